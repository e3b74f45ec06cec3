#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_

// Estimates of 64 tokens at a time from their few-bit codes, and the attention mass of those
// estimates (kernels/sketch.h): a warp's arithmetic. What is scored when is in select_sketch.cu.
//
// Bits are not unpacked. A product with a sparse matrix, m16n8k64, says for every four columns of a
// row which two of them are not zero: those two-bit indices are the codes. With -q, q of one
// component and -q', q' of another in the four rows of the other operand, the pair of indices (b, 2
// + b') picks the signed components of two bits b, b'. The matrix's values are all alike, 1 for the
// lowest plane and twice that for each plane above it, so the planes of a token add up
//   sum_p 2^(P - 1 - p) sum_j (2 bit_pj - 1) q_j  =  sum_j q_j level_j
// in the accumulators of the tensor core. Every second bit of a word is in place already, and so
// are those between them, for rows in another order (-q, -q', q, q'): one instruction makes the
// indices of 16 components.
//
// A step is 16 quarters of a page, four tokens each. Lane (r, c), r = lane / 4 and c = lane % 4,
// gives the indices of row r (c even) or r + 8 (c odd) of the sparse matrix, of the first (c < 2)
// or the second 32 columns. So it reads 16 bytes of a word, of the four tokens of quarter 2 r + c %
// 2, one product for each, and its word is c / 2 of a pair of words. The products of a token's
// heads, columns 2 c and 2 c + 1 of rows r and r + 8, come out in the lanes of the quarters 2 r and
// 2 r + 1: eight tokens that follow each other, whose masses a lane sums alone.
//
// The sums start from 1.5 * 2^23, the bits of which make them floats without a conversion.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/params.h"
#include "kernels/sketch.h"

namespace resa::kernels::cuda {

inline constexpr int kStepTokens = 64;
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
  float octaves[kMaxGroup];  // What a dot product times a token's scale is multiplied by.
};

// A lane's components of a head, lane * kDim / 32 ..: two bf16 in each word.
template <int kDim>
struct RawQuery {
  uint32_t pairs[kDim / 64];

  // Where it stands, ahead of the copies that follow.
  __device__ __forceinline__ void Load(const uint16_t* q) {
    const uint16_t* const from = q + static_cast<int>(threadIdx.x) % 32 * (kDim / 32);
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(pairs[i]) : "l"(from + 2 * i) : "memory");
    }
  }
};

// One head: a warp's work. kernels/sketch.h has the formulas, and the CPU backend the same order of
// operations; a query that is not finite counts as zero.
template <int kDim>
__device__ __forceinline__ void PrepareSketchQuery(const RawQuery<kDim>& q, int head,
                                                   SketchQueries* queries) {
  constexpr int kEach = kDim / 32;
  constexpr float kInverseRoot = kDim == 64 ? 0.125f : 0.088388347648318440550f;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = lane * kEach + i;
    constexpr uint64_t kLow = kSketchSignBits[0], kHigh = kSketchSignBits[1];
    const bool flip = (((j < 64 ? kLow : kHigh) >> (j % 64)) & 1) != 0;
    const uint32_t pair = q.pairs[i / 2];
    const float value = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
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
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int value = counts ? __float2int_rn(x[i] * inverse) : 0;
    queries->rounded[head][lane * kEach + i] = static_cast<int8_t>(value);
  }
  if (lane == 0) {
    constexpr float kOctavesPerUnit = 1.44269504088896341f;
    const float root = kDim == 64 ? 8.0f : 11.3137084989847604f;
    queries->octaves[head] = (counts ? scale : 1.0f) * kOctavesPerUnit / root;
  }
}

// Which heads of the group are a lane's: kHeads of them. Up to four heads of a group stand in every
// other column of one tile of eight, so that each lane has one; up to eight fill it and up to
// sixteen fill two, with two per lane and tile.
template <int kHeads>
struct SketchColumns {
  static_assert(kHeads == 1 || kHeads == 2 || kHeads == 4);
  static constexpr int kTiles = kHeads == 4 ? 2 : 1;
  static constexpr int kEach = kHeads == 1 ? 1 : 2;  // Heads of a lane in a tile.
  static constexpr int kGroup = kHeads * 4;          // The largest group.

  // The head in a column of a tile, or -1.
  __device__ __forceinline__ static int HeadOf(int tile, int column) {
    if (kHeads == 1) return column % 2 == 0 ? column / 2 : -1;
    return tile * 8 + column;
  }
  // The lane's head i of a tile.
  __device__ __forceinline__ static int Head(int tile, int i) {
    const int lane = static_cast<int>(threadIdx.x) % 4;
    return kHeads == 1 ? lane : tile * 8 + lane * 2 + i;
  }
};

// A lane's part of the queries: the second operand of its products. Columns 4 g .. 4 g + 3 of the
// sparse matrix are components (4 n, 4 n + 2), or those behind them (odd = 1), of word 2 pair + g /
// 8, n = g % 8.
template <int kDim, int kHeads>
struct SketchOperand {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  static constexpr int kPairs = kDim / 64;  // Of words.
  uint32_t quads[kTiles][kPairs][2][4];     // [odd]

