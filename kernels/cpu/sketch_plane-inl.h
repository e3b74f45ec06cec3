// Estimates with the sign plane alone by table look-up, for instruction sets without a four-way
// multiply-add: half the work of codes. Compiled once per instruction set.
//
// Four bits of a plane are four signs, so four components of the query have sixteen signed sums: a
// table that one byte shuffle reads for 32 tokens (known from product quantisation as fast scan).
// Eight components of a query sum to 127 at most (kernels/sketch.h), so two look-ups add up in 8
// bits; with 128 added they are positive, and pairs of bytes go on in 16 bits, as the sum of whole
// words and that of their upper bytes.

#if defined(RESA_KERNELS_CPU_SKETCH_PLANE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SKETCH_PLANE_INL_H_
#undef RESA_KERNELS_CPU_SKETCH_PLANE_INL_H_
#else
#define RESA_KERNELS_CPU_SKETCH_PLANE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr bool kReadPlaneByTables = HWY_TARGET != HWY_AVX3_DL;
constexpr size_t kNibbles = kMaxHeadDim / 4;

using D8 = hn::CappedTag<uint8_t, kPairTokens>;
using D16Table = hn::CappedTag<uint8_t, 16>;

struct PlaneTables {
  alignas(64) uint8_t of_head[kMaxGroup][kNibbles][16];
};

struct SignPatterns {
  alignas(64) int8_t flip[4][16];  // [bit][nibble]: -1 where the bit is 0
};
constexpr SignPatterns MakeSignPatterns() {
  SignPatterns patterns = {};
  for (int bit = 0; bit < 4; ++bit) {
    for (int nibble = 0; nibble < 16; ++nibble) {
      patterns.flip[bit][nibble] = ((nibble >> bit) & 1) != 0 ? 0 : -1;
    }
  }
  return patterns;
}
inline constexpr SignPatterns kSignPatterns = MakeSignPatterns();

// The tables of the queries' s8 values; those of even nibbles have 128 added.
inline void PrepareTables(const SketchQuery& query, size_t group, size_t d, PlaneTables* out) {
  const hn::RebindToSigned<D16Table> ds;
  const D16Table du;
  for (size_t g = 0; g < group; ++g) {
    const int8_t* q = query.rounded[g];
    for (size_t nibble = 0; nibble < d / 4; ++nibble, q += 4) {
      auto sum = hn::Set(ds, static_cast<int8_t>(nibble % 2 == 0 ? -128 : 0));
      for (size_t bit = 0; bit < 4; ++bit) {
        const auto flip = hn::Load(ds, kSignPatterns.flip[bit]);
        sum = hn::Add(sum, hn::Sub(hn::Xor(hn::Set(ds, q[bit]), flip), flip));
      }
      hn::Store(hn::BitCast(du, sum), du, out->of_head[g][nibble]);
    }
  }
}

// Words [4 r, 4 r + 4) of a row of each page that a vector of D8 holds tokens of: 128 bits a page.
HWY_INLINE hn::Vec<D8> LoadWords(const PagePair& pair, size_t page, size_t row, size_t r) {
  const D16Table half;
  const auto load = [&](size_t i) {
    const uint32_t* const from = pair.words[page + i] + row * kPageTokens + 4 * r;
    return hn::LoadU(half, reinterpret_cast<const uint8_t*>(from));
  };
#if HWY_MAX_BYTES >= 32
  return hn::Combine(D8(), load(1), load(0));
#else
  return load(0);
#endif
}

