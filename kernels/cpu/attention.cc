// Dense chunk attention and sparse attention over the paged pool; the arithmetic is in
// attention-inl.h, here is how it is cut into tasks.
//
// A unit is a block of up to kMaxRows query rows (tokens x heads of one group) on one KV head. With
// plenty of units each is one task that runs through its tokens. With few (a decode step of one
// long sequence) every split of a unit is a task, and a second loop merges the splits. Both ways
// do the same arithmetic in the same order.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/attention-inl.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"

#ifndef RESA_KERNELS_CPU_ATTENTION_ONCE_
#define RESA_KERNELS_CPU_ATTENTION_ONCE_
namespace resa::kernels::cpu {

// Fewer units than this many times the threads are cut into splits, ...
constexpr size_t kUnitsPerThread = 4;
// ... in this many runs of them for each thread ...
constexpr size_t kRunsPerThread = 6;
// ... if their partial results fit this many bytes.
constexpr size_t kMaxPartialBytes = size_t{64} << 20;

// What both ops read: the pool, the queries, the output.
struct AttendShape {
  const float* q;
  float* out;
  size_t num_heads;
  size_t group;
  size_t d;
  KvLayout layout;
  KvLayer kv;
};

// A block of query rows on one KV head.
struct AttendUnit {
  size_t row_begin;  // In the flat batch.
  size_t tokens;     // Query tokens; times the group: rows.
  size_t kv_head;
  const int32_t* table;
  const int32_t* ids;  // Sparse: the row's blocks. Dense: null.
  size_t num_ranks;    // Tokens that the last query attends to.
};

}  // namespace resa::kernels::cpu
#endif  // RESA_KERNELS_CPU_ATTENTION_ONCE_

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// Points at `count` tokens from `rank` on; the rest of the tile at a token of zeros.
template <class T>
void FillTile(const AttendShape& shape, const AttendUnit& unit, size_t rank, size_t count,
              TileTokens<T>* tile) {
  alignas(64) static constexpr std::byte kZeros[kMaxHeadDim * sizeof(float)] = {};
  const size_t run =
      unit.ids == nullptr ? kPageTokens : static_cast<size_t>(shape.layout.selector.block_tokens);
  const auto* const k = reinterpret_cast<const T*>(shape.kv.k);
  const auto* const v = reinterpret_cast<const T*>(shape.kv.v);
  for (size_t t = 0; t < count; t += run) {
    const size_t index = (rank + t) / run;
    const size_t position =
        (unit.ids == nullptr ? index : static_cast<size_t>(unit.ids[index])) * run;
    const auto page = static_cast<size_t>(unit.table[position / kPageTokens]);
    const size_t heads = static_cast<size_t>(shape.layout.num_kv_heads);
    const size_t offset =
        ((page * heads + unit.kv_head) * kPageTokens + position % kPageTokens) * shape.d;
    for (size_t i = t; i < std::min(count, t + run); ++i) {
      tile->k[i] = k + offset + (i - t) * shape.d;
      tile->v[i] = v + offset + (i - t) * shape.d;
    }
  }
  for (size_t i = count; i < kTile; ++i) {
    tile->k[i] = reinterpret_cast<const T*>(kZeros);
    tile->v[i] = reinterpret_cast<const T*>(kZeros);
  }
}

// The unit's queries times d^-1/2, rows ordered by token, then head of the group.
void LoadQueries(const AttendShape& shape, const AttendUnit& unit, float* to) {
  const DF d;
  const VF scale = hn::Set(d, 1.0f / std::sqrt(static_cast<float>(shape.d)));
  const size_t width = shape.group * shape.d;
  for (size_t t = 0; t < unit.tokens; ++t) {
    const float* const from =
        shape.q + (unit.row_begin + t) * shape.num_heads * shape.d + unit.kv_head * width;
    for (size_t j = 0; j < width; j += kLanes) {
      hn::Store(hn::Mul(hn::LoadU(d, from + j), scale), d, to + t * width + j);
    }
  }
}

