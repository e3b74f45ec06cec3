#ifndef RESA_KERNELS_CUDA_SELECT_TEAM_CUH_
#define RESA_KERNELS_CUDA_SELECT_TEAM_CUH_

// A team: the CTAs, any number of them, that work on one (row, KV head) together, and the exact
// top-k over the keys that they hold. They meet in global memory, not in a cluster: clusters do not
// fill the multiprocessors and cannot follow the lengths of a batch's rows.
//
// REQUIRES that the CTAs of a team stand next to each other in the grid. They are started in that
// order, so that whoever waits is waited for by nobody who has not started.
//
// FindTeamCut counts keys in bins, of which the first pass has 64 per octave around the mean score
// (scores of a row sum up to a known number); then the few keys of the bin that holds the cut are
// shown to all, and each CTA finds the cut among them. Two meetings, unless very many keys are
// within a hundredth of each other. The result does not depend on how the blocks are dealt out.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {

inline constexpr int kTeamBins = 2048;
inline constexpr int kTeamBinBits = 11;
inline constexpr int kFirstBinShift = 23 - 6;  // 64 bins to an octave of floats,
inline constexpr int kFirstBinOctaves = 26;    // this many of them below the mean.
inline constexpr int kMaxCandidates = 1024;    // Keys shown to all.

// In global memory, zero before and after each launch.
struct TeamCounters {
  uint32_t arrived;
  uint32_t saturated;  // The sketch's.
  unsigned long long upper[kMaxGroup];
  unsigned long long lower[kMaxGroup];
  uint32_t largest[kMaxGroup];
  alignas(16) uint32_t histogram[kTeamBins];
};
static_assert(sizeof(TeamCounters) % 16 == 0);

// What a CTA shows the others of its team; in global memory.
struct alignas(16) TeamCandidates {
  uint32_t above;  // Keys that are kept whatever the candidates are.
  uint32_t count;
  uint32_t padding[2];
  uint32_t keys[kMaxCandidates];
};

struct Team {
  int rank;
  int size;
  TeamCounters* counters;      // Of the team. Both null when size is 1.
  TeamCandidates* candidates;  // [size]
  uint32_t meetings;

  // Everything that the team's threads wrote before can be read afterwards, past the L1 cache.
  __device__ __forceinline__ void Meet() {
    __syncthreads();
    if (size == 1) return;
    ++meetings;
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&counters->arrived) : "memory");
      const uint32_t all = meetings * static_cast<uint32_t>(size);
      uint32_t arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(&counters->arrived)
                     : "memory");
      } while (arrived < all);
    }
    __syncthreads();
  }
  // Behind the last meeting; the last CTA's leaves the counter at zero.
  __device__ __forceinline__ void Leave() const {
    if (size == 1 || threadIdx.x != 0) return;
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(&counters->arrived),
                 "r"((meetings + 1) * static_cast<uint32_t>(size) - 1)
                 : "memory");
  }
};

struct TeamShared {
  alignas(16) uint32_t histogram[kTeamBins];
  alignas(16) uint32_t candidates[kMaxCandidates];
  uint32_t warp_sum[32];
  uint32_t bin, above, equal;  // Found by one thread, for all.
  uint32_t own_above, own_count;
  uint32_t before_above, before_count;
};

// The first pass's bins: 64 per octave around the mean of the keys' scores. Whoever makes the keys
// counts them while he has them.
struct TeamBins {
  uint32_t origin;

  __device__ __forceinline__ explicit TeamBins(float mean_score) {
    const int lowest = __float_as_int(mean_score) - (kFirstBinOctaves << 23);
    origin = static_cast<uint32_t>(max(0, lowest));
  }
  // Before a barrier that Count comes after.
  template <int kThreads>
  __device__ __forceinline__ static void Clear(TeamShared& shared) {
    static_assert(kThreads * 4 == kTeamBins);
    reinterpret_cast<uint4*>(shared.histogram)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void Count(TeamShared& shared, uint32_t key) const {
    const uint32_t past = key < origin ? 0 : key - origin;
    atomicAdd(&shared.histogram[min(past >> kFirstBinShift, kTeamBins - 1u)], 1u);
  }
};

// The bin of the `wanted`-th largest key, 1 <= wanted <= the sum of all bins, to shared.bin, above
// and equal. A thread has four adjacent bins, the first thread the highest.
template <int kThreads>
__device__ __forceinline__ void ScanTeamBins(TeamShared& shared, uint32_t wanted) {
  static_assert(kThreads * 4 == kTeamBins);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int low_bin = kTeamBins - 4 * (thread + 1);
  const uint4 four = *reinterpret_cast<const uint4*>(shared.histogram + low_bin);
  const uint32_t counts[4] = {four.x, four.y, four.z, four.w};
  const uint32_t sum = four.x + four.y + four.z + four.w;
  uint32_t inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) shared.warp_sum[thread / 32] = inclusive;
  __syncthreads();
  const uint32_t before = lane < thread / 32 ? shared.warp_sum[lane] : 0;
  uint32_t above = __reduce_add_sync(kAllLanes, before) + inclusive - sum;
  if (above < wanted && wanted <= above + sum) {
    bool searching = true;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (searching && wanted <= above + counts[i]) {
        shared.bin = static_cast<uint32_t>(low_bin + i);
        shared.above = above;
        shared.equal = counts[i];
        searching = false;
      }
      above += counts[i];
    }
  }
  __syncthreads();
}

