// out = x weight^T for f32 rows and bf16 weights.
//
// The sum over K of one (row, column) is cut in equal chunks of at most kMaxChunk, at places fixed
// by K. Within a chunk one vector accumulator takes, for each group of 2 kLanes elements, first the
// even and then the odd ones; its lanes are then added in a fixed tree, and the chunks' sums in
// order. Register tiles hold many such accumulators but never change the order inside one, so a
// result has the same bits in every batch, tile and task.
//
// Weights are used as they lie in memory. Widening a bf16 costs one operation when even and odd
// elements go to different vectors (a shift, a mask), so x is rearranged to match, once per call.
//   Few rows: bound by the reading of weights, then by the widening. All rows share a widened
//   weight while it is in a register, up to eight of them; the columns come in the order of memory.
//   Many rows: a panel of columns is widened into the first-level cache and used by a block of rows
//   that stays in the second.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kMaxChunk = 1024;  // Elements of K per partial sum.
constexpr size_t kPanel = 24;       // Columns of a task,
constexpr size_t kSumsStride = 32;  // and room for the sums of a row of them.
// Rows of a register tile on weights as stored,
constexpr size_t kStoredRows = HWY_MAX_BYTES == 32 ? 6 : 8;
constexpr size_t kWidenedRows = 6;      // and on widened ones.
constexpr size_t kDirectRows = 32;      // Up to here weights are widened in registers.
constexpr size_t kWidenedCols = 8;      // Columns that are widened together.
constexpr size_t kRowBlock = 96;        // Rows that share one widening.
constexpr size_t kTasksPerThread = 12;  // So that none trails at the end for long.
constexpr size_t kSkew = 16;            // Keeps rows from meeting in the same sets of a cache.
static_assert(kPanel % kWidenedCols == 0 && kRowBlock % kWidenedRows == 0);

// The length of K's chunks.
inline size_t ChunkOf(size_t k) {
  const size_t chunks = (k + kMaxChunk - 1) / kMaxChunk;
  constexpr size_t kStep = 2 * kLanes;
  return ((k + chunks - 1) / chunks + kStep - 1) / kStep * kStep;
}

// The columns of a register tile of so many rows. Accumulators, a weight per column, one x and a
// mask have to fit in 16 registers on AVX2, 32 elsewhere; eight accumulators keep both multipliers
// busy.
constexpr size_t ColsOfTile(size_t rows) {
  constexpr bool kWide = HWY_MAX_BYTES != 32;
  return rows <= 2 ? 4 : rows == 3 ? (kWide ? 4 : 3) : kWide ? (rows <= 6 ? 4 : 3) : 2;
}

// Where a tile's weights come from: bf16 rows as stored, ...
struct Stored {
  const uint16_t* column[4];
  const uint16_t* next[4];  // What the tile after this one reads.
  HWY_INLINE VU32 Pairs(size_t c, size_t k) const {
    return hn::BitCast(DU32(), hn::LoadU(DU16(), column[c] + k));
  }
  HWY_INLINE VF Even(size_t c, size_t k) const { return WidenEven(Pairs(c, k)); }
  HWY_INLINE VF Odd(size_t c, size_t k) const { return WidenOdd(Pairs(c, k)); }
  // The hardware's own prefetching stops at the end of a page, and sees no order in several
  // columns.
  HWY_INLINE void Prefetch(size_t c, size_t k) const { __builtin_prefetch(next[c] + k, 0, 3); }
};
// ... or widened columns.
struct Widened {
  const float* column[4];
  HWY_INLINE VF Even(size_t c, size_t k) const { return hn::Load(DF(), column[c] + k); }
  HWY_INLINE VF Odd(size_t c, size_t k) const { return hn::Load(DF(), column[c] + k + kLanes); }
  HWY_INLINE void Prefetch(size_t, size_t) const {}
};

