// Estimates the logits of tokens from their sketches, 32 tokens (two pages) at a time for all heads
// of a group. Compiled once per instruction set.
//
// A vector holds the same 32 components' bits of kLanes tokens, one word each. Shifts and masks
// turn the words of all planes into u8 codes: bit i of a word's four bytes becomes the quad of
// codes of components {i, 8 + i, 16 + i, 24 + i}, which one multiply-add with the s8 query in the
// same order adds up. Codes are stored doubled, 2 code, so that
//   sum_j q_j level_j = sum_j q_j 2 code_j - (2^p - 1) sum_j q_j
// starts from a constant and needs no further step. They are made once for all heads, and one load
// of a quad serves all of them.

#if defined(RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_
#undef RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_
#else
#define RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_rotate-inl.h"
#include "kernels/params.h"
#include "kernels/sketch.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kPairTokens = 2 * kPageTokens;  // Tokens scored at a time.
constexpr size_t kPageVectors = kPageTokens / kLanes;
constexpr size_t kPairVectors = kPairTokens / kLanes;
constexpr size_t kMaxQuads = kMaxHeadDim / 4;
// Queries and scales past the first count as not finite, queries below the second as zero, so that
// no product of theirs overflows and kNoEstimate is far below any estimate.
constexpr float kLargestFactor = 1e9f;
constexpr float kLeastFactor = 1e-14f;
constexpr float kNoEstimate = -1e20f;  // Of a token that does not count; weighs nothing.
constexpr float kOctave = 8388608.0f;  // 2^23, the steps of a float's mantissa

// ---- the multiply-add of four u8 codes with four s8 queries -------------------------------------

using DI16 = hn::ScalableTag<int16_t>;
using VI16 = hn::Vec<DI16>;
using VI32 = hn::Vec<DI32>;

#if HWY_TARGET == HWY_AVX3_DL  // One instruction adds four products to a 32-bit lane.
using DotSums = VI32;
HWY_INLINE DotSums StartDot(VI32 start) { return start; }
HWY_INLINE DotSums AddProducts(DotSums sums, VU32 codes, VI32 query) {
  // Not by its intrinsic, which Highway 1.0's flags for this target leave out.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.raw) : "v"(codes.raw), "v"(query.raw));
  return sums;
}
HWY_INLINE VI32 FinishDot(DotSums sums) { return sums; }
#else  // Two 16-bit sums per lane. They cannot overflow: kernels/sketch.h bounds a whole product.
using DotSums = VI16;
HWY_INLINE DotSums StartDot(VI32 start) {  // In one half of the lane.
  return hn::BitCast(DI16(), hn::And(start, hn::Set(DI32(), 0xffff)));
}
HWY_INLINE DotSums AddProducts(DotSums sums, VU32 codes, VI32 query) {
#if HWY_TARGET == HWY_AVX3
  return hn::Add(sums, VI16{_mm512_maddubs_epi16(codes.raw, query.raw)});
#elif HWY_TARGET == HWY_AVX2
  return hn::Add(sums, VI16{_mm256_maddubs_epi16(codes.raw, query.raw)});
#else
  const DI16 d16;
  const auto even = [&](auto v) {
    return hn::ShiftRight<8>(hn::ShiftLeft<8>(hn::BitCast(d16, v)));
  };
  const auto odd = [&](auto v) { return hn::ShiftRight<8>(hn::BitCast(d16, v)); };
  return hn::Add(sums, hn::Add(hn::Mul(even(codes), even(query)), hn::Mul(odd(codes), odd(query))));
#endif
}
HWY_INLINE VI32 FinishDot(DotSums sums) {
#if HWY_TARGET == HWY_AVX3
  return VI32{_mm512_madd_epi16(sums.raw, _mm512_set1_epi16(1))};
#elif HWY_TARGET == HWY_AVX2
  return VI32{_mm256_madd_epi16(sums.raw, _mm256_set1_epi16(1))};
#else
  const VI32 both = hn::BitCast(DI32(), sums);
  return hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(both)), hn::ShiftRight<16>(both));
#endif
}
#endif

// ---- the query
// ------------------------------------------------------------------------------------

// AVX-512 broadcasts a memory operand at no cost; elsewhere a quad is stored once per lane.
constexpr size_t kQuadCopies = HWY_MAX_BYTES == 64 ? 1 : kLanes;
// More heads than that do not fit in registers together.
constexpr size_t kTileHeads = 8;
constexpr size_t kTileVectors = HWY_MAX_BYTES == 64 ? 2 : 1;

