// Linear by cuBLASLt, for the rows of a prompt.
//
// cuBLASLt is column-major: out^T [out, T] = weight [out, in] x^T [in, T], with weight stored as
// its transpose. The heuristic is asked once per (in, out, bucket of T, type, beta) and its answer
// kept: a call then costs the host about two microseconds, and can be recorded.
//
// Biases are f32 and cuBLASLt adds only bf16 ones to a bf16 result, so they take a kernel of their
// own. It reads and writes T x out, a few percent of what the product takes.

#include <cublasLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "kernels/cuda/cublas_library.h"
#include "kernels/cuda/linear.h"

namespace resa::kernels::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr uint32_t kAlignment = 16;

struct ProductKey {
  int64_t in, out, rows;  // rows: the bucket's.
  bool f32_out, accumulate;
  auto operator<=>(const ProductKey&) const = default;
};

// The four matrices of a product. On the stack: making them allocates nothing.
struct Layouts {
  cublasLtMatrixLayoutOpaque_t weight, x, out;

  Layouts(int64_t in, int64_t cols, int64_t rows, cudaDataType_t out_type) {
    const auto k = static_cast<uint64_t>(in), m = static_cast<uint64_t>(cols),
               n = static_cast<uint64_t>(rows);
    RESA_CUBLAS_CHECK(cublasLtMatrixLayoutInit(&weight, CUDA_R_16BF, k, m, in));
    RESA_CUBLAS_CHECK(cublasLtMatrixLayoutInit(&x, CUDA_R_16BF, k, n, in));
    RESA_CUBLAS_CHECK(cublasLtMatrixLayoutInit(&out, out_type, m, n, cols));
  }
};

cublasLtMatmulDescOpaque_t Product() {
  cublasLtMatmulDescOpaque_t product;
  RESA_CUBLAS_CHECK(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  RESA_CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA,
                                                   &transposed, sizeof(transposed)));
  return product;
}

// Rows rounded up so that few heuristics are asked for, and that an algorithm chosen for a bucket
// has the workspace that any number of rows in it needs.
int64_t BucketOf(int64_t rows) {
  int64_t step = 16;
  while (step * 8 < rows) step *= 2;
  return (rows + step - 1) / step * step;
}

}  // namespace

// The algorithms chosen so far. `found` is false where cuBLASLt has none.
struct CublasPlans {
  struct Plan {
    bool found = false;
    cublasLtMatmulAlgo_t algo;
  };
  std::map<ProductKey, Plan> plans;
};

namespace {

const CublasPlans::Plan& FindPlan(Context& context, const ProductKey& key) {
  if (context.cublas_plans == nullptr) context.cublas_plans = std::make_shared<CublasPlans>();
  const auto [found, added] = context.cublas_plans->plans.try_emplace(key);
  CublasPlans::Plan& plan = found->second;
  if (!added) return plan;

  cublasLtMatmulDescOpaque_t product = Product();
  Layouts layouts(key.in, key.out, key.rows, key.f32_out ? CUDA_R_32F : CUDA_R_16BF);
  cublasLtMatmulPreferenceOpaque_t preference;
  RESA_CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    RESA_CUBLAS_CHECK(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kAlignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kAlignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, kAlignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kAlignment);
  cublasLtMatmulHeuristicResult_t result;
  int results = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(context.cublas, &product, &layouts.weight, &layouts.x,
                                     &layouts.out, &layouts.out, &preference, 1, &result, &results);
  plan.found = status == CUBLAS_STATUS_SUCCESS && results > 0;
  if (plan.found) plan.algo = result.algo;
  return plan;
}

bool Aligned(const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data) % kAlignment == 0; }

// False when cuBLASLt does not have it.
bool Multiply(Context& context, const LinearParams& p, int64_t planned_rows) {
  const bool f32_out = p.out.dtype == DType::kF32;
  const CublasPlans::Plan& plan =
      FindPlan(context, {p.weight.cols, p.weight.rows, planned_rows, f32_out, p.accumulate});
  if (!plan.found) return false;
  cublasLtMatmulDescOpaque_t product = Product();
  Layouts layouts(p.weight.cols, p.weight.rows, p.x.rows, f32_out ? CUDA_R_32F : CUDA_R_16BF);
  const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
  const cublasStatus_t status = cublasLtMatmul(
      context.cublas, &product, &alpha, p.weight.data, &layouts.weight, p.x.data, &layouts.x, &beta,
      p.out.data, &layouts.out, p.out.data, &layouts.out, &plan.algo,
      context.cublas_workspace.Reserve(kWorkspaceBytes), kWorkspaceBytes, context.stream);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return false;
  RESA_CUBLAS_CHECK(status);
  return true;
}

}  // namespace

bool LinearCublas(Context& context, const LinearParams& p) {
  if (p.weight.cols % 8 != 0 || p.weight.rows % 8 != 0) return false;
  if (!Aligned(p.x) || !Aligned(p.weight) || !Aligned(p.out)) return false;
  // An algorithm chosen for a bucket may refuse some number of rows in it.
  if (!Multiply(context, p, BucketOf(p.x.rows)) && !Multiply(context, p, p.x.rows)) return false;
  if (p.bias != nullptr) AddBias(context, p.bias, p.out);
  return true;
}

}  // namespace resa::kernels::cuda
