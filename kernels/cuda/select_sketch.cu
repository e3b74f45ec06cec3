// The sketch selector: an estimated logit for every token from its few-bit code, a block's score
// the attention mass that the estimates give it (params.h), and the exact top-k of select_topk.cuh.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk]{u32 words[planes][d / 32][16], bf16 scale[16]},
//   pages through the page table; ids [row][KV head][keep] out.
//
// A team of CTAs (select_team.cuh) has one (row, KV head), each CTA a contiguous range of chunks of
// 128 tokens, each of its warps a chunk at a time, copied to a ring in shared memory ahead of time.
// The masses of a block, one per head, stay in shared memory until the team knows every head's
// total; then they become one score per block. When a CTA's part does not fit they wait in global
// scratch. Teams are as large as their row is long, so that all CTAs have about the same to do;
// with more rows and KV heads than multiprocessors, a CTA does one after the other alone.
//
// Progressive reading is a loop of such passes: the ids that one pass keeps are a list in global
// scratch, which the next one cuts anew among the CTAs and reads with one plane more.
//
// A row's choice does not depend on the batch, although the number of CTAs does: masses are
// relative to a base that the row's own tokens at fixed places give, chunks are cut at fixed
// places, and totals over chunks are sums of integers.
//
// Bound: the bytes of the planes read at the device's read bandwidth, plus 4 us. Measured: 69 % of
// it at 8 x 256K with two planes (28 heads on 4), 49 % at 4 x 128K; LOG.md says where the time
// goes.

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_sketch_scan.cuh"
#include "kernels/cuda/select_team.cuh"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = kSketchThreads;
constexpr int kWarps = kSketchWarps;

struct SketchArgs {
  const uint16_t* q;
  const SparseRow* rows;
  PageTables tables;
  const std::byte* descriptors;
  int32_t* ids;
  TeamCounters* counters;  // [row][KV head]
  LaunchCount* launches;
  TeamParcels* parcels;       // [CTA]
  std::byte* mass_scratch;    // [CTA][scratch_bytes], for CTAs whose part is large.
  int32_t* survivor_scratch;  // [row][KV head][2][survivor_stride]
  int64_t scratch_bytes;
  int64_t survivor_stride;
  bool one_more_slot;  // SketchRing.
  int shared_blocks;   // Whose masses and keys are in shared memory.
  int tail_bytes;      // Of it, for the rings, then RankShared and the keys; masses follow.
  int num_rows;
  bool teams;  // By the lengths of the rows. Else a CTA does whole rows and KV heads.
  int num_kv_heads;
  int group;
  int block_tokens;
  int run_bytes;                      // DescriptorRunBytes()
  int scales_at;                      // Bytes before the scales.
  float ratio[kSketchMaxPlanes + 1];  // Of the scale of p planes to the stored one.
  float refine_share[2];
};

// The part of the work that a CTA has.
struct TeamPlace {
  SparseRow row;
  int index;  // Of the row; -1: none.
  int kv_head;
  int rank;
  int size;
};

// At the beginning of shared memory. The tail follows, and then masses.
struct SketchShared {
  TeamPlace place;
  alignas(16) SketchScanShared scan;
};
static_assert(sizeof(SketchShared) % 16 == 0);

// At the beginning of the tail, when the rings are no longer used. The keys follow.
struct RankShared {
  TeamShared team;
  TopKWarpCounts warp_counts;
};
static_assert(sizeof(RankShared) % 16 == 0);

// Scores of the CTA's blocks, as keys, and of a long row which bins they are in.
__device__ __forceinline__ void FoldMasses(const MassMemory& memory, const TopKRange& range,
                                           const TopKBudget& budget, int group,
                                           const TeamBins& bins, const float* weights,
                                           TeamShared& shared) {
  const bool counts = budget.blocks > kMaxCandidates;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < range.count; i += kThreads * 4) {
    float score[4] = {};
#pragma unroll 4
    for (int h = 0; h < group; ++h) {
      const uint2 upper = *reinterpret_cast<const uint2*>(memory.upper + h * memory.stride + i);
      const uint32_t lower =
          *reinterpret_cast<const uint32_t*>(memory.lower + h * memory.stride + i);
      const float weight = weights[h];
      const uint32_t packed[4] = {
          __byte_perm(upper.x, lower, 0x7104), __byte_perm(upper.x, lower, 0x7325),
          __byte_perm(upper.y, lower, 0x7106), __byte_perm(upper.y, lower, 0x7327)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // The byte above the 24 bits is shifted out but for its lowest bit, the sign.
        score[j] = fmaf(fabsf(__uint_as_float(packed[j] << 7)), weight, score[j]);
      }
    }
    uint32_t keys[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      keys[j] = __float_as_uint(score[j]);
      if (counts && i + j < range.count && !budget.Forces(range.first + i + j)) {
        bins.Count(shared, keys[j]);
      }
    }
    *reinterpret_cast<uint4*>(memory.keys + i) = make_uint4(keys[0], keys[1], keys[2], keys[3]);
  }
}

