#ifndef RESA_KERNELS_CUDA_SELECT_TOPK_CUH_
#define RESA_KERNELS_CUDA_SELECT_TOPK_CUH_

// Exact top-k of block scores, ids ascending: what both selectors do once a row's blocks of one KV
// head have their scores.
//
// A cluster of CTAs (or a CTA alone) works on one (row, KV head). CTA r of the cluster holds the
// keys of a contiguous range of blocks, in the order of r; a range may be empty. Keys are u32 that
// rise with the scores (TopKKey), read through a functor, so that they may lie in shared memory, in
// global memory, or be made on the fly of f32 or bf16 scores.
//
//   FindTopKCut   radix select from the top, a digit of 8 bits a pass. Each CTA counts its keys
//   that
//                 agree with the digits found so far; after a cluster barrier every CTA reads the
//                 counts of all, through distributed shared memory, and comes to the same digit.
//                 It also learns how many keys before its own range are kept, so that
//   WriteTopKIds  writes the ids of its range where they belong, with no further exchange: a count
//                 per warp, then ballots. Nothing depends on the order of atomics.
//   FinishTopK    before the CTA returns or uses the shared memory again.
//
// Ties at the cut go to the lower ids, the forced blocks (the first `sink` and the last `local`)
// are above all others, and NaN is below all others, as in the CPU backend.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr uint32_t kTopKForcedKey = 0xffffffffu;  // No score has it.
inline constexpr int kTopKBins = 256;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Rises with the score: +0 and -0 alike, NaN lowest of all.
__device__ __forceinline__ uint32_t TopKKey(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 + 0 = +0
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31);
  return isnan(score) ? 0u : key;
}

// What one (row, KV head) keeps.
struct TopKBudget {
  int blocks;  // Of the sequence, up to the row's position.
  int keep;    // 1 .. blocks
  int sink;    // The first ones, forced.
  int local;   // The last ones, forced; sink + local <= blocks.

  __device__ __forceinline__ bool Forces(int id) const { return id < sink || id >= blocks - local; }
  // False when everything is kept or the forced blocks fill the budget: nothing need be scored.
  __device__ __forceinline__ bool ScoresDecide() const {
    return keep < blocks && sink + local < keep;
  }
  // The i-th kept block when scores decide nothing.
  __device__ __forceinline__ int UnscoredId(int i) const {
    return i < sink ? i : i + blocks - keep;
  }
};

__device__ __forceinline__ TopKBudget TopKBudgetOf(const SparseRow& row, int block_tokens) {
  TopKBudget budget;
  budget.blocks = (row.position + block_tokens) / block_tokens;
  budget.keep = row.keep_blocks;
  budget.sink = min(row.sink_blocks, budget.blocks);
  budget.local = min(row.local_blocks, budget.blocks - budget.sink);
  return budget;
}

// The blocks whose keys a CTA holds: ids [first, first + count).
struct TopKRange {
  int first;
  int count;
};

// Where the kept keys end. A key is kept when (key & mask) > bound, and among those that are equal
// to it the `ties` of the lowest ids.
struct TopKCut {
  uint32_t bound;
  uint32_t mask;  // The digits that had to be looked at.
  int ties;
  int above_before;  // Keys above the bound in CTAs of lower rank.
  int ties_before;   // Keys equal to it there.

  // How many ids CTAs of lower rank keep: this one's begin there in the list.
  __device__ __forceinline__ int Offset() const { return above_before + min(ties_before, ties); }
  // How many of this CTA's ties may be kept.
  __device__ __forceinline__ int TiesLeft() const { return max(0, ties - ties_before); }
};

// At the same place in every CTA of the cluster.
struct TopKShared {
  alignas(16) uint32_t histogram[4][kTopKBins];  // Of this CTA's keys, per digit; others read it.
  alignas(16) uint32_t total[kTopKBins];         // One digit's counts over the whole cluster,
  alignas(16) uint32_t before[kTopKBins];        // and over the CTAs of lower rank.
  uint32_t warp_above[32];
  uint32_t warp_ties[32];
};

// A digit found by TopKScanDigit, with the counts it was found from.
struct TopKDigit {
  uint32_t digit;
  uint32_t above;         // Keys with a higher digit, in the cluster.
  uint32_t above_before;  // The same in CTAs of lower rank.
  uint32_t equal;         // Keys with this digit.
  uint32_t equal_before;
};

