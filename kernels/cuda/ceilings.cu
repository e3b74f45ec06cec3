// Measures the ceilings of kernels/ceilings.h: reads of much more memory than the L2 holds, and a
// large bf16 product by cuBLASLt on random values (zeros draw less power and run faster).
//
// Each is the best of many short measurements with events, after a warm-up.

#include <cublasLt.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cublas_library.h"
#include "kernels/cuda/kernels.h"

namespace resa::kernels::cuda {
namespace {

// Of steps at batch 1 and 8K to 64K tokens: sparse less dense, and what dense attention of those
// tokens took more, by the layer (resa_bench --device).
constexpr double kMinMaxSeconds = 5e-6;
constexpr double kSketchSeconds = 22e-6;

constexpr int64_t kSide = 8192;                             // Of the square matrices.
constexpr size_t kMatrixBytes = size_t{kSide} * kSide * 2;  // bf16
constexpr size_t kReadBytes = 3 * kMatrixBytes;             // 384 MiB, eight times the L2.
constexpr int kPasses = 4;                                  // Over them per read.
constexpr int kReads = 100;                                 // About 350 us each.
constexpr int kProducts = 100;                              // About 1.4 ms each.
constexpr int kThreads = 256;
constexpr int kUnroll = 8;

// Random bf16 in (-2, 2), two in a word: any mantissa and sign, exponents from 2^-3 up.
__global__ void FillKernel(uint32_t* to, size_t words) {
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < words;
       i += size_t{gridDim.x} * kThreads) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    // Exponent bits 0x3e00 .. 0x3f80: 2^-3 .. 2^0.
    to[i] = (static_cast<uint32_t>(x) & 0x81ff81ffu) + 0x3e003e00u;
  }
}

// Every CTA reads runs of kThreads * kUnroll vectors, with all of a thread's loads in flight.
__global__ void __launch_bounds__(kThreads)
    ReadKernel(const uint4* from, size_t vectors, uint32_t* sink) {
  uint32_t sum = 0;
  constexpr size_t kRun = size_t{kThreads} * kUnroll;
  const size_t runs = vectors / kRun;
  for (size_t i = blockIdx.x; i < kPasses * runs; i += gridDim.x) {
    const uint4* const run = from + i % runs * kRun + threadIdx.x;
    uint4 value[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) value[j] = __ldcs(run + j * kThreads);
#pragma unroll
    for (const uint4& v : value) sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x5eed) *sink = sum;  // So that the loads are not left out.
}

class Event {
 public:
  Event() { RESA_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// The shortest of `count` runs of body(), in seconds, after a tenth as many to warm up.
template <class Body>
double BestSeconds(cudaStream_t stream, int count, const Body& body) {
  Event begin, end;
  float best_ms = 0;
  for (int i = -count / 10; i < count; ++i) {
    RESA_CUDA_CHECK(cudaEventRecord(begin.get(), stream));
    body();
    RESA_CUDA_CHECK(cudaGetLastError());
    RESA_CUDA_CHECK(cudaEventRecord(end.get(), stream));
    RESA_CUDA_CHECK(cudaEventSynchronize(end.get()));
    if (i < 0) continue;
    float ms = 0;
    RESA_CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    best_ms = i == 0 ? ms : std::min(best_ms, ms);
  }
  return best_ms * 1e-3;
}

double ReadBytesPerSecond(Context& context, const std::byte* memory, uint32_t* sink) {
  const size_t vectors = kReadBytes / sizeof(uint4);
  static_assert(kReadBytes % (sizeof(uint4) * kThreads * kUnroll) == 0);
  const double seconds = BestSeconds(context.stream, kReads, [&] {
    ReadKernel<<<static_cast<unsigned>(context.device.sms * 8), kThreads, 0, context.stream>>>(
        reinterpret_cast<const uint4*>(memory), vectors, sink);
  });
  return kPasses * static_cast<double>(kReadBytes) / seconds;
}

// c = a^T b, all kSide x kSide, column-major: the layout cuBLAS likes best.
double ProductFlopsPerSecond(Context& context, std::byte* memory) {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t layout = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  RESA_CUBLAS_CHECK(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  RESA_CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA,
                                                   &transposed, sizeof(transposed)));
  RESA_CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, kSide, kSide, kSide));
  RESA_CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
  const size_t workspace_bytes = size_t{32} << 20;
  RESA_CUBLAS_CHECK(
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &workspace_bytes, sizeof(workspace_bytes)));
  cublasLtMatmulHeuristicResult_t choice = {};
  int choices = 0;
  RESA_CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(context.cublas, product, layout, layout, layout,
                                                   layout, preference, 1, &choice, &choices));
  RESA_CHECK(choices > 0) << "cuBLASLt has no bf16 product";
  std::byte* const workspace = context.cublas_workspace.Reserve(workspace_bytes);
  const float one = 1.0f;
  const float zero = 0.0f;
  const double seconds = BestSeconds(context.stream, kProducts, [&] {
    RESA_CUBLAS_CHECK(
        cublasLtMatmul(context.cublas, product, &one, memory, layout, memory + kMatrixBytes, layout,
                       &zero, memory + 2 * kMatrixBytes, layout, memory + 2 * kMatrixBytes, layout,
                       &choice.algo, workspace, workspace_bytes, context.stream));
  });
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(product);
  return 2.0 * kSide * kSide * kSide / seconds;
}

}  // namespace

Ceilings MeasureCeilings(Context& context) {
  std::byte* memory = nullptr;
  RESA_CHECK(cudaMalloc(reinterpret_cast<void**>(&memory), kReadBytes + sizeof(uint32_t)) ==
             cudaSuccess)
      << "no memory to measure the ceilings: " << kReadBytes << " bytes";
  FillKernel<<<static_cast<unsigned>(context.device.sms * 8), kThreads, 0, context.stream>>>(
      reinterpret_cast<uint32_t*>(memory), kReadBytes / sizeof(uint32_t));
  RESA_CUDA_CHECK(cudaGetLastError());
  Ceilings ceilings;
  ceilings.read_bytes_per_s =
      ReadBytesPerSecond(context, memory, reinterpret_cast<uint32_t*>(memory + kReadBytes));
  ceilings.flops_per_s = ProductFlopsPerSecond(context, memory);
  ceilings.minmax_seconds = kMinMaxSeconds;
  ceilings.sketch_seconds = kSketchSeconds;
  RESA_CUDA_CHECK(cudaFree(memory));
  return ceilings;
}

}  // namespace resa::kernels::cuda