  __device__ __forceinline__ void Load(const SketchQueries& queries) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = SketchColumns<kHeads>::HeadOf(tile, lane / 4);
      const int8_t* const q = queries.rounded[max(head, 0)];
      const uint32_t mask = head < 0 ? 0u : 0xffu;
#pragma unroll
      for (int i = 0; i < kPairs * 8; ++i) {
        const int pair = i / 8, odd = i / 4 % 2;
        const int group = i % 4 * 4 + lane % 4;
        const int first = pair * 64 + group / 8 * 32 + group % 8 * 4 + odd;
        const int a = q[first], b = q[first + 2];
        const int rows[4] = {-a, odd == 0 ? a : -b, odd == 0 ? -b : a, b};
        uint32_t& quad = quads[tile][pair][odd][i % 4];
        quad = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) quad |= (static_cast<uint32_t>(rows[r]) & mask) << (r * 8);
      }
    }
  }
};

// ---- codes ------------------------------------------------------------------------------------

// A plane of a step: the lane's word of each pair, of the four tokens of its quarter.
template <int kDim>
struct PlaneWords {
  uint4 pair[kDim / 64];
};

// The indices of every second bit of a word, two of them in each four bits: (b, 2 + b') of bits 0 2
// 4 .., and (2 b, 1 + 2 b') of bits 1 3 5 ... One instruction: (word & bits) | others.
template <int kOdd>
__device__ __forceinline__ uint32_t SparseIndices(uint32_t word) {
  uint32_t indices;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;"
      : "=r"(indices)
      : "r"(word), "r"(kOdd == 0 ? 0x55555555u : 0xaaaaaaaau),
        "r"(kOdd == 0 ? 0x88888888u : 0x44444444u));
  return indices;
}

// sum += weight (the selected rows of b), weight in each byte. The indices of a pair may be in any
// order, which is what tells this form of the instruction from ::ordered_metadata.
__device__ __forceinline__ void MmaSparse(int (&sum)[4], uint32_t weight, const uint32_t (&b)[4],
                                          uint32_t indices) {
  asm volatile(
      "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %4, %4, %4}, {%5, %6, %7, %8}, {%0, %1, %2, %3}, %9, 0x0;"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(weight), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(indices));
}

// The sums of q level of a step, over kSumOrigin. [tile][t][row * 2 + i]: token t of quarter 2 r +
// row, the lane's head i.
template <int kHeads>
struct SketchSums {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  int sums[kTiles][kQuarterTokens][4];

  __device__ __forceinline__ SketchSums() {
#pragma unroll
    for (int i = 0; i < kTiles * kQuarterTokens * 4; ++i) {
      (&sums[0][0][0])[i] = static_cast<int>(kSumOrigin);
    }
  }

  // A plane whose bits weigh `weight`. The products of four tokens take turns, since one that adds
  // to the last waits for it.
  template <int kDim>
  __device__ __forceinline__ void Add(const PlaneWords<kDim>& words, int weight,
                                      const SketchOperand<kDim, kHeads>& operand) {
#pragma unroll
    for (int pair = 0; pair < kDim / 64; ++pair) {
      const uint4& v = words.pair[pair];
      const uint32_t of_token[kQuarterTokens] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int t = 0; t < kQuarterTokens; ++t) {
          const uint32_t indices =
              odd == 0 ? SparseIndices<0>(of_token[t]) : SparseIndices<1>(of_token[t]);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            MmaSparse(sums[tile][t], 0x01010101u * static_cast<uint32_t>(weight),
                      operand.quads[tile][pair][odd], indices);
          }
        }
      }
    }
  }
  // All planes of a step.
  template <int kDim, int kPlanes>
  __device__ __forceinline__ void AddStep(const PlaneWords<kDim> (&words)[kPlanes],
                                          const SketchOperand<kDim, kHeads>& operand) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) Add(words[p], 1 << (kPlanes - 1 - p), operand);
  }

  // Calls use(tile, t, row, i, estimate) for each, the estimate before the head's factor.
  template <typename Use>
  __device__ __forceinline__ void ForEstimates(const float (&scales)[8], const Use& use) const {
#pragma unroll
    for (int t = 0; t < kQuarterTokens; ++t) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float scale = scales[row * kQuarterTokens + t];
        const float origin = -kSumOriginValue * scale;  // Exact.
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < SketchColumns<kHeads>::kEach; ++i) {
            use(tile, t, row, i, fmaf(__int_as_float(sums[tile][t][row * 2 + i]), scale, origin));
          }
        }
      }
    }
  }
};

// The scales of the lane's eight tokens as floats, NaN where one does not count.
__device__ __forceinline__ void SketchScales(const uint4& packed, float (&scales)[8]) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bound = kLargestScaleBits * 0x00010001u;
    const uint32_t magnitude = pairs[i] & 0x7fff7fffu;
    const uint32_t guarded =
        pairs[i] | ~__hlt2_mask(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                *reinterpret_cast<const __nv_bfloat162*>(&bound));
    scales[2 * i] = __uint_as_float(guarded << 16);
    scales[2 * i + 1] = __uint_as_float(guarded & 0xffff0000u);
  }
}

// Tokens from `valid` on do not count.
__device__ __forceinline__ void CutScales(int valid, float (&scales)[8]) {
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    if (t >= valid) scales[t] = __uint_as_float(0x7fffffffu);
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

// Masses are stored to 24 bits, upper 16 and lower 8 apart: 2^-17 of them. Those bits, rounded, in
// the upper three bytes.
__device__ __forceinline__ uint32_t PackMass(float mass) {
  return (__float_as_uint(mass) << 1) + 128;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_