// The keys that may be at the cut: those in [low, high], of which the `wanted` largest are kept.
struct TeamInterval {
  uint32_t low = 0;
  uint32_t high = 0x7fffffffu;
  uint32_t wanted = 0;
};

// Narrows the interval until few enough keys are in it, or keys of one value. Keys are the bits of
// floats that are not negative.
template <int kThreads>
__device__ __forceinline__ TeamInterval FindTeamInterval(Team& team, TeamShared& shared,
                                                         const uint32_t* keys,
                                                         const TopKRange& range,
                                                         const TopKBudget& budget,
                                                         const TeamBins& bins) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t origin = bins.origin;
  TeamInterval interval;
  interval.wanted = static_cast<uint32_t>(budget.keep - budget.sink - budget.local);
  for (bool first = true;; first = false) {
    const uint32_t width = interval.high - interval.low;
    const int shift = max(0, 32 - __clz(static_cast<int>(width)) - kTeamBinBits);
    if (!first) {
      TeamBins::Clear<kThreads>(shared);
      __syncthreads();
#pragma unroll 4
      for (int i = thread; i < range.count; i += kThreads) {
        const uint32_t past = keys[i] - interval.low;
        if (!budget.Forces(range.first + i) && past <= width) {
          atomicAdd(&shared.histogram[past >> shift], 1u);
        }
      }
    }
    if (team.size > 1) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTeamBins / kThreads; ++i) {
        const int bin = i * kThreads + thread;
        const uint32_t count = shared.histogram[bin];
        if (count != 0) atomicAdd(&team.counters->histogram[bin], count);
      }
      team.Meet();
      reinterpret_cast<uint4*>(shared.histogram)[thread] =
          __ldcg(reinterpret_cast<const uint4*>(team.counters->histogram) + thread);
    }
    __syncthreads();
    ScanTeamBins<kThreads>(shared, interval.wanted);
    const uint32_t bin = shared.bin;
    if (first) {
      interval.low = bin == 0 ? 0 : origin + (bin << kFirstBinShift);
      if (bin < kTeamBins - 1u) interval.high = origin + ((bin + 1) << kFirstBinShift) - 1;
    } else {
      const uint32_t low = interval.low + (bin << shift);
      interval.high = low + min(interval.high - low, (1u << shift) - 1);
      interval.low = low;
    }
    interval.wanted -= shared.above;
    if (shared.equal <= kMaxCandidates || interval.low == interval.high) return interval;
    if (team.size > 1) {  // All have read the bins; the first CTA clears them.
      team.Meet();
      if (team.rank == 0) {
        reinterpret_cast<uint4*>(team.counters->histogram)[thread] = make_uint4(0, 0, 0, 0);
      }
      team.Meet();
    }
    __syncthreads();
  }
}

// The candidates of all CTAs to shared.candidates, in the order of ranks, and what those of lower
// rank have: shared.before_above and before_count. Returns how many candidates there are.
template <int kThreads>
__device__ __forceinline__ uint32_t ShowCandidates(Team& team, TeamShared& shared, bool with_keys) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  if (team.size == 1) {
    if (thread == 0) shared.before_above = shared.before_count = 0;
    __syncthreads();
    return shared.own_count;
  }
  TeamCandidates* const own = team.candidates + team.rank;
  if (thread == 0) {
    own->above = shared.own_above;
    own->count = shared.own_count;
  }
  if (with_keys) {
    for (int i = thread; i < static_cast<int>(shared.own_count); i += kThreads) {
      own->keys[i] = shared.candidates[i];
    }
  }
  team.Meet();
  // Each warp works out where the candidates of its CTAs belong.
  uint32_t total = 0;
  for (int begin = 0; begin < team.size; begin += 32) {
    const int r = begin + lane;
    uint2 counts = make_uint2(0, 0);
    if (r < team.size) counts = __ldcg(reinterpret_cast<const uint2*>(team.candidates + r));
    uint32_t inclusive = counts.y;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    const uint32_t above = __reduce_add_sync(kAllLanes, r < team.rank ? counts.x : 0);
    const uint32_t before = __reduce_add_sync(kAllLanes, r < team.rank ? counts.y : 0);
    if (thread == 0) {
      shared.before_above = (begin == 0 ? 0 : shared.before_above) + above;
      shared.before_count = (begin == 0 ? 0 : shared.before_count) + before;
    }
    if (with_keys) {
      for (int i = thread / 32; i < min(32, team.size - begin); i += kThreads / 32) {
        const uint32_t count = __shfl_sync(kAllLanes, counts.y, i);
        const uint32_t to = total + __shfl_sync(kAllLanes, inclusive, i) - count;
        for (uint32_t j = lane; j < count; j += 32) {
          shared.candidates[to + j] = __ldcg(team.candidates[begin + i].keys + j);
        }
      }
    }
    total += __shfl_sync(kAllLanes, inclusive, 31);
  }
  __syncthreads();
  return total;
}