// sums[r][c] = or += the chunk's partial sum; k is a multiple of 2 kLanes.
template <size_t R, size_t C, class Weights>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, size_t x_stride, const Weights& weights, size_t k,
                     bool first, float* HWY_RESTRICT sums) {
  const DF d;
  constexpr size_t kSums = (R * C + 3) / 4 * 4;
  VF acc[kSums];
  for (VF& sum : acc) sum = hn::Zero(d);
  for (size_t i = 0; i < k; i += 2 * kLanes) {
    VF w[C];
    for (size_t c = 0; c < C; ++c) {
      weights.Prefetch(c, i);
      w[c] = weights.Even(c, i);
    }
    for (size_t r = 0; r < R; ++r) {
      const VF value = Pin(hn::Load(d, x + r * x_stride + i));
      for (size_t c = 0; c < C; ++c) acc[r * C + c] = hn::MulAdd(w[c], value, acc[r * C + c]);
    }
    for (size_t c = 0; c < C; ++c) w[c] = weights.Odd(c, i);
    for (size_t r = 0; r < R; ++r) {
      const VF value = Pin(hn::Load(d, x + r * x_stride + i + kLanes));
      for (size_t c = 0; c < C; ++c) acc[r * C + c] = hn::MulAdd(w[c], value, acc[r * C + c]);
    }
  }
  HWY_ALIGN float flat[kSums];
  for (size_t i = 0; i < kSums; i += 4) {
    hn::Store(Sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]), D4(), flat + i);
  }
  for (size_t r = 0; r < R; ++r) {
    float* const to = sums + r * kSumsStride;
    if constexpr (C == 2 || C == 4) {
      const hn::CappedTag<float, C> dc;
      const auto sum = hn::LoadU(dc, flat + r * C);
      hn::StoreU(first ? sum : hn::Add(hn::LoadU(dc, to), sum), dc, to);
    } else {
      for (size_t c = 0; c < C; ++c) to[c] = first ? flat[r * C + c] : to[c] + flat[r * C + c];
    }
  }
}

// Rearranges a row: each group of 2 kLanes becomes its even and then its odd elements, the last one
// padded with zeros.
void PackRow(const float* x, size_t n, float* to) {
  const DF d;
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VF a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + kLanes);
    hn::Store(hn::ConcatEven(d, b, a), d, to + i);
    hn::Store(hn::ConcatOdd(d, b, a), d, to + i + kLanes);
  }
  if (i == n) return;
  HWY_ALIGN float tail[2 * kLanes] = {};
  std::memcpy(tail, x + i, (n - i) * sizeof(float));
  const VF a = hn::Load(d, tail), b = hn::Load(d, tail + kLanes);
  hn::Store(hn::ConcatEven(d, b, a), d, to + i);
  hn::Store(hn::ConcatOdd(d, b, a), d, to + i + kLanes);
}

// The weights [begin, begin + count) of a row, widened and padded to a multiple of 2 kLanes.
void WidenRow(const uint16_t* weights, size_t count, float* to) {
  const DF d;
  size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const VU32 pairs = hn::BitCast(DU32(), hn::LoadU(DU16(), weights + i));
    hn::Store(WidenEven(pairs), d, to + i);
    hn::Store(WidenOdd(pairs), d, to + i + kLanes);
  }
  if (i == count) return;
  HWY_ALIGN uint16_t tail[2 * kLanes] = {};
  std::memcpy(tail, weights + i, (count - i) * sizeof(uint16_t));
  const VU32 pairs = hn::BitCast(DU32(), hn::Load(DU16(), tail));
  hn::Store(WidenEven(pairs), d, to + i);
  hn::Store(WidenOdd(pairs), d, to + i + kLanes);
}

struct Problem {
  const float* x;  // [rows, k_padded], packed
  size_t rows;
  size_t k;                 // Of the weights.
  size_t k_padded;          // From row to row of x: k rounded up to 2 kLanes, and kSkew.
  size_t chunk;             // ChunkOf(k)
  const uint16_t* weights;  // [cols, k]
  size_t cols;
  const float* bias;
  bool accumulate;
  float* out;  // [rows, cols]
};

