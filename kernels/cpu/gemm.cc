// out = x weight^T for f32 rows and bf16 weights.
//
// The sum over K of one (row, column) is cut in chunks of kChunk at fixed places. Within a chunk
// one vector accumulator takes, for each group of 2 kLanes elements, first the even and then the
// odd ones; its lanes are then added in a fixed tree, and the chunks' sums in order. Register tiles
// hold many such accumulators but never change the order inside one, so a result has the same bits
// in every batch, tile and task.
//
// Weights are used as they lie in memory. Widening a bf16 costs one operation when even and odd
// elements go to different vectors (a shift, a mask), so x is rearranged to match, once per call.
// Few rows: each weight is widened in registers, straight from memory. Many rows: a panel of
// kPanel columns by kChunk is widened into the cache once and used by all rows.

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

constexpr size_t kChunk = 1024;                // Elements of K per partial sum.
constexpr size_t kCols = 4;                    // Columns of a register tile.
constexpr size_t kRows = kLanes == 8 ? 3 : 6;  // Rows of one: 16 registers on AVX2, 32 elsewhere.
constexpr size_t kPanel = 32;                  // Columns of a task.
constexpr size_t kRowBlock = 512;              // Rows that share one widening of a panel.
constexpr int64_t kDirectRows = 2 * kRows;     // Up to here weights are widened in registers.
static_assert(kChunk % (2 * kLanes) == 0 && kPanel % kCols == 0);

// Where a tile's weights come from: bf16 rows as stored, ...
struct Stored {
  const uint16_t* column[kCols];
  HWY_INLINE void Load(size_t c, size_t k, VF* even, VF* odd) const {
    const VU32 pairs = hn::BitCast(DU32(), hn::LoadU(DU16(), column[c] + k));
    *even = WidenEven(pairs);
    *odd = WidenOdd(pairs);
  }
};
// ... or a widened panel.
struct Widened {
  const float* column[kCols];
  HWY_INLINE void Load(size_t c, size_t k, VF* even, VF* odd) const {
    *even = hn::Load(DF(), column[c] + k);
    *odd = hn::Load(DF(), column[c] + k + kLanes);
  }
};

// sums[r][c] = or += the chunk's partial sum; k is a multiple of 2 kLanes.
template <size_t R, class Weights>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, size_t x_stride, const Weights& weights, size_t k,
                     bool first, float* HWY_RESTRICT sums, size_t sums_stride) {
  const DF d;
  VF acc[R][kCols];
  for (size_t r = 0; r < R; ++r) {
    for (size_t c = 0; c < kCols; ++c) acc[r][c] = hn::Zero(d);
  }
  for (size_t i = 0; i < k; i += 2 * kLanes) {
    VF x_even[R], x_odd[R];
    for (size_t r = 0; r < R; ++r) {
      x_even[r] = hn::Load(d, x + r * x_stride + i);
      x_odd[r] = hn::Load(d, x + r * x_stride + i + kLanes);
    }
    for (size_t c = 0; c < kCols; ++c) {
      VF even, odd;
      weights.Load(c, i, &even, &odd);
      for (size_t r = 0; r < R; ++r) acc[r][c] = hn::MulAdd(even, x_even[r], acc[r][c]);
      for (size_t r = 0; r < R; ++r) acc[r][c] = hn::MulAdd(odd, x_odd[r], acc[r][c]);
    }
  }
  for (size_t r = 0; r < R; ++r) {
    auto sum = Sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    float* const to = sums + r * sums_stride;
    if (!first) sum = hn::Add(hn::Load(D4(), to), sum);
    hn::Store(sum, D4(), to);
  }
}