// Narrows the interval further, by the candidates alone: until all in it are kept, or to one value.
template <int kThreads>
__device__ __forceinline__ TeamInterval NarrowToCut(TeamShared& shared, uint32_t total,
                                                    TeamInterval interval) {
  do {
    TeamBins::Clear<kThreads>(shared);
    __syncthreads();
    const uint32_t width = interval.high - interval.low;
    const int shift = max(0, 32 - __clz(static_cast<int>(width)) - kTeamBinBits);
    for (uint32_t i = threadIdx.x; i < total; i += kThreads) {
      const uint32_t past = shared.candidates[i] - interval.low;
      if (past <= width) atomicAdd(&shared.histogram[past >> shift], 1u);
    }
    __syncthreads();
    ScanTeamBins<kThreads>(shared, interval.wanted);
    interval.low += shared.bin << shift;
    interval.high = min(interval.high, interval.low + ((1u << shift) - 1));
    interval.wanted -= shared.above;
  } while (interval.wanted != shared.equal && interval.low != interval.high);
  return interval;
}

// Finds where the budget's kept keys end; for WriteTopKIds. keys[0 .. range.count) are the CTA's,
// the bits of scores that are not negative, with any value at forced blocks; those of other blocks
// have been counted in `bins`. They may have just been written. REQUIRES budget.keep > sink +
// local. Called by all threads of all CTAs of the team, who then all have passed the last meeting.
template <int kThreads>
__device__ __forceinline__ TopKCut FindTeamCut(Team& team, TeamShared& shared, const uint32_t* keys,
                                               const TopKRange& range, const TopKBudget& budget,
                                               const TeamBins& bins) {
  const int thread = static_cast<int>(threadIdx.x);
  TeamInterval interval = FindTeamInterval<kThreads>(team, shared, keys, range, budget, bins);
  const bool with_keys = interval.low != interval.high;
  if (thread == 0) shared.own_above = shared.own_count = 0;
  __syncthreads();
  uint32_t above = 0, equal = 0;
  for (int i = thread; i < range.count; i += kThreads) {
    const uint32_t key = budget.Forces(range.first + i) ? kTopKForcedKey : keys[i];
    above += key > interval.high;
    if (key >= interval.low && key <= interval.high) {
      if (with_keys) {
        shared.candidates[atomicAdd(&shared.own_count, 1u)] = key;
      } else {
        ++equal;
      }
    }
  }
  above = __reduce_add_sync(kAllLanes, above);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (thread % 32 == 0) {
    atomicAdd(&shared.own_above, above);
    if (!with_keys) atomicAdd(&shared.own_count, equal);
  }
  __syncthreads();
  const uint32_t total = ShowCandidates<kThreads>(team, shared, with_keys);
  if (team.size > 1 && team.rank == 0) {  // All have read the bins.
    reinterpret_cast<uint4*>(team.counters->histogram)[thread] = make_uint4(0, 0, 0, 0);
  }
  TopKCut cut = {interval.low, ~0u, static_cast<int>(interval.wanted),
                 static_cast<int>(shared.before_above), static_cast<int>(shared.before_count)};
  if (!with_keys) return cut;

  interval = NarrowToCut<kThreads>(shared, total, interval);
  // All in the interval are kept, or some of those of its one value.
  const bool all = interval.low != interval.high || interval.wanted == shared.equal;
  cut.bound = all && interval.low > 0 ? interval.low - 1 : interval.low;
  cut.ties = !all ? static_cast<int>(interval.wanted) : interval.low > 0 ? 0 : INT32_MAX;
  cut.ties_before = 0;
  for (uint32_t begin = 0; begin < shared.before_count; begin += kThreads) {
    const uint32_t i = begin + thread;
    const bool counts = i < shared.before_count;
    cut.above_before += __syncthreads_count(counts && shared.candidates[i] > cut.bound);
    cut.ties_before += __syncthreads_count(counts && shared.candidates[i] == cut.bound);
  }
  return cut;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_TEAM_CUH_
