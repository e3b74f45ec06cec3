// The sketch selector: an estimated logit for every token from its few-bit code, a block's score
// the approximate attention mass that the estimates give it (params.h). The arithmetic is in
// sketch_score-inl.h; here is what is scored when, and how blocks are ranked.
//
// For each head and block only (m, s) is kept, s = sum of exp(estimate - m) over the block's
// tokens, m the maximum over the sixteen tokens it was scored with. Ranking then takes the maximum
// of m over the row, the sum over the row, and adds up the heads' shares.
//
// Progressive reading starts with the fewest planes that spec.refine_share allows, ranks, scores
// the best share again with one plane more, and so on. In every ranking, the last included, a
// block counts with the finest score it has.

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select_sketch.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/select_plan.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_score-inl.h"
#include "kernels/cpu/topk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kGroupsPerTask = 128;  // Of those, a task scores this many.

// scores[i] = sum over heads of the share of the head's mass in block i; `mass` is scratch.
void RankBlocks(const Masses& masses, size_t heads, size_t blocks, float* mass, float* scores) {
  const DF d;
  std::fill_n(scores, PadTopK(blocks), 0.0f);
  for (size_t g = 0; g < heads; ++g) {
    const float* const m = masses.m + g * masses.stride;
    const float* const s = masses.s + g * masses.stride;
    VF top = hn::Set(d, kNoScore);
    for (size_t i = 0; i < blocks; i += kLanes) top = hn::Max(top, hn::Load(d, m + i));
    const VF shift = hn::Set(d, Max1(top));
    VF sum = hn::Zero(d);
    for (size_t i = 0; i < blocks; i += kLanes) {
      const VF part = hn::Mul(hn::Load(d, s + i), Exp(hn::Sub(hn::Load(d, m + i), shift)));
      hn::Store(part, d, mass + i);
      sum = hn::Add(sum, part);
    }
    const VF share = hn::Set(d, 1.0f / Sum1(sum));
    for (size_t i = 0; i < blocks; i += kLanes) {
      const VF so_far = hn::Load(d, scores + i);
      hn::Store(hn::MulAdd(hn::Load(d, mass + i), share, so_far), d, scores + i);
    }
  }
}

// Everything a unit needs between loops, at unit.memory of the selector's scratch.
struct UnitMemory {
  Masses masses;       // [group][padded] each
  int32_t* survivors;  // [padded]: the blocks to score again, ascending
  int32_t* previous;   // [padded]: those of the pass before
};
size_t UnitFloats(size_t blocks, size_t group) { return PadTopK(blocks) * 2 * (group + 1); }
UnitMemory MemoryOf(float* memory, const SelectUnit& unit, size_t group) {
  const size_t stride = PadTopK(unit.blocks);
  float* const begin = memory + unit.memory;
  auto* const lists = reinterpret_cast<int32_t*>(begin + 2 * group * stride);
  return UnitMemory{Masses{begin, begin + group * stride, stride}, lists, lists + stride};
}

size_t RefineCount(const SelectorSpec& spec, const SelectUnit& unit, int planes) {
  return static_cast<size_t>(SketchRefineCount(spec.refine_share[static_cast<size_t>(planes - 2)],
                                               static_cast<int64_t>(unit.blocks),
                                               unit.row->keep_blocks));
}

// The planes that every block of the unit is scored with.
int FirstPlanes(const SelectorSpec& spec, const SelectUnit& unit) {
  int planes = 1;
  while (planes < spec.planes && RefineCount(spec, unit, planes + 1) == unit.blocks) ++planes;
  return planes;
}

// One Select call: its units and their memory.
class SketchSelect {
 public:
  SketchSelect(Context& context, const SelectParams& p, OpCounters* counters)
      : context_(context),
        p_(p),
        spec_(p.layout.selector),
        d_(static_cast<size_t>(p.layout.head_dim)),
        group_(static_cast<size_t>(p.num_heads / p.layout.num_kv_heads)),
        counters_(counters) {}

