#ifndef RESA_KERNELS_CUDA_SELECT_TEAM_CUH_
#define RESA_KERNELS_CUDA_SELECT_TEAM_CUH_

// A team: the CTAs, any number of them, that work on one (row, KV head) together, and the exact
// top-k over the keys that they hold. They meet in global memory, not in a cluster: clusters do not
// fill the multiprocessors and cannot follow the lengths of a batch's rows.
//
// REQUIRES that the CTAs of a team stand next to each other in the grid. They are started in that
// order, so that whoever waits is waited for by nobody who has not started.
//
// What a few words can say is sent in parcels of 16 bytes, 12 of data and a tag, which are written
// and read as one: whoever finds the tag has the data. That is one way through the L2 cache each,
// half of what a counter takes on which all wait before they read (Meet).
//
// FindTeamCut: of a short row all CTAs get all keys. Of a long one they count keys in bins, 64 per
// octave around the mean score (scores of a row sum up to a known number), then show each other the
// few keys of the bin that holds the cut; two exchanges, unless very many keys are within a
// hundredth of each other. Then each CTA finds the cut among the keys that it has got. The result
// does not depend on how the blocks are dealt out.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {

inline constexpr int kFirstBinShift = 23 - 6;  // 64 bins to an octave of floats,
inline constexpr int kFirstBinOctaves = 26;    // this many of them below the mean.
inline constexpr int kMaxCandidates = 4096;    // Keys shown to all.
inline constexpr int kMaxTeam = 256;
inline constexpr int kParcelKeys = 3;

// ---- parcels ------------------------------------------------------------------------------------

// What a CTA sends to its team. Tags rise with every launch, so that nothing need be cleared: what
// has another tag was sent by an earlier launch, or never.
struct alignas(16) TeamParcels {
  uint4 totals[2][kMaxGroup];
  uint4 counts;
  uint4 keys[(kMaxCandidates + kParcelKeys - 1) / kParcelKeys];
};

__device__ __forceinline__ void SendParcel(uint4* to, uint32_t a, uint32_t b, uint32_t c,
                                           uint32_t tag) {
  asm volatile(
      "{\n"
      ".reg .b64 low, high;\n"
      ".reg .b128 all;\n"
      "mov.b64 low, {%1, %2};\n"
      "mov.b64 high, {%3, %4};\n"
      "mov.b128 all, {low, high};\n"
      "st.relaxed.gpu.global.b128 [%0], all;\n"
      "}" ::"l"(to),
      "r"(a), "r"(b), "r"(c), "r"(tag)
      : "memory");
}
__device__ __forceinline__ uint4 LookAtParcel(const uint4* from) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .b64 low, high;\n"
      ".reg .b128 all;\n"
      "ld.relaxed.gpu.global.b128 all, [%4];\n"
      "mov.b128 {low, high}, all;\n"
      "mov.b64 {%0, %1}, low;\n"
      "mov.b64 {%2, %3}, high;\n"
      "}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from)
      : "memory");
  return v;
}
// Waits for parcels first, first + step .. below count, a few at a time, and calls use(i, parcel);
// at(i) is where parcel i is, or null when there is none.
template <typename At, typename Use>
__device__ __forceinline__ void ReceiveParcels(int first, int step, int count, uint32_t tag,
                                               const At& at, const Use& use) {
  constexpr int kTogether = 4;
#pragma unroll 1
  for (; first < count; first += kTogether * step) {
    const uint4* from[kTogether];
    uint4 parcels[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = first + k * step;
      from[k] = i < count ? at(i) : nullptr;
      if (from[k] != nullptr) parcels[k] = LookAtParcel(from[k]);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (from[k] == nullptr) continue;
      while (parcels[k].w != tag) parcels[k] = LookAtParcel(from[k]);
      use(first + k * step, parcels[k]);
    }
  }
}

// In global memory, zero at first.
struct LaunchCount {
  uint32_t launches;
  uint32_t counted;  // CTAs of this launch.

