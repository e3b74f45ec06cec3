// Embedding, RMS norm, SiLU times up, the rotary table, gathering of rows: one pass over memory.
//
//   Embed, GatherRows   out[i] = from[index[i]]
//   RmsNorm             out = x / sqrt(mean(x^2) + eps) * weight
//   SiluMul             out = gate / (1 + exp(-gate)) * up
//   RopeTable           out[t][j] = factor * cos(position[t] * inv_freq[j]), and sin
//
// Activations are bf16, read and written 16 bytes at a time where the row length allows it (a
// multiple of 8) and one by one elsewhere. A CTA takes a row, or a part of one. In a decode step
// rows are few and what counts is the latency of one pass: 0.8 to 1.9 us per launch in a graph at 1
// to 32 rows of Qwen2.5-7B. In a prefill chunk of 8192 rows it is the bandwidth: SiluMul moves 4.39
// TB/s (95 % of the reads' ceiling), RmsNorm and Embed 2.9 TB/s (63 %).

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/silu.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kVector = 8;  // bf16 values in 16 bytes.

struct alignas(16) Bf16x8 {
  __nv_bfloat162 pair[4];
};

__device__ __forceinline__ void Widen(const Bf16x8& from, float (&to)[kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = __bfloat1622float2(from.pair[i]);
    to[2 * i] = both.x;
    to[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ Bf16x8 Narrow(const float (&from)[kVector]) {
  Bf16x8 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) to.pair[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  return to;
}

bool Aligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
unsigned CeilDiv(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

// ---- rows by index -----------------------------------------------------------------------------

// blockIdx.x is a row of `to`, blockIdx.y a run of blockDim.x units of it.
template <class Unit>
__global__ void CopyRowsKernel(const Unit* from, const int32_t* index, int64_t units, Unit* to) {
  LetNextStart();
  WaitForPrevious();
  const int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  to[int64_t{blockIdx.x} * units + unit] = from[index[blockIdx.x] * units + unit];
}

template <class Unit>
void CopyRowsOf(Context& context, const void* from, const int32_t* index, int64_t row_bytes,
                int64_t rows, void* to) {
  constexpr int kThreads = 128;
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  LaunchOverlapped(context.stream, CopyRowsKernel<Unit>,
                   dim3(static_cast<unsigned>(rows), CeilDiv(units, kThreads)), kThreads, 0, 1,
                   static_cast<const Unit*>(from), index, units, static_cast<Unit*>(to));
}

void CopyRows(Context& context, const void* from, const int32_t* index, int64_t row_bytes,
              int64_t rows, void* to) {
  if (rows == 0 || row_bytes == 0) return;
  if (row_bytes % 16 == 0 && Aligned16(from) && Aligned16(to)) {
    CopyRowsOf<uint4>(context, from, index, row_bytes, rows, to);
  } else {
    CopyRowsOf<uint16_t>(context, from, index, row_bytes, rows, to);
  }
}

// ---- RMS norm ----------------------------------------------------------------------------------

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over the CTA, the same bits in every thread: warps first, then their sums in order.
__device__ __forceinline__ float BlockSum(float x, float* of_warp) {
  x = WarpSum(x);
  const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return WarpSum(lane < warps ? of_warp[lane] : 0.0f);
}

// A CTA per row; a thread holds kVectors vectors of it. blockDim.x depends on D alone, and so do
// the order of the sum and the bits of the row.
template <int kVectors>
__global__ void RmsNormKernel(const Bf16x8* x, const float4* weight, int vectors, float eps,
                              Bf16x8* out) {
  __shared__ float of_warp[kWarp];
  LetNextStart();
  // The weight is nobody's output, so it may come before the wait.
  float4 scale[kVectors][2];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v >= vectors) continue;
    scale[i][0] = __ldg(weight + 2 * v);
    scale[i][1] = __ldg(weight + 2 * v + 1);
  }
  WaitForPrevious();
  const Bf16x8* const row = x + int64_t{blockIdx.x} * vectors;
  float value[kVectors][kVector];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v >= vectors) continue;
    Widen(row[v], value[i]);
#pragma unroll
    for (float a : value[i]) squares = fmaf(a, a, squares);
  }
  const float mean = BlockSum(squares, of_warp) / static_cast<float>(vectors * kVector);
  const float inverse = 1.0f / sqrtf(mean + eps);
  Bf16x8* const to = out + int64_t{blockIdx.x} * vectors;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v >= vectors) continue;
    const float by[kVector] = {scale[i][0].x, scale[i][0].y, scale[i][0].z, scale[i][0].w,
                               scale[i][1].x, scale[i][1].y, scale[i][1].z, scale[i][1].w};
