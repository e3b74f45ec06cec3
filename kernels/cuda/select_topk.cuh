#ifndef RESA_KERNELS_CUDA_SELECT_TOPK_CUH_
#define RESA_KERNELS_CUDA_SELECT_TOPK_CUH_

// Exact top-k of block scores, ids ascending: what both selectors do once a row's blocks of one KV
// head have their scores. Keys are u32 that rise with the scores (TopKKey). Ties at the cut go to
// the lower ids, the forced blocks (the first `sink` and the last `local`) are above all others,
// and NaN is below all others, as in the CPU backend. Nothing depends on the order of atomics.
//
// Spread over several CTAs, for any number of blocks: each holds the keys of a contiguous range of
// blocks, which may be empty. Keys are read through a functor, so that they may lie in shared or in
// global memory. Together the CTAs find where the kept keys end (FindTeamCut of select_team.cuh),
// and how many keys before its own range are kept, so that
//   WriteTopKIds  writes the ids of its range where they belong, with no further exchange: votes on
//                 32 keys at a time, then one sum over the threads.
//
// In one CTA that has all keys in shared memory: FindTopKInterval passes over an interval of keys
// that begins as [least, greatest], not as all u32: keys of one row are close to each other, and
// 2048 bins over what they span part them at once, where the top bits of a float would be the same.
// ClassifyKeys and WriteTurn then write.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr uint32_t kTopKForcedKey = 0xffffffffu;  // No score has it.
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

// What the warps of a CTA have counted, for WriteTurn: twice, so that one barrier per turn is
// enough.
using TopKWarpCounts = uint32_t[2][32];

// ---- bins ---------------------------------------------------------------------------------------

inline constexpr int kTopKWideBins = 2048;
inline constexpr int kTopKWideBits = 11;

struct TopKBins {
  alignas(16) uint32_t histogram[kTopKWideBins];  // Zero between passes.
  uint32_t warp_sum[32];
  uint32_t bin;  // Found by one thread, for all.
  uint32_t above;
  uint32_t equal;
};

// Before a barrier that counting comes after.
template <int kThreads>
__device__ __forceinline__ void ClearTopK(TopKBins& shared) {
  for (auto i = threadIdx.x; i < kTopKWideBins; i += kThreads) shared.histogram[i] = 0;
}

// Finds the bin of the `wanted`-th largest key, 1 <= wanted <= the sum of all bins, and how many
// keys are in higher bins and in it; clears the histogram. A thread has a few adjacent bins, the
// first thread the highest.
template <int kThreads>
__device__ __forceinline__ void ScanTopKBins(TopKBins& shared, uint32_t wanted) {
  constexpr int kPerThread = kTopKWideBins / kThreads;
  constexpr int kWarps = kThreads / 32;
  static_assert(kPerThread >= 2 && kPerThread * kThreads == kTopKWideBins);
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int low_bin = kTopKWideBins - kPerThread * (thread + 1);
  uint32_t counts[kPerThread];
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) counts[i] = shared.histogram[low_bin + i];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    shared.histogram[low_bin + i] = 0;
    sum += counts[i];
  }
  uint32_t inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) shared.warp_sum[warp] = inclusive;
  __syncthreads();
  const uint32_t of_warp = lane < warp && lane < kWarps ? shared.warp_sum[lane] : 0;
  uint32_t above = __reduce_add_sync(kAllLanes, of_warp) + inclusive - sum;
  if (above < wanted && wanted <= above + sum) {
    bool searching = true;
#pragma unroll
    for (int i = kPerThread - 1; i >= 0; --i) {
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

// ---- spread over CTAs ---------------------------------------------------------------------------

// The key by which a block competes.
template <typename KeyAt>
__device__ __forceinline__ uint32_t TopKKeyOf(const KeyAt& key_at, const TopKRange& range,
                                              const TopKBudget& budget, int i) {
  return budget.Forces(range.first + i) ? kTopKForcedKey : key_at(i);
}

// Writes ids of which each thread has some, those of lower threads being lower: bit i of above and
// of ties stands for id first + i; of the ties only the first `ties_kept` of all turns are written.
// above_done and ties_done are counts of earlier turns. Called by all threads; a barrier is inside.
template <int kThreads>
__device__ __forceinline__ void WriteTurn(uint32_t (&warp_counts)[32], uint32_t above,
                                          uint32_t ties, int first, int ties_kept, int* above_done,
                                          int* ties_done, int32_t* out) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && kThreads * 32 < 1 << 16);  // Both counts fit.
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // Both counts in one word.
  const auto counts = static_cast<uint32_t>(__popc(above) | __popc(ties) << 16);
  uint32_t inclusive = counts;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_counts[warp] = inclusive;
  __syncthreads();
  const uint32_t of_warp = lane < kWarps ? warp_counts[lane] : 0;
  const uint32_t total = __reduce_add_sync(kAllLanes, of_warp);
  const uint32_t before =
      __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0) + inclusive - counts;
  const int ties_before = *ties_done + static_cast<int>(before >> 16);
  int32_t* to = out + *above_done + static_cast<int>(before & 0xffff) + min(ties_before, ties_kept);
  for (int excess = ties_before + __popc(ties) - ties_kept; excess > 0 && ties != 0; --excess) {
    ties ^= 0x80000000u >> __clz(static_cast<int>(ties));
  }
  for (uint32_t kept = above | ties; kept != 0; kept &= kept - 1) {
    *to++ = first + __ffs(static_cast<int>(kept)) - 1;
  }
  *above_done += static_cast<int>(total & 0xffff);
  *ties_done += static_cast<int>(total >> 16);
}

