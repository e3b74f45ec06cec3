#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_

// Estimates of 32 tokens at a time from their few-bit codes, and the attention mass of those
// estimates (kernels/sketch.h): a warp's arithmetic. What is scored when is in select_sketch.cu.
//
// A step is eight quarters of a page, four tokens each: a lane (r, c), r = lane / 4 and c = lane %
// 4, reads 16 bytes of a plane, the same 32 components of the four tokens of quarter r. Those are
// rows r and r + 8 of two products m16n8k32 of u8 codes and s8 queries, with the group's heads as
// columns. The order of the components within a product is free as long as both operands have the
// same: lane c brings the components of its own word (of half its word when d = 64), bits to bytes
// by shifts and masks. A byte of a word holds the codes of eight components i; those of i < 4 enter
// as they are and the others times 16, which saves shifts: the two kinds have accumulators of their
// own. The sums of a token's heads come out in the lanes of the same quarter, so that summing over
// a block's tokens needs one exchange between lanes, for both of a lane's heads.
//
// The sums start from 1.5 * 2^23, the bits of which make them floats without a conversion.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/params.h"
#include "kernels/sketch.h"

namespace resa::kernels::cuda {

inline constexpr int kStepTokens = 32;
inline constexpr int kQuarterTokens = 4;
inline constexpr uint32_t kSumOrigin = 0x4b400000u;  // The bits of 1.5 * 2^23.
inline constexpr float kSumOriginValue = 12582912.0f;

// ---- queries ----------------------------------------------------------------------------------

// Queries and scales past the first count as not finite, queries below the second as zero, as in
// the CPU backend.
inline constexpr float kSketchLargestFactor = 1e9f;
inline constexpr float kSketchLeastFactor = 1e-14f;
inline constexpr uint16_t kLargestScaleBits = 0x4e6f;  // The least bf16 that is not below 1e9.

// The group's queries, rotated and rounded to s8. Heads past the group are zero.
struct SketchQueries {
  alignas(16) int8_t rounded[kMaxGroup][kMaxHeadDim];
  int32_t sum[kMaxGroup];    // Of a head's rounded components.
  float octaves[kMaxGroup];  // What a dot product times a token's scale is multiplied by.
};

// One head: a warp's work. kernels/sketch.h has the formulas, and the CPU backend the same order of
// operations; a query that is not finite counts as zero.
template <int kDim>
__device__ __forceinline__ void PrepareSketchQuery(const uint16_t* q, int head,
                                                   SketchQueries* queries) {
  constexpr int kEach = kDim / 32;  // Components lane * kEach ...
  constexpr float kInverseRoot = kDim == 64 ? 0.125f : 0.088388347648318440550f;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = lane * kEach + i;
    constexpr uint64_t kLow = kSketchSignBits[0], kHigh = kSketchSignBits[1];
    const bool flip = (((j < 64 ? kLow : kHigh) >> (j % 64)) & 1) != 0;
    const float value = __uint_as_float(static_cast<uint32_t>(q[j]) << 16);
    x[i] = value * (flip ? -kInverseRoot : kInverseRoot);
  }
#pragma unroll
  for (int stride = 1; stride < kEach; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], bit);
      x[i] = (lane & bit) != 0 ? other - x[i] : x[i] + other;
    }
  }
  // Sums of the magnitudes of eight neighbours.
  float run = 0;
#pragma unroll
  for (int i = 0; i < kEach; i += 2) {
    const float pair = fabsf(x[i]) + fabsf(x[i + 1]);
    run = i == 0 ? pair : run + pair;
  }
#pragma unroll
  for (int bit = 1; bit < 8 / kEach; bit *= 2) run += __shfl_xor_sync(~0u, run, bit);
  float top = run, total = run;
