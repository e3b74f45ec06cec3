// The paper's selector: s_i = sum_j max(q_j kmin_ij, q_j kmax_ij), q the mean over the group's
// heads. Since kmin <= kmax the larger product belongs to kmax where q > 0 and to kmin where q < 0,
// so s_i = q+ . kmax_i + q- . kmin_i: two multiply-adds per pair of bounds.

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select_minmax.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/select_plan.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/topk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kBlocksPerTask = 256;
constexpr size_t kPagesAhead = 8;

// The positive and the negative part of the group's mean query, even and odd elements of each
// group of 2 kLanes apart, as the descriptors are widened.
struct SignedQuery {
  alignas(64) float positive[kMaxHeadDim];
  alignas(64) float negative[kMaxHeadDim];
};

void MeanQuery(const float* q, size_t group, size_t d, SignedQuery* out) {
  const DF df;
  const VF share = hn::Set(df, 1.0f / static_cast<float>(group));
  for (size_t j = 0; j < d; j += 2 * kLanes) {
    VF a = hn::Zero(df), b = hn::Zero(df);
    for (size_t g = 0; g < group; ++g) {
      a = hn::Add(a, hn::LoadU(df, q + g * d + j));
      b = hn::Add(b, hn::LoadU(df, q + g * d + j + kLanes));
    }
    a = hn::Mul(a, share);
    b = hn::Mul(b, share);
    const VF even = hn::ConcatEven(df, b, a), odd = hn::ConcatOdd(df, b, a);
    hn::Store(hn::Max(even, hn::Zero(df)), df, out->positive + j);
    hn::Store(hn::Max(odd, hn::Zero(df)), df, out->positive + j + kLanes);
    hn::Store(hn::Min(even, hn::Zero(df)), df, out->negative + j);
    hn::Store(hn::Min(odd, hn::Zero(df)), df, out->negative + j + kLanes);
  }
}

HWY_INLINE float ScoreBlock(const std::byte* descriptor, size_t d, const SignedQuery& q) {
  const DF df;
  const auto* const lower = reinterpret_cast<const uint16_t*>(descriptor);
  const uint16_t* const upper = lower + d;
  VF sum0 = hn::Zero(df), sum1 = hn::Zero(df);
  for (size_t j = 0; j < d; j += 2 * kLanes) {
    const VU32 low = hn::BitCast(DU32(), hn::LoadU(DU16(), lower + j));
    const VU32 high = hn::BitCast(DU32(), hn::LoadU(DU16(), upper + j));
    sum0 = hn::MulAdd(hn::Load(df, q.positive + j), WidenEven(high), sum0);
    sum1 = hn::MulAdd(hn::Load(df, q.positive + j + kLanes), WidenOdd(high), sum1);
    sum0 = hn::MulAdd(hn::Load(df, q.negative + j), WidenEven(low), sum0);
    sum1 = hn::MulAdd(hn::Load(df, q.negative + j + kLanes), WidenOdd(low), sum1);
  }
  return Sum1(hn::Add(sum0, sum1));
}

void SelectMinMaxImpl(Context& context, const SelectParams& p, OpCounters* counters) {
  const auto heads = static_cast<size_t>(p.layout.num_kv_heads);
  const auto d = static_cast<size_t>(p.layout.head_dim);
  const size_t group = static_cast<size_t>(p.num_heads) / heads;
  const size_t capacity = static_cast<size_t>(p.num_rows) * heads;
  context.shared.Reset(Scratch::BytesFor<SelectUnit>(capacity));
  SelectUnit* const units = context.shared.Take<SelectUnit>(capacity);
  size_t num_units = 0, tasks = 0, floats = 0;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    for (size_t head = 0; head < heads; ++head) {
      SelectUnit unit = MakeSelectUnit(p, p.rows[i], head);
      if (KeepWithoutScores(unit)) continue;
      unit.first_task = tasks;
      unit.memory = floats;
      tasks += (unit.blocks + kBlocksPerTask - 1) / kBlocksPerTask;
      floats += PadTopK(unit.blocks);
      counters->blocks_scored += static_cast<int64_t>(unit.blocks);
      counters->descriptor_bytes +=
          static_cast<int64_t>(unit.blocks * p.layout.DescriptorRunBytes());
      units[num_units++] = unit;
    }
  }
  if (num_units == 0) return;
  context.partials.Reset(Scratch::BytesFor<float>(floats));
  float* const scores = context.partials.Take<float>(floats);
  context.pool.For(static_cast<int64_t>(tasks), [&](int64_t task, int) {
    const SelectUnit& unit = UnitOfTask(units, num_units, static_cast<size_t>(task));
    SignedQuery q;
    MeanQuery(QueriesOf(p, unit), group, d, &q);
    const size_t begin = (static_cast<size_t>(task) - unit.first_task) * kBlocksPerTask;
    const size_t end = std::min(unit.blocks, begin + kBlocksPerTask);
    for (size_t i = begin; i < end; ++i) {
      // Pages lie anywhere, so the hardware cannot foresee the next one.
      const std::byte* const ahead = DescriptorOf(p, unit, std::min(i + kPagesAhead, end - 1));
      for (size_t at = 0; at < p.layout.DescriptorRunBytes(); at += 64) {
        __builtin_prefetch(ahead + at);
      }
      scores[unit.memory + i] = ScoreBlock(DescriptorOf(p, unit, i), d, q);
    }
  });
  context.pool.For(static_cast<int64_t>(num_units), [&](int64_t task, int thread) {
    const SelectUnit& unit = units[task];
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    const size_t room = PadTopK(unit.blocks);
    scratch.Reset(Scratch::BytesFor<uint32_t>(room));
    KeepBlocks(scores + unit.memory, unit.blocks, static_cast<size_t>(unit.row->keep_blocks),
               static_cast<size_t>(unit.row->sink_blocks),
               static_cast<size_t>(unit.row->local_blocks), scratch.Take<uint32_t>(room), unit.ids);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(SelectMinMaxImpl);

void SelectMinMax(Context& context, const SelectParams& params, OpCounters* counters) {
  HWY_DYNAMIC_DISPATCH(SelectMinMaxImpl)(context, params, counters);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