HWY_INLINE VI32 LoadQuad(const int32_t* quad) {
  if constexpr (kQuadCopies == 1) {
    return hn::Set(DI32(), *quad);
  } else {
    return hn::Load(DI32(), quad);
  }
}

constexpr size_t kQueryStride = kMaxQuads * kQuadCopies;

// A unit's queries as one pass needs them, each value in all lanes: rotated, rounded to s8 and laid
// out as the codes are.
struct SketchQuery {
  alignas(64) int32_t quads[kMaxGroup][kQueryStride];  // Four s8 each.
  alignas(64) int8_t rounded[kMaxGroup][kMaxHeadDim];  // The s8 values in order.
  alignas(64) int32_t start[kMaxGroup][kLanes];        // What the sums of products begin with.
  float octaves[kMaxGroup];  // s8 step d^-1/2 log2(e) 2^23 of the planes read; not 0
};

// One head's query; a query that is not finite counts as zero.
template <int kPlanes, size_t kDim>
void PrepareHead(const float* q, size_t g, float ratio, SketchQuery* out) {
  const DF d;
  const DI32 di;
  VF x[kDim / kLanes];
  Rotate<kDim>(q, x);
  HWY_ALIGN float magnitude[kDim];
  for (size_t i = 0; i < kDim / kLanes; ++i) hn::Store(hn::Abs(x[i]), d, magnitude + i * kLanes);
  float top = 0.0f, total = 0.0f;
  for (size_t j = 0; j < kDim; j += 8) {
    const float* const m = magnitude + j;
    const float sum = ((m[0] + m[1]) + (m[2] + m[3])) + ((m[4] + m[5]) + (m[6] + m[7]));
    top = std::max(top, sum);
    total += sum;
  }
  // The maximum may pass over a NaN, the sum does not.
  const float scale = top / kSketchQueryRange;
  const bool counts = total < kLargestFactor && scale > kLeastFactor;
  const VF inverse = hn::Set(d, counts ? 1.0f / scale : 0.0f);
  int8_t* const rounded = out->rounded[g];
  auto sum = hn::Zero(di);
  for (size_t i = 0; i < kDim / kLanes; ++i) {
    const auto value = counts ? hn::NearestInt(hn::Mul(x[i], inverse)) : hn::Zero(di);
    const hn::Rebind<int8_t, DI32> d8;
    hn::StoreU(hn::DemoteTo(d8, value), d8, rounded + i * kLanes);
    sum = hn::Add(sum, value);
  }
  const hn::CappedTag<int8_t, 8> d8;
  for (size_t j = 0; j < kDim; j += 32) {
    HWY_ALIGN int32_t quads[8];
    hn::StoreInterleaved4(hn::Load(d8, rounded + j), hn::Load(d8, rounded + j + 8),
                          hn::Load(d8, rounded + j + 16), hn::Load(d8, rounded + j + 24), d8,
                          reinterpret_cast<int8_t*>(quads));
    for (size_t i = 0; i < 8; ++i) {
      std::fill_n(out->quads[g] + (j / 4 + i) * kQuadCopies, kQuadCopies, quads[i]);
    }
  }
  const int32_t start = -((1 << kPlanes) - 1) * hn::GetLane(hn::SumOfLanes(di, sum));
  std::fill_n(out->start[g], kLanes, start);
  const float octaves = 1.44269504088896341f * kOctave;
  const float per_root = 1.0f / std::sqrt(static_cast<float>(kDim));
  out->octaves[g] = (counts ? scale : 1.0f) * ratio * octaves * per_root;
}

// `ratio` turns stored scales into those of kPlanes.
template <int kPlanes>
void PrepareQuery(const float* q, size_t group, size_t d, float ratio, SketchQuery* out) {
  for (size_t g = 0; g < group; ++g) {
    if (d == 64) {
      PrepareHead<kPlanes, 64>(q + g * d, g, ratio, out);
    } else {
      PrepareHead<kPlanes, 128>(q + g * d, g, ratio, out);
    }
  }
}

// ---- the keys
// -------------------------------------------------------------------------------------

// Two pages' descriptors and how many of their 32 tokens count: the first ones.
struct PagePair {
  const uint32_t* words[2];
  size_t tokens;
};