#pragma unroll
  for (int bit = 8 / kEach; bit < 32; bit *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
    total += __shfl_xor_sync(~0u, total, bit);
  }
  // The maximum may pass over a NaN, the sum does not.
  const float scale = top / kSketchQueryRange;
  const bool counts = total < kSketchLargestFactor && scale > kSketchLeastFactor;
  const float inverse = counts ? 1.0f / scale : 0.0f;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int value = counts ? __float2int_rn(x[i] * inverse) : 0;
    queries->rounded[head][lane * kEach + i] = static_cast<int8_t>(value);
    sum += value;
  }
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) {
    constexpr float kOctavesPerUnit = 1.44269504088896341f;
    const float root = kDim == 64 ? 8.0f : 11.3137084989847604f;
    queries->sum[head] = sum;
    queries->octaves[head] = (counts ? scale : 1.0f) * kOctavesPerUnit / root;
  }
}

// A lane's part of the queries: the second operand of its products. kTiles tiles of eight heads.
template <int kDim, int kTiles>
struct SketchOperand {
  static constexpr int kBits = kDim / 32;  // Components of a byte's lower half that a lane brings.
  uint32_t low[kTiles][kBits];
  uint32_t high[kTiles][kBits];

  __device__ __forceinline__ void Load(const SketchQueries& queries) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int word = lane % (kDim / 32);
    const int shift = kDim == 64 ? lane % 4 / 2 * 2 : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int8_t* const q = queries.rounded[tile * 8 + lane / 4] + word * 32 + shift;
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        uint32_t quads[2] = {};
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          quads[0] |= static_cast<uint32_t>(static_cast<uint8_t>(q[byte * 8 + i])) << (8 * byte);
          quads[1] |= static_cast<uint32_t>(static_cast<uint8_t>(q[byte * 8 + i + 4]))
                      << (8 * byte);
        }
        low[tile][i] = quads[0];
        high[tile][i] = quads[1];
      }
    }
  }
};

// ---- codes ------------------------------------------------------------------------------------

// What a lane reads of a step.
template <int kPlanes>
struct SketchWords {
  uint4 plane[kPlanes];  // The lane's word of four tokens.
  uint2 scales;          // bf16, of the same tokens.
};

// 16 or 8 bytes that are read once.
__device__ __forceinline__ uint4 LoadOnce16(const std::byte* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
__device__ __forceinline__ uint2 LoadOnce8(const std::byte* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from));
  return v;
}

// The bits of `a` where the mask has ones, those of `b` elsewhere.
__device__ __forceinline__ uint32_t Merge(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}

// codes[i]: in each byte, the code of component i in the lower half and that of i + 4 in the upper
// one, with other bits beside them. `word` has a token's planes.
template <int kPlanes>
__device__ __forceinline__ void SpreadCodes(const uint32_t (&word)[kPlanes], uint32_t (&codes)[4]) {
  if constexpr (kPlanes == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = word[0] >> i;
    return;
  }
  // Pairs of bits of components 0 2 4 6 and 1 3 5 7 of each byte.
  const uint32_t even = Merge(word[0] << 1, word[kPlanes > 1 ? 1 : 0], 0xaaaaaaaau);
  const uint32_t odd = Merge(word[0], word[kPlanes > 1 ? 1 : 0] >> 1, 0xaaaaaaaau);
  if constexpr (kPlanes == 2) {
    codes[0] = even;
    codes[1] = odd;
    codes[2] = even >> 2;
    codes[3] = odd >> 2;
  } else if constexpr (kPlanes == 3) {
    codes[0] = Merge(even << 1, word[2], 0x66666666u);
    codes[1] = Merge(odd << 1, word[2] >> 1, 0x66666666u);
    codes[2] = Merge(even >> 1, word[2] >> 2, 0x66666666u);
    codes[3] = Merge(odd >> 1, word[2] >> 3, 0x66666666u);
  }
}

