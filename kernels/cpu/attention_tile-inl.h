// The keys and values of a tile of tokens on their way from pages that lie anywhere into registers.
// Compiled once per instruction set.

#if defined(RESA_KERNELS_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#undef RESA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#else
#define RESA_KERNELS_CPU_ATTENTION_TILE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kTile = 64;          // Tokens per step of the online softmax.
constexpr size_t kWide = 4 * kLanes;  // Tokens of a panel of transposed keys.
static_assert(kTile % kWide == 0);

// A tile's tokens: where each one's K and V are.
template <class T>
struct TileTokens {
  const T* k[kTile];
  const T* v[kTile];
};

// One vector of 32-bit words: four consecutive words of each of the tokens t, t + 4, t + 8, ..., a
// 128-bit part each.
template <class T>
HWY_INLINE VU32 LoadParts(const T* const* tokens, size_t t, size_t element) {
  const hn::CappedTag<uint32_t, 4> d4;
  const auto part = [&](size_t i) {
    return hn::LoadU(d4, reinterpret_cast<const uint32_t*>(tokens[t + 4 * i] + element));
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

// words[i]: the word i of four at `element` of each of the kLanes tokens from t on.
template <class T>
HWY_INLINE void TransposeWords(const T* const* tokens, size_t t, size_t element, VU32 (&words)[4]) {
  const DU32 d32;
  const hn::RepartitionToWide<DU32> d64;
  const VU32 a = LoadParts(tokens, t, element), b = LoadParts(tokens, t + 1, element);
  const VU32 c = LoadParts(tokens, t + 2, element), e = LoadParts(tokens, t + 3, element);
  const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
  const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d32, c, e));
  const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
  const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d32, c, e));
  words[0] = hn::BitCast(d32, hn::InterleaveLower(d64, ab_low, ce_low));
  words[1] = hn::BitCast(d32, hn::InterleaveUpper(d64, ab_low, ce_low));
  words[2] = hn::BitCast(d32, hn::InterleaveLower(d64, ab_high, ce_high));
  words[3] = hn::BitCast(d32, hn::InterleaveUpper(d64, ab_high, ce_high));
}

// A word of keys holds one f32 component, or two bf16.
template <class T>
constexpr size_t kPerWord = sizeof(uint32_t) / sizeof(T);
HWY_INLINE VF ComponentOf(VU32 words, size_t, const float*) { return hn::BitCast(DF(), words); }
HWY_INLINE VF ComponentOf(VU32 words, size_t i, const bf16*) {
  return i == 0 ? WidenEven(words) : WidenOdd(words);
}

// 2 kLanes consecutive values as two vectors: as they lie (f32), or the even and the odd ones.
HWY_INLINE void LoadPair(const float* from, VF* first, VF* second) {
  *first = hn::LoadU(DF(), from);
  *second = hn::LoadU(DF(), from + kLanes);
}
HWY_INLINE void LoadPair(const bf16* from, VF* first, VF* second) {
  const VU32 pairs =
      hn::BitCast(DU32(), hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(from)));
  *first = WidenEven(pairs);
  *second = WidenOdd(pairs);
}
// Back to the order of components.
HWY_INLINE void StorePair(VF first, VF second, float* to, const float*) {
  hn::StoreU(first, DF(), to);
  hn::StoreU(second, DF(), to + kLanes);
}
HWY_INLINE void StorePair(VF first, VF second, float* to, const bf16*) {
  hn::StoreInterleaved2(first, second, DF(), to);
}

// Asks for a token's row to be in the cache by the time its tile comes. Pages lie anywhere, so the
// hardware cannot foresee the next one.
template <class T>
HWY_INLINE void PrefetchRow(const T* row, size_t d) {
  for (size_t j = 0; j < d; j += 64 / sizeof(T)) __builtin_prefetch(row + j, 0, 2);
}

// Asks for the i-th cache line of a tile's rows, of d = 2^log_d values each. Lines are asked for
// one by one while others are used (a burst would wait for itself), and in the order of memory, so
// that the hardware sees a stream inside each page.
template <class T>
HWY_INLINE void PrefetchLine(const T* const* rows, size_t i, size_t log_d) {
  const size_t value = i * (64 / sizeof(T));
  __builtin_prefetch(rows[value >> log_d] + (value & ((size_t{1} << log_d) - 1)), 0, 2);
}

// The keys of a tile, widened and transposed: kt[panel][component][kWide tokens]. Prefetches the
// values of the next tile.
template <class T>
void TransposeKeys(const TileTokens<T>& tile, const TileTokens<T>& next, size_t d, float* kt) {
  const T* const type = nullptr;
  for (size_t t = 0; t < kTile; t += kLanes) {
    float* const to = kt + t / kWide * d * kWide + t % kWide;
    for (size_t i = t; i < t + kLanes; ++i) PrefetchRow(next.v[i], d);
    for (size_t c = 0; c < d; c += 4 * kPerWord<T>) {
      VU32 words[4];
      TransposeWords(tile.k, t, c, words);
      for (size_t i = 0; i < 4 * kPerWord<T>; ++i) {
        hn::Store(ComponentOf(words[i / kPerWord<T>], i % kPerWord<T>, type), DF(),
                  to + (c + i) * kWide);
      }
    }
  }
}

// The values of a tile, widened: to[token][d], components in the order of LoadPair. Prefetches the
// keys of the next tile.
template <class T>
void WidenValues(const TileTokens<T>& tile, const TileTokens<T>& next, size_t tokens, size_t d,
                 float* to) {
  for (size_t t = 0; t < tokens; ++t) {
    PrefetchRow(next.k[t], d);
    for (size_t j = 0; j < d; j += 2 * kLanes) {
      VF first, second;
      LoadPair(tile.v[t] + j, &first, &second);
      hn::Store(first, DF(), to + t * d + j);
      hn::Store(second, DF(), to + t * d + j + kLanes);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_TILE_INL_H_
