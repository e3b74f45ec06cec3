// Scores sixteen tokens' sketches for all heads of a group. Compiled once per instruction set.
//
// Sixteen tokens are scored at a time, one per 32-bit lane. A plane's bits of 32 components lie in
// one word per token; (word >> i) & 0x01010101 spreads bit i of its four bytes over the lane's four
// bytes, so shifts and masks build u8 codes of components {i, 8 + i, 16 + i, 24 + i}, and a
// multiply of u8 codes with the s8 query in the same order adds them up. The codes are made once
// for all heads of the group.

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
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/select_plan.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_rotate-inl.h"
#include "kernels/sketch.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kGroupTokens = 16;  // Tokens scored at a time.
constexpr size_t kMaxQuads = kMaxHeadDim / 4;
constexpr size_t kVectors = kGroupTokens / kLanes;  // Of one 32-bit value per token: 1, 2 or 4.
constexpr float kNoScore = -1e30f;  // Stands for -infinity where differences are taken.

// A unit's queries: rotated, rounded to s8 and laid out as the codes are.
struct SketchQuery {
  int32_t quads[kMaxGroup][kMaxQuads];  // Four s8 each.
  int32_t sum[kMaxGroup];               // Of a head's s8 values
  float scale[kMaxGroup];               // s8 step times d^-1/2
};

template <size_t kDim>
void PrepareQuery(const float* q, size_t group, SketchQuery* out) {
  const DF d;
  const DI32 di;
  for (size_t g = 0; g < group; ++g) {
    VF x[kDim / kLanes];
    Rotate<kDim>(q + g * kDim, x);
    VF top = hn::Zero(d), total = hn::Zero(d);
    for (const VF& v : x) {
      top = hn::Max(top, hn::Abs(v));
      total = hn::Add(total, hn::Abs(v));
    }
    // The maximum may pass over a NaN, the sum does not: no estimate is a number then.
    const float scale = std::isfinite(Sum1(total)) ? Max1(top) / kSketchQueryLevels
                                                   : std::numeric_limits<float>::quiet_NaN();
    const VF inverse = hn::Set(d, scale > 0 ? 1.0f / scale : 0.0f);
    HWY_ALIGN int8_t rounded[kDim];
    auto sum = hn::Zero(di);
    for (size_t i = 0; i < kDim / kLanes; ++i) {
      auto value = hn::NearestInt(hn::Mul(x[i], inverse));
      value = hn::Min(hn::Max(value, hn::Set(di, -127)), hn::Set(di, 127));
      const hn::Rebind<int8_t, DI32> d8;
      hn::StoreU(hn::DemoteTo(d8, value), d8, rounded + i * kLanes);
      sum = hn::Add(sum, value);
    }
    for (size_t quad = 0; quad < kDim / 4; ++quad) {
      int8_t bytes[4];
      for (size_t b = 0; b < 4; ++b) bytes[b] = rounded[quad / 8 * 32 + b * 8 + quad % 8];
      std::memcpy(&out->quads[g][quad], bytes, 4);
    }
    out->sum[g] = hn::GetLane(hn::SumOfLanes(di, sum));
    out->scale[g] = scale / std::sqrt(static_cast<float>(kDim));
  }
}

// Sixteen tokens, or fewer: whole blocks, from anywhere.
struct TokenGroup {
  const uint8_t* token[kGroupTokens];        // Its bits of plane 0.
  alignas(64) float scale[kGroupTokens];     // As stored.
  alignas(64) uint32_t valid[kGroupTokens];  // 0 or all ones.
};

// Places the block `id` at tokens [at, at + block) of the group; tokens past kv_len are not valid.
void PlaceBlock(const SelectParams& p, const SelectUnit& unit, size_t id, size_t at,
                TokenGroup* group) {
  const auto block = static_cast<size_t>(p.layout.selector.block_tokens);
  const size_t row_bytes = static_cast<size_t>(p.layout.head_dim) / 8;
  const auto planes = static_cast<size_t>(p.layout.selector.planes);
  const size_t begin = id * block;
  const size_t slot = begin % kPageTokens;
  const auto* const bytes =
      reinterpret_cast<const uint8_t*>(DescriptorOf(p, unit, begin / kPageTokens));
  const auto* const scales =
      reinterpret_cast<const bf16*>(bytes + planes * kPageTokens * row_bytes);
  for (size_t t = 0; t < block; ++t) {
    group->token[at + t] = bytes + (slot + t) * row_bytes;
    group->scale[at + t] = ToFloat(scales[slot + t]);
    group->valid[at + t] = begin + t < unit.kv_len ? UINT32_MAX : 0;
  }
}

// Fills tokens [at, 16) with copies that count for nothing.
void PadGroup(size_t at, TokenGroup* group) {
  for (size_t t = at; t < kGroupTokens; ++t) {
    group->token[t] = group->token[0];
    group->scale[t] = 0.0f;
    group->valid[t] = 0;
  }
}