__device__ __forceinline__ void MmaCodes(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// products[tile][token][head]: eight times the sums of q level, over kSumOriginValue; of the lane's
// four tokens and its heads tile * 8 + lane % 4 * 2 + {0, 1}. `start` has what they begin with.
template <int kDim, int kTiles, int kPlanes>
__device__ __forceinline__ void SketchProducts(const SketchWords<kPlanes>& words,
                                               const SketchOperand<kDim, kTiles>& operand,
                                               const int (&start)[kTiles][2],
                                               float (&products)[kTiles][4][2]) {
  constexpr int kBits = kDim / 32;
  constexpr uint32_t kLow = ((1u << kPlanes) - 1) * 0x01010101u;
  const int shift = kDim == 64 ? static_cast<int>(threadIdx.x) % 4 / 2 * 2 : 0;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // Tokens 2 pair and 2 pair + 1
    uint32_t codes[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      uint32_t word[kPlanes];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const uint4& v = words.plane[p];
        word[p] = pair == 0 ? (t == 0 ? v.x : v.y) : (t == 0 ? v.z : v.w);
        if (kDim == 64) word[p] >>= shift;
      }
      SpreadCodes<kPlanes>(word, codes[t]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int low[4] = {0, 0, 0, 0};
      int high[4] = {start[tile][0], start[tile][1], start[tile][0], start[tile][1]};
#pragma unroll
      for (int i = 0; i < kBits; i += 2) {
        MmaCodes(low, codes[0][i] & kLow, codes[1][i] & kLow, codes[0][i + 1] & kLow,
                 codes[1][i + 1] & kLow, operand.low[tile][i], operand.low[tile][i + 1]);
        MmaCodes(high, codes[0][i] & (kLow << 4), codes[1][i] & (kLow << 4),
                 codes[0][i + 1] & (kLow << 4), codes[1][i + 1] & (kLow << 4),
                 operand.high[tile][i], operand.high[tile][i + 1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        products[tile][pair * 2 + j / 2][j % 2] = __int_as_float(low[j] * 16 + high[j]);
      }
    }
  }
}

// What a head's products start from: eight times the part of the levels that does not depend on the
// codes, 2 q code - (2^p - 1) q.
template <int kPlanes>
__device__ __forceinline__ int SketchStart(const SketchQueries& queries, int head) {
  return static_cast<int>(kSumOrigin) - 8 * ((1 << kPlanes) - 1) * queries.sum[head];
}

// The scales of the lane's tokens as floats, NaN where one does not count; `valid` of the four
// tokens exist.
__device__ __forceinline__ void SketchScales(uint2 packed, int valid, float (&scales)[4]) {
  constexpr uint32_t kBound = kLargestScaleBits * 0x00010001u;
  const auto guard = [](uint32_t pair) {
    const __nv_bfloat162 value = *reinterpret_cast<const __nv_bfloat162*>(&pair);
    const uint32_t bound = kBound;
    return pair | ~__hlt2_mask(__habs2(value), *reinterpret_cast<const __nv_bfloat162*>(&bound));
  };
  packed.x = guard(packed.x);
  packed.y = guard(packed.y);
  scales[0] = __uint_as_float(packed.x << 16);
  scales[1] = __uint_as_float(packed.x & 0xffff0000u);
  scales[2] = __uint_as_float(packed.y << 16);
  scales[3] = __uint_as_float(packed.y & 0xffff0000u);
  if (valid < 4) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (t >= valid) scales[t] = __uint_as_float(0x7fffffffu);
    }
  }
}

// ---- masses -----------------------------------------------------------------------------------

// A head's masses are relative to 2^base, a whole number of octaves kHeadroom above the largest
// estimate of a sample: shares do not depend on it. Between 2^-127 and 2 they are exact to 2^-17
// octaves; from 2 up they are cut off, which the sum of a few of them shows (kSaturated).
inline constexpr float kHeadroomOctaves = 30.0f;
inline constexpr float kWindowOctaves = 128.0f;
inline constexpr float kSaturated = 1.0f;

// The mass of an estimate given (x - base + 127) / 128, x in octaves; 0 for NaN. The window's place
// in [0, 1] is rounded to 23 bits, which are the exponent and 16 bits of the mantissa of the mass.
__device__ __forceinline__ float SketchMass(float scaled, float factor, float offset) {
  const float place = __saturatef(fmaf(scaled, factor, offset)) + 1.0f;
  return __int_as_float(__float_as_int(place) * 128 + 0x40000000);
}

// Masses are stored to 24 bits, upper 16 and lower 8 apart: 2^-17 of them.
__device__ __forceinline__ uint32_t PackMass(float mass) {
  return (__float_as_uint(mass) + 64) >> 7;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_