// Masses of some blocks from shared to global memory, where they are those from `first` on.
__device__ __forceinline__ void MoveMasses(const MassMemory& from, const MassMemory& to, int first,
                                           int blocks, int group) {
  for (int h = 0; h < group; ++h) {
    for (int i = static_cast<int>(threadIdx.x) * 4; i < blocks; i += kThreads * 4) {
      const auto at = static_cast<int64_t>(h) * to.stride + first + i;
      *reinterpret_cast<uint2*>(to.upper + at) =
          *reinterpret_cast<const uint2*>(from.upper + h * from.stride + i);
      *reinterpret_cast<uint32_t*>(to.lower + at) =
          *reinterpret_cast<const uint32_t*>(from.lower + h * from.stride + i);
    }
  }
}

// The number of blocks that the pass with `planes` scores when one before it scored all.
__device__ __forceinline__ int RefineCount(const SketchArgs& args, const TopKBudget& budget,
                                           int planes) {
  const double share = args.refine_share[planes - 2];
  const int wanted = static_cast<int>(ceil(share * static_cast<double>(budget.blocks)));
  return min(max(wanted, budget.keep), budget.blocks);
}

// The chunks of a CTA, and where their masses belong.
struct SketchPart {
  int begin;
  int end;
  int window_chunks;  // So many at a time have theirs in `window`, in shared memory.
  MassMemory window;
  MassMemory masses;  // The same if all fit.

  __device__ __forceinline__ bool Fits() const { return end - begin <= window_chunks; }
};

// A CTA's passes over its part of a row and KV head.
template <int kDim, int kHeads, int kLastPlanes>
struct SketchUnit {
  const SketchArgs& args;
  SketchScanShared& shared;
  std::byte* tail;  // Of shared memory, of args.tail_bytes; masses follow.
  SparseRow row;
  TopKBudget budget;
  int unit;
  int kv_head;
  Team team;
  uint32_t launches;  // Before this one.

  __device__ __forceinline__ RankShared& Rank() const {
    return *reinterpret_cast<RankShared*>(tail);
  }
  __device__ __forceinline__ std::byte* KeysAt() const { return tail + sizeof(RankShared); }
  // In turns the samples of the base, masses, unless they are in global memory, and candidates.
  __device__ __forceinline__ std::byte* MassesAt() const { return tail + args.tail_bytes; }
  __device__ __forceinline__ int32_t* List(int planes) const {
    return args.survivor_scratch +
           (static_cast<int64_t>(unit) * 2 + planes % 2) * args.survivor_stride;
  }

  __device__ __forceinline__ SketchSource SourceOf(int planes, bool first) const {
    const int quarters = args.block_tokens / kQuarterTokens;
    SketchSource source;
    source.pages = args.tables.pages + row.table * args.tables.stride;
    source.list = first ? nullptr : List(planes);
    source.descriptors = args.descriptors + static_cast<int64_t>(kv_head) * args.run_bytes;
    source.page_bytes = static_cast<uint32_t>(args.num_kv_heads * args.run_bytes);
    source.scales_at = args.scales_at;
    source.quarter_shift = quarters == 4 ? 2 : quarters - 1;
    source.blocks = first ? budget.blocks : RefineCount(args, budget, planes);
    source.tokens = row.position + 1;
    if (!first) {
      // Only the row's last block may be short; it comes last.
      const bool has_last = __ldcg(source.list + source.blocks - 1) == budget.blocks - 1;
      const int missing = budget.blocks * args.block_tokens - source.tokens;
      source.tokens = source.blocks * args.block_tokens - (has_last ? missing : 0);
    }
    return source;
  }

