// The core of both attention ops: exact softmax attention of a block of query rows over a list of
// tokens, in tiles. Compiled once per instruction set.
//
// Tokens are numbered by rank: the absolute position for dense attention, the place in the sorted
// id list for sparse. Tiles of kTile and splits of kSplit tokens begin at fixed ranks. Within a
// split a row keeps (m, l, o), the running maximum, sum and weighted values, rescaled once per
// tile; splits are merged in rank order. Every (row, token) product and every (row, component) sum
// is taken in rank order, one fused multiply-add after the other, whatever the register tile. So
// the bits of a row depend on its own query and tokens alone, and sparse attention that keeps
// everything gives the bits of dense attention.
//
// Nothing past a row's last token enters its sums, not even times zero: recycled pages may hold
// NaN.

#if defined(RESA_KERNELS_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_ATTENTION_INL_H_
#undef RESA_KERNELS_CPU_ATTENTION_INL_H_
#else
#define RESA_KERNELS_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kTile = 64;          // Tokens per step of the online softmax.
constexpr size_t kSplit = 512;        // Tokens per unit of parallel work.
constexpr size_t kMaxRows = 64;       // Query rows (token x head) that share a tile's widening.
constexpr size_t kWide = 4 * kLanes;  // Columns of a register tile.
constexpr size_t kTileRows = kLanes == 8 ? 3 : 6;
static_assert(kTile % kWide == 0 && kSplit % kTile == 0);

// A tile's tokens: where each one's K and V are.
template <class T>
struct TileTokens {
  const T* k[kTile];
  const T* v[kTile];
};

// The running softmax of a block of rows over some tokens.
struct Softmax {
  float* m;  // [rows] maximum of the scores; -infinity before the first
  float* l;  // [rows] sum of exp(score - m)
  float* o;  // [rows, d] sum of exp(score - m) v, components in the order of LoadPair
};
constexpr size_t SoftmaxFloats(size_t rows, size_t d) { return rows * (d + 2); }
inline Softmax SoftmaxAt(float* memory, size_t rows, size_t d) {
  return Softmax{memory + rows * d, memory + rows * (d + 1), memory};
}