HWY_INLINE VU32 LoadWords(const uint8_t* const* token, size_t t, size_t byte) {
  const hn::CappedTag<uint32_t, 4> d4;
  const auto part = [&](size_t i) {
    return hn::LoadU(d4, reinterpret_cast<const uint32_t*>(token[t + 4 * i] + byte));
  };
#if HWY_MAX_BYTES == 64
  const hn::Half<DU32> dh;
  return hn::Combine(DU32(), hn::Combine(dh, part(3), part(2)), hn::Combine(dh, part(1), part(0)));
#elif HWY_MAX_BYTES == 32
  return hn::Combine(DU32(), part(1), part(0));
#else
  return part(0);
#endif
}

// words[w]: the word w (components 32 w ...) of kLanes tokens from `t` on, one per lane. Reads 16
// bytes per token; at d = 64 the upper 8 belong to what follows in the descriptor and are not used.
HWY_INLINE void TransposeWords(const uint8_t* const* token, size_t t, size_t byte,
                               VU32 (&words)[4]) {
  const DU32 d32;
  const hn::RepartitionToWide<DU32> d64;
  const VU32 a = LoadWords(token, t, byte), b = LoadWords(token, t + 1, byte);
  const VU32 c = LoadWords(token, t + 2, byte), e = LoadWords(token, t + 3, byte);
  const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
  const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d32, c, e));
  const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
  const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d32, c, e));
  words[0] = hn::BitCast(d32, hn::InterleaveLower(d64, ab_low, ce_low));
  words[1] = hn::BitCast(d32, hn::InterleaveUpper(d64, ab_low, ce_low));
  words[2] = hn::BitCast(d32, hn::InterleaveLower(d64, ab_high, ce_high));
  words[3] = hn::BitCast(d32, hn::InterleaveUpper(d64, ab_high, ce_high));
}

// Bit `kBit` of each byte of `word`, moved to bit `kTo` of that byte.
template <int kBit, int kTo>
HWY_INLINE VU32 MoveBit(VU32 word) {
  const VU32 mask = hn::Set(DU32(), 0x01010101u << kTo);
  if constexpr (kBit >= kTo) return hn::And(hn::ShiftRight<kBit - kTo>(word), mask);
  if constexpr (kBit < kTo) return hn::And(hn::ShiftLeft<kTo - kBit>(word), mask);
}

template <int kPlanes, int kBit>
HWY_INLINE VU32 CodesOfBit(const VU32 (&words)[kPlanes][4], size_t w) {
  VU32 codes = MoveBit<kBit, kPlanes - 1>(words[0][w]);
  if constexpr (kPlanes > 1) codes = hn::Or(codes, MoveBit<kBit, kPlanes - 2>(words[1][w]));
  if constexpr (kPlanes > 2) codes = hn::Or(codes, MoveBit<kBit, kPlanes - 3>(words[2][w]));
  return codes;
}

// codes[quad][16 tokens], four u8 in a lane.
template <int kPlanes>
void UnpackCodes(const TokenGroup& group, size_t d, uint32_t* codes) {
  const DU32 du;
  const size_t plane_bytes = kPageTokens * (d / 8);
  for (size_t v = 0; v < kVectors; ++v) {
    VU32 words[kPlanes][4];
    for (size_t plane = 0; plane < kPlanes; ++plane) {
      TransposeWords(group.token, v * kLanes, plane * plane_bytes, words[plane]);
    }
    for (size_t w = 0; w < d / 32; ++w) {
      uint32_t* const to = codes + w * 8 * kGroupTokens + v * kLanes;
      hn::Store(CodesOfBit<kPlanes, 0>(words, w), du, to);
      hn::Store(CodesOfBit<kPlanes, 1>(words, w), du, to + 1 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 2>(words, w), du, to + 2 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 3>(words, w), du, to + 3 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 4>(words, w), du, to + 4 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 5>(words, w), du, to + 5 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 6>(words, w), du, to + 6 * kGroupTokens);
      hn::Store(CodesOfBit<kPlanes, 7>(words, w), du, to + 7 * kGroupTokens);
    }
  }
}

using DI16 = hn::ScalableTag<int16_t>;
using VI16 = hn::Vec<DI16>;
using VI32 = hn::Vec<DI32>;

// Sums of adjacent pairs of u8 code times s8 query. |sum| <= 2 * 7 * 128, far from saturation.
HWY_INLINE VI16 PairProducts(VU32 codes, VI32 query) {
#if HWY_TARGET == HWY_AVX3
  return VI16{_mm512_maddubs_epi16(codes.raw, query.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI16{_mm256_maddubs_epi16(codes.raw, query.raw)};
#else
  const DI16 d16;
  const auto even = [&](auto v) {
    return hn::ShiftRight<8>(hn::ShiftLeft<8>(hn::BitCast(d16, v)));
  };
  const auto odd = [&](auto v) { return hn::ShiftRight<8>(hn::BitCast(d16, v)); };
  return hn::Add(hn::Mul(even(codes), even(query)), hn::Mul(odd(codes), odd(query)));
#endif
}

// The sum of the two 16-bit halves of each lane.
HWY_INLINE VI32 AddHalves(VI16 pairs) {
  const VI32 both = hn::BitCast(DI32(), pairs);
  return hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(both)), hn::ShiftRight<16>(both));
}

