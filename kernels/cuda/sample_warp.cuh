#ifndef RESA_KERNELS_CUDA_SAMPLE_WARP_CUH_
#define RESA_KERNELS_CUDA_SAMPLE_WARP_CUH_

// The arithmetic of sampling within a warp: keys in the order of floats, sums whose order never
// changes, the merge of partial maxima, and the pick of a part by its running weight.

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda::sampling {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kNone = 0xffffffff;

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int Warp() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ double WarpSum(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Unsigned keys in the order of floats; -0 counts as +0. No NaN.
__device__ __forceinline__ uint32_t OrderedKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FromOrderedKey(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

// exp(x) for x <= 0, good to 2e-7 (1 + |x|): one product and one instruction.
__device__ __forceinline__ float QuickExp(float x) { return Exp2(x * 1.44269504f); }

// Sums of eight values per lane over the warp: afterwards lane l has the sum of value l / 4.
template <class T>
__device__ __forceinline__ T WarpSumOfEight(T (&v)[8]) {
#pragma unroll
  for (int width = 4; width >= 1; width /= 2) {
    const int offset = 4 * width;
    const bool upper = (Lane() & offset) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const T other = __shfl_xor_sync(~0u, upper ? v[i] : v[i + width], offset);
      v[i] = (upper ? v[i + width] : v[i]) + other;
    }
  }
  v[0] += __shfl_xor_sync(~0u, v[0], 2);
  return v[0] + __shfl_xor_sync(~0u, v[0], 1);
}

// The sum of n values, pairs first: a short chain of additions.
template <int n, class T, class Value>
__device__ __forceinline__ T PairSum(const Value& value) {
  constexpr int kPower = n <= 8 ? 8 : kWarp / 2;
  static_assert(n <= kPower);
  T v[kPower];
#pragma unroll
  for (int i = 0; i < kPower; ++i) v[i] = i < n ? value(i) : T{0};
#pragma unroll
  for (int width = kPower / 2; width >= 1; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

// The highest logit of some tokens, and the sum of exp(logit - top).
struct Partial {
  double sum;
  float top;
  int32_t id;    // The lowest that has it.
  uint32_t bad;  // Non-zero when one is NaN or +infinity.
};
// The lanes' parts as one, in every lane; its sum only `with_sum`.
__device__ __forceinline__ Partial MergeLanes(const Partial& part, bool with_sum) {
  const uint32_t key = OrderedKey(part.top);
  const uint32_t best = __reduce_max_sync(~0u, key);
  Partial all;
  all.top = FromOrderedKey(best);
  all.id = static_cast<int32_t>(
      __reduce_min_sync(~0u, key == best ? static_cast<uint32_t>(part.id) : kNone));
  all.bad = static_cast<uint32_t>(__any_sync(~0u, part.bad != 0));
  all.sum = 0;
  if (with_sum) {
    const bool some = part.sum > 0;
    all.sum = WarpSum(some ? part.sum * static_cast<double>(expf(part.top - all.top)) : 0.0);
  }
  return all;
}

// The first lane at which the running weight passes *target, or, when rounding leaves none, the
// last that has any. *target becomes what it is within that lane's part.
__device__ __forceinline__ int PickLane(double weight, double* target) {
  double sum = weight;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double other = __shfl_up_sync(~0u, sum, offset);
    if (Lane() >= offset) sum += other;
  }
  const uint32_t some = __ballot_sync(~0u, weight > 0);
  const uint32_t passes = __ballot_sync(~0u, weight > 0 && sum > *target);
  const int chosen = passes != 0 ? __ffs(static_cast<int>(passes)) - 1
                     : some != 0 ? kWarp - 1 - __clz(static_cast<int>(some))
                                 : 0;
  const double before = __shfl_sync(~0u, sum, max(chosen - 1, 0));
  if (chosen > 0) *target -= before;
  return chosen;
}

}  // namespace resa::kernels::cuda::sampling

#endif  // RESA_KERNELS_CUDA_SAMPLE_WARP_CUH_