// The digit of the `wanted`-th largest key by shared.total, 1 <= wanted <= its sum. Every warp
// works it out for itself; a lane has 8 bins, the first lane the highest.
__device__ __forceinline__ TopKDigit TopKScanDigit(const TopKShared& shared, uint32_t wanted) {
  constexpr int kPerLane = kTopKBins / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int low_bin = kTopKBins - kPerLane * (lane + 1);
  uint32_t total[kPerLane], before[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    *reinterpret_cast<uint4*>(total + i) =
        *reinterpret_cast<const uint4*>(shared.total + low_bin + i);
    *reinterpret_cast<uint4*>(before + i) =
        *reinterpret_cast<const uint4*>(shared.before + low_bin + i);
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += total[i];
  uint32_t inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  // Each lane walks down its bins until the wanted key is among those passed: all the way in lanes
  // before the one that has it, not at all in those behind.
  TopKDigit found = {0, inclusive - sum, 0, 0, 0};
  bool searching = found.above < wanted;
  bool mine = false;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {
    if (searching && wanted <= found.above + total[i]) {
      found.digit = static_cast<uint32_t>(low_bin + i);
      found.equal = total[i];
      found.equal_before = before[i];
      searching = false;
      mine = true;
    }
    if (searching) {
      found.above += total[i];
      found.above_before += before[i];
    }
  }
  const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, mine))) - 1;
  found.above_before = __reduce_add_sync(kAllLanes, found.above_before);
  found.digit = __shfl_sync(kAllLanes, found.digit, owner);
  found.above = __shfl_sync(kAllLanes, found.above, owner);
  found.equal = __shfl_sync(kAllLanes, found.equal, owner);
  found.equal_before = __shfl_sync(kAllLanes, found.equal_before, owner);
  return found;
}

// The key by which a block competes.
template <typename KeyAt>
__device__ __forceinline__ uint32_t TopKKeyOf(const KeyAt& key_at, const TopKRange& range,
                                              const TopKBudget& budget, int i) {
  return budget.Forces(range.first + i) ? kTopKForcedKey : key_at(i);
}

// One digit's counts over the cluster, from every CTA's histogram.
template <bool kClustered>
__device__ __forceinline__ void TopKSumDigit(TopKShared& shared, int digit) {
  const auto bin = threadIdx.x;
  if (bin >= kTopKBins) return;
  uint32_t* const own = &shared.histogram[digit][bin];
  if constexpr (!kClustered) {
    shared.total[bin] = *own;
    shared.before[bin] = 0;
  } else {
    const auto cluster = cooperative_groups::this_cluster();
    const unsigned rank = cluster.block_rank();
    const unsigned size = cluster.num_blocks();
    uint32_t counts[16];  // All loads before the first use: each takes hundreds of cycles.
#pragma unroll
    for (unsigned r = 0; r < 16; ++r) {
      counts[r] = r < size ? *cluster.map_shared_rank(own, r) : 0;
    }
    uint32_t total = 0, before = 0;
#pragma unroll
    for (unsigned r = 0; r < 16; ++r) {
      total += counts[r];
      before += r < rank ? counts[r] : 0;
    }
    shared.total[bin] = total;
    shared.before[bin] = before;
  }
}