// c[R][kWide] = or += a[R][n] b[n][kWide]: each sum runs through n in order.
template <size_t R>
HWY_INLINE void MultiplyTile(const float* HWY_RESTRICT a, size_t a_stride,
                             const float* HWY_RESTRICT b, size_t b_stride, size_t n,
                             bool accumulate, float* HWY_RESTRICT c, size_t c_stride) {
  const DF d;
  VF acc[R][4];
  for (size_t r = 0; r < R; ++r) {
    for (size_t j = 0; j < 4; ++j) {
      acc[r][j] = accumulate ? hn::LoadU(d, c + r * c_stride + j * kLanes) : hn::Zero(d);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    VF scale[R];
    for (size_t r = 0; r < R; ++r) scale[r] = hn::Set(d, a[r * a_stride + i]);
    for (size_t j = 0; j < 4; ++j) {
      const VF values = Pin(hn::Load(d, b + i * b_stride + j * kLanes));
      for (size_t r = 0; r < R; ++r) acc[r][j] = hn::MulAdd(scale[r], values, acc[r][j]);
    }
  }
  for (size_t r = 0; r < R; ++r) {
    for (size_t j = 0; j < 4; ++j) hn::StoreU(acc[r][j], d, c + r * c_stride + j * kLanes);
  }
}

inline void MultiplyRows(size_t rows, const float* a, size_t a_stride, const float* b,
                         size_t b_stride, size_t n, bool accumulate, float* c, size_t c_stride) {
  switch (rows) {
    case 1:
      return MultiplyTile<1>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
    case 2:
      return MultiplyTile<2>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
    case 3:
      return MultiplyTile<3>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
#if HWY_MAX_BYTES != 32
    case 4:
      return MultiplyTile<4>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
    case 5:
      return MultiplyTile<5>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
    case 6:
      return MultiplyTile<6>(a, a_stride, b, b_stride, n, accumulate, c, c_stride);
#endif
  }
}

// How many of the `left` rows the next register tile takes: 7 rows are 4 + 3, not 6 + 1.
inline size_t NextTileRows(size_t left) {
  const size_t tiles = (left + kTileRows - 1) / kTileRows;
  return (left + tiles - 1) / tiles;
}

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

// A thread's memory for one block of rows.
struct Work {
  float* q;       // [kMaxRows, d], times d^-1/2
  float* kt;      // [kTile / kWide][d][kWide]
  float* v;       // [kTile, d]
  float* scores;  // [kMaxRows, kTile], then their exponentials
  Softmax split;  // Of the current split
  Softmax total;  // Of the splits so far
};
constexpr size_t WorkBytes(size_t d) {
  return Scratch::BytesFor<float>(kMaxRows * d) + 2 * Scratch::BytesFor<float>(kTile * d) +
         Scratch::BytesFor<float>(kMaxRows * kTile) +
         2 * Scratch::BytesFor<float>(SoftmaxFloats(kMaxRows, d));
}
inline Work TakeWork(Scratch& scratch, size_t d) {
  Work work;
  work.q = scratch.Take<float>(kMaxRows * d);
  work.kt = scratch.Take<float>(kTile * d);
  work.v = scratch.Take<float>(kTile * d);
  work.scores = scratch.Take<float>(kMaxRows * kTile);
  work.split = SoftmaxAt(scratch.Take<float>(SoftmaxFloats(kMaxRows, d)), kMaxRows, d);
  work.total = SoftmaxAt(scratch.Take<float>(SoftmaxFloats(kMaxRows, d)), kMaxRows, d);
  return work;
}

// Turns N <= 4 rows' scores of a tile into exp(score - m), row r over its first counts[r] > 0
// tokens, moves m and l on, and rescales o. Rows go together because each is a chain of short
// reductions.
template <size_t N>
HWY_INLINE void SoftmaxRows(float* scores, const size_t* counts, size_t d, float* m, float* l,
                            float* o) {
  const DF df;
  const D4 d4;
  const VF none = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF tops[4] = {none, none, none, none};
  for (size_t r = 0; r < N; ++r) {
    float* const row = scores + r * kTile;
    for (size_t j = 0; j < counts[r]; j += kLanes) {
      VF s = hn::Load(df, row + j);
      if (j + kLanes > counts[r]) {
        s = hn::IfThenElse(hn::FirstN(df, counts[r] - j), s, none);
        hn::Store(s, df, row + j);
      }
      tops[r] = hn::Max(tops[r], s);
    }
  }
  HWY_ALIGN float before[4] = {}, after[4], factors[kLanes] = {}, totals[4];
  std::copy_n(m, N, before);
  const auto m_before = hn::Load(d4, before);
  const auto m_after = hn::Max(m_before, Max4(tops[0], tops[1], tops[2], tops[3]));
  hn::Store(m_after, d4, after);
  // exp(0) is 1, exactly; -infinity is the m of a row that has seen nothing.
  hn::Store(hn::Sub(m_before, m_after), d4, factors);
  hn::Store(Exp(hn::Load(df, factors)), df, factors);

  VF sums[4] = {hn::Zero(df), hn::Zero(df), hn::Zero(df), hn::Zero(df)};
  for (size_t r = 0; r < N; ++r) {
    float* const row = scores + r * kTile;
    const VF shift = hn::Set(df, after[r]);
    for (size_t j = 0; j < counts[r]; j += kLanes) {
      const VF p = Exp(hn::Sub(hn::Load(df, row + j), shift));
      hn::Store(p, df, row + j);
      sums[r] = hn::Add(sums[r], p);
    }
  }
  hn::Store(Sum4(sums[0], sums[1], sums[2], sums[3]), d4, totals);
  for (size_t r = 0; r < N; ++r) {
    m[r] = after[r];
    l[r] = l[r] * factors[r] + totals[r];
    if (factors[r] == 1.0f) continue;
    const VF factor = hn::Set(df, factors[r]);
    for (size_t j = r * d; j < (r + 1) * d; j += kLanes) {
      hn::StoreU(hn::Mul(hn::LoadU(df, o + j), factor), df, o + j);
    }
  }
}

// The same for rows [begin, end).
inline void SoftmaxTile(float* scores, const size_t* counts, size_t begin, size_t end, size_t d,
                        const Softmax& state) {
  const auto rows = [&](size_t r, auto n) HWY_ATTR {
    SoftmaxRows<decltype(n)::value>(scores + r * kTile, counts + r, d, state.m + r, state.l + r,
                                    state.o + r * d);
  };
  size_t r = begin;
  for (; r + 4 <= end; r += 4) rows(r, std::integral_constant<size_t, 4>());
  if (end - r == 3) rows(r, std::integral_constant<size_t, 3>());
  if (end - r == 2) rows(r, std::integral_constant<size_t, 2>());
  if (end - r == 1) rows(r, std::integral_constant<size_t, 1>());
}

// ---- few rows: keys and values are used from registers ----------------------------------------
//
// A decode step has one row per head of the group: too few to pay for a widened copy of the tile in
// memory. The same products are added in the same order.

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

// AttendTile for few rows with the same count.
template <class T>
void AttendTileFew(const TileTokens<T>& tile, const TileTokens<T>& next, size_t rows,
                   const size_t* counts, size_t d, const Work& work, const Softmax& state) {
  const size_t tokens = counts[0];
  if (tokens == 0) return;
  ForFewRows<kFewScoreRows>(rows, [&](size_t r, auto count) HWY_ATTR {
    ScoreFew<decltype(count)::value>(tile, next, r == 0, tokens, work.q + r * d, d,
                                     work.scores + r * kTile);
  });
  SoftmaxTile(work.scores, counts, 0, rows, d, state);
  ForFewRows<kFewValueRows>(rows, [&](size_t r, auto count) HWY_ATTR {
    AddValuesFew<decltype(count)::value>(tile, next, r == 0, tokens, work.scores + r * kTile, d,
                                         state.o + r * d);
  });
}

// ---- any number of rows -------------------------------------------------------------------------

// Adds a tile to the running softmax of `rows` rows; row r attends to the tile's first counts[r]
// tokens (0: none). Counts rise with r. `tokens`: the most any row wants. `next` is the tile to
// come.
template <class T>
void AttendTile(const TileTokens<T>& tile, const TileTokens<T>& next, size_t tokens, size_t rows,
                const size_t* counts, size_t d, const Work& work, const Softmax& state) {
  if (rows <= kFewRows && counts[0] == counts[rows - 1]) {
    return AttendTileFew(tile, next, rows, counts, d, work, state);
  }
  TransposeKeys(tile, next, d, work.kt);
  WidenValues(tile, next, tokens, d, work.v);
  size_t first = 0;
  while (first < rows && counts[first] == 0) ++first;
  for (size_t r = first, n = 0; r < rows; r += n) {
    n = NextTileRows(rows - r);
    for (size_t t = 0; t < tokens; t += kWide) {
      MultiplyRows(n, work.q + r * d, d, work.kt + t * d, kWide, d, false,
                   work.scores + r * kTile + t, kTile);
    }
  }
  SoftmaxTile(work.scores, counts, first, rows, d, state);
  for (size_t r = first, n = 0; r < rows; r += n) {
    n = NextTileRows(rows - r);
    const size_t common = counts[r];  // What every row of the register tile attends to ...
    for (size_t j = 0; j < d; j += kWide) {
      MultiplyRows(n, work.scores + r * kTile, kTile, work.v + j, d, common, true,
                   state.o + r * d + j, d);
      for (size_t i = r; i < r + n; ++i) {  // ... and the rest, for the later ones alone.
        if (counts[i] == common) continue;
        MultiplyRows(1, work.scores + i * kTile + common, kTile, work.v + common * d + j, d,
                     counts[i] - common, true, state.o + i * d + j, d);
      }
    }
  }
}

inline void ResetSoftmax(size_t rows, size_t d, const Softmax& state) {
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.o, rows * d, 0.0f);
}