#pragma unroll
    for (int j = 0; j < kVector; ++j) value[i][j] = value[i][j] * inverse * by[j];
    to[v] = Narrow(value[i]);
  }
}

// Rows of any length, and of more than the kernel above holds in registers.
__global__ void RmsNormAnyKernel(const __nv_bfloat16* x, const float* weight, int64_t cols,
                                 float eps, __nv_bfloat16* out) {
  __shared__ float of_warp[kWarp];
  LetNextStart();
  WaitForPrevious();
  const __nv_bfloat16* const row = x + blockIdx.x * cols;
  float squares = 0;
  for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    const float a = __bfloat162float(row[j]);
    squares = fmaf(a, a, squares);
  }
  const float mean = BlockSum(squares, of_warp) / static_cast<float>(cols);
  const float inverse = 1.0f / sqrtf(mean + eps);
  for (int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    out[blockIdx.x * cols + j] =
        __float2bfloat16_rn(__bfloat162float(row[j]) * inverse * weight[j]);
  }
}

// ---- SiLU --------------------------------------------------------------------------------------

constexpr int kSiluThreads = 128;

__global__ void SiluMulKernel(const Bf16x8* gate, const Bf16x8* up, int64_t vectors, Bf16x8* out) {
  LetNextStart();
  WaitForPrevious();
  const int64_t v = int64_t{blockIdx.x} * kSiluThreads + threadIdx.x;
  if (v >= vectors) return;
  float g[kVector], u[kVector];
  Widen(gate[v], g);
  Widen(up[v], u);
#pragma unroll
  for (int j = 0; j < kVector; ++j) g[j] = SiluTimes(g[j], u[j]);
  out[v] = Narrow(g);
}

__global__ void SiluMulAnyKernel(const __nv_bfloat16* gate, const __nv_bfloat16* up, int64_t count,
                                 __nv_bfloat16* out) {
  LetNextStart();
  WaitForPrevious();
  const int64_t i = int64_t{blockIdx.x} * kSiluThreads + threadIdx.x;
  if (i >= count) return;
  out[i] = __float2bfloat16_rn(SiluTimes(__bfloat162float(gate[i]), __bfloat162float(up[i])));
}

// ---- rotary table ------------------------------------------------------------------------------

// sin and cos of |x| < 2^24 within 1e-9: the quarter turns are removed in double precision, then
// Taylor polynomials on [-pi/4, pi/4].
__device__ __forceinline__ void SinCos(double x, double* sin_out, double* cos_out) {
  const double turns = rint(x * 0.63661977236758134308);
  double r = fma(-turns, 1.57079632679489655800, x);
  r = fma(-turns, 6.12323399573676603587e-17, r);
  const double r2 = r * r;
  double s = 2.7557319223985893e-06;
  s = fma(s, r2, -1.9841269841269841e-04);
  s = fma(s, r2, 8.3333333333333333e-03);
  s = fma(s, r2, -1.6666666666666666e-01);
  s = fma(s * r2, r, r);
  double c = -2.7557319223985888e-07;
  c = fma(c, r2, 2.4801587301587302e-05);
  c = fma(c, r2, -1.3888888888888889e-03);
  c = fma(c, r2, 4.1666666666666664e-02);
  c = fma(c, r2, -0.5);
  c = fma(c, r2, 1.0);
  const int quarter = static_cast<int>(turns) & 3;
  const double sin_abs = (quarter & 1) != 0 ? c : s;
  const double cos_abs = (quarter & 1) != 0 ? s : c;
  *sin_out = (quarter & 2) != 0 ? -sin_abs : sin_abs;
  *cos_out = quarter == 1 || quarter == 2 ? -cos_abs : cos_abs;
}

constexpr int kRopeThreads = 128;