inline size_t PadStep(size_t n) { return (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// Columns [begin, begin + count) for few rows. sums: [rows, kSumsStride].
void PanelDirect(const Problem& p, size_t begin, size_t count, float* sums) {
  // Tiles of similar size rather than full ones and a remainder: 9 rows are 5 + 4, not 6 + 3. The
  // first `larger` have `step` rows, the others one less.
  const size_t tiles = (p.rows + kStoredRows - 1) / kStoredRows;
  const size_t step = (p.rows + tiles - 1) / tiles;
  const size_t larger = tiles - (step * tiles - p.rows);
  const size_t whole = p.k / (2 * kLanes) * (2 * kLanes);
  const size_t cols = ColsOfTile(step);
  for (size_t c0 = 0; c0 < count; c0 += cols) {
    for (size_t k0 = 0; k0 < p.k; k0 += p.chunk) {
      const size_t k1 = std::min(p.k, k0 + p.chunk);
      HWY_ALIGN uint16_t padded[4][kMaxChunk];
      Stored weights;
      for (size_t c = 0; c < cols; ++c) {
        // Past the last column its neighbour is computed again and not stored.
        const size_t column = begin + std::min(c0 + c, count - 1);
        weights.column[c] = p.weights + column * p.k + k0;
        weights.next[c] = weights.column[c] + (k1 < p.k ? p.chunk : (cols - 1) * p.k + k1 - k0);
        if (k1 > whole) {  // The row ends inside a vector, which must not be read.
          std::memset(padded[c], 0, sizeof(padded[c]));
          std::memcpy(padded[c], weights.column[c], (k1 - k0) * sizeof(uint16_t));
          weights.column[c] = padded[c];
        }
      }
      const size_t k = PadStep(k1 - k0);
      WithConstant<kStoredRows>(step, [&](auto rows) HWY_ATTR {
        constexpr size_t kRows = decltype(rows)::value, kCols = ColsOfTile(kRows);
        const float* x = p.x + k0;
        float* to = sums + c0;
        for (size_t t = 0; t < larger; ++t, x += kRows * p.k_padded, to += kRows * kSumsStride) {
          Tile<kRows, kCols>(x, p.k_padded, weights, k, k0 == 0, to);
        }
        if constexpr (kRows > 1) {
          constexpr size_t kLess = kRows - 1;
          for (size_t t = larger; t < tiles;
               ++t, x += kLess * p.k_padded, to += kLess * kSumsStride) {
            Tile<kLess, kCols>(x, p.k_padded, weights, k, k0 == 0, to);
          }
        }
      });
    }
  }
}

// Columns [begin, begin + count) for rows [row, row + rows). sums: [kRowBlock, kSumsStride],
// panel: [kWidenedCols, chunk + kSkew].
void PanelWidened(const Problem& p, size_t begin, size_t count, size_t row, size_t rows,
                  float* sums, float* panel) {
  constexpr size_t kCols = ColsOfTile(kWidenedRows);
  static_assert(kWidenedCols % kCols == 0);
  for (size_t k0 = 0; k0 < p.k; k0 += p.chunk) {
    const size_t k1 = std::min(p.k, k0 + p.chunk);
    const size_t k = PadStep(k1 - k0);
    for (size_t b0 = 0; b0 < count; b0 += kWidenedCols) {
      const size_t columns = std::min(kWidenedCols, count - b0);
      for (size_t c = 0; c < columns; ++c) {
        WidenRow(p.weights + (begin + b0 + c) * p.k + k0, k1 - k0, panel + c * (p.chunk + kSkew));
      }
      for (size_t r = 0; r < rows; r += kWidenedRows) {
        const float* const x = p.x + (row + r) * p.k_padded + k0;
        for (size_t c0 = 0; c0 < columns; c0 += kCols) {
          Widened weights;
          for (size_t c = 0; c < kCols; ++c) {
            weights.column[c] = panel + std::min(c0 + c, columns - 1) * (p.chunk + kSkew);
          }
          WithConstant<kWidenedRows>(
              std::min(kWidenedRows, rows - r), [&](auto tile_rows) HWY_ATTR {
                Tile<decltype(tile_rows)::value, kCols>(x, p.k_padded, weights, k, k0 == 0,
                                                        sums + r * kSumsStride + b0 + c0);
              });
        }
      }
    }
  }
}

// Adds bias and residual to the sums of one row's columns and stores them.
void Finish(const Problem& p, size_t row, size_t begin, size_t count, const float* sums) {
  const DF d;
  float* const out = p.out + row * p.cols + begin;
  for (size_t c = 0; c < count; c += kLanes) {
    const size_t left = std::min(kLanes, count - c);
    const auto mask = hn::FirstN(d, left);
    auto sum = hn::Load(d, sums + c);
    if (p.bias != nullptr) sum = hn::Add(sum, hn::MaskedLoad(mask, d, p.bias + begin + c));
    if (p.accumulate) sum = hn::Add(hn::MaskedLoad(mask, d, out + c), sum);
    if (left == kLanes) {
      hn::StoreU(sum, d, out + c);
    } else {
      hn::BlendedStore(sum, mask, d, out + c);
    }
  }
}

// Rearranges the rows of x; a few are not worth waking the workers for.
void PackRows(Context& context, const LinearParams& params, size_t k_padded, float* packed) {
  constexpr int64_t kRowsPerTask = 4;
  const auto k = static_cast<size_t>(params.x.cols);
  const float* const x = params.x.f32();
  const auto pack = [&](int64_t task, int) HWY_ATTR {
    const int64_t end = std::min(params.x.rows, (task + 1) * kRowsPerTask);
    for (auto r = static_cast<size_t>(task * kRowsPerTask); r < static_cast<size_t>(end); ++r) {
      PackRow(x + r * k, k, packed + r * k_padded);
    }
  };
  const int64_t tasks = (params.x.rows + kRowsPerTask - 1) / kRowsPerTask;
  if (tasks > 4) return context.pool.For(tasks, pack);
  for (int64_t task = 0; task < tasks; ++task) pack(task, 0);
}

void LinearImpl(Context& context, const LinearParams& params) {
  Problem p;
  p.rows = static_cast<size_t>(params.x.rows);
  p.k = static_cast<size_t>(params.weight.cols);
  p.k_padded = PadStep(p.k) + kSkew;
  p.chunk = ChunkOf(p.k);
  p.weights = reinterpret_cast<const uint16_t*>(params.weight.b16());
  p.cols = static_cast<size_t>(params.weight.rows);
  p.bias = params.bias;
  p.accumulate = params.accumulate;
  p.out = params.out.f32();

  context.shared.Reset(Scratch::BytesFor<float>(p.rows * p.k_padded));
  float* const packed = context.shared.Take<float>(p.rows * p.k_padded);
  p.x = packed;
  PackRows(context, params, p.k_padded, packed);

  const bool direct = p.rows <= kDirectRows;
  const size_t panels = (p.cols + kPanel - 1) / kPanel;
  const size_t block = std::min(p.rows, kRowBlock);
  const size_t blocks = (p.rows + block - 1) / block;
  // Few rows stream: a task takes panels that follow each other, the next one being on its way
  // while one is worked on.
  const size_t run =
      direct ? std::max<size_t>(
                   1, panels / (kTasksPerThread * static_cast<size_t>(context.pool.threads())))
             : 1;
  const size_t runs = (panels + run - 1) / run;
  context.pool.For(static_cast<int64_t>(runs * blocks), [&](int64_t task, int thread) {
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(Scratch::BytesFor<float>(block * kSumsStride) +
                  Scratch::BytesFor<float>(kWidenedCols * (p.chunk + kSkew)));
    float* const sums = scratch.Take<float>(block * kSumsStride);
    float* const panel = scratch.Take<float>(kWidenedCols * (p.chunk + kSkew));
    const size_t row = static_cast<size_t>(task) / runs * block;
    const size_t rows = std::min(block, p.rows - row);
    const size_t first = static_cast<size_t>(task) % runs * run;
    for (size_t i = first; i < std::min(first + run, panels); ++i) {
      const size_t begin = i * kPanel;
      const size_t count = std::min(kPanel, p.cols - begin);
      if (direct) {
        PanelDirect(p, begin, count, sums);
      } else {
        PanelWidened(p, begin, count, row, rows, sums, panel);
      }
      for (size_t r = 0; r < rows; ++r) Finish(p, row + r, begin, count, sums + r * kSumsStride);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(LinearImpl);

void Linear(Context& context, const LinearParams& params) {
  HWY_DYNAMIC_DISPATCH(LinearImpl)(context, params);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