// Doubled codes, quad i of a word at to[i * kPairTokens].
HWY_INLINE void StoreQuad(VU32 codes, size_t quad, uint32_t* to) {
  hn::Store(codes, DU32(), to + quad * kPairTokens);
}
template <int kShift>  // To the right, or to the left when negative.
HWY_INLINE VU32 MoveBits(VU32 word, uint32_t mask) {
  const VU32 m = hn::Set(DU32(), mask * 0x01010101u);
  if constexpr (kShift > 0) return hn::And(hn::ShiftRight<kShift>(word), m);
  if constexpr (kShift == 0) return hn::And(word, m);
  if constexpr (kShift < 0) return hn::And(hn::ShiftLeft<-kShift>(word), m);
}
HWY_INLINE VU32 MergeBits(VU32 word, VU32 other, uint32_t mask) {
  return hn::OrAnd(word, other, hn::Set(DU32(), mask * 0x01010101u));
}

HWY_INLINE void UnpackWord(const VU32 (&planes)[1], uint32_t* to) {
  const VU32 a = planes[0];
  StoreQuad(MoveBits<-1>(a, 2), 0, to);
  StoreQuad(MoveBits<0>(a, 2), 1, to);
  StoreQuad(MoveBits<1>(a, 2), 2, to);
  StoreQuad(MoveBits<2>(a, 2), 3, to);
  StoreQuad(MoveBits<3>(a, 2), 4, to);
  StoreQuad(MoveBits<4>(a, 2), 5, to);
  StoreQuad(MoveBits<5>(a, 2), 6, to);
  StoreQuad(MoveBits<6>(a, 2), 7, to);
}

// Bytes of two-bit codes a b, of the odd bits (7 5 3 1) and of the even ones (6 4 2 0).
HWY_INLINE VU32 OddPairs(VU32 a, VU32 b) { return MergeBits(MoveBits<1>(b, 0x55), a, 0xaa); }
HWY_INLINE VU32 EvenPairs(VU32 a, VU32 b) { return MergeBits(MoveBits<-1>(a, 0xaa), b, 0x55); }

HWY_INLINE void UnpackWord(const VU32 (&planes)[2], uint32_t* to) {
  const VU32 odd = OddPairs(planes[0], planes[1]), even = EvenPairs(planes[0], planes[1]);
  StoreQuad(MoveBits<-1>(even, 6), 0, to);
  StoreQuad(MoveBits<-1>(odd, 6), 1, to);
  StoreQuad(MoveBits<1>(even, 6), 2, to);
  StoreQuad(MoveBits<1>(odd, 6), 3, to);
  StoreQuad(MoveBits<3>(even, 6), 4, to);
  StoreQuad(MoveBits<3>(odd, 6), 5, to);
  StoreQuad(MoveBits<5>(even, 6), 6, to);
  StoreQuad(MoveBits<5>(odd, 6), 7, to);
}

// Bytes of two codes a b c, doubled: bit i + 4 in the upper half, bit i in the lower one.
HWY_INLINE void StoreNibbles(VU32 codes, size_t i, uint32_t* to) {
  StoreQuad(MoveBits<0>(codes, 0x0e), i, to);
  StoreQuad(MoveBits<4>(codes, 0x0e), i + 4, to);
}
HWY_INLINE void UnpackWord(const VU32 (&planes)[3], uint32_t* to) {
  const VU32 odd = OddPairs(planes[0], planes[1]), even = EvenPairs(planes[0], planes[1]);
  const VU32 c = planes[2];
  StoreNibbles(MergeBits(MoveBits<-1>(c, 0x22), hn::ShiftLeft<2>(even), 0xcc), 0, to);
  StoreNibbles(MergeBits(MoveBits<0>(c, 0x22), hn::ShiftLeft<2>(odd), 0xcc), 1, to);
  StoreNibbles(MergeBits(MoveBits<1>(c, 0x22), even, 0xcc), 2, to);
  StoreNibbles(MergeBits(MoveBits<2>(c, 0x22), odd, 0xcc), 3, to);
}