// A thread per (row, j).
__global__ void RopeTableKernel(const int32_t* positions, int64_t count, const float* inv_freq,
                                int half, float factor, float* cos, float* sin) {
  LetNextStart();
  WaitForPrevious();
  const int64_t i = int64_t{blockIdx.x} * kRopeThreads + threadIdx.x;
  if (i >= count) return;
  // The angle is rounded to f32, as in the reference implementations the models come from.
  const float angle = static_cast<float>(positions[i / half]) * inv_freq[i % half];
  double s, c;
  SinCos(double{angle}, &s, &c);
  cos[i] = static_cast<float>(c) * factor;
  sin[i] = static_cast<float>(s) * factor;
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------------

void Embed(Context& context, const EmbedParams& params) {
  CopyRows(context, params.table.data, params.ids, params.table.cols * 2, params.out.rows,
           params.out.data);
}

void GatherRows(Context& context, const GatherRowsParams& params) {
  CopyRows(context, params.x.data, params.rows,
           params.x.cols * static_cast<int64_t>(BytesOf(params.x.dtype)), params.out.rows,
           params.out.data);
}

void RmsNorm(Context& context, const RmsNormParams& params) {
  const int64_t rows = params.x.rows;
  const int64_t cols = params.x.cols;
  if (rows == 0 || cols == 0) return;
  constexpr int kMaxThreads = 512;
  constexpr int kMaxVectors = 4;  // Per thread.
  const auto grid = static_cast<unsigned>(rows);
  if (cols % kVector != 0 || cols > kVector * kMaxVectors * kMaxThreads ||
      !Aligned16(params.x.data) || !Aligned16(params.out.data) || !Aligned16(params.weight)) {
    LaunchOverlapped(context.stream, RmsNormAnyKernel, grid, 256, 0, 1,
                     reinterpret_cast<const __nv_bfloat16*>(params.x.b16()), params.weight, cols,
                     params.eps, reinterpret_cast<__nv_bfloat16*>(params.out.b16()));
    return;
  }
  const int vectors = static_cast<int>(cols / kVector);
  const auto launch = [&](auto kernel, int per_thread) {
    const unsigned threads = CeilDiv(CeilDiv(vectors, per_thread), kWarp) * kWarp;
    LaunchOverlapped(context.stream, kernel, grid, threads, 0, 1,
                     static_cast<const Bf16x8*>(params.x.data),
                     reinterpret_cast<const float4*>(params.weight), vectors, params.eps,
                     static_cast<Bf16x8*>(params.out.data));
  };
  if (vectors <= kMaxThreads) {
    launch(RmsNormKernel<1>, 1);
  } else if (vectors <= 2 * kMaxThreads) {
    launch(RmsNormKernel<2>, 2);
  } else {
    launch(RmsNormKernel<4>, 4);
  }
}

void SiluMul(Context& context, const SiluMulParams& params) {
  const int64_t count = params.out.rows * params.out.cols;
  if (count == 0) return;
  if (count % kVector != 0 || !Aligned16(params.gate.data) || !Aligned16(params.up.data) ||
      !Aligned16(params.out.data)) {
    LaunchOverlapped(context.stream, SiluMulAnyKernel, CeilDiv(count, kSiluThreads), kSiluThreads,
                     0, 1, reinterpret_cast<const __nv_bfloat16*>(params.gate.b16()),
                     reinterpret_cast<const __nv_bfloat16*>(params.up.b16()), count,
                     reinterpret_cast<__nv_bfloat16*>(params.out.b16()));
    return;
  }
  const int64_t vectors = count / kVector;
  LaunchOverlapped(context.stream, SiluMulKernel, CeilDiv(vectors, kSiluThreads), kSiluThreads, 0,
                   1, static_cast<const Bf16x8*>(params.gate.data),
                   static_cast<const Bf16x8*>(params.up.data), vectors,
                   static_cast<Bf16x8*>(params.out.data));
}

void RopeTable(Context& context, const RopeTableParams& params) {
  const int half = params.head_dim / 2;
  const int64_t count = params.rows * half;
  if (count == 0) return;
  LaunchOverlapped(context.stream, RopeTableKernel, CeilDiv(count, kRopeThreads), kRopeThreads, 0,
                   1, params.positions, count, params.inv_freq, half, params.factor, params.cos,
                   params.sin);
}

}  // namespace resa::kernels::cuda