  // A head's total, with those of the team's other CTAs added: a warp's work. Parcels have the
  // total in units of 2^-74, of which 2^50 are one of `upper`, and whether a mass was cut off.
  __device__ __forceinline__ void AddTeamTotal(int head, bool exact) {
    constexpr int kLowerBits = 50;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Total own = shared.totals[head];
    own.upper += own.lower >> kLowerBits;
    own.lower &= (1ull << kLowerBits) - 1;
    if (lane == 0) {
      const uint64_t middle = own.upper << (kLowerBits - 32) | own.lower >> 32;
      const auto top = static_cast<uint32_t>(middle >> 32);
      SendParcel(&team.parcels[team.rank].totals[exact ? 1 : 0][head],
                 static_cast<uint32_t>(own.lower), static_cast<uint32_t>(middle),
                 top << 1 | shared.saturated, team.tag);
    }
    Total sum;
    uint32_t saturated = 0;
    ReceiveParcels(
        lane, 32, team.size, team.tag,
        [&](int r) { return &team.parcels[r].totals[exact ? 1 : 0][head]; },
        [&](int, const uint4& parcel) {
          const uint64_t middle = static_cast<uint64_t>(parcel.z >> 1) << 32 | parcel.y;
          sum.upper += middle >> (kLowerBits - 32);
          sum.lower += (middle & ((1ull << (kLowerBits - 32)) - 1)) << 32 | parcel.x;
          saturated |= parcel.z & 1;
        });
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      sum.upper += __shfl_xor_sync(kAllLanes, sum.upper, bit);
      sum.lower += __shfl_xor_sync(kAllLanes, sum.lower, bit);
    }
    saturated = __reduce_or_sync(kAllLanes, saturated);
    if (lane != 0) return;
    shared.totals[head] = sum;
    if (saturated != 0) atomicOr(&shared.team_saturated, 1u);
  }

  // The team's totals, in shared memory; whether a mass of its tokens was cut off.
  __device__ __forceinline__ bool MeetWithTotals(bool first_pass, bool exact) {
    __syncthreads();
    if (team.size == 1) return shared.saturated != 0;
    LetNextStart();
    static_assert(kWarps >= kMaxGroup);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < args.group) AddTeamTotal(warp, exact);
    if (first_pass && !exact && threadIdx.x == kThreads - 1) args.launches->Count(launches);
    __syncthreads();
    return shared.team_saturated != 0;
  }

  // A warp's head.
  __device__ __forceinline__ void LoadQuery(RawQuery<kDim>* query) const {
    const int head = static_cast<int>(threadIdx.x) / 32;
    if (head >= args.group) return;
    const int64_t first_head =
        (static_cast<int64_t>(row.row) * args.num_kv_heads + kv_head) * args.group;
    query->Load(args.q + (first_head + head) * kDim);
  }
  __device__ __forceinline__ void PrepareQuery(const RawQuery<kDim>& query) const {
    static_assert(kWarps >= kMaxGroup);
    const int head = static_cast<int>(threadIdx.x) / 32;
    if (head < args.group) {
      PrepareSketchQuery(query, head, &shared.queries);
    } else if (head < SketchColumns<kHeads>::kGroup) {
      auto* const quads = reinterpret_cast<uint32_t*>(shared.queries.quads[head]);
      for (int i = static_cast<int>(threadIdx.x) % 32; i < kDim / 2; i += 32) quads[i] = 0;
      shared.queries.octaves[head] = 0;
    }
  }

  // Before a barrier that scoring comes after.
  __device__ __forceinline__ void ClearSums() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kMaxGroup) {
      shared.largest[thread] = 0;
      shared.totals[thread] = Total();
    }
    if (thread == 0) shared.saturated = shared.team_saturated = 0;
  }

  // shared.largest of the whole team.
  __device__ __forceinline__ void MeetWithLargest() {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (team.size == 1) return;
    if (thread < args.group) atomicMax(&team.counters->largest[thread], shared.largest[thread]);
    team.Meet();
    if (thread < args.group) shared.largest[thread] = __ldcg(&team.counters->largest[thread]);
    team.Meet();
    if (thread < args.group && team.rank == 0) team.counters->largest[thread] = 0;
  }

  // Masses of all chunks of the part; those of a window at a time where they do not fit.
  template <typename Stream>
  __device__ __forceinline__ void ScorePart(const SketchPart& part, Stream* stream,
                                            const SketchOperand<kDim, kHeads>& operand,
                                            const LaneHeads<kHeads>& heads) {
    const int shift = stream->reader.source.quarter_shift;
    for (int at = part.begin;;) {
      if (!Stream::kReadsList && shift == 1) {  // The usual one.
        ScoreChunks<1>(*stream, args.group, operand, heads, part.window, shared);
      } else {
        ScoreChunks<-1>(*stream, args.group, operand, heads, part.window, shared);
      }
      if (part.Fits()) return;
      const int chunk_blocks = kChunkQuarters >> shift;
      const int next = min(part.end, at + part.window_chunks);
      __syncthreads();
      MoveMasses(part.window, part.masses, (at - part.begin) * chunk_blocks,
                 (next - at) * chunk_blocks, args.group);
      __syncthreads();
      at = next == part.end ? part.begin : next;
      stream->Move(at, min(part.end, at + part.window_chunks));
      if (next == part.end) return;
      stream->FindPlaces();
      stream->Start();
    }
  }

  // The largest estimates of all the team's tokens; hardly ever done. slots: for a step.
  template <typename Stream>
  __device__ __forceinline__ void FindLargest(const SketchPart& part, const Stream& stream,
                                              uint32_t slots,
                                              const SketchOperand<kDim, kHeads>& operand,
                                              const LaneHeads<kHeads>& heads) {
    __syncthreads();
    ClearSums();
    __syncthreads();
    LargestEstimates<kHeads> largest;
#pragma unroll 1
    for (int chunk = part.begin + static_cast<int>(threadIdx.x) / 32; chunk < part.end;
         chunk += kWarps) {
      const uint32_t places = stream.reader.Places(chunk, part.end, 0);
#pragma unroll 1
      for (int j = 0; j < kChunkSteps; ++j) {
        stream.CopyOne(places, j, slots);
        SketchSums<kHeads> sums;
        uint4 scales;
        stream.template ReadOne<false>(operand, slots, &sums, &scales);
        largest.AddStep(sums, scales, j, stream.reader.source.tokens - chunk * kChunkTokens, heads);
      }
    }
    largest.Store(shared.largest);
    MeetWithLargest();
  }

  // Scores the part, and leaves shared.weight. Masses are relative to the largest estimate of one
  // step per warp, at places spread over the row; where that falls far short, once more relative to
  // the largest of all.
  template <int kPlanes, bool kList>
  __device__ __forceinline__ void Score(const SketchSource& source, const SketchPart& part,
                                        bool first_pass) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    ChunkStream<kDim, kPlanes, kPlanes == kLastPlanes, kList> stream(
        source, part.begin, min(part.end, part.begin + part.window_chunks), tail,
        args.one_more_slot);
    const auto sample =
        static_cast<int>((source.tokens - 1) / kStepTokens * int64_t{warp} / (kWarps - 1));
    const int sample_chunk = sample / kChunkSteps;
    const uint32_t sample_places = stream.reader.Places(sample_chunk, source.Chunks(), 0);
    const uint32_t sample_slots = SharedAddress(MassesAt()) + warp * stream.kStepBytes;
    stream.FindPlaces();
    RawQuery<kDim> query;
    if (first_pass) {  // What is above, no kernel writes.
      WaitForPrevious();
      if (team.size > 1) launches = args.launches->Before();
      LoadQuery(&query);
    }
    stream.CopyOne(sample_places, sample % kChunkSteps, sample_slots);
    stream.Start();
    if (first_pass) PrepareQuery(query);
    ClearSums();
    __syncthreads();
    team.tag = (launches + 1) << 2 | kPlanes;
    SketchOperand<kDim, kHeads> operand;
    operand.Load(shared.queries);
    LaneHeads<kHeads> heads;
    heads.LoadFactors(shared.queries, args.group, args.ratio[kPlanes]);
    {
      SketchSums<kHeads> sums;
      uint4 scales;
      stream.template ReadOne<true>(operand, sample_slots, &sums, &scales);
      LargestEstimates<kHeads> largest;
      largest.AddStep(sums, scales, sample % kChunkSteps,
                      source.tokens - sample_chunk * kChunkTokens, heads);
      largest.Store(shared.largest);
    }
    __syncthreads();
