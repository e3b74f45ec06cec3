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
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention_few_rows-inl.h"
#include "kernels/cpu/attention_softmax-inl.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kSplit = 512;   // Tokens per unit of parallel work.
constexpr size_t kMaxRows = 64;  // Query rows (token x head) that share a tile's widening.
constexpr size_t kTileRows = kLanes == 8 ? 3 : 6;
static_assert(kSplit % kTile == 0);

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

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_INL_H_