// Merges the next split of row r into `total`, whose earlier splits it follows.
HWY_INLINE void MergeSoftmaxRow(size_t r, size_t d, const Softmax& split, const Softmax& total) {
  const DF df;
  const float m = std::max(total.m[r], split.m[r]);
  const float keep = Exp1(total.m[r] - m);
  const float add = Exp1(split.m[r] - m);
  total.m[r] = m;
  total.l[r] = total.l[r] * keep + split.l[r] * add;
  float* const to = total.o + r * d;
  const float* const from = split.o + r * d;
  for (size_t j = 0; j < d; j += kLanes) {
    const VF kept = hn::Mul(hn::LoadU(df, to + j), hn::Set(df, keep));
    hn::StoreU(hn::MulAdd(hn::LoadU(df, from + j), hn::Set(df, add), kept), df, to + j);
  }
}

// Writes o / l of one row, in the order of components.
template <class T>
HWY_INLINE void StoreSoftmaxRow(size_t r, size_t d, const Softmax& total, float* out) {
  const DF df;
  const T* const type = nullptr;
  const VF l = hn::Set(df, total.l[r]);
  for (size_t j = 0; j < d; j += 2 * kLanes) {
    const float* const o = total.o + r * d + j;
    StorePair(hn::Div(hn::LoadU(df, o), l), hn::Div(hn::LoadU(df, o + kLanes), l), out + j, type);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_INL_H_