#pragma unroll 1
    for (bool exact = false;; exact = true) {
      heads.LoadOffsets(shared.largest, args.group, exact ? 2.0f : kHeadroomOctaves);
      ScorePart(part, &stream, operand, heads);
      if (!MeetWithTotals(first_pass, exact) || exact) break;
      FindLargest(part, stream, sample_slots, operand, heads);
      stream.FindPlaces();
      stream.Start();
    }
    if (thread < args.group) {
      const double value = shared.totals[thread].Value();
      shared.weight[thread] = value > 0 ? static_cast<float>(1.0 / value) : 0.0f;
    }
    ClearTopK<kThreads>(Rank().team);
    __syncthreads();
  }

  template <int kPlanes>
  __device__ __forceinline__ void Pass(bool first) {
    const SketchSource source = SourceOf(kPlanes, first);
    const int per_cta = (source.Chunks() + team.size - 1) / team.size;
    const int begin = min(source.Chunks(), team.rank * per_cta);
    const int end = min(source.Chunks(), begin + per_cta);
    const int chunk_blocks = kChunkQuarters >> source.quarter_shift;
    const int first_block = min(source.blocks, begin * chunk_blocks);
    const TopKRange range = {first_block, min(source.blocks, end * chunk_blocks) - first_block};
    const int most = per_cta * chunk_blocks;
    const MassMemory window(KeysAt(), MassesAt(), args.shared_blocks, args.group);
    const int window_chunks = args.shared_blocks / chunk_blocks;
    std::byte* const scratch = args.mass_scratch + blockIdx.x * args.scratch_bytes;
    const MassMemory masses =
        end - begin <= window_chunks
            ? window
            : MassMemory(scratch, scratch + MassMemory::KeyBytesFor(most), most, args.group);
    const SketchPart part = {begin, end, window_chunks, window, masses};
    if (kPlanes == 1 || first) {
      Score<kPlanes, false>(source, part, first);
    } else {
      Score<kPlanes, true>(source, part, false);
    }
    const TeamBins bins(static_cast<float>(args.group) / static_cast<float>(source.blocks));
    TopKBudget pass = budget;
    pass.blocks = source.blocks;
    int32_t* out = args.ids + row.ids_begin + static_cast<int64_t>(kv_head) * row.keep_blocks;
    if constexpr (kPlanes < kLastPlanes) {
      pass.keep = RefineCount(args, budget, kPlanes + 1);
      out = List(kPlanes + 1);
    }
    FoldMasses(masses, range, pass, args.group, bins, shared.weight, Rank().team);
    __syncthreads();
    const TopKCut cut = FindTeamCut<kThreads>(team, Rank().team, masses.keys, range, pass, most,
                                              bins, reinterpret_cast<uint32_t*>(MassesAt()));
    out += cut.Offset();
    const auto key_at = [&](int i) { return masses.keys[i]; };
    const int kept = WriteTopKIds<kThreads>(Rank().warp_counts, key_at, range, pass, cut, out);
    if (!first) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kept; i += kThreads) {
        out[i] = __ldcg(source.list + out[i]);
      }
    }
    if constexpr (kPlanes < kLastPlanes) team.Meet();
  }
};