// Writes the ids that the CTA keeps of its range to out[0 ...], ascending, and returns how many
// they are. In the list of all CTAs they begin at cut.Offset(). Called by all threads.
template <int kThreads, typename KeyAt>
__device__ int WriteTopKIds(TopKWarpCounts& warp_counts, const KeyAt& key_at,
                            const TopKRange& range, const TopKBudget& budget, const TopKCut& cut,
                            int32_t* out) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kTurn = kThreads * 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int above_done = 0, ties_done = 0;
  for (int base = 0, turn = 0; base < range.count; base += kTurn, turn ^= 1) {
    // A warp has adjacent rows of 32 keys, votes on a row at a time, and a lane keeps one row's
    // votes.
    const int end = min(range.count, base + kTurn);
    const int rows = ((end - base + 31) / 32 + kWarps - 1) / kWarps;
    const int begin = base + warp * rows * 32;
    uint32_t above = 0, ties = 0;
#pragma unroll 4
    for (int row = 0; row < rows; ++row) {
      const int i = begin + row * 32 + lane;
      const uint32_t key = i < end ? TopKKeyOf(key_at, range, budget, i) & cut.mask : 0;
      const uint32_t row_above = __ballot_sync(kAllLanes, i < end && key > cut.bound);
      const uint32_t row_ties = __ballot_sync(kAllLanes, i < end && key == cut.bound);
      if (row == lane) {
        above = row_above;
        ties = row_ties;
      }
    }
    WriteTurn<kThreads>(warp_counts[turn], above, ties, range.first + begin + lane * 32,
                        cut.TiesLeft(), &above_done, &ties_done, out);
  }
  return above_done + min(ties_done, cut.TiesLeft());
}

// ---- in one CTA ---------------------------------------------------------------------------------

struct TopKCtaShared : TopKBins {
  TopKWarpCounts warp_counts;
};

// Where the kept keys end: those above `high` are kept, and of those in [low, high] the `ties` of
// the lowest ids.
struct TopKInterval {
  uint32_t low;
  uint32_t high;
  uint32_t ties;
};

// low and high as given hold the `ties`-th largest key and all keys but those that are kept anyway;
// narrowed until they part the keys. The last vector of keys is filled up with kTopKForcedKey.
template <int kThreads>
__device__ __forceinline__ TopKInterval FindTopKInterval(TopKCtaShared& shared,
                                                         const uint32_t* keys, int count,
                                                         TopKInterval cut) {
  while (cut.low != cut.high) {
    const int shift = max(0, 32 - __clz(static_cast<int>(cut.high - cut.low)) - kTopKWideBits);
    const uint32_t width = cut.high - cut.low;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x) * 4; i < count; i += kThreads * 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
      const uint32_t offsets[4] = {four.x - cut.low, four.y - cut.low, four.z - cut.low,
                                   four.w - cut.low};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (offsets[j] <= width) {
          atomicAdd(&shared.histogram[offsets[j] >> shift], 1u);
        }
      }
    }
    __syncthreads();
    ScanTopKBins<kThreads>(shared, cut.ties);
    const uint32_t low = cut.low + (shared.bin << shift);
    cut.high = low + min(cut.high - low, (1u << shift) - 1);
    cut.low = low;
    cut.ties -= shared.above;
    if (cut.ties == shared.equal) break;  // All of the bin are kept.
  }
  return cut;
}

// Which of a thread's adjacent keys are kept: the given number (1 .. 8) of vectors from `begin` on,
// bit i for key begin + i. Lanes start at different ones of their vectors, which spreads them over
// the banks.
__device__ __forceinline__ void ClassifyKeys(const uint32_t* keys, int count,
                                             const TopKInterval& cut, int begin, int vectors,
                                             uint32_t* above, uint32_t* ties) {
  uint32_t over = 0, reached = 0;
  int vector = static_cast<int>(threadIdx.x) % vectors;
#pragma unroll 4
  for (int i = 0; i < vectors; ++i) {
    const int at = begin + vector * 4;
    if (at < count) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + at);
      const uint32_t of_four[4] = {four.x, four.y, four.z, four.w};
      uint32_t vector_over = 0, vector_reached = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        vector_over |= of_four[j] > cut.high ? 1u << j : 0;
        vector_reached |= of_four[j] >= cut.low ? 1u << j : 0;
      }
      over |= vector_over << (vector * 4);
      reached |= vector_reached << (vector * 4);
    }
    vector = vector + 1 == vectors ? 0 : vector + 1;
  }
  const int valid = max(0, count - begin);
  const uint32_t in_range = valid < 32 ? (1u << valid) - 1 : ~0u;
  *above = over & in_range;
  *ties = reached & ~over & in_range;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_TOPK_CUH_