  // How many launches there have been.
  __device__ __forceinline__ uint32_t Before() const {
    uint32_t before;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(before) : "l"(&launches) : "memory");
    return before;
  }
  // By one thread of each CTA, when its threads have got their answers from Before(): the last one
  // adds this launch.
  __device__ __forceinline__ void Count(uint32_t before) {
    const uint32_t last = gridDim.x - 1;
    uint32_t order;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(order)
                 : "l"(&counted), "r"(last)
                 : "memory");
    if (order != last) return;
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(&launches), "r"(before + 1)
                 : "memory");
  }
};

// ---- teams --------------------------------------------------------------------------------------

// In global memory, zero before and after each launch.
struct TeamCounters {
  uint32_t arrived;
  uint32_t largest[kMaxGroup];
  alignas(16) uint32_t histogram[kTopKWideBins];
};
static_assert(sizeof(TeamCounters) % 16 == 0);

struct Team {
  int rank;
  int size;
  TeamCounters* counters;  // Of the team. Null when size is 1, as are the parcels.
  TeamParcels* parcels;    // [size]
  uint32_t tag;            // Of this launch and pass.
  uint32_t meetings;

  // Everything that the team's threads wrote before can be read afterwards, past the L1 cache.
  __device__ __forceinline__ void Meet() {
    __syncthreads();
    if (size == 1) return;
    ++meetings;
    if (threadIdx.x == 0) {
      CountRelease(&counters->arrived);
      while (LoadAcquire(&counters->arrived) < meetings * static_cast<uint32_t>(size)) {
      }
    }
    __syncthreads();
  }
  // Behind the last meeting; the last CTA's leaves the counter at zero.
  __device__ __forceinline__ void Leave() const {
    if (size == 1 || meetings == 0 || threadIdx.x != 0) return;
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(&counters->arrived),
                 "r"((meetings + 1) * static_cast<uint32_t>(size) - 1)
                 : "memory");
  }
};

// ---- ranking ------------------------------------------------------------------------------------

struct TeamShared : TopKBins {
  uint32_t own_above, own_count;
  uint32_t before_above, before_ties;
  uint2 counts[kMaxTeam];  // Of each CTA: keys above the interval, and in it.
};

// The keys that may be at the cut: those in [low, high], of which the `wanted` largest are kept.
// Keys are the bits of floats that are not negative.
struct TeamInterval {
  uint32_t low = 0;
  uint32_t high = 0x7fffffffu;
  uint32_t wanted = 0;
};

// The first pass's bins: 64 per octave around the mean of the keys' scores. Whoever makes the keys
// counts them while he has them.
struct TeamBins {
  uint32_t origin;

  __device__ __forceinline__ explicit TeamBins(float mean_score) {
    const int lowest = __float_as_int(mean_score) - (kFirstBinOctaves << 23);
    origin = static_cast<uint32_t>(max(0, lowest));
  }
  __device__ __forceinline__ void Count(TopKBins& bins, uint32_t key) const {
    const uint32_t past = key < origin ? 0 : key - origin;
    atomicAdd(&bins.histogram[min(past >> kFirstBinShift, kTopKWideBins - 1u)], 1u);
  }
  // The interval of the bin that was found.
  __device__ __forceinline__ void Narrow(const TopKBins& found, TeamInterval* interval) const {
    const uint32_t low = origin + (found.bin << kFirstBinShift);
    interval->low = found.bin == 0 ? 0 : low;
    if (found.bin < kTopKWideBins - 1u) interval->high = low + ((1u << kFirstBinShift) - 1);
    interval->wanted -= found.above;
  }
};

// Bins of equal width over an interval, as many as there are or fewer.
struct IntervalBins {
  uint32_t low;
  uint32_t width;  // Less one.
  int shift;

  __device__ __forceinline__ explicit IntervalBins(const TeamInterval& interval) {
    low = interval.low;
    width = interval.high - interval.low;
    shift = max(0, 32 - __clz(static_cast<int>(width)) - kTopKWideBits);
  }
  __device__ __forceinline__ void Count(TopKBins& bins, uint32_t key) const {
    if (key - low <= width) atomicAdd(&bins.histogram[(key - low) >> shift], 1u);
  }
  __device__ __forceinline__ void Narrow(const TopKBins& found, TeamInterval* interval) const {
    interval->low += found.bin << shift;
    interval->high = min(interval->high, interval->low + ((1u << shift) - 1));
    interval->wanted -= found.above;
  }
};