// ---- which CTA does what ------------------------------------------------------------------------

constexpr int kMaxRowsInTeams = 160;

// The chunks that a row's scoring takes; 0 when nothing is scored.
__device__ __forceinline__ int ChunksOfRow(const SparseRow& row, int block_tokens) {
  return TopKBudgetOf(row, block_tokens).ScoresDecide() ? row.position / kChunkTokens + 1 : 0;
}

// Teams as large as their rows are long: the least part of a row, in chunks, by which all rows cut
// to such parts have no more of them than the grid has CTAs (found to a sixteenth). A warp's work.
// REQUIRES that the grid has a CTA per row and KV head.
__device__ __forceinline__ void FindPlace(const SketchArgs& args, TeamPlace* place) {
  constexpr int kRowsPerLane = kMaxRowsInTeams / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int grid = static_cast<int>(gridDim.x);
  int chunks[kRowsPerLane];
  int total = 0;
#pragma unroll
  for (int k = 0; k < kRowsPerLane; ++k) {
    const int r = k * 32 + lane;
    chunks[k] = r < args.num_rows ? ChunksOfRow(args.rows[r], args.block_tokens) : -1;
    total += max(0, chunks[k]);
  }
  total = __reduce_add_sync(kAllLanes, total);
  int part = max(kWarps, (total * args.num_kv_heads + grid - 1) / grid);
  int ctas[kRowsPerLane];
  while (true) {
    int sum = 0;
#pragma unroll
    for (int k = 0; k < kRowsPerLane; ++k) {
      ctas[k] = 0;
      if (k * 32 >= args.num_rows) continue;
      if (chunks[k] >= 0) ctas[k] = max(1, (chunks[k] + part - 1) / part) * args.num_kv_heads;
      sum += ctas[k];
    }
    if (static_cast<int>(__reduce_add_sync(kAllLanes, sum)) <= grid) break;
    part += part / 16 + 1;
  }
  int before = 0;
  bool found = false;
#pragma unroll
  for (int k = 0; k < kRowsPerLane; ++k) {
    if (k * 32 >= args.num_rows) break;
    int inclusive = ctas[k];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    const int at = static_cast<int>(blockIdx.x) - (before + inclusive - ctas[k]);
    if (at >= 0 && at < ctas[k]) {
      found = true;
      place->index = k * 32 + lane;
      place->size = ctas[k] / args.num_kv_heads;
      place->kv_head = at / place->size;
      place->rank = at % place->size;
      place->row = args.rows[place->index];
    }
    before += __shfl_sync(kAllLanes, inclusive, 31);
  }
  if (!__any_sync(kAllLanes, found) && lane == 0) place->index = -1;
}