template <class Weights>
void TileRows(size_t rows, const float* x, size_t x_stride, const Weights& weights, size_t k,
              bool first, float* sums) {
  switch (rows) {
    case 1:
      return Tile<1>(x, x_stride, weights, k, first, sums, kPanel);
    case 2:
      return Tile<2>(x, x_stride, weights, k, first, sums, kPanel);
    case 3:
      return Tile<3>(x, x_stride, weights, k, first, sums, kPanel);
#if HWY_MAX_BYTES != 32
    case 4:
      return Tile<4>(x, x_stride, weights, k, first, sums, kPanel);
    case 5:
      return Tile<5>(x, x_stride, weights, k, first, sums, kPanel);
    case 6:
      return Tile<6>(x, x_stride, weights, k, first, sums, kPanel);
#endif
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
  size_t k_padded;          // k rounded up to 2 kLanes.
  const uint16_t* weights;  // [cols, k]
  size_t cols;
  const float* bias;
  bool accumulate;
  float* out;  // [rows, cols]
};

// Rows of similar size rather than full tiles and a remainder: 8 rows are 4 + 4, not 6 + 2.
inline size_t RowsPerTile(size_t rows) {
  const size_t tiles = (rows + kRows - 1) / kRows;
  return (rows + tiles - 1) / tiles;
}

// Columns [begin, begin + count) for few rows. sums: [rows, kPanel].
void PanelDirect(const Problem& p, size_t begin, size_t count, float* sums) {
  const size_t step = RowsPerTile(p.rows);
  const size_t whole = p.k / (2 * kLanes) * (2 * kLanes);
  for (size_t c0 = 0; c0 < count; c0 += kCols) {
    for (size_t k0 = 0; k0 < p.k; k0 += kChunk) {
      const size_t k1 = std::min(p.k, k0 + kChunk);
      HWY_ALIGN uint16_t padded[kCols][kChunk];
      Stored weights;
      for (size_t c = 0; c < kCols; ++c) {
        // Past the last column its neighbour is computed again and not stored.
        const size_t column = begin + std::min(c0 + c, count - 1);
        weights.column[c] = p.weights + column * p.k + k0;
        if (k1 > whole) {  // The row ends inside a vector, which must not be read.
          std::memset(padded[c], 0, sizeof(padded[c]));
          std::memcpy(padded[c], weights.column[c], (k1 - k0) * sizeof(uint16_t));
          weights.column[c] = padded[c];
        }
      }
      const size_t k = (k1 - k0 + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
      for (size_t r = 0; r < p.rows; r += step) {
        TileRows(std::min(step, p.rows - r), p.x + r * p.k_padded + k0, p.k_padded, weights, k,
                 k0 == 0, sums + r * kPanel + c0);
      }
    }
  }
}

// Columns [begin, begin + count) for rows [row, row + rows). sums: [kRowBlock, kPanel],
// panel: [kPanel, kChunk].
void PanelWidened(const Problem& p, size_t begin, size_t count, size_t row, size_t rows,
                  float* sums, float* panel) {
  const size_t step = RowsPerTile(rows);
  for (size_t k0 = 0; k0 < p.k; k0 += kChunk) {
    const size_t k1 = std::min(p.k, k0 + kChunk);
    const size_t k = (k1 - k0 + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
    for (size_t c = 0; c < count; ++c) {
      WidenRow(p.weights + (begin + c) * p.k + k0, k1 - k0, panel + c * kChunk);
    }
    for (size_t r = 0; r < rows; r += step) {
      const float* const x = p.x + (row + r) * p.k_padded + k0;
      for (size_t c0 = 0; c0 < count; c0 += kCols) {
        Widened weights;
        for (size_t c = 0; c < kCols; ++c) {
          weights.column[c] = panel + std::min(c0 + c, count - 1) * kChunk;
        }
        TileRows(std::min(step, rows - r), x, p.k_padded, weights, k, k0 == 0,
                 sums + r * kPanel + c0);
      }
    }
  }
}

// Adds bias and residual to the sums of one row's columns and stores them.
void Finish(const Problem& p, size_t row, size_t begin, size_t count, const float* sums) {
  const hn::CappedTag<float, kPanel> d;
  const size_t lanes = hn::Lanes(d);
  float* const out = p.out + row * p.cols + begin;
  for (size_t c = 0; c < count; c += lanes) {
    const size_t left = std::min(lanes, count - c);
    const auto mask = hn::FirstN(d, left);
    auto sum = hn::Load(d, sums + c);
    if (p.bias != nullptr) sum = hn::Add(sum, hn::MaskedLoad(mask, d, p.bias + begin + c));
    if (p.accumulate) sum = hn::Add(hn::MaskedLoad(mask, d, out + c), sum);
    if (left == lanes) {
      hn::StoreU(sum, d, out + c);
    } else {
      hn::BlendedStore(sum, mask, d, out + c);
    }
  }
}

void LinearImpl(Context& context, const LinearParams& params) {
  Problem p;
  p.rows = static_cast<size_t>(params.x.rows);
  p.k = static_cast<size_t>(params.weight.cols);
  p.k_padded = (p.k + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  p.weights = reinterpret_cast<const uint16_t*>(params.weight.b16());
  p.cols = static_cast<size_t>(params.weight.rows);
  p.bias = params.bias;
  p.accumulate = params.accumulate;
  p.out = params.out.f32();

  context.shared.Reset(Scratch::BytesFor<float>(p.rows * p.k_padded));
  float* const packed = context.shared.Take<float>(p.rows * p.k_padded);
  p.x = packed;
  const float* const x = params.x.f32();
  constexpr int64_t kPackRows = 4;
  context.pool.For((params.x.rows + kPackRows - 1) / kPackRows, [&](int64_t task, int) {
    const int64_t end = std::min(params.x.rows, (task + 1) * kPackRows);
    for (auto r = static_cast<size_t>(task * kPackRows); r < static_cast<size_t>(end); ++r) {
      PackRow(x + r * p.k, p.k, packed + r * p.k_padded);
    }
  });

  const bool direct = params.x.rows <= kDirectRows;
  const size_t block = direct ? p.rows : std::min(p.rows, kRowBlock);
  const auto tasks = static_cast<int64_t>((p.cols + kPanel - 1) / kPanel);
  context.pool.For(tasks, [&](int64_t task, int thread) {
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(Scratch::BytesFor<float>(block * kPanel) +
                  Scratch::BytesFor<float>(kPanel * kChunk));
    float* const sums = scratch.Take<float>(block * kPanel);
    float* const panel = scratch.Take<float>(kPanel * kChunk);
    const size_t begin = static_cast<size_t>(task) * kPanel;
    const size_t count = std::min(kPanel, p.cols - begin);
    for (size_t row = 0; row < p.rows; row += block) {
      const size_t rows = std::min(block, p.rows - row);
      if (direct) {
        PanelDirect(p, begin, count, sums);
      } else {
        PanelWidened(p, begin, count, row, rows, sums, panel);
      }
      for (size_t r = 0; r < rows; ++r) Finish(p, row + r, begin, count, sums + r * kPanel);
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
