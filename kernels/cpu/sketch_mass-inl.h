// Turns a chunk's estimates into its blocks' masses, and masses into scores. Compiled once per
// instruction set.
//
// The mass of an estimate x (kernels/sketch.h) is the float whose bits are those of 1.0f plus
// 2^23 x: straight lines between the powers of two. A chunk keeps masses relative to 2^m, m the
// head's largest estimate in the chunk rounded up, so that it needs one m per head; ranking then
// brings all chunks to a common one. Both steps scale by powers of two, which changes no mantissa.
// Masses are kept times 2^58: a block may weigh 2^-184 of the best and still be told from nothing,
// and products with the weights of chunks stay clear of denormal numbers, which are slow.

#if defined(RESA_KERNELS_CPU_SKETCH_MASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#undef RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#else
#define RESA_KERNELS_CPU_SKETCH_MASS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr float kMassOctaves = 58.0f;
constexpr size_t kMassTokens = 64;  // Four pages: masses are summed this many tokens at a time.

// To the nearest integer, ties to even; the least one for all that are too low. x < 2^31, so that
// Highway's care for numbers too large can be left out.
HWY_INLINE VI32 NearestOrLeast(VF x) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return VI32{_mm512_cvtps_epi32(x.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI32{_mm256_cvtps_epi32(x.raw)};
#else
  return hn::NearestInt(x);
#endif
}

// The mass of 2^-23 `steps`, less than 128; 0 below -127.
HWY_INLINE VF MassOf(VF steps) {
  const DI32 di;
  const auto bits = hn::Add(NearestOrLeast(steps), hn::Set(di, 0x3f800000));
  return hn::BitCast(DF(), hn::Max(bits, hn::Zero(di)));
}

// A unit's masses of one pass: blocks in the order they were scored, chunks of kChunkTokens.
struct Masses {
  float* of_block;      // [group][stride]
  float* chunk_top;     // [group][chunk_stride]: 2^23 m
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

// The largest of a head's estimates; `tokens` is a multiple of kMassTokens.
inline float TopOf(const float* estimates, size_t tokens) {
  const DF d;
  constexpr size_t kChains = kMassTokens / kLanes;  // A maximum waits for the one before.
  VF top[kChains];
  for (size_t i = 0; i < kChains; ++i) top[i] = hn::Load(d, estimates + i * kLanes);
  for (size_t t = kMassTokens; t < tokens; t += kMassTokens) {
    for (size_t i = 0; i < kChains; ++i) {
      top[i] = hn::Max(top[i], hn::Load(d, estimates + t + i * kLanes));
    }
  }
  for (size_t n = kChains / 2; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) top[i] = hn::Max(top[i], top[i + n]);
  }
  return Max1(top[0]);
}

// The masses of the blocks of `tokens` tokens (a multiple of kMassTokens) of one head, relative to
// that of 2^-23 `top`; returns their sum.
inline float MassOfBlocks(const float* estimates, size_t tokens, float octaves, float top,
                          size_t block_tokens, float* masses) {
  const DF d;
  const VF factor = hn::Set(d, octaves);
  const VF base = hn::Set(d, top - kMassOctaves * kOctave);
  VF total = hn::Zero(d);
  for (size_t t = 0; t < tokens; t += kMassTokens) {
    HWY_ALIGN float quarters[kPageTokens];
    for (size_t v = 0; v < kPageVectors; ++v) {
      const auto mass_of = [&](size_t page) {
        const VF estimate = hn::Load(d, estimates + t + page * kPageTokens + v * kLanes);
        return MassOf(hn::MulSub(estimate, factor, base));
      };
      const VF sums = SumBlocksOf4(mass_of(0), mass_of(1), mass_of(2), mass_of(3));
      hn::Store(sums, d, quarters + v * kLanes);
      total = hn::Add(total, sums);
    }
    StoreBlockSums(quarters, block_tokens, masses + t / block_tokens);
  }
  return Sum1(total);
}

// The masses of a chunk whose estimates are complete: all heads, `tokens` of them scored.
inline void MassOfChunk(ChunkEstimates& estimates, const SketchQuery& query, size_t group,
                        size_t tokens, size_t chunk, size_t block_tokens, const Masses& masses) {
  const size_t padded = (tokens + kMassTokens - 1) / kMassTokens * kMassTokens;
  for (size_t g = 0; g < group; ++g) {
    float* const of_head = estimates.of_head[g];
    std::fill(of_head + tokens, of_head + padded, kNoEstimate);
    const float octaves = query.octaves[g];
    const float top = std::ceil(TopOf(of_head, padded) * octaves / kOctave) * kOctave;
    float* const to = masses.of_block + g * masses.stride + chunk * kChunkTokens / block_tokens;
    const size_t at = g * masses.chunk_stride + chunk;
    masses.chunk_top[at] = top;
    masses.chunk_sum[at] = MassOfBlocks(of_head, padded, octaves, top, block_tokens, to);
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
    const VF base = hn::Set(d, Max1(most));
    VF total = hn::Zero(d);
    for (size_t c = 0; c < chunks; c += kLanes) {
      const VF weight = MassOf(hn::Sub(hn::Load(d, top + c), base));
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
