// Turns a chunk's estimates into its blocks' masses, and masses into scores. Compiled once per
// instruction set.
//
// A mass is a sum of 2^(estimate - m), m the largest estimate of the head in the chunk, so that a
// chunk needs one m per head; ranking then brings all chunks to a common maximum. Masses are kept
// times 2^58: a block may weigh 2^-184 of the best and still be told from nothing, and products
// with the weights of chunks stay clear of denormal numbers, which are slow.

#if defined(RESA_KERNELS_CPU_SKETCH_MASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#undef RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#else
#define RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr float kMassExponent = 58.0f;
constexpr size_t kMassTokens = 64;  // Four pages: masses are summed this many tokens at a time.

// 2^x by 2^k p(r), r = x - k in [-0.5, 0.5], p of degree 5 with the least relative error (8e-8).
// x <= 127; below -126 the result is 0.
HWY_INLINE VF Exp2(VF x) {
  const DF d;
  const DI32 di;
  const VF magic = hn::Set(d, 12582912.0f);  // 1.5 2^23: the sum's low bits are the integer k.
  const VF shifted = hn::Add(x, magic);
  const VF r = hn::Sub(x, hn::Sub(shifted, magic));
  VF p = hn::Set(d, 0.001327647198f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.009675541334f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.05550713274f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.2402211972f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.6931469671f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.000000072f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const VF result = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), result);
}

// A unit's masses of one pass: blocks in the order they were scored, chunks of kChunkTokens.
struct Masses {
  float* of_block;      // [group][stride]
  float* chunk_top;     // [group][chunk_stride]: m
  float* chunk_sum;     // [group][chunk_stride]: the sum of the chunk's masses
  size_t stride;        // Whole chunks.
  size_t chunk_stride;  // A multiple of kTopKPadding.
};

// The sums over the blocks of four pages, given sums over quarters of a page: [quarter][page].
HWY_INLINE void StoreBlockSums(const float* quarters, size_t block_tokens, float* sums) {
  const D4 d;
  const auto a = hn::Load(d, quarters), b = hn::Load(d, quarters + 4);
  const auto c = hn::Load(d, quarters + 8), e = hn::Load(d, quarters + 12);
  if (block_tokens == 4) {
    hn::StoreInterleaved4(a, b, c, e, d, sums);
    return;
  }
  const auto first = hn::Add(a, b), second = hn::Add(c, e);
  if (block_tokens == 8) {
    hn::StoreU(hn::InterleaveLower(d, first, second), d, sums);
    hn::StoreU(hn::InterleaveUpper(d, first, second), d, sums + 4);
  } else {
    hn::StoreU(hn::Add(first, second), d, sums);
  }
}

// The masses of the blocks of `tokens` tokens (a multiple of kMassTokens) of one head, relative to
// 2^top; returns their sum.
inline float MassOfBlocks(const float* estimates, size_t tokens, float top, size_t block_tokens,
                          float* masses) {
  const DF d;
  const VF shift = hn::Set(d, top - kMassExponent);
  VF total = hn::Zero(d);
  for (size_t t = 0; t < tokens; t += kMassTokens) {
    VF p[kMassTokens / kLanes];
    for (size_t v = 0; v < kMassTokens / kLanes; ++v) {
      p[v] = Exp2(hn::Sub(hn::Load(d, estimates + t + v * kLanes), shift));
    }
    HWY_ALIGN float quarters[kPageTokens];
    for (size_t v = 0; v < kPageVectors; ++v) {
      const VF sums =
          SumBlocksOf4(p[v], p[kPageVectors + v], p[2 * kPageVectors + v], p[3 * kPageVectors + v]);
      hn::Store(sums, d, quarters + v * kLanes);
      total = hn::Add(total, sums);
    }
    StoreBlockSums(quarters, block_tokens, masses + t / block_tokens);
  }
  return Sum1(total);
}

// The masses of a chunk whose estimates are complete: all heads, `tokens` of them scored.
inline void MassOfChunk(ChunkEstimates& estimates, size_t group, size_t tokens, size_t chunk,
                        size_t block_tokens, const Masses& masses) {
  const size_t padded = (tokens + kMassTokens - 1) / kMassTokens * kMassTokens;
  for (size_t g = 0; g < group; ++g) {
    float* const of_head = estimates.of_head[g];
    std::fill(of_head + tokens, of_head + padded, kNoEstimate);
    const float top = Max1(hn::Load(DF(), estimates.top[g]));
    float* const to = masses.of_block + g * masses.stride + chunk * kChunkTokens / block_tokens;
    const size_t at = g * masses.chunk_stride + chunk;
    masses.chunk_top[at] = top;
    masses.chunk_sum[at] = MassOfBlocks(of_head, padded, top, block_tokens, to);
  }
}

// Replaces chunk_top by the chunks' weights: what brings their masses to shares of the head's whole
// mass, times 2^58.
inline void WeighChunks(const Masses& masses, size_t group, size_t chunks) {
  const DF d;
  for (size_t g = 0; g < group; ++g) {
    float* const top = masses.chunk_top + g * masses.chunk_stride;
    float* const sum = masses.chunk_sum + g * masses.chunk_stride;
    std::fill(top + chunks, top + masses.chunk_stride, kNoEstimate);
    std::fill(sum + chunks, sum + masses.chunk_stride, 0.0f);
    VF most = hn::Set(d, kNoEstimate);
    for (size_t c = 0; c < chunks; c += kLanes) most = hn::Max(most, hn::Load(d, top + c));
    const VF shift = hn::Set(d, Max1(most));
    VF total = hn::Zero(d);
    for (size_t c = 0; c < chunks; c += kLanes) {
      const VF weight = Exp2(hn::Sub(hn::Load(d, top + c), shift));
      total = hn::MulAdd(weight, hn::Load(d, sum + c), total);
      hn::Store(weight, d, top + c);
    }
    const VF share = hn::Set(d, 0x1p58f / Sum1(total));
    for (size_t c = 0; c < chunks; c += kLanes) {
      hn::Store(hn::Mul(hn::Load(d, top + c), share), d, top + c);
    }
  }
}

// scores[i] = sum over heads of the share of the head's mass in block i, for `blocks` blocks
// scored; room for PadTopK(blocks). Uses up the masses.
inline void ScoresOfMasses(const Masses& masses, size_t group, size_t blocks, size_t block_tokens,
                           float* scores) {
  const DF d;
  const size_t per_chunk = kChunkTokens / block_tokens;
  WeighChunks(masses, group, (blocks + per_chunk - 1) / per_chunk);
  for (size_t begin = 0, chunk = 0; begin < blocks; begin += per_chunk, ++chunk) {
    for (size_t i = begin; i < std::min(blocks, begin + per_chunk); i += kLanes) {
      VF score = hn::Zero(d);
      for (size_t g = 0; g < group; ++g) {
        const VF weight = hn::Set(d, masses.chunk_top[g * masses.chunk_stride + chunk]);
        score = hn::MulAdd(weight, hn::Load(d, masses.of_block + g * masses.stride + i), score);
      }
      hn::Store(score, d, scores + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