// Adds up the bins of the team's CTAs.
template <int kThreads>
__device__ __forceinline__ void AddTeamBins(Team& team, TopKBins& bins) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (team.size == 1) return;
#pragma unroll
  for (int i = 0; i < kTopKWideBins / kThreads; ++i) {
    const int bin = i * kThreads + thread;
    const uint32_t count = bins.histogram[bin];
    if (count != 0) atomicAdd(&team.counters->histogram[bin], count);
  }
  team.Meet();
  static_assert(kThreads * 4 == kTopKWideBins);
  reinterpret_cast<uint4*>(bins.histogram)[thread] =
      __ldcg(reinterpret_cast<const uint4*>(team.counters->histogram) + thread);
  __syncthreads();
}
// By the first CTA, when all have read them.
__device__ __forceinline__ void ClearTeamBins(const Team& team) {
  if (team.size == 1 || team.rank != 0) return;
  reinterpret_cast<uint4*>(team.counters->histogram)[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

// Narrows the interval until few enough keys are in it, or keys of one value; the keys have been
// counted in `first_bins`.
template <int kThreads>
__device__ __forceinline__ void NarrowTogether(Team& team, TeamShared& shared, const uint32_t* keys,
                                               const TopKRange& range, const TopKBudget& budget,
                                               const TeamBins& first_bins, TeamInterval* interval) {
  AddTeamBins<kThreads>(team, shared);
  ScanTopKBins<kThreads>(shared, interval->wanted);
  first_bins.Narrow(shared, interval);
  while (shared.equal > kMaxCandidates && interval->low != interval->high) {
    team.Meet();
    ClearTeamBins(team);
    team.Meet();
    const IntervalBins bins(*interval);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < range.count; i += kThreads) {
      if (!budget.Forces(range.first + i)) bins.Count(shared, keys[i]);
    }
    AddTeamBins<kThreads>(team, shared);
    ScanTopKBins<kThreads>(shared, interval->wanted);
    bins.Narrow(shared, interval);
  }
}

// Keys that compete for the last places: those of all CTAs, in the order of blocks.
struct TeamCandidates {
  uint32_t* keys;  // [kMaxCandidates], in shared memory.
  int count;
  int before;        // How many of them CTAs of lower rank have,
  int above_before;  // and how many keys above the interval, where those are no candidates.
};

// Every key of the row is one, a forced block's as kTopKForcedKey; the others are counted in bins.
// per_cta: the keys of each CTA but the last ones. REQUIRES that no bin has any.
template <int kThreads>
__device__ __forceinline__ TeamCandidates ExchangeAll(const Team& team, TeamShared& shared,
                                                      const TeamBins& bins, const uint32_t* own,
                                                      const TopKRange& range,
                                                      const TopKBudget& budget, int per_cta,
                                                      uint32_t* to) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto take = [&](int id, uint32_t key) {
    to[id] = budget.Forces(id) ? kTopKForcedKey : key;
    if (!budget.Forces(id)) bins.Count(shared, key);
  };
  for (int i = thread; i * kParcelKeys < range.count; i += kThreads) {
    uint32_t keys[kParcelKeys];
#pragma unroll
    for (int j = 0; j < kParcelKeys; ++j) {
      const int at = i * kParcelKeys + j;
      keys[j] = at < range.count ? own[at] : 0;
      if (at < range.count) take(range.first + at, keys[j]);
    }
    if (team.size > 1) {
      SendParcel(team.parcels[team.rank].keys + i, keys[0], keys[1], keys[2], team.tag);
    }
  }
  // Parcel i of the others: a part of a rank's, as many for each.
  const int parcels = (per_cta + kParcelKeys - 1) / kParcelKeys;
  const auto rank_of = [&](int i) { return i / parcels + (i / parcels >= team.rank ? 1 : 0); };
  const auto first_of = [&](int i) { return rank_of(i) * per_cta + i % parcels * kParcelKeys; };
  const auto left_of = [&](int i) {
    return min(per_cta - i % parcels * kParcelKeys, budget.blocks - first_of(i));
  };
  ReceiveParcels(
      thread, kThreads, (team.size - 1) * parcels, team.tag,
      [&](int i) { return left_of(i) > 0 ? team.parcels[rank_of(i)].keys + i % parcels : nullptr; },
      [&](int i, const uint4& parcel) {
        const int first = first_of(i), left = left_of(i);
        take(first, parcel.x);
        if (left > 1) take(first + 1, parcel.y);
        if (left > 2) take(first + 2, parcel.z);
      });
  __syncthreads();
  return {to, budget.blocks, range.first, 0};
}