  void Run() {
    MakeUnits();
    if (num_units_ == 0) return;
    for (int planes = first_planes_; planes <= spec_.planes; ++planes) {
      ScoreUnits(planes);
      RankUnits(planes);
    }
  }

 private:
  size_t BlocksPerGroup() const { return kGroupTokens / static_cast<size_t>(spec_.block_tokens); }

  void MakeUnits() {
    const auto heads = static_cast<size_t>(p_.layout.num_kv_heads);
    const size_t capacity = static_cast<size_t>(p_.num_rows) * heads;
    context_.shared.Reset(Scratch::BytesFor<SelectUnit>(capacity));
    units_ = context_.shared.Take<SelectUnit>(capacity);
    size_t floats = 0;
    for (int64_t i = 0; i < p_.num_rows; ++i) {
      for (size_t head = 0; head < heads; ++head) {
        SelectUnit unit = MakeSelectUnit(p_, p_.rows[i], head);
        if (KeepWithoutScores(unit)) continue;
        unit.memory = floats;
        floats += UnitFloats(unit.blocks, group_);
        units_[num_units_++] = unit;
      }
    }
    context_.partials.Reset(Scratch::BytesFor<float>(floats));
    memory_ = context_.partials.Take<float>(floats);
    for (size_t u = 0; u < num_units_; ++u) {
      first_planes_ = std::min(first_planes_, FirstPlanes(spec_, units_[u]));
      ClearPadding(units_[u]);
    }
  }

  // The entries past the last block weigh nothing.
  void ClearPadding(const SelectUnit& unit) const {
    const Masses masses = MemoryOf(memory_, unit, group_).masses;
    for (size_t g = 0; g < group_; ++g) {
      const size_t end = (g + 1) * masses.stride;
      std::fill(masses.m + g * masses.stride + unit.blocks, masses.m + end, kNoScore);
      std::fill(masses.s + g * masses.stride + unit.blocks, masses.s + end, 0.0f);
    }
  }

  // The blocks of a unit that are scored with `planes`: all, the survivors, or none.
  size_t BlocksToScore(const SelectUnit& unit, int planes) const {
    const int first = FirstPlanes(spec_, unit);
    return planes < first ? 0 : planes == first ? unit.blocks : RefineCount(spec_, unit, planes);
  }

  void ScoreUnits(int planes) {
    const size_t per_task = kGroupsPerTask * BlocksPerGroup();
    size_t tasks = 0;
    for (size_t u = 0; u < num_units_; ++u) {
      SelectUnit& unit = units_[u];
      unit.first_task = tasks;
      const size_t blocks = BlocksToScore(unit, planes);
      tasks += (blocks + per_task - 1) / per_task;
      if (blocks == 0) continue;
      // The first pass reads its planes and the scales of every block, a later one new planes only.
      const bool first = planes == FirstPlanes(spec_, unit);
      const size_t reads = first ? blocks * static_cast<size_t>(planes) : unit.plane_reads;
      const size_t scales = first ? blocks : 0;
      counters_->blocks_scored += static_cast<int64_t>(reads);
      counters_->descriptor_bytes += static_cast<int64_t>(static_cast<size_t>(spec_.block_tokens) *
                                                          (reads * d_ / 8 + scales * sizeof(bf16)));
    }
    context_.pool.For(static_cast<int64_t>(tasks), [&](int64_t task, int) {
      const SelectUnit& unit = UnitOfTask(units_, num_units_, static_cast<size_t>(task));
      const size_t begin = (static_cast<size_t>(task) - unit.first_task) * per_task;
      const size_t end = std::min(BlocksToScore(unit, planes), begin + per_task);
      const bool all = planes == FirstPlanes(spec_, unit);
      switch (planes) {
        case 1:
          return ScoreRange<1>(unit, begin, end, all);
        case 2:
          return ScoreRange<2>(unit, begin, end, all);
        default:
          return ScoreRange<3>(unit, begin, end, all);
      }
    });
  }