template <class T>
void StoreOutputs(const AttendShape& shape, const AttendUnit& unit, const Softmax& total) {
  for (size_t r = 0; r < unit.tokens * shape.group; ++r) {
    const size_t head = unit.kv_head * shape.group + r % shape.group;
    StoreSoftmaxRow<T>(
        r, shape.d, total,
        shape.out + ((unit.row_begin + r / shape.group) * shape.num_heads + head) * shape.d);
  }
}

// One split of a unit into work.split, or wherever `state` is.
template <class T>
void AttendSplit(const AttendShape& shape, const AttendUnit& unit, size_t split, const Work& work,
                 const Softmax& state) {
  const size_t rows = unit.tokens * shape.group;
  ResetSoftmax(rows, shape.d, state);
  const size_t end = std::min(unit.num_ranks, (split + 1) * kSplit);
  TileTokens<T> tiles[2];  // The current one and the next, in turn.
  size_t current = 0;
  size_t counts[kMaxRows];
  FillTile(shape, unit, split * kSplit, std::min(kTile, end - split * kSplit), &tiles[0]);
  for (size_t begin = split * kSplit; begin < end; begin += kTile, current ^= 1) {
    const size_t tokens = std::min(kTile, end - begin);
    const size_t left = unit.num_ranks - begin - tokens;  // The next split's too: it comes soon.
    if (left > 0) FillTile(shape, unit, begin + tokens, std::min(kTile, left), &tiles[current ^ 1]);
    const TileTokens<T>& next = tiles[left > 0 ? current ^ 1 : current];
    for (size_t t = 0; t < unit.tokens; ++t) {
      // Query token t attends to num_ranks - (tokens - 1 - t) ranks in all.
      const size_t visible = unit.num_ranks - (unit.tokens - 1 - t);
      const size_t count = visible <= begin ? 0 : std::min(kTile, visible - begin);
      std::fill_n(counts + t * shape.group, shape.group, count);
    }
    AttendTile(tiles[current], next, tokens, rows, counts, shape.d, work, state);
  }
}

size_t SplitsOf(const AttendUnit& unit) { return (unit.num_ranks + kSplit - 1) / kSplit; }

// Merges a split's rows. One that ends before this split has l = 0 there and is left as it is, as
// it would be without the longer rows beside it.
void MergeSplit(size_t rows, size_t d, size_t split, const Softmax& part, const Softmax& total) {
  for (size_t r = 0; r < rows; ++r) {
    if (part.l[r] == 0.0f && split > 0) continue;
    MergeSoftmaxRow(r, d, part, total);
  }
}

template <class T>
void AttendWhole(Context& context, const AttendShape& shape, const AttendUnit* units,
                 size_t num_units) {
  context.pool.For(static_cast<int64_t>(num_units), [&](int64_t task, int thread) {
    // The last units see the most tokens: they start first, so that none trails at the end.
    const AttendUnit& unit = units[num_units - 1 - static_cast<size_t>(task)];
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(WorkBytes(shape.d));
    const Work work = TakeWork(scratch, shape.d);
    const size_t rows = unit.tokens * shape.group;
    LoadQueries(shape, unit, work.q);
    ResetSoftmax(rows, shape.d, work.total);
    for (size_t split = 0; split < SplitsOf(unit); ++split) {
      AttendSplit<T>(shape, unit, split, work, work.split);
      MergeSplit(rows, shape.d, split, work.split, work.total);
    }
    StoreOutputs<T>(shape, unit, work.total);
  });
}