// Those in the interval, which are few enough; with_keys false: they are alike, and only their
// numbers are exchanged.
template <int kThreads>
__device__ __forceinline__ TeamCandidates ExchangeSome(const Team& team, TeamShared& shared,
                                                       const TeamInterval& interval,
                                                       const uint32_t* own, const TopKRange& range,
                                                       const TopKBudget& budget, bool with_keys,
                                                       uint32_t* to) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  if (thread == 0) shared.own_above = shared.own_count = 0;
  __syncthreads();
  uint32_t above = 0;
  for (int begin = 0; begin < range.count; begin += kThreads) {
    const int i = begin + thread;
    const bool exists = i < range.count;
    const uint32_t key = !exists ? 0 : budget.Forces(range.first + i) ? kTopKForcedKey : own[i];
    above += exists && key > interval.high;
    const bool in = exists && key >= interval.low && key <= interval.high;
    const uint32_t votes = __ballot_sync(kAllLanes, in);
    if (votes == 0) continue;
    uint32_t at = 0;
    if (lane == 0) at = atomicAdd(&shared.own_count, static_cast<uint32_t>(__popc(votes)));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(votes & ((1u << lane) - 1));
    if (in && with_keys) to[at] = key;
  }
  above = __reduce_add_sync(kAllLanes, above);
  if (lane == 0) atomicAdd(&shared.own_above, above);
  __syncthreads();
  const auto own_count = static_cast<int>(shared.own_count);
  if (team.size == 1) return {to, own_count, 0, 0};

  TeamParcels& sent = team.parcels[team.rank];
  if (thread == 0) SendParcel(&sent.counts, shared.own_above, shared.own_count, 0, team.tag);
  if (with_keys) {
    for (int i = thread; i * kParcelKeys < own_count; i += kThreads) {
      const uint32_t* const three =
          to + i * kParcelKeys;  // What is past the last is not looked at.
      SendParcel(sent.keys + i, three[0], three[1], three[2], team.tag);
    }
  }
  ReceiveParcels(
      thread, kThreads, team.size, team.tag, [&](int r) { return &team.parcels[r].counts; },
      [&](int r, const uint4& parcel) { shared.counts[r] = make_uint2(parcel.x, parcel.y); });
  __syncthreads();
  // Each warp works out where the keys of its CTAs belong.
  TeamCandidates all = {to, 0, 0, 0};
  for (int begin = 0; begin < team.size; begin += 32) {
    const int r = begin + lane;
    const uint2 counts = r < team.size ? shared.counts[r] : make_uint2(0, 0);
    uint32_t inclusive = counts.y;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    all.before += static_cast<int>(__reduce_add_sync(kAllLanes, r < team.rank ? counts.y : 0));
    all.above_before +=
        static_cast<int>(__reduce_add_sync(kAllLanes, r < team.rank ? counts.x : 0));
    if (with_keys) {
      const int ranks = min(32, team.size - begin);
      const int parts = max(1, kThreads / 32 / ranks);  // Warps to a rank.
      for (int item = thread / 32; item < ranks * parts; item += kThreads / 32) {
        const int i = item / parts;
        const auto count = static_cast<int>(__shfl_sync(kAllLanes, counts.y, i));
        uint32_t* const place =
            to + all.count + static_cast<int>(__shfl_sync(kAllLanes, inclusive, i)) - count;
        ReceiveParcels(
            item % parts * 32 + lane, parts * 32, (count + kParcelKeys - 1) / kParcelKeys, team.tag,
            [&](int j) { return team.parcels[begin + i].keys + j; },
            [&](int j, const uint4& parcel) {
              const int left = count - j * kParcelKeys;
              place[j * kParcelKeys] = parcel.x;
              if (left > 1) place[j * kParcelKeys + 1] = parcel.y;
              if (left > 2) place[j * kParcelKeys + 2] = parcel.z;
            });
      }
    }
    all.count += static_cast<int>(__shfl_sync(kAllLanes, inclusive, 31));
  }
  __syncthreads();
  return all;
}