// dots[16]: sum over quads of codes times query, exact. A quad adds at most 2 * 7 * 128 to a 16-bit
// sum, so these are moved to 32 bits every 16 quads.
HWY_INLINE void DotCodes(const uint32_t* codes, const int32_t* query, size_t quads,
                         VI32 (&dots)[kVectors]) {
  for (VI32& dot : dots) dot = hn::Zero(DI32());
  for (size_t begin = 0; begin < quads; begin += 16) {
    VI16 sums[kVectors];
    for (VI16& sum : sums) sum = hn::Zero(DI16());
    for (size_t i = begin; i < begin + 16; ++i) {
      const VI32 q = hn::Set(DI32(), query[i]);
      for (size_t v = 0; v < kVectors; ++v) {
        const VU32 c = hn::Load(DU32(), codes + i * kGroupTokens + v * kLanes);
        sums[v] = hn::Add(sums[v], PairProducts(c, q));
      }
    }
    for (size_t v = 0; v < kVectors; ++v) dots[v] = hn::Add(dots[v], AddHalves(sums[v]));
  }
}

// A unit's scores so far, for head g and block i at [g * stride + i].
struct Masses {
  float* m;
  float* s;
  size_t stride;
};

// sums[i] = the sum of p over block i of the group, 16 / block_tokens of them (four lanes stored).
HWY_INLINE void SumBlocks(const float* p, size_t block_tokens, float* sums) {
  const D4 d;
  const hn::RepartitionToWide<D4> d2;
  const auto a = hn::Load(d, p), b = hn::Load(d, p + 4);
  const auto c = hn::Load(d, p + 8), e = hn::Load(d, p + 12);
  const auto ab =
      hn::BitCast(d2, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce =
      hn::BitCast(d2, hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  auto sum = hn::Add(hn::BitCast(d, hn::InterleaveLower(d2, ab, ce)),
                     hn::BitCast(d, hn::InterleaveUpper(d2, ab, ce)));
  if (block_tokens >= 8) {
    sum = hn::Add(sum, hn::Shuffle2301(sum));
    if (block_tokens == 16) sum = hn::Add(sum, hn::Shuffle1032(sum));
    sum = hn::ConcatEven(d, sum, sum);
  }
  hn::StoreU(sum, d, sums);
}

// Scores one group of tokens for all heads; ids[i] is the block at tokens [i * block_tokens, ...).
template <int kPlanes>
void ScoreGroup(const SelectorSpec& spec, size_t d, size_t heads, const SketchQuery& query,
                const TokenGroup& group, const size_t* ids, size_t num_ids, const Masses& masses) {
  const DF df;
  const DI32 di;
  const DU32 du;
  HWY_ALIGN uint32_t codes[kMaxQuads * kGroupTokens];
  UnpackCodes<kPlanes>(group, d, codes);
  const VF ratio = hn::Set(df, SketchScaleRatio(spec.planes, kPlanes));
  const VF none = hn::Set(df, -std::numeric_limits<float>::infinity());
  for (size_t g = 0; g < heads; ++g) {
    VI32 dots[kVectors];
    DotCodes(codes, query.quads[g], d / 4, dots);
    // sum_j q_j level_j = 2 sum_j q_j code_j - (2^p - 1) sum_j q_j
    const auto bias = hn::Set(di, ((1 << kPlanes) - 1) * query.sum[g]);
    const VF query_scale = hn::Mul(ratio, hn::Set(df, query.scale[g]));
    VF estimates[kVectors];
    VF top = hn::Set(df, kNoScore);
    for (size_t v = 0; v < kVectors; ++v) {
      const VF dot = hn::ConvertTo(df, hn::Sub(hn::Add(dots[v], dots[v]), bias));
      const VF scale = hn::Mul(hn::Load(df, group.scale + v * kLanes), query_scale);
      const VF estimate = hn::Mul(dot, scale);
      const auto valid = hn::MaskFromVec(hn::BitCast(df, hn::Load(du, group.valid + v * kLanes)));
      const auto counts = hn::And(valid, hn::IsFinite(estimate));
      estimates[v] = hn::IfThenElse(counts, estimate, none);
      top = hn::Max(top, estimates[v]);
    }
    const float m = Max1(top);
    HWY_ALIGN float p[kGroupTokens];
    for (size_t v = 0; v < kVectors; ++v) {
      hn::Store(Exp(hn::Sub(estimates[v], hn::Set(df, m))), df, p + v * kLanes);
    }
    float sums[4];
    SumBlocks(p, static_cast<size_t>(spec.block_tokens), sums);
    for (size_t i = 0; i < num_ids; ++i) {
      masses.m[g * masses.stride + ids[i]] = m;
      masses.s[g * masses.stride + ids[i]] = sums[i];
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SKETCH_SCORE_INL_H_