// partials: for each unit, each split: SoftmaxFloats(rows, d); offsets[u] is where unit u begins.
// Tasks go through the splits of a sequence in the order of memory, where the KV heads of a page
// lie side by side: what the hardware fetches too far is the next head's.
template <class T>
void AttendInSplits(Context& context, const AttendShape& shape, const AttendUnit* units,
                    size_t num_units, const size_t* first_split, float* partials,
                    const size_t* offsets) {
  const auto partial = [&](size_t u, size_t split) {
    const size_t rows = units[u].tokens * shape.group;
    return SoftmaxAt(partials + offsets[u] + split * SoftmaxFloats(rows, shape.d), rows, shape.d);
  };
  const auto heads = static_cast<size_t>(shape.layout.num_kv_heads);
  const size_t sequences = num_units / heads;
  const size_t parts = first_split[sequences] * heads;
  const size_t run =
      std::max<size_t>(1, parts / (kRunsPerThread * static_cast<size_t>(context.pool.threads())));
  context.pool.For(static_cast<int64_t>((parts + run - 1) / run), [&](int64_t task, int thread) {
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(WorkBytes(shape.d));
    const Work work = TakeWork(scratch, shape.d);
    const size_t begin = static_cast<size_t>(task) * run;
    for (size_t i = begin; i < std::min(begin + run, parts); ++i) {
      const auto s = static_cast<size_t>(
          std::upper_bound(first_split, first_split + sequences, i / heads) - first_split - 1);
      const size_t split = i / heads - first_split[s];
      const size_t u = s * heads + i % heads;
      if (split >= SplitsOf(units[u])) continue;
      LoadQueries(shape, units[u], work.q);
      AttendSplit<T>(shape, units[u], split, work, partial(u, split));
    }
  });
  context.pool.For(static_cast<int64_t>(num_units), [&](int64_t task, int thread) {
    const auto u = static_cast<size_t>(task);
    const size_t rows = units[u].tokens * shape.group;
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(WorkBytes(shape.d));
    const Work work = TakeWork(scratch, shape.d);
    ResetSoftmax(rows, shape.d, work.total);
    for (size_t split = 0; split < SplitsOf(units[u]); ++split) {
      MergeSplit(rows, shape.d, split, partial(u, split), work.total);
    }
    StoreOutputs<T>(shape, units[u], work.total);
  });
}

template <class T>
void AttendUnits(Context& context, const AttendShape& shape, const AttendUnit* units,
                 size_t num_units, size_t* first_split, size_t* offsets) {
  const auto heads = static_cast<size_t>(shape.layout.num_kv_heads);
  size_t splits = 0, most = 0, floats = 0;
  for (size_t u = 0; u < num_units; ++u) {
    if (u % heads == 0) {
      splits += most;
      first_split[u / heads] = splits;
      most = 0;
    }
    most = std::max(most, SplitsOf(units[u]));
    offsets[u] = floats;
    floats += SplitsOf(units[u]) * SoftmaxFloats(units[u].tokens * shape.group, shape.d);
  }
  first_split[num_units / heads] = splits + most;
  const auto threads = static_cast<size_t>(context.pool.threads());
  if (threads == 1 || (splits + most) * heads == num_units ||
      num_units >= kUnitsPerThread * threads || floats * sizeof(float) > kMaxPartialBytes) {
    return AttendWhole<T>(context, shape, units, num_units);
  }
  context.partials.Reset(Scratch::BytesFor<float>(floats));
  AttendInSplits<T>(context, shape, units, num_units, first_split,
                    context.partials.Take<float>(floats), offsets);
}

void AttendUnitsImpl(Context& context, const AttendShape& shape, const AttendUnit* units,
                     size_t num_units, size_t* first_split, size_t* offsets) {
  if (shape.layout.kv_dtype == DType::kBF16) {
    AttendUnits<bf16>(context, shape, units, num_units, first_split, offsets);
  } else {
    AttendUnits<float>(context, shape, units, num_units, first_split, offsets);
  }
}

size_t MaxRowsImpl() { return kMaxRows; }

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(AttendUnitsImpl);
HWY_EXPORT(MaxRowsImpl);