// Finds where the budget's kept keys end; the same bound in every CTA. key_at(i) is the key of
// block range.first + i and is not asked for forced blocks; keys in shared memory may have just
// been written, without a barrier since. The first kDigits * 8 bits of the keys count (bf16 scores
// need two digits). Called by all of the kThreads >= 256 threads of every CTA of the cluster, of at
// most 16 CTAs. REQUIRES budget.keep <= the keys in all ranges.
template <int kThreads, bool kClustered, int kDigits = 4, typename KeyAt>
__device__ TopKCut FindTopKCut(TopKShared& shared, const KeyAt& key_at, const TopKRange& range,
                               const TopKBudget& budget) {
  static_assert(kThreads >= kTopKBins && kThreads % 32 == 0 && kDigits >= 1 && kDigits <= 4);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kDigits * kTopKBins; i += kThreads) (&shared.histogram[0][0])[i] = 0;
  __syncthreads();
  TopKCut cut = {0, 0, budget.keep, 0, 0};
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 24 - 8 * digit;
#pragma unroll 4
    for (int i = thread; i < range.count; i += kThreads) {
      const uint32_t key = TopKKeyOf(key_at, range, budget, i);
      if ((key & cut.mask) == cut.bound) {
        atomicAdd(&shared.histogram[digit][(key >> shift) % kTopKBins], 1u);
      }
    }
    if constexpr (kClustered) {
      cooperative_groups::this_cluster().sync();
    } else {
      __syncthreads();
    }
    TopKSumDigit<kClustered>(shared, digit);
    __syncthreads();
    const TopKDigit found = TopKScanDigit(shared, static_cast<uint32_t>(cut.ties));
    cut.bound |= found.digit << shift;
    cut.mask |= (kTopKBins - 1u) << shift;
    cut.ties -= static_cast<int>(found.above);
    cut.above_before += static_cast<int>(found.above_before);
    cut.ties_before = static_cast<int>(found.equal_before);
    // When all of them are kept, what the lower digits are does not matter.
    if (static_cast<uint32_t>(cut.ties) == found.equal) break;
  }
  // From here on this CTA reads no other's shared memory.
  if constexpr (kClustered) cooperative_groups::this_cluster().barrier_arrive();
  return cut;
}

// Waits until no CTA of the cluster reads this one's shared memory: exactly once after each
// FindTopKCut, before the CTA returns or clears or frees `shared`, and before any other barrier of
// the cluster.
template <bool kClustered>
__device__ __forceinline__ void FinishTopK() {
  if constexpr (kClustered) {
    cooperative_groups::this_cluster().barrier_wait();
  } else {
    __syncthreads();
  }
}

// Writes the ids that the CTA keeps of its range to out[0 ...], ascending, and returns how many
// they are. In the list of the whole cluster they begin at cut.Offset(). Called by all threads; a
// warp has a contiguous part of the range.
template <int kThreads, typename KeyAt>
__device__ int WriteTopKIds(TopKShared& shared, const KeyAt& key_at, const TopKRange& range,
                            const TopKBudget& budget, const TopKCut& cut, int32_t* out) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int per_warp = ((range.count + 31) / 32 + kWarps - 1) / kWarps * 32;
  const int begin = min(range.count, warp * per_warp);
  const int end = min(range.count, begin + per_warp);

  uint32_t above = 0, ties = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) {
    const uint32_t key = TopKKeyOf(key_at, range, budget, i) & cut.mask;
    above += key > cut.bound;
    ties += key == cut.bound;
  }
  above = __reduce_add_sync(kAllLanes, above);
  ties = __reduce_add_sync(kAllLanes, ties);
  if (lane == 0) {
    shared.warp_above[warp] = above;
    shared.warp_ties[warp] = ties;
  }
  __syncthreads();

  const uint32_t ties_left = static_cast<uint32_t>(cut.TiesLeft());
  const uint32_t lane_above = lane < kWarps ? shared.warp_above[lane] : 0;
  const uint32_t lane_ties = lane < kWarps ? shared.warp_ties[lane] : 0;
  const uint32_t all_above = __reduce_add_sync(kAllLanes, lane_above);
  const uint32_t all_ties = __reduce_add_sync(kAllLanes, lane_ties);
  uint32_t ties_passed = __reduce_add_sync(kAllLanes, lane < warp ? lane_ties : 0);
  uint32_t place =
      __reduce_add_sync(kAllLanes, lane < warp ? lane_above : 0) + min(ties_passed, ties_left);
  const uint32_t lower_lanes = (1u << lane) - 1;
#pragma unroll 2
  for (int row = begin; row < end; row += 32) {
    const int i = row + lane;
    const uint32_t key = i < end ? TopKKeyOf(key_at, range, budget, i) & cut.mask : 0;
    const bool tie = i < end && key == cut.bound;
    const uint32_t tied = __ballot_sync(kAllLanes, tie);
    const bool kept = i < end && (key > cut.bound ||
                                  (tie && ties_passed + __popc(tied & lower_lanes) < ties_left));
    const uint32_t keeps = __ballot_sync(kAllLanes, kept);
    if (kept) out[place + __popc(keeps & lower_lanes)] = range.first + i;
    place += __popc(keeps);
    ties_passed += __popc(tied);
  }
  return static_cast<int>(all_above + min(all_ties, ties_left));
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_TOPK_CUH_