// Narrows the interval further, by the candidates alone: until all in it are kept, or to one value.
template <int kThreads>
__device__ __forceinline__ void NarrowAlone(TopKBins& shared, const TeamCandidates& candidates,
                                            TeamInterval* interval) {
  do {
    const IntervalBins bins(*interval);
    for (int i = static_cast<int>(threadIdx.x); i < candidates.count; i += kThreads) {
      bins.Count(shared, candidates.keys[i]);
    }
    __syncthreads();
    ScanTopKBins<kThreads>(shared, interval->wanted);
    bins.Narrow(shared, interval);
  } while (interval->wanted != shared.equal && interval->low != interval->high);
}

// Finds where the budget's kept keys end; for WriteTopKIds. keys[0 .. range.count) are the CTA's,
// the bits of scores that are not negative, with any value at forced blocks; of a row of more than
// kMaxCandidates blocks those of other blocks have been counted in `bins`, of a shorter one none
// has, and the histogram is clear. A CTA has per_cta keys, those of the last ones excepted.
// `candidates`: shared memory for kMaxCandidates keys and two. REQUIRES budget.keep > sink + local.
// Called by all threads of all CTAs of the team.
template <int kThreads>
__device__ __forceinline__ TopKCut FindTeamCut(Team& team, TeamShared& shared, const uint32_t* keys,
                                               const TopKRange& range, const TopKBudget& budget,
                                               int per_cta, const TeamBins& bins,
                                               uint32_t* candidates) {
  const int thread = static_cast<int>(threadIdx.x);
  TeamInterval interval;
  interval.wanted = static_cast<uint32_t>(budget.keep - budget.sink - budget.local);
  TeamCandidates all;
  if (budget.blocks <= kMaxCandidates) {
    all = ExchangeAll<kThreads>(team, shared, bins, keys, range, budget, per_cta, candidates);
    ScanTopKBins<kThreads>(shared, interval.wanted);
    bins.Narrow(shared, &interval);
  } else {
    NarrowTogether<kThreads>(team, shared, keys, range, budget, bins, &interval);
    const bool with_keys = interval.low != interval.high;
    all =
        ExchangeSome<kThreads>(team, shared, interval, keys, range, budget, with_keys, candidates);
    ClearTeamBins(team);
    if (!with_keys) {
      return {interval.low, ~0u, static_cast<int>(interval.wanted), all.above_before, all.before};
    }
  }
  if (thread == 0) shared.before_above = shared.before_ties = 0;
  NarrowAlone<kThreads>(shared, all, &interval);
  // All in the interval are kept, or some of those of its one value.
  const bool whole = interval.low != interval.high || interval.wanted == shared.equal;
  TopKCut cut;
  cut.bound = whole && interval.low > 0 ? interval.low - 1 : interval.low;
  cut.mask = ~0u;
  cut.ties = !whole ? static_cast<int>(interval.wanted) : interval.low > 0 ? 0 : INT32_MAX;
  uint32_t above = 0, ties = 0;
  for (int i = thread; i < all.before; i += kThreads) {
    above += all.keys[i] > cut.bound;
    ties += all.keys[i] == cut.bound;
  }
  above = __reduce_add_sync(kAllLanes, above);
  ties = __reduce_add_sync(kAllLanes, ties);
  if (thread % 32 == 0 && above != 0) atomicAdd(&shared.before_above, above);
  if (thread % 32 == 0 && ties != 0) atomicAdd(&shared.before_ties, ties);
  __syncthreads();
  cut.above_before = all.above_before + static_cast<int>(shared.before_above);
  cut.ties_before = static_cast<int>(shared.before_ties);
  return cut;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_TEAM_CUH_