// The work of a CTA that has a place.
template <int kDim, int kHeads, int kLeastPlanes, int kLastPlanes>
__device__ __forceinline__ void SelectAtPlace(const SketchArgs& args, const TeamPlace& place,
                                              SketchScanShared& shared, std::byte* tail) {
  const TopKBudget budget = TopKBudgetOf(place.row, args.block_tokens);
  if (!budget.ScoresDecide()) {
    WaitForPrevious();
    int32_t* const ids = args.ids + place.row.ids_begin +
                         static_cast<int64_t>(place.kv_head) * place.row.keep_blocks;
    for (int i = static_cast<int>(threadIdx.x); i < budget.keep; i += kThreads) {
      ids[i] = budget.UnscoredId(i);
    }
    return;
  }
  const int unit = place.index * args.num_kv_heads + place.kv_head;
  const bool alone = place.size == 1;
  const Team team = {place.rank,
                     place.size,
                     alone ? nullptr : args.counters + unit,
                     alone ? nullptr : args.parcels + blockIdx.x - place.rank,
                     0,
                     0};
  SketchUnit<kDim, kHeads, kLastPlanes> work = {args, shared,        tail, place.row, budget,
                                                unit, place.kv_head, team, 0};
  int first = kLeastPlanes;
  if constexpr (kLeastPlanes < kLastPlanes) {
    while (first < kLastPlanes && RefineCount(args, budget, first + 1) == budget.blocks) ++first;
  }
  if constexpr (kLeastPlanes == 1 && kLastPlanes >= 1) {
    if (first <= 1) work.template Pass<1>(first == 1);
  }
  if constexpr (kLeastPlanes <= 2 && kLastPlanes >= 2) {
    if (first <= 2) work.template Pass<2>(first == 2);
  }
  if constexpr (kLastPlanes >= 3) work.template Pass<3>(first == 3);
  work.team.Leave();
}

// Every row is scored with at least kLeastPlanes: the others are read whole.
template <int kDim, int kHeads, int kLeastPlanes, int kLastPlanes>
__global__ void __launch_bounds__(kThreads, 1) SelectSketchKernel(const SketchArgs args) {
  extern __shared__ uint4 dynamic[];
  SketchShared& shared = *reinterpret_cast<SketchShared*>(dynamic);
  std::byte* const tail = reinterpret_cast<std::byte*>(dynamic) + sizeof(SketchShared);
  const int thread = static_cast<int>(threadIdx.x);
  const int units = args.teams ? 1 : args.num_rows * args.num_kv_heads - blockIdx.x;
  // In teams, once.
#pragma unroll 1
  for (int turn = 0; turn < units; turn += static_cast<int>(gridDim.x)) {
    if (args.teams) {
      if (thread < 32) FindPlace(args, &shared.place);
    } else if (thread == 0) {
      const int unit = static_cast<int>(blockIdx.x) + turn;
      const int index = unit / args.num_kv_heads;
      shared.place = {args.rows[index], index, unit % args.num_kv_heads, 0, 1};
    }
    __syncthreads();
    const TeamPlace place = shared.place;
    if (args.teams && (place.index < 0 || place.size == 1) && thread == 0) {
      WaitForPrevious();
      args.launches->Count(args.launches->Before());
    }
    if (place.index >= 0) {
      SelectAtPlace<kDim, kHeads, kLeastPlanes, kLastPlanes>(args, place, shared.scan, tail);
    }
    __syncthreads();
  }
}

