// The sketch selector: an estimated logit for every token from its few-bit code, a block's score
// the approximate attention mass that the estimates give it (params.h). The arithmetic is in
// sketch_score-inl.h and sketch_mass-inl.h; here is what is scored when.
//
// Progressive reading starts with the fewest planes that spec.refine_share allows, ranks, scores
// the survivors again with one plane more, and so on. The first pass reads pages where they lie; a
// later one copies its survivors, which are blocks from anywhere, together into pages. Its masses
// are in the order of the survivors, and take the place of those of the pass before.

#include <algorithm>
#include <cstdint>
#include <cstring>

#define HWY_WANT_AVX3_DL  // For the four-way multiply-add of VNNI.
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select_sketch.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/select_plan.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_mass-inl.h"
#include "kernels/cpu/sketch_plane-inl.h"
#include "kernels/cpu/sketch_score-inl.h"
#include "kernels/cpu/topk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kChunksPerTask = 4;
constexpr size_t kPagesAhead = 4;  // Asked for before they are read: pages lie anywhere.

// Everything a unit needs between loops, at unit.memory of the selector's scratch.
struct UnitMemory {
  Masses masses;
  int32_t* survivors;  // The blocks of the pass, ascending; all are scored in the first one.
};

size_t ChunksOf(size_t blocks, size_t block_tokens) {
  return (blocks * block_tokens + kChunkTokens - 1) / kChunkTokens;
}
size_t UnitFloats(size_t blocks, size_t block_tokens, size_t group) {
  const size_t chunks = ChunksOf(blocks, block_tokens);
  const size_t stride = chunks * (kChunkTokens / block_tokens);
  return group * (stride + 2 * PadTopK(chunks)) + PadTopK(blocks);
}
UnitMemory MemoryOf(float* memory, const SelectUnit& unit, size_t block_tokens, size_t group) {
  const size_t chunks = ChunksOf(unit.blocks, block_tokens);
  const size_t stride = chunks * (kChunkTokens / block_tokens);
  const size_t chunk_stride = PadTopK(chunks);
  float* const of_block = memory + unit.memory;
  float* const chunk_top = of_block + group * stride;
  float* const chunk_sum = chunk_top + group * chunk_stride;
  return {.masses = {of_block, chunk_top, chunk_sum, stride, chunk_stride},
          .survivors = reinterpret_cast<int32_t*>(chunk_sum + group * chunk_stride)};
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
        block_(static_cast<size_t>(p.layout.selector.block_tokens)),
        d_(static_cast<size_t>(p.layout.head_dim)),
        group_(static_cast<size_t>(p.num_heads / p.layout.num_kv_heads)),
        plane_words_(d_ / 32 * kPageTokens),
        scales_at_(static_cast<size_t>(p.layout.selector.planes) * plane_words_),
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
  static constexpr size_t kPairsPerChunk = kChunkTokens / kPairTokens;
  // Words of a page's descriptor at the most.
  static constexpr size_t kMaxPageWords =
      kPageTokens * (kMaxHeadDim / 32 * kSketchMaxPlanes) + kPageTokens / 2;

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
        floats += UnitFloats(unit.blocks, block_, group_);
        first_planes_ = std::min(first_planes_, FirstPlanes(spec_, unit));
        units_[num_units_++] = unit;
      }
    }
    context_.partials.Reset(Scratch::BytesFor<float>(floats));
    memory_ = context_.partials.Take<float>(floats);
  }

  // The blocks of a unit that are scored with `planes`: all, the survivors, or none.
  size_t BlocksToScore(const SelectUnit& unit, int planes) const {
    const int first = FirstPlanes(spec_, unit);
    return planes < first ? 0 : planes == first ? unit.blocks : RefineCount(spec_, unit, planes);
  }

  void ScoreUnits(int planes) {
    size_t tasks = 0;
    for (size_t u = 0; u < num_units_; ++u) {
      SelectUnit& unit = units_[u];
      unit.first_task = tasks;
      const size_t blocks = BlocksToScore(unit, planes);
      tasks += (ChunksOf(blocks, block_) + kChunksPerTask - 1) / kChunksPerTask;
      // The first pass reads its planes and the scales of every block, a later one a new plane.
      const bool first = planes == FirstPlanes(spec_, unit);
      const size_t reads = first ? blocks * static_cast<size_t>(planes) : blocks;
      const size_t scales = first ? blocks : 0;
      counters_->blocks_scored += static_cast<int64_t>(reads);
      counters_->descriptor_bytes +=
          static_cast<int64_t>(block_ * (reads * d_ / 8 + scales * sizeof(bf16)));
    }
    for (int i = 0; i < context_.pool.threads(); ++i) BenchOf(i).unit = nullptr;
    context_.pool.For(static_cast<int64_t>(tasks), [&](int64_t task, int thread) {
      const SelectUnit& unit = UnitOfTask(units_, num_units_, static_cast<size_t>(task));
      const size_t chunk = (static_cast<size_t>(task) - unit.first_task) * kChunksPerTask;
      Workbench& bench = BenchOf(thread);
      switch (planes) {
        case 1:
          return ScoreChunks<1>(unit, chunk, bench);
        case 2:
          return ScoreChunks<2>(unit, chunk, bench);
        default:
          return ScoreChunks<3>(unit, chunk, bench);
      }
    });
  }

  // What a thread works with; its query is that of the unit and the pass it scored last.
  struct Workbench {
    const SelectUnit* unit;
    SketchQuery query;
    PlaneTables tables;
    ChunkEstimates estimates;
    alignas(64) uint32_t codes[kMaxQuads * kPairTokens];
    alignas(64) uint8_t nibbles[kNibbles][kPairTokens];
    alignas(64) uint32_t gathered[2][kMaxPageWords];
  };
  Workbench& BenchOf(int thread) const {
    Scratch& scratch = context_.of_thread[static_cast<size_t>(thread)];
    scratch.Reset(Scratch::BytesFor<Workbench>(1));
    return *scratch.Take<Workbench>(1);
  }

  // Scores the chunks [begin, begin + kChunksPerTask) of the unit's blocks, or of its survivors.
  template <int kPlanes>
  void ScoreChunks(const SelectUnit& unit, size_t begin, Workbench& bench) const {
    const UnitMemory memory = MemoryOf(memory_, unit, block_, group_);
    const int32_t* const survivors =
        kPlanes == FirstPlanes(spec_, unit) ? nullptr : memory.survivors;
    const size_t tokens = TokensToScore(unit, kPlanes, survivors);
    const size_t end = std::min(begin + kChunksPerTask, (tokens + kChunkTokens - 1) / kChunkTokens);
    if (bench.unit != &unit) Prepare<kPlanes>(unit, bench);
    for (size_t chunk = begin; chunk < end; ++chunk) {
      const size_t first = chunk * kChunkTokens;
      const size_t count = std::min(kChunkTokens, tokens - first);
      size_t at = 0;
      for (; at < count; at += kPairTokens) {
        PagePair pair = {{bench.gathered[0], bench.gathered[1]}, std::min(kPairTokens, count - at)};
        if (survivors == nullptr) {
          PointToPages(unit, (first + at) / kPageTokens, &pair);
        } else {
          Gather(unit, survivors + (first + at) / block_, kPlanes, pair.tokens, bench.gathered);
        }
        ScorePair<kPlanes>(pair, at, bench);
      }
      MassOfChunk(bench.estimates, bench.query, group_, at, chunk, block_, memory.masses);
    }
  }

  template <int kPlanes>
  void Prepare(const SelectUnit& unit, Workbench& bench) const {
    bench.unit = &unit;
    PrepareQuery<kPlanes>(QueriesOf(p_, unit), group_, d_, SketchScaleRatio(spec_.planes, kPlanes),
                          &bench.query);
    if constexpr (kPlanes == 1 && kReadPlaneByTables) {
      PrepareTables(bench.query, group_, d_, &bench.tables);
    }
  }

  template <int kPlanes>
  void ScorePair(const PagePair& pair, size_t at, Workbench& bench) const {
    TokenFactors factors;
    ReadScales(pair, scales_at_, &factors);
    if constexpr (kPlanes == 1 && kReadPlaneByTables) {
      UnpackNibbles(pair, d_, bench.nibbles);
      const auto estimate = d_ == 64 ? &EstimatePairByTables<64> : &EstimatePairByTables<128>;
      estimate(bench.nibbles, group_, bench.tables, factors, at, &bench.estimates);
    } else {
      UnpackPair<kPlanes>(pair, d_, bench.codes);
      EstimatePair(bench.codes, d_, group_, bench.query, factors, at, &bench.estimates);
    }
  }

  // The tokens of a pass in a row: all, or those of the survivors, of which only the row's last
  // block, which comes last, may be short.
  size_t TokensToScore(const SelectUnit& unit, int planes, const int32_t* survivors) const {
    if (survivors == nullptr) return unit.kv_len;
    const size_t count = RefineCount(spec_, unit, planes);
    const bool has_last = static_cast<size_t>(survivors[count - 1]) == unit.blocks - 1;
    return count * block_ - (has_last ? unit.blocks * block_ - unit.kv_len : 0);
  }

  const uint32_t* PageWords(const SelectUnit& unit, size_t page) const {
    return reinterpret_cast<const uint32_t*>(DescriptorOf(p_, unit, page));
  }

  // The pages `page` and `page` + 1; when the latter does not exist none of its tokens count.
  void PointToPages(const SelectUnit& unit, size_t page, PagePair* pair) const {
    const size_t last = (unit.kv_len - 1) / kPageTokens;
    for (size_t i = 0; i < 2; ++i) {
      pair->words[i] = PageWords(unit, std::min(page + i, last));
      Prefetch(PageWords(unit, std::min(page + i + kPagesAhead, last)));
    }
  }
  void Prefetch(const uint32_t* words) const {
    const auto* const bytes = reinterpret_cast<const std::byte*>(words);
    for (size_t at = 0; at < p_.layout.DescriptorRunBytes(); at += 64) {
      __builtin_prefetch(bytes + at);
    }
  }

  // Copies the listed blocks, `tokens` tokens, one after the other into two pages.
  void Gather(const SelectUnit& unit, const int32_t* ids, int planes, size_t tokens,
              uint32_t (&to)[2][kMaxPageWords]) const {
    switch (block_) {  // So that each copy is a load and a store.
      case 4:
        return GatherBlocks<4>(unit, ids, planes, tokens, to);
      case 8:
        return GatherBlocks<8>(unit, ids, planes, tokens, to);
      default:
        return GatherBlocks<16>(unit, ids, planes, tokens, to);
    }
  }
  template <size_t kBlock>
  void GatherBlocks(const SelectUnit& unit, const int32_t* ids, int planes, size_t tokens,
                    uint32_t (&to)[2][kMaxPageWords]) const {
    const size_t rows = static_cast<size_t>(planes) * (d_ / 32);
    for (size_t t = 0; t < tokens; t += kBlock) {
      const size_t begin = static_cast<size_t>(ids[t / kBlock]) * kBlock;
      const uint32_t* const from = PageWords(unit, begin / kPageTokens);
      uint32_t* const page = to[t / kPageTokens];
      const size_t from_slot = begin % kPageTokens, slot = t % kPageTokens;
      for (size_t row = 0; row < rows; ++row) {
        std::memcpy(page + row * kPageTokens + slot, from + row * kPageTokens + from_slot,
                    kBlock * sizeof(uint32_t));
      }
      const auto* const from_scales = reinterpret_cast<const bf16*>(from + scales_at_);
      auto* const scales = reinterpret_cast<bf16*>(page + scales_at_);
      std::memcpy(scales + slot, from_scales + from_slot, kBlock * sizeof(bf16));
    }
  }

  // After the pass with `planes`: the survivors of the next pass, or the ids that are kept.
  void RankUnits(int planes) {
    context_.pool.For(static_cast<int64_t>(num_units_), [&](int64_t task, int thread) {
      const SelectUnit& unit = units_[task];
      if (planes >= FirstPlanes(spec_, unit)) {
        RankUnit(unit, planes, &context_.of_thread[static_cast<size_t>(thread)]);
      }
    });
  }

  void RankUnit(const SelectUnit& unit, int planes, Scratch* scratch) const {
    const size_t blocks = BlocksToScore(unit, planes);
    const size_t room = PadTopK(blocks);
    scratch->Reset(Scratch::BytesFor<float>(room) + Scratch::BytesFor<uint32_t>(room));
    float* const scores = scratch->Take<float>(room);
    uint32_t* const keys = scratch->Take<uint32_t>(room);
    const UnitMemory memory = MemoryOf(memory_, unit, block_, group_);
    ScoresOfMasses(memory.masses, group_, blocks, block_, scores);
    const bool last = planes == spec_.planes;
    const size_t count =
        last ? static_cast<size_t>(unit.row->keep_blocks) : RefineCount(spec_, unit, planes + 1);
    // Sink and local blocks survive each pass, so they are the first and the last of its list.
    auto* const ranks = last ? unit.ids : reinterpret_cast<int32_t*>(scores);
    KeepBlocks(scores, blocks, count, static_cast<size_t>(unit.row->sink_blocks),
               static_cast<size_t>(unit.row->local_blocks), keys, ranks);
    const bool whole = planes == FirstPlanes(spec_, unit);
    int32_t* const ids = last ? unit.ids : memory.survivors;
    for (size_t i = 0; i < count; ++i) ids[i] = whole ? ranks[i] : memory.survivors[ranks[i]];
  }

  Context& context_;
  const SelectParams& p_;
  const SelectorSpec& spec_;
  const size_t block_;
  const size_t d_;
  const size_t group_;
  const size_t plane_words_;  // Of a page
  const size_t scales_at_;    // Words before the scales
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