  // Scores the blocks [begin, end) of the unit, or of its survivors.
  template <int kPlanes>
  void ScoreRange(const SelectUnit& unit, size_t begin, size_t end, bool all) const {
    const UnitMemory memory = MemoryOf(memory_, unit, group_);
    SketchQuery query;
    const float* const q = QueriesOf(p_, unit);
    if (d_ == 64) {
      PrepareQuery<64>(q, group_, &query);
    } else {
      PrepareQuery<128>(q, group_, &query);
    }
    TokenGroup tokens;
    for (size_t i = begin; i < end; i += BlocksPerGroup()) {
      size_t ids[4];
      const size_t count = std::min(BlocksPerGroup(), end - i);
      for (size_t b = 0; b < count; ++b) {
        ids[b] = all ? i + b : static_cast<size_t>(memory.survivors[i + b]);
        PlaceBlock(p_, unit, ids[b], b * static_cast<size_t>(spec_.block_tokens), &tokens);
      }
      PadGroup(count * static_cast<size_t>(spec_.block_tokens), &tokens);
      ScoreGroup<kPlanes>(spec_, d_, group_, query, tokens, ids, count, memory.masses);
    }
  }

  // After the pass with `planes`: the survivors of the next pass, or the ids that are kept.
  void RankUnits(int planes) {
    context_.pool.For(static_cast<int64_t>(num_units_), [&](int64_t task, int thread) {
      SelectUnit& unit = units_[task];
      if (planes >= FirstPlanes(spec_, unit)) {
        RankUnit(unit, planes, &context_.of_thread[static_cast<size_t>(thread)]);
      }
    });
  }

  void RankUnit(SelectUnit& unit, int planes, Scratch* scratch) const {
    const size_t room = PadTopK(unit.blocks) + kTopKPadding;
    scratch->Reset(2 * Scratch::BytesFor<float>(room) + 2 * Scratch::BytesFor<uint32_t>(room));
    float* const scores = scratch->Take<float>(room);
    float* const mass = scratch->Take<float>(room);
    uint32_t* const keys = scratch->Take<uint32_t>(room);
    uint32_t* const live = scratch->Take<uint32_t>(room);
    const UnitMemory memory = MemoryOf(memory_, unit, group_);
    RankBlocks(memory.masses, group_, unit.blocks, mass, scores);
    if (planes == spec_.planes) {
      KeepBlocks(scores, unit.blocks, static_cast<size_t>(unit.row->keep_blocks),
                 static_cast<size_t>(unit.row->sink_blocks),
                 static_cast<size_t>(unit.row->local_blocks), keys, live, unit.ids);
      return;
    }
    const size_t count = RefineCount(spec_, unit, planes + 1);
    const size_t known = planes == FirstPlanes(spec_, unit) ? 0 : RefineCount(spec_, unit, planes);
    std::copy_n(memory.survivors, known, memory.previous);
    KeepBlocks(scores, unit.blocks, count, 0, 0, keys, live, memory.survivors);
    // One new plane each, and the one before too where the pass before left a block out.
    unit.plane_reads = count;
    if (known > 0) {
      size_t at = 0;
      for (size_t i = 0; i < count; ++i) {
        while (at < known && memory.previous[at] < memory.survivors[i]) ++at;
        if (at == known || memory.previous[at] != memory.survivors[i]) ++unit.plane_reads;
      }
    }
  }

  Context& context_;
  const SelectParams& p_;
  const SelectorSpec& spec_;
  const size_t d_;
  const size_t group_;
  OpCounters* const counters_;
  SelectUnit* units_ = nullptr;
  size_t num_units_ = 0;
  int first_planes_ = kSketchMaxPlanes;  // The fewest any unit begins with.
  float* memory_ = nullptr;
};

void SelectSketchImpl(Context& context, const SelectParams& p, OpCounters* counters) {
  SketchSelect(context, p, counters).Run();
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(SelectSketchImpl);

void SelectSketch(Context& context, const SelectParams& params, OpCounters* counters) {
  HWY_DYNAMIC_DISPATCH(SelectSketchImpl)(context, params, counters);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
