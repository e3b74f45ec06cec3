// Linear: out [T, out] (+)= x [T, in] weight^T [in, out] + bias, in three ways:
//   - linear_stream.cu, a few rows: bound by reading the weights;
//   - linear_tile.cu, some tens of rows: the same, by wgmma;
//   - linear_cublas.cc, many rows: bound by the tensor cores;
//   - LinearAnyKernel below: any shape and alignment, at no speed to speak of. Real models have
//     widths that are multiples of 16 and never come here.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <span>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/linear.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ float Load(const void* data, int64_t i, bool f32) {
  return f32 ? static_cast<const float*>(data)[i]
             : __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ void Store(void* data, int64_t i, bool f32, float value) {
  if (f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  }
}

// ---- any shape ----------------------------------------------------------------------------------

struct AnyArgs {
  const __nv_bfloat16* x;
  const __nv_bfloat16* weight;
  const float* bias;
  void* out;
  int64_t rows, in, cols;
  bool f32_out, accumulate;
};

constexpr int kAnyRows = 8;  // Of x, per warp.

// A warp computes one column of kAnyRows rows. Each row has its own sums, in an order that depends
// on `in` alone.
__global__ void LinearAnyKernel(AnyArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t col = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t first_row = int64_t{blockIdx.y} * kAnyRows;
  const int rows = static_cast<int>(min(int64_t{kAnyRows}, a.rows - first_row));
  if (col >= a.cols) return;
  float sums[kAnyRows] = {};
  for (int64_t k = lane; k < a.in; k += 32) {
    const float w = __bfloat162float(a.weight[col * a.in + k]);
#pragma unroll
    for (int r = 0; r < kAnyRows; ++r) {
      if (r < rows) sums[r] += w * __bfloat162float(a.x[(first_row + r) * a.in + k]);
    }
  }
#pragma unroll
  for (int r = 0; r < kAnyRows; ++r) {
    for (int step = 16; step > 0; step /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], step);
    if (lane != 0 || r >= rows) continue;
    float sum = sums[r];
    if (a.bias != nullptr) sum += a.bias[col];
    const int64_t i = (first_row + r) * a.cols + col;
    if (a.accumulate) sum += Load(a.out, i, a.f32_out);
    Store(a.out, i, a.f32_out, sum);
  }
}

void LinearAny(Context& context, const LinearParams& p) {
  const AnyArgs args = {static_cast<const __nv_bfloat16*>(p.x.data),
                        static_cast<const __nv_bfloat16*>(p.weight.data),
                        p.bias,
                        p.out.data,
                        p.x.rows,
                        p.x.cols,
                        p.out.cols,
                        p.out.dtype == DType::kF32,
                        p.accumulate};
  const dim3 grid(static_cast<unsigned>((args.cols + kWarps - 1) / kWarps),
                  static_cast<unsigned>((args.rows + kAnyRows - 1) / kAnyRows));
  LinearAnyKernel<<<grid, kThreads, 0, context.stream>>>(args);
  RESA_CUDA_CHECK(cudaGetLastError());
}

// ---- bias ---------------------------------------------------------------------------------------

__global__ void AddBiasKernel(void* out, const float* bias, int64_t cols, bool f32) {
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (col >= cols) return;
  const int64_t i = int64_t{blockIdx.y} * cols + col;
  Store(out, i, f32, Load(out, i, f32) + bias[col]);
}

}  // namespace

void AddBias(Context& context, const float* bias, const Matrix& out) {
  constexpr int64_t kMaxRows = 65535;  // Of a grid.
  for (int64_t row = 0; row < out.rows; row += kMaxRows) {
    const dim3 grid(static_cast<unsigned>((out.cols + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min(kMaxRows, out.rows - row)));
    AddBiasKernel<<<grid, kThreads, 0, context.stream>>>(
        static_cast<std::byte*>(out.data) + row * out.cols * BytesOf(out.dtype), bias, out.cols,
        out.dtype == DType::kF32);
    RESA_CUDA_CHECK(cudaGetLastError());
  }
}

namespace {

// `rows` rows from `begin` on.
LinearParams RowsOf(const LinearParams& p, int64_t begin, int64_t rows) {
  const auto part = [&](const Matrix& m) {
    auto* const data =
        static_cast<std::byte*>(m.data) + begin * m.cols * static_cast<int64_t>(BytesOf(m.dtype));
    return Matrix{data, m.dtype, rows, m.cols};
  };
  LinearParams to = p;
  to.x = part(p.x);
  to.out = part(p.out);
  return to;
}

// All columns over the number of multiprocessors.
int64_t ShareOf(const Context& context, std::span<const LinearParams> products) {
  int64_t columns = 0;
  for (const LinearParams& p : products) columns += p.weight.rows;
  return columns / context.device.sms;
}

// From how many columns to a multiprocessor linear_tile.cu is faster for a few rows, too: those of
// logits, where a norm is nothing beside the product.
constexpr int64_t kMostStreamShare = 512;

// Up to how many rows linear_tile.cu is faster than cuBLASLt, as measured. Three products in one
// launch keep all multiprocessors busy where one by one they do not. With few columns x is read by
// too many; with very many, cuBLASLt's larger tiles win.
int64_t MostTileRows(int64_t share, int64_t in, size_t count) {
  if (count == 3) return kMaxTileRows;
  if (share < 32) return in > 256 * share ? 64 : 32;
  return share < 512 ? 64 : 32;
}

// By one kernel and one way to cut a sum, whatever the number of rows: a row's bits are its own.
void MultiplyDeterministic(Context& context, std::span<const LinearParams> products) {
  const int count = static_cast<int>(products.size());
  if (!TileSupports(products.data(), count)) {
    for (const LinearParams& p : products) LinearAny(context, p);
    return;
  }
  const int64_t rows = products[0].x.rows;
  for (int64_t begin = 0; begin < rows; begin += kMaxTileRows) {
    LinearParams parts[kMaxProducts];
    for (int i = 0; i < count; ++i) {
      parts[i] = RowsOf(products[i], begin, std::min<int64_t>(kMaxTileRows, rows - begin));
    }
    LinearTile(context, parts, count);
  }
}

void Multiply(Context& context, std::span<const LinearParams> products) {
  const int64_t rows = products[0].x.rows;
  const int64_t share = ShareOf(context, products);
  const int count = static_cast<int>(products.size());
  if (rows <= MostTileRows(share, products[0].x.cols, products.size()) &&
      TileSupports(products.data(), count)) {
    return LinearTile(context, products.data(), count);
  }
  for (const LinearParams& p : products) {
    if (!LinearCublas(context, p)) LinearAny(context, p);
  }
}

}  // namespace

bool Linears(Context& context, const LinearsParams& params) {
  const int64_t rows = params.products[0].x.rows;
  if (rows == 0) return false;
  const bool stream = !context.deterministic && rows <= kMaxStreamRows &&
                      ShareOf(context, params.products) < kMostStreamShare;
  if (stream && LinearStream(context, params)) return true;
  if (params.norm.weight != nullptr) RmsNorm(context, params.norm);
  if (context.deterministic) {
    MultiplyDeterministic(context, params.products);
  } else {
    Multiply(context, params.products);
  }
  if (params.gated) {
    const Matrix& gate = params.products[0].out;
    SiluMul(context, {.gate = gate, .up = params.products[1].out, .out = gate});
  }
  return false;
}

}  // namespace resa::kernels::cuda