// ---- launcher ---------------------------------------------------------------------------------

// How shared memory is divided.
struct SketchMemory {
  int64_t available;  // For the tail and masses.
  int group;
  int64_t ring_bytes;
  int64_t most_blocks;  // That fit.

  SketchMemory(size_t shared_bytes, int group_size, int64_t rings)
      : available(static_cast<int64_t>(shared_bytes - sizeof(SketchShared))),
        group(group_size),
        ring_bytes(rings),
        most_blocks(0) {
    while (TailBytes(most_blocks + 64) + MassBytes(most_blocks + 64) <= available) {
      most_blocks += 64;
    }
  }
  // Masses, or what has their place when there are none.
  int64_t MassBytes(int64_t blocks) const {
    const int64_t candidates = (kMaxCandidates + kParcelKeys) * sizeof(uint32_t);
    return std::max(
        {MassMemory::MassBytesFor(blocks, group), ring_bytes, (candidates + 15) / 16 * 16});
  }
  int64_t TailBytes(int64_t blocks) const {
    const auto rank_bytes = static_cast<int64_t>(sizeof(RankShared));
    return std::max(ring_bytes, rank_bytes + MassMemory::KeyBytesFor(blocks));
  }
};

// The grid, and the chunks that a CTA gets at the most.
struct SketchGrid {
  int64_t ctas;
  int64_t most_chunks;
};

// With few (row, KV head) pairs all multiprocessors have a CTA each, dealt out by length. Otherwise
// each pair has one CTA, with its masses in global memory if it must be.
SketchGrid PlanGrid(int64_t units, int64_t row_chunks, int sms, bool teams) {
  if (!teams) return {std::min<int64_t>(units, sms), row_chunks};
  // Parts of this size are few enough: one more than whole ones for each row.
  const int64_t spare = sms - units;
  const int64_t enough = spare == 0 ? row_chunks : (row_chunks * units + spare - 1) / spare;
  const int64_t most = std::max<int64_t>(kWarps, enough + enough / 16 + 1);
  return {sms, std::min(row_chunks, most)};
}

// Of a warp's ring, whose passes have these planes.
template <int kDim, int kLeastPlanes, int kLastPlanes>
constexpr int RingBytes(bool one_more_slot) {
  int bytes = SketchRing<kDim, kLastPlanes>::Bytes(one_more_slot);
  if constexpr (kLeastPlanes < kLastPlanes) {
    bytes = std::max(bytes, RingBytes<kDim, kLeastPlanes, kLastPlanes - 1>(one_more_slot));
  }
  return bytes;
}

template <int kDim, int kHeads, int kLeastPlanes, int kLastPlanes>
void Launch(Context& context, SketchArgs args) {
  const auto kernel = SelectSketchKernel<kDim, kHeads, kLeastPlanes, kLastPlanes>;
  static const bool configured = [&] {
    RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(context.device.shared_bytes_per_block)));
    return true;
  }();
  static_cast<void>(configured);

  const int64_t units = int64_t{args.num_rows} * args.num_kv_heads;
  const int64_t row_chunks = (args.tables.stride * kPageTokens + kChunkTokens - 1) / kChunkTokens;
  const int64_t chunk_blocks = kChunkTokens / args.block_tokens;
  const SketchMemory least(context.device.shared_bytes_per_block, args.group,
                           kWarps * RingBytes<kDim, kLeastPlanes, kLastPlanes>(false));
  const SketchMemory most(context.device.shared_bytes_per_block, args.group,
                          kWarps * RingBytes<kDim, kLeastPlanes, kLastPlanes>(true));
  const int sms = context.device.sms;
  args.teams = units <= sms && args.num_rows <= kMaxRowsInTeams;
  const SketchGrid grid = PlanGrid(units, row_chunks, sms, args.teams);
  const int64_t blocks = grid.most_chunks * chunk_blocks;
  args.one_more_slot = blocks <= most.most_blocks;
  const SketchMemory& memory = args.one_more_slot ? most : least;
  const int64_t shared_blocks = std::min(blocks, memory.most_blocks);
  const int64_t shared_mass_bytes = memory.MassBytes(shared_blocks);
  args.shared_blocks = static_cast<int>(shared_blocks);
  args.tail_bytes = static_cast<int>(memory.TailBytes(shared_blocks));
  args.scratch_bytes = 0;
  if (blocks > memory.most_blocks) {
    const int64_t bytes =
        MassMemory::KeyBytesFor(blocks) + MassMemory::MassBytesFor(blocks, args.group);
    args.scratch_bytes = (bytes + 255) / 256 * 256;
  }
  args.survivor_stride =
      kLeastPlanes == kLastPlanes ? 0 : args.tables.stride * (kPageTokens / args.block_tokens);

  const auto mass_bytes = static_cast<size_t>(args.scratch_bytes * grid.ctas);
  const size_t survivor_bytes =
      static_cast<size_t>(args.survivor_stride * units * 2) * sizeof(int32_t);
  std::byte* const scratch = context.select.Reserve(mass_bytes + survivor_bytes);
  args.mass_scratch = scratch;
  args.survivor_scratch = reinterpret_cast<int32_t*>(scratch + mass_bytes);
  if (args.teams) {
    RESA_CHECK(sms <= kMaxTeam) << "SelectSketch: " << sms << " multiprocessors";
    const auto words = [](size_t bytes) { return bytes / sizeof(uint32_t); };
    args.counters = reinterpret_cast<TeamCounters*>(context.select_counters.Reserve(
        words(static_cast<size_t>(units) * sizeof(TeamCounters)), context.stream));
    args.parcels = reinterpret_cast<TeamParcels*>(context.select_parcels.Reserve(
        words((static_cast<size_t>(sms) + 1) * sizeof(TeamParcels)), context.stream));
    args.launches = reinterpret_cast<LaunchCount*>(args.parcels + sms);
  }
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(grid.ctas)), dim3(kThreads),
                   sizeof(SketchShared) + static_cast<size_t>(args.tail_bytes + shared_mass_bytes),
                   1, args);
}