namespace {

template <class Params>
AttendShape ShapeOf(const Params& p) {
  return AttendShape{.q = p.q.f32(),
                     .out = p.out.f32(),
                     .num_heads = static_cast<size_t>(p.num_heads),
                     .group = static_cast<size_t>(p.num_heads / p.layout.num_kv_heads),
                     .d = static_cast<size_t>(p.layout.head_dim),
                     .layout = p.layout,
                     .kv = p.kv};
}

// Room for a plan of `units` units.
struct Plan {
  Plan(Scratch& scratch, size_t units) {
    scratch.Reset(Scratch::BytesFor<AttendUnit>(units) + 2 * Scratch::BytesFor<size_t>(units + 1));
    unit = scratch.Take<AttendUnit>(units);
    first_split = scratch.Take<size_t>(units + 1);
    offsets = scratch.Take<size_t>(units + 1);
  }
  AttendUnit* unit;
  size_t* first_split;  // For each row of the step, whose units are its KV heads.
  size_t* offsets;
};

}  // namespace

void ChunkAttend(Context& context, const ChunkAttendParams& p) {
  const AttendShape shape = ShapeOf(p);
  const size_t tokens_per_unit = HWY_DYNAMIC_DISPATCH(MaxRowsImpl)() / shape.group;
  const auto heads = static_cast<size_t>(p.layout.num_kv_heads);
  size_t num_units = 0;
  for (int64_t i = 0; i < p.num_chunks; ++i) {
    const auto rows = static_cast<size_t>(p.chunks[i].rows);
    num_units += (rows + tokens_per_unit - 1) / tokens_per_unit * heads;
  }
  const Plan plan(context.shared, num_units);
  size_t u = 0;
  for (int64_t i = 0; i < p.num_chunks; ++i) {
    const DenseChunk& chunk = p.chunks[i];
    const auto rows = static_cast<size_t>(chunk.rows);
    for (size_t begin = 0; begin < rows; begin += tokens_per_unit) {
      const size_t tokens = std::min(tokens_per_unit, rows - begin);
      for (size_t head = 0; head < heads; ++head) {
        plan.unit[u++] =
            AttendUnit{.row_begin = static_cast<size_t>(chunk.row_begin) + begin,
                       .tokens = tokens,
                       .kv_head = head,
                       .table = p.tables.pages + chunk.table * p.tables.stride,
                       .ids = nullptr,
                       .num_ranks = static_cast<size_t>(chunk.position) + begin + tokens};
      }
    }
  }
  HWY_DYNAMIC_DISPATCH(AttendUnitsImpl)
  (context, shape, plan.unit, num_units, plan.first_split, plan.offsets);
}

void SparseAttend(Context& context, const SparseAttendParams& p) {
  const AttendShape shape = ShapeOf(p);
  const auto heads = static_cast<size_t>(p.layout.num_kv_heads);
  const auto block = static_cast<size_t>(p.layout.selector.block_tokens);
  const size_t num_units = static_cast<size_t>(p.num_rows) * heads;
  const Plan plan(context.shared, num_units);
  size_t u = 0;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const SparseRow& row = p.rows[i];
    const auto keep = static_cast<size_t>(row.keep_blocks);
    for (size_t head = 0; head < heads; ++head) {
      const int32_t* const ids = p.ids + row.ids_begin + static_cast<int64_t>(head * keep);
      const auto last_begin = static_cast<size_t>(ids[keep - 1]) * block;
      const auto kv_len = static_cast<size_t>(row.position) + 1;
      RESA_CHECK_LT(last_begin, kv_len) << "SparseAttend: a block past the row's position";
      plan.unit[u++] =
          AttendUnit{.row_begin = static_cast<size_t>(row.row),
                     .tokens = 1,
                     .kv_head = head,
                     .table = p.tables.pages + row.table * p.tables.stride,
                     .ids = ids,
                     .num_ranks = (keep - 1) * block + std::min(block, kv_len - last_begin)};
    }
  }
  HWY_DYNAMIC_DISPATCH(AttendUnitsImpl)
  (context, shape, plan.unit, num_units, plan.first_split, plan.offsets);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