// codes[quad][32 tokens], four doubled u8 in a lane.
template <int kPlanes>
void UnpackPair(const PagePair& pair, size_t d, uint32_t* codes) {
  const size_t words = d / 32;
  for (size_t w = 0; w < words; ++w) {
    for (size_t v = 0; v < kPairVectors; ++v) {
      const uint32_t* const from =
          pair.words[v / kPageVectors] + w * kPageTokens + v % kPageVectors * kLanes;
      VU32 planes[kPlanes];
      for (size_t plane = 0; plane < kPlanes; ++plane) {
        planes[plane] = hn::LoadU(DU32(), from + plane * words * kPageTokens);
      }
      UnpackWord(planes, codes + w * 8 * kPairTokens + v * kLanes);
    }
  }
}

// What an estimate is multiplied by and what is added to it: 0 and kNoEstimate where a token does
// not count.
struct TokenFactors {
  alignas(64) float scale[kPairTokens];
  alignas(64) float offset[kPairTokens];
};

// `scales_at`: words before the scales.
HWY_INLINE void ReadScales(const PagePair& pair, size_t scales_at, TokenFactors* out) {
  const DF df;
  for (size_t v = 0; v < kPairVectors; ++v) {
    const auto* const scales =
        reinterpret_cast<const bf16*>(pair.words[v / kPageVectors] + scales_at);
    const VF scale = LoadWide(scales + v % kPageVectors * kLanes);
    const size_t begin = v * kLanes;
    const auto within = hn::FirstN(df, pair.tokens > begin ? pair.tokens - begin : 0);
    const auto counts = hn::And(within, hn::Lt(hn::Abs(scale), hn::Set(df, kLargestFactor)));
    hn::Store(hn::IfThenElseZero(counts, scale), df, out->scale + begin);
    hn::Store(hn::IfThenZeroElse(counts, hn::Set(df, kNoEstimate)), df, out->offset + begin);
  }
}

// ---- estimates --------------------------------------------------------------------------------

// The estimates of a chunk: what a head's `octaves` turn into e / ln 2 in units of 2^-23.
constexpr size_t kChunkTokens = 512;
struct ChunkEstimates {
  alignas(64) float of_head[kMaxGroup][kChunkTokens];
};

// Heads [g, g + kHeads) of 32 tokens, at tokens [at, at + 32) of the chunk.
template <size_t kHeads>
void EstimateHeads(const uint32_t* codes, size_t quads, const SketchQuery& query, size_t g,
                   const TokenFactors& tokens, size_t at, ChunkEstimates* out) {
  const DF df;
  for (size_t v = 0; v < kPairVectors; v += kTileVectors) {
    const size_t token = v * kLanes;
    DotSums sums[kHeads][kTileVectors];
    for (size_t h = 0; h < kHeads; ++h) {
      const VI32 start = hn::Load(DI32(), query.start[g] + h * kLanes);
      for (size_t i = 0; i < kTileVectors; ++i) sums[h][i] = StartDot(start);
    }
    const uint32_t* code = codes + token;
    const int32_t* quad = query.quads[g];
    for (size_t n = 0; n < quads; ++n, code += kPairTokens, quad += kQuadCopies) {
      VU32 c[kTileVectors];
      for (size_t i = 0; i < kTileVectors; ++i) c[i] = hn::Load(DU32(), code + i * kLanes);
      for (size_t h = 0; h < kHeads; ++h) {
        const VI32 q = LoadQuad(quad + h * kQueryStride);
        for (size_t i = 0; i < kTileVectors; ++i) sums[h][i] = AddProducts(sums[h][i], c[i], q);
      }
    }
    float* const to = out->of_head[g] + at + token;
    for (size_t i = 0; i < kTileVectors; ++i) {
      const VF scale = hn::Load(df, tokens.scale + token + i * kLanes);
      const VF offset = hn::Load(df, tokens.offset + token + i * kLanes);
      for (size_t h = 0; h < kHeads; ++h) {
        const VF dot = hn::ConvertTo(df, FinishDot(sums[h][i]));
        hn::Store(hn::MulAdd(dot, scale, offset), df, to + h * kChunkTokens + i * kLanes);
      }
    }
  }
}

// All heads of the group, in tiles of nearly equal size.
inline void EstimatePair(const uint32_t* codes, size_t d, size_t group, const SketchQuery& query,
                         const TokenFactors& tokens, size_t at, ChunkEstimates* out) {
  const size_t quads = d / 4;
  ForParts<kTileHeads>(group, [&](size_t g, auto heads) HWY_ATTR {
    EstimateHeads<decltype(heads)::value>(codes, quads, query, g, tokens, at, out);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_
