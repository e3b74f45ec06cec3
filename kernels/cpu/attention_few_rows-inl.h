// The two products of a tile for few rows, keys and values used straight from registers. A decode
// step has one row per head of the group: too few to pay for a widened copy of the tile in memory.
// The same products are added in the same order as in attention-inl.h. Compiled once per
// instruction set.

#if defined(RESA_KERNELS_CPU_ATTENTION_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_ATTENTION_FEW_ROWS_INL_H_
#undef RESA_KERNELS_CPU_ATTENTION_FEW_ROWS_INL_H_
#else
#define RESA_KERNELS_CPU_ATTENTION_FEW_ROWS_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/params.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kFewRows = kMaxGroup;
constexpr size_t kFewScoreRows = HWY_MAX_BYTES == 32 ? 7 : 8;  // Rows of one pass over the keys,
constexpr size_t kFewValueRows = HWY_MAX_BYTES == 32 ? 4 : 8;  // and over the values.

// acc[g][r] += q[r][i] times component i of the group's keys, for i from I to the end of the four
// words. Unrolled by hand: the words have to stay in registers.
template <size_t I, class T, size_t G, size_t R>
HWY_INLINE void AddComponents(const float* HWY_RESTRICT q, size_t d, const VU32 (&words)[G][4],
                              VF (&acc)[G][R]) {
  const T* const type = nullptr;
  VF key[G];
  for (size_t g = 0; g < G; ++g) {
    key[g] = Pin(ComponentOf(words[g][I / kPerWord<T>], I % kPerWord<T>, type));
  }
  for (size_t r = 0; r < R; ++r) {
    const VF scale = hn::Set(DF(), q[r * d + I]);
    for (size_t g = 0; g < G; ++g) acc[g][r] = hn::MulAdd(scale, key[g], acc[g][r]);
  }
  if constexpr (I + 1 < 4 * kPerWord<T>) AddComponents<I + 1, T>(q, d, words, acc);
}

// scores[r][token] of R rows. Prefetches the keys of the next tile when `prefetch`.
template <size_t R, class T>
HWY_INLINE void ScoreFew(const TileTokens<T>& tile, const TileTokens<T>& next, bool prefetch,
                         size_t tokens, const float* HWY_RESTRICT q, size_t d,
                         float* HWY_RESTRICT scores) {
  // Enough sums to keep both multipliers busy, and one load of a query component for all of them.
  constexpr size_t kGroups = R <= 4 || HWY_MAX_BYTES == 64 ? 2 : 1;
  static_assert(kTile % (kGroups * kLanes) == 0);
  const DF df;
  const auto log_d = static_cast<size_t>(std::countr_zero(d));
  for (size_t t = 0; t < tokens; t += kGroups * kLanes) {
    VF acc[kGroups][R];
    for (size_t g = 0; g < kGroups; ++g) {
      for (size_t r = 0; r < R; ++r) acc[g][r] = hn::Zero(df);
    }
    for (size_t c = 0; c < d; c += 4 * kPerWord<T>) {
      if (prefetch) {
        constexpr size_t kLines = kGroups * kLanes / 4;  // A quarter of a line per token and step.
        const size_t line = t * d * sizeof(T) / 64 + c / (4 * kPerWord<T>)*kLines;
        for (size_t i = line; i < line + kLines; ++i) PrefetchLine(next.k, i, log_d);
      }
      VU32 words[kGroups][4];
      for (size_t g = 0; g < kGroups; ++g) {
        TransposeWords(tile.k, t + g * kLanes, c, words[g]);
      }
      AddComponents<0, T>(q + c, d, words, acc);
    }
    for (size_t g = 0; g < kGroups; ++g) {
      for (size_t r = 0; r < R; ++r) {
        hn::Store(acc[g][r], df, scores + r * kTile + t + g * kLanes);
      }
    }
  }
}

// o[r] += sum over the tile's first `tokens` of p[r][token] v[token], for R rows. Prefetches the
// values of the next tile when `prefetch`.
template <size_t R, class T>
HWY_INLINE void AddValuesFew(const TileTokens<T>& tile, const TileTokens<T>& next, bool prefetch,
                             size_t tokens, const float* HWY_RESTRICT p, size_t d,
                             float* HWY_RESTRICT o) {
  constexpr size_t kPairs = R <= 3 ? 2 : 1;
  constexpr size_t kStep = 2 * kLanes * kPairs;
  const DF df;
  const auto log_d = static_cast<size_t>(std::countr_zero(d));
  for (size_t j = 0; j < d; j += kStep) {
    VF acc[R][2 * kPairs];
    for (size_t r = 0; r < R; ++r) {
      for (size_t i = 0; i < 2 * kPairs; ++i) acc[r][i] = hn::LoadU(df, o + r * d + j + i * kLanes);
    }
    for (size_t t = 0; t < tokens; ++t) {
      if (prefetch) PrefetchLine(next.v, (j / kStep * tokens + t) * kStep * sizeof(T) / 64, log_d);
      for (size_t i = 0; i < 2 * kPairs; i += 2) {
        VF first, second;
        LoadPair(tile.v[t] + j + i * kLanes, &first, &second);
        first = Pin(first);
        second = Pin(second);
        for (size_t r = 0; r < R; ++r) {
          const VF scale = hn::Set(df, p[r * kTile + t]);
          acc[r][i] = hn::MulAdd(scale, first, acc[r][i]);
          acc[r][i + 1] = hn::MulAdd(scale, second, acc[r][i + 1]);
        }
      }
    }
    for (size_t r = 0; r < R; ++r) {
      for (size_t i = 0; i < 2 * kPairs; ++i) hn::StoreU(acc[r][i], df, o + r * d + j + i * kLanes);
    }
  }
}

// Calls body(first row, std::integral_constant<size_t, count>) for parts of `rows` of similar size,
// none above kMost.
template <size_t kMost, class Body>
HWY_INLINE void ForFewRows(size_t rows, const Body& body) {
  const size_t parts = (rows + kMost - 1) / kMost;
  for (size_t r = 0, n = 0, part = 0; part < parts; ++part, r += n) {
    n = (rows - r + parts - part - 1) / (parts - part);
    switch (n) {
      case 1:
        body(r, std::integral_constant<size_t, 1>());
        break;
      case 2:
        body(r, std::integral_constant<size_t, 2>());
        break;
      case 3:
        body(r, std::integral_constant<size_t, 3>());
        break;
      case 4:
        body(r, std::integral_constant<size_t, 4>());
        break;
      case 5:
        body(r, std::integral_constant<size_t, std::min<size_t>(kMost, 5)>());
        break;
      case 6:
        body(r, std::integral_constant<size_t, std::min<size_t>(kMost, 6)>());
        break;
      case 7:
        body(r, std::integral_constant<size_t, std::min<size_t>(kMost, 7)>());
        break;
      default:
        body(r, std::integral_constant<size_t, kMost>());
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_FEW_ROWS_INL_H_