template <int kDim, int kHeads>
void LaunchPlanes(Context& context, const SketchArgs& args, const SelectorSpec& spec) {
  const bool whole2 = spec.refine_share[0] == 1.0f;
  const bool whole = whole2 && (spec.planes < 3 || spec.refine_share[1] == 1.0f);
  switch (spec.planes) {
    case 1:
      return Launch<kDim, kHeads, 1, 1>(context, args);
    case 2:
      return whole ? Launch<kDim, kHeads, 2, 2>(context, args)
                   : Launch<kDim, kHeads, 1, 2>(context, args);
    case 3:
      return whole ? Launch<kDim, kHeads, 3, 3>(context, args)
                   : Launch<kDim, kHeads, 1, 3>(context, args);
    default:
      RESA_CHECK(false) << "SelectSketch: " << spec.planes << " planes";
  }
}

template <int kDim>
void LaunchGroup(Context& context, const SketchArgs& args, const SelectorSpec& spec) {
  if (args.group <= 4) return LaunchPlanes<kDim, 1>(context, args, spec);
  if (args.group <= 8) return LaunchPlanes<kDim, 2>(context, args, spec);
  return LaunchPlanes<kDim, 4>(context, args, spec);
}

}  // namespace

void SelectSketch(Context& context, const SelectParams& params) {
  if (params.num_rows == 0) return;
  const KvLayout& layout = params.layout;
  const SelectorSpec& spec = layout.selector;
  SketchArgs args = {};
  args.q = reinterpret_cast<const uint16_t*>(params.q.b16());
  args.rows = params.rows;
  args.num_rows = static_cast<int>(params.num_rows);
  args.tables = params.tables;
  args.descriptors = params.kv.descriptors;
  args.ids = params.ids;
  args.num_kv_heads = layout.num_kv_heads;
  args.group = params.num_heads / layout.num_kv_heads;
  args.block_tokens = spec.block_tokens;
  args.run_bytes = static_cast<int>(layout.DescriptorRunBytes());
  args.scales_at = args.run_bytes - kPageTokens * 2;
  for (int p = 1; p <= spec.planes; ++p) args.ratio[p] = SketchScaleRatio(spec.planes, p);
  std::copy(spec.refine_share.begin(), spec.refine_share.end(), args.refine_share);
  RESA_CHECK(args.group >= 1 && args.group <= kMaxGroup) << "SelectSketch: group " << args.group;
  switch (layout.head_dim) {
    case 64:
      return LaunchGroup<64>(context, args, spec);
    case 128:
      return LaunchGroup<128>(context, args, spec);
    default:
      RESA_CHECK(false) << "SelectSketch: head size " << layout.head_dim;
  }
}

}  // namespace resa::kernels::cuda