// nibbles[i][token]: four bits of the sign plane, components 4 i ..., as table indices.
inline void UnpackNibbles(const PagePair& pair, size_t d, uint8_t (*nibbles)[kPairTokens]) {
  const D8 d8;
  const hn::Repartition<uint32_t, D8> d32;
  const hn::Repartition<uint64_t, D8> d64;
  // Brings the same byte of four words together.
  alignas(16) static constexpr uint8_t kByByte[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                      2, 6, 10, 14, 3, 7, 11, 15};
  const auto by_byte = hn::LoadDup128(d8, kByByte);
  const auto low = hn::Set(d8, uint8_t{15});
  for (size_t w = 0; w < d / 32; ++w) {
    for (size_t page = 0; page < 2; page += hn::Lanes(d8) / kPageTokens) {
      const auto grouped = [&](size_t r) {
        return hn::BitCast(d32, hn::TableLookupBytes(LoadWords(pair, page, w, r), by_byte));
      };
      // Four by four groups are transposed: a vector per byte of the words, tokens in order.
      const auto a = grouped(0), b = grouped(1), c = grouped(2), e = grouped(3);
      const auto ab01 = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
      const auto ab23 = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
      const auto ce01 = hn::BitCast(d64, hn::InterleaveLower(d32, c, e));
      const auto ce23 = hn::BitCast(d64, hn::InterleaveUpper(d32, c, e));
      const auto store = [&](auto bytes64, size_t byte) {
        const auto bytes = hn::BitCast(d8, bytes64);
        uint8_t* const to = nibbles[w * 8 + byte * 2] + page * kPageTokens;
        hn::Store(hn::And(bytes, low), d8, to);
        hn::Store(hn::ShiftRight<4>(bytes), d8, to + kPairTokens);
      };
      store(hn::InterleaveLower(d64, ab01, ce01), 0);
      store(hn::InterleaveUpper(d64, ab01, ce01), 1);
      store(hn::InterleaveLower(d64, ab23, ce23), 2);
      store(hn::InterleaveUpper(d64, ab23, ce23), 3);
    }
  }
}

// dots[token]: sum over components of the s8 query with the plane's signs.
template <size_t kDim>
HWY_INLINE void DotPlane(const uint8_t (*nibbles)[kPairTokens], const uint8_t (*tables)[16],
                         int16_t* dots) {
  const D8 d8;
  const hn::Repartition<uint16_t, D8> d16;
  const hn::Repartition<int16_t, D8> di16;
  const auto bias = hn::Set(d16, static_cast<uint16_t>(kDim / 8 * 128));
  for (size_t at = 0; at < kPairTokens; at += hn::Lanes(d8)) {
    auto words = hn::Zero(d16), upper = hn::Zero(d16);
    for (size_t i = 0; i < kDim / 4; i += 2) {
      const auto even =
          hn::TableLookupBytes(hn::LoadDup128(d8, tables[i]), hn::Load(d8, nibbles[i] + at));
      const auto odd = hn::TableLookupBytes(hn::LoadDup128(d8, tables[i + 1]),
                                            hn::Load(d8, nibbles[i + 1] + at));
      const auto both = hn::BitCast(d16, hn::Add(even, odd));
      words = hn::Add(words, both);
      upper = hn::Add(upper, hn::ShiftRight<8>(both));
    }
    const auto lower = hn::Sub(words, hn::ShiftLeft<8>(upper));
    hn::StoreInterleaved2(hn::BitCast(di16, hn::Sub(lower, bias)),
                          hn::BitCast(di16, hn::Sub(upper, bias)), di16, dots + at);
  }
}

// EstimatePair() for one plane.
template <size_t kDim>
void EstimatePairByTables(const uint8_t (*nibbles)[kPairTokens], size_t group,
                          const PlaneTables& tables, const TokenFactors& tokens, size_t at,
                          ChunkEstimates* out) {
  const DF df;
  const hn::Rebind<int16_t, DF> d16;
  for (size_t g = 0; g < group; ++g) {
    HWY_ALIGN int16_t dots[kPairTokens];
    DotPlane<kDim>(nibbles, tables.of_head[g], dots);

    float* const to = out->of_head[g] + at;
    for (size_t t = 0; t < kPairTokens; t += kLanes) {
      const VF dot = hn::ConvertTo(df, hn::PromoteTo(DI32(), hn::Load(d16, dots + t)));
      const VF scale = hn::Load(df, tokens.scale + t), offset = hn::Load(df, tokens.offset + t);
      hn::Store(hn::MulAdd(dot, scale, offset), df, to + t);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SKETCH_PLANE_INL_H_
