#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_UNIT_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_UNIT_CUH_

// A CTA's passes over its part of a row and KV head, for the sketch selector (select_sketch.cu).

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_sketch_scan.cuh"
#include "kernels/cuda/select_team.cuh"
#include "kernels/cuda/select_topk.cuh"
#include "kernels/params.h"

namespace resa::kernels::cuda {

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
  for (int i = static_cast<int>(threadIdx.x) * 4; i < range.count; i += kSketchThreads * 4) {
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
    for (int i = static_cast<int>(threadIdx.x) * 4; i < blocks; i += kSketchThreads * 4) {
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
    static_assert(kSketchWarps >= kMaxGroup);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < args.group) AddTeamTotal(warp, exact);
    if (first_pass && !exact && threadIdx.x == kSketchThreads - 1) args.launches->Count(launches);
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
    static_assert(kSketchWarps >= kMaxGroup);
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
         chunk += kSketchWarps) {
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
        static_cast<int>((source.tokens - 1) / kStepTokens * int64_t{warp} / (kSketchWarps - 1));
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
    ClearTopK<kSketchThreads>(Rank().team);
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
    const TopKCut cut =
        FindTeamCut<kSketchThreads>(team, Rank().team, masses.keys, range, pass, most, bins,
                                    reinterpret_cast<uint32_t*>(MassesAt()));
    out += cut.Offset();
    const auto key_at = [&](int i) { return masses.keys[i]; };
    const int kept =
        WriteTopKIds<kSketchThreads>(Rank().warp_counts, key_at, range, pass, cut, out);
    if (!first) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kept; i += kSketchThreads) {
        out[i] = __ldcg(source.list + out[i]);
      }
    }
    if constexpr (kPlanes < kLastPlanes) team.Meet();
  }
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_UNIT_CUH_
