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
#include <cstddef>
#include <cstdint>
#include <limits>

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
  float* o;  // [rows, d] sum of exp(score - m) v
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
      const VF values = hn::Load(d, b + i * b_stride + j * kLanes);
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

// Stores the transposed words of kLanes tokens: to[w * kWide] holds word w of all of them.
HWY_INLINE void StoreWords(VU32 words, size_t w, float* to, const float*) {
  hn::Store(hn::BitCast(DF(), words), DF(), to + w * kWide);
}
HWY_INLINE void StoreWords(VU32 words, size_t w, float* to, const bf16*) {
  hn::Store(WidenEven(words), DF(), to + 2 * w * kWide);
  hn::Store(WidenOdd(words), DF(), to + (2 * w + 1) * kWide);
}

// Asks for a token's row to be in the cache by the time its tile comes. Pages lie anywhere, so the
// hardware cannot foresee the next one.
template <class T>
HWY_INLINE void PrefetchRow(const T* row, size_t d) {
  for (size_t j = 0; j < d; j += 64 / sizeof(T)) __builtin_prefetch(row + j, 0, 2);
}

// The keys of a tile, widened and transposed: kt[panel][component][kWide tokens]. Prefetches the
// values of the next tile.
template <class T>
void TransposeKeys(const TileTokens<T>& tile, const TileTokens<T>& next, size_t d, float* kt) {
  constexpr size_t kPerWord = sizeof(uint32_t) / sizeof(T);
  const DU32 d32;
  const hn::RepartitionToWide<DU32> d64;
  for (size_t t = 0; t < kTile; t += kLanes) {
    float* const to = kt + t / kWide * d * kWide + t % kWide;
    for (size_t i = t; i < t + kLanes; ++i) PrefetchRow(next.v[i], d);
    for (size_t w = 0; w < d / kPerWord; w += 4) {
      const VU32 a = LoadParts(tile.k, t, w * kPerWord);
      const VU32 b = LoadParts(tile.k, t + 1, w * kPerWord);
      const VU32 c = LoadParts(tile.k, t + 2, w * kPerWord);
      const VU32 e = LoadParts(tile.k, t + 3, w * kPerWord);
      const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
      const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d32, c, e));
      const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
      const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d32, c, e));
      const T* const type = nullptr;
      StoreWords(hn::BitCast(d32, hn::InterleaveLower(d64, ab_low, ce_low)), w, to, type);
      StoreWords(hn::BitCast(d32, hn::InterleaveUpper(d64, ab_low, ce_low)), w + 1, to, type);
      StoreWords(hn::BitCast(d32, hn::InterleaveLower(d64, ab_high, ce_high)), w + 2, to, type);
      StoreWords(hn::BitCast(d32, hn::InterleaveUpper(d64, ab_high, ce_high)), w + 3, to, type);
    }
  }
}

// The values of a tile, widened: to[token][component]. Prefetches the keys of the next tile.
template <class T>
void WidenValues(const TileTokens<T>& tile, const TileTokens<T>& next, size_t tokens, size_t d,
                 float* to) {
  for (size_t t = 0; t < tokens; ++t) {
    PrefetchRow(next.k[t], d);
    for (size_t j = 0; j < d; j += kLanes) {
      hn::Store(LoadWide(tile.v[t] + j), DF(), to + t * d + j);
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

// Turns a row's scores of a tile's first `count` tokens into exp(score - m), moves m and l on, and
// rescales o.
HWY_INLINE void SoftmaxRow(float* scores, size_t count, size_t d, float* m, float* l, float* o) {
  const DF df;
  const VF none = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF top = none;
  for (size_t j = 0; j < count; j += kLanes) {
    VF s = hn::Load(df, scores + j);
    if (j + kLanes > count) {
      s = hn::IfThenElse(hn::FirstN(df, count - j), s, none);
      hn::Store(s, df, scores + j);
    }
    top = hn::Max(top, s);
  }
  const float m_new = std::max(*m, Max1(top));
  const VF shift = hn::Set(df, m_new);
  VF sum = hn::Zero(df);
  for (size_t j = 0; j < count; j += kLanes) {
    const VF p = Exp(hn::Sub(hn::Load(df, scores + j), shift));
    hn::Store(p, df, scores + j);
    sum = hn::Add(sum, p);
  }
  if (*m == m_new) {
    *l += Sum1(sum);
    return;
  }
  const float rescale = Exp1(*m - m_new);
  *l = *l * rescale + Sum1(sum);
  *m = m_new;
  const VF factor = hn::Set(df, rescale);
  for (size_t j = 0; j < d; j += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(df, o + j), factor), df, o + j);
  }
}

// Adds a tile to the running softmax of `rows` rows; row r attends to the tile's first counts[r]
// tokens (0: none). Counts rise with r. `tokens`: the most any row wants. `next` is the tile to
// come.
template <class T>
void AttendTile(const TileTokens<T>& tile, const TileTokens<T>& next, size_t tokens, size_t rows,
                const size_t* counts, size_t d, const Work& work, const Softmax& state) {
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
  for (size_t r = first; r < rows; ++r) {
    SoftmaxRow(work.scores + r * kTile, counts[r], d, state.m + r, state.l + r, state.o + r * d);
  }
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

// Writes o / l of one row.
HWY_INLINE void StoreSoftmaxRow(size_t r, size_t d, const Softmax& total, float* out) {
  const DF df;
  const VF l = hn::Set(df, total.l[r]);
  for (size_t j = 0; j < d; j += kLanes) {
    hn::StoreU(hn::Div(hn::LoadU(df, total.o + r * d + j), l), df, out + j);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_INL_H_
