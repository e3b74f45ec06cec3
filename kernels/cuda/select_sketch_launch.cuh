#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_LAUNCH_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_LAUNCH_CUH_

// The kernel of the sketch selector (select_sketch.cu) and its launcher, for one head size.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_sketch_unit.cuh"
#include "kernels/params.h"

namespace resa::kernels::cuda {

// ---- which CTA does what ------------------------------------------------------------------------

inline constexpr int kMaxRowsInTeams = 160;

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
  int part = max(kSketchWarps, (total * args.num_kv_heads + grid - 1) / grid);
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
    for (int i = static_cast<int>(threadIdx.x); i < budget.keep; i += kSketchThreads) {
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
__global__ void __launch_bounds__(kSketchThreads, 1) SelectSketchKernel(const SketchArgs args) {
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
inline SketchGrid PlanGrid(int64_t units, int64_t row_chunks, int sms, bool teams) {
  if (!teams) return {std::min<int64_t>(units, sms), row_chunks};
  // Parts of this size are few enough: one more than whole ones for each row.
  const int64_t spare = sms - units;
  const int64_t enough = spare == 0 ? row_chunks : (row_chunks * units + spare - 1) / spare;
  const int64_t most = std::max<int64_t>(kSketchWarps, enough + enough / 16 + 1);
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
                           kSketchWarps * RingBytes<kDim, kLeastPlanes, kLastPlanes>(false));
  const SketchMemory most(context.device.shared_bytes_per_block, args.group,
                          kSketchWarps * RingBytes<kDim, kLeastPlanes, kLastPlanes>(true));
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
  LaunchOverlapped(
      context.stream, kernel, dim3(static_cast<unsigned>(grid.ctas)), dim3(kSketchThreads),
      sizeof(SketchShared) + static_cast<size_t>(args.tail_bytes + shared_mass_bytes), 1, args);
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

// For the group that args has; instantiated once for each head size.
template <int kDim>
void LaunchSketch(Context& context, const SketchArgs& args, const SelectorSpec& spec) {
  if (args.group <= 4) return LaunchPlanes<kDim, 1>(context, args, spec);
  if (args.group <= 8) return LaunchPlanes<kDim, 2>(context, args, spec);
  return LaunchPlanes<kDim, 4>(context, args, spec);
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_LAUNCH_CUH_
