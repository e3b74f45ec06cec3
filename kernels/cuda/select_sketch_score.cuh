#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCORE_CUH_

// Estimates of 64 tokens at a time from their few-bit codes, and the attention mass of those
// estimates (kernels/sketch.h): a warp's arithmetic. What is scored when is in
// select_sketch_unit.cuh.
//
// Bits are not unpacked. A product with a sparse matrix, m16n8k64, has two values for every four
// columns of a row, and a two-bit index for each that says which of them it stands in: those
// indices are the codes. With -q - q', q - q', -q + q' and q + q' in the four rows of the other
// operand, q of one component and q' of its neighbour, an index made of their two bits picks
//   (2 bit - 1) q + (2 bit' - 1) q',
// and the value that goes with it is 1 for the lowest plane and twice that for each plane above. So
// one product takes two planes of 32 components, and the sums over planes and components,
//   sum_p 2^(P - 1 - p) sum_j (2 bit_pj - 1) q_j  =  sum_j q_j level_j
// stay in the accumulators of the tensor core. A pair of planes takes its bits in turns from either
// word, two instructions for 16 components; a plane that is left over is an index as it stands,
// with the other value zero.
//
// Both indices of four columns may be the same here, which PTX leaves undefined: on sm_90 each is a
// choice of its own among the four rows (measured with all 16 pairs, LOG.md), and the tests compare
// what is chosen with float64: a device where it is not so fails them.
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

// Which of four columns' rows is whose: components a and b of a rotated query, rounded to s8.
__device__ __forceinline__ uint32_t SketchQuad(int a, int b) {
  const int rows[4] = {-a - b, a - b, b - a, a + b};  // kSketchQueryRange: they fit.
  uint32_t quad = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) quad |= (static_cast<uint32_t>(rows[r]) & 0xffu) << (r * 8);
  return quad;
}

// The group's queries, rotated and rounded, as the products take them (SketchOperand). Heads past
// the group are zero.
struct SketchQueries {
  // Of components 4 n + 2 half and the next, the n-th four of a pair of words: [n % 4][n / 4].
  alignas(16) uint32_t quads[kMaxGroup][kMaxHeadDim / 64][2][4][4];
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
  for (int i = 0; i < kEach; i += 2) {
    const int a = counts ? __float2int_rn(x[i] * inverse) : 0;
    const int b = counts ? __float2int_rn(x[i + 1] * inverse) : 0;
    const int at = lane * kEach + i;
    const int four = at % 64 / 4;
    queries->quads[head][at / 64][at % 4 / 2][four % 4][four / 4] = SketchQuad(a, b);
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
// sparse matrix are components 4 n + 2 half and the next of word 2 pair + g / 8, n = g % 8.
template <int kDim, int kHeads>
struct SketchOperand {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  static constexpr int kPairs = kDim / 64;  // Of words.
  uint32_t quads[kTiles][kPairs][2][4];     // [half]

  __device__ __forceinline__ void Load(const SketchQueries& queries) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = SketchColumns<kHeads>::HeadOf(tile, lane / 4);
#pragma unroll
      for (int i = 0; i < kPairs * 2; ++i) {
        const int pair = i / 2, half = i % 2;
        const uint4 v =
            *reinterpret_cast<const uint4*>(queries.quads[max(head, 0)][pair][half][lane % 4]);
        const uint32_t loaded[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) quads[tile][pair][half][k] = head < 0 ? 0u : loaded[k];
      }
    }
  }
};

// ---- codes ------------------------------------------------------------------------------------

// A plane of a step: the lane's word of each pair, of the four tokens of its quarter.
template <int kDim>
struct PlaneWords {
  uint32_t pair[kDim / 64][kQuarterTokens];
};

// The indices of two planes, the upper one's first in each four bits: of the lower half of the
// components under every four bits, or of the upper. The compiler would need one instruction more.
template <int kHalf>
__device__ __forceinline__ uint32_t SparseIndices(uint32_t upper, uint32_t lower) {
  const uint32_t first = kHalf == 0 ? upper : upper >> 2;
  const uint32_t second = kHalf == 0 ? lower << 2 : lower;
  uint32_t indices;  // Where the mask has ones `first`, else `second`.
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(indices) : "r"(first), "r"(0x33333333u), "r"(second));
  return indices;
}

// The matrix's values, alike in all groups of four columns: that of the first index and the second.
__device__ __forceinline__ constexpr uint32_t SparseValues(uint32_t first, uint32_t second) {
  return (first | second << 8) * 0x00010001u;
}

// sum = from + the selected rows of b times the values. This form of the instruction, without
// ::ordered_metadata, takes the indices of four columns in any order.
__device__ __forceinline__ void MmaSparse(int (&sum)[4], const int (&from)[4], uint32_t values,
                                          const uint32_t (&b)[4], uint32_t indices) {
  asm volatile(
      "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %4, %4, %4}, {%5, %6, %7, %8}, {%9, %10, %11, %12}, %13, 0x0;"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(values), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(from[0]), "r"(from[1]),
        "r"(from[2]), "r"(from[3]), "r"(indices));
}

// The sums of q level of a step, over kSumOrigin. [tile][t][row * 2 + i]: token t of quarter 2 r +
// row, the lane's head i.
template <int kHeads>
struct SketchSums {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  int sums[kTiles][kQuarterTokens][4];

  // All planes of a step. The products of four tokens take turns, since one that adds to the last
  // waits for it.
  template <int kDim, int kPlanes>
  __device__ __forceinline__ void Compute(const PlaneWords<kDim> (&words)[kPlanes],
                                          const SketchOperand<kDim, kHeads>& operand) {
    constexpr bool kPaired = kPlanes > 1;  // The upper two.
    constexpr bool kSingle = kPlanes % 2 != 0;
#pragma unroll
    for (int pair = 0; pair < kDim / 64; ++pair) {
      if constexpr (kPaired) {
        constexpr uint32_t kValues = SparseValues(1u << (kPlanes - 1), 1u << (kPlanes - 2));
        const auto& upper = words[0].pair[pair];
        const auto& lower = words[1].pair[pair];
#pragma unroll
        for (int t = 0; t < kQuarterTokens; ++t) {
          Add(t, pair == 0, kValues, operand, pair, 0, SparseIndices<0>(upper[t], lower[t]));
        }
#pragma unroll
        for (int t = 0; t < kQuarterTokens; ++t) {
          Add(t, false, kValues, operand, pair, 1, SparseIndices<1>(upper[t], lower[t]));
        }
      }
      if constexpr (kSingle) {
        const auto& word = words[kPlanes - 1].pair[pair];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int t = 0; t < kQuarterTokens; ++t) {
            Add(t, !kPaired && pair == 0 && half == 0, SparseValues(1 - half, half), operand, pair,
                half, word[t]);
          }
        }
      }
    }
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

 private:
  template <int kDim>
  __device__ __forceinline__ void Add(int t, bool first, uint32_t values,
                                      const SketchOperand<kDim, kHeads>& operand, int pair,
                                      int half, uint32_t indices) {
    constexpr int kOrigin = static_cast<int>(kSumOrigin);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int(&sum)[4] = sums[tile][t];
      const int from[4] = {first ? kOrigin : sum[0], first ? kOrigin : sum[1],
                           first ? kOrigin : sum[2], first ? kOrigin : sum[3]};
      MmaSparse(sum, from, values, operand.quads[tile][pair][half], indices);
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
