#ifndef RESA_KERNELS_CUDA_SELECT_RANK_CUH_
#define RESA_KERNELS_CUDA_SELECT_RANK_CUH_

// Exact top-k in one CTA over keys that other CTAs are still making. A key says by itself that it
// has come: it is stored inverted, in memory that was zero, and no key is kTopKForcedKey. So there
// is nothing to count and nothing to order between who scores and who ranks.
//
//   PutKey    stores a key; any thread of the grid.
//   RankUnit  takes a unit's keys as they come, leaves zeros, and writes the kept ids.
//
// RankUnit counts keys into bins while it waits for more. The first keys to come say what the bins
// are, with room for greater ones; a cut outside of them costs passes, not the result. When all
// have come, the bin that holds the cut is known at once, and the few keys in it are compared each
// with each.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {

inline constexpr int kMaxRankCandidates = 1024;  // That are looked at apart from all other keys.
inline constexpr int kMaxComparedKeys = 64;      // Candidates that are compared each with each.
inline constexpr int kRowKeys = 32;              // That a warp takes at once.
inline constexpr int kRowsAhead = 16;            // Of a warp, on their way together.

__device__ __forceinline__ void PutKey(uint32_t* at, uint32_t key) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(~key) : "memory");
}
// Zero as long as no key has come, else the key inverted.
__device__ __forceinline__ uint32_t LookForKey(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// The least and the greatest of some keys.
struct KeySpan {
  uint32_t least;
  uint32_t greatest;
};

struct RankShared {
  TopKCtaShared topk;
  KeySpan span_of_warp[32];
  alignas(16) uint32_t candidates[kMaxRankCandidates + 4];
  uint32_t num_candidates;
  TopKInterval cut;
};

// Bins over a span of keys and, if that is not of all keys, over as much again above it; the first
// and the last bin take all others.
struct RankBins {
  uint32_t origin;
  int shift;

  __device__ __forceinline__ RankBins(const KeySpan& span, bool of_all) {
    const bool none = span.least > span.greatest;
    origin = none ? 0 : span.least;
    const uint32_t width = none ? UINT32_MAX : span.greatest - span.least;
    const int bits = of_all ? kTopKWideBits : kTopKWideBits - 1;
    shift = max(0, 32 - __clz(static_cast<int>(width)) - bits);
  }
  __device__ __forceinline__ uint32_t Of(uint32_t key) const {
    return key < origin ? 0 : min(((key - origin) >> shift) + 1, kTopKWideBins - 1u);
  }
  // The keys that may be in a bin which holds some.
  __device__ __forceinline__ TopKInterval KeysOf(uint32_t bin, uint32_t ties) const {
    if (bin == 0) return {0, origin - 1, ties};
    const uint32_t low = origin + ((bin - 1) << shift);
    return {low, bin == kTopKWideBins - 1u ? kTopKForcedKey - 1 : low + ((1u << shift) - 1), ties};
  }
};

// Which rows of 32 keys a warp takes in which batch. The first batch of a long unit is spread over
// 2 kBatch rows, since it stands for all keys.
template <int kThreads>
struct RankRows {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBatch = kWarps * kRowsAhead;
  int rows;
  bool spread;

  __device__ __forceinline__ explicit RankRows(int keys)
      : rows((keys + kRowKeys - 1) / kRowKeys), spread(rows > kBatch) {}
  __device__ __forceinline__ int Batches() const {
    return spread ? (rows + 2 * kBatch - 1) / (2 * kBatch) * 2 : 1;
  }
  __device__ __forceinline__ int RowOf(int batch, int ahead) const {
    const int in_batch = ahead * kWarps + static_cast<int>(threadIdx.x) / 32;
    return spread ? batch / 2 * (2 * kBatch) + 2 * in_batch + batch % 2 : in_batch;
  }
};

// Waits for the warp's keys of a batch, as they are stored; 1 where there is none. While many rows
// are missing it looks for the last one alone, since keys come about in order.
template <int kThreads>
__device__ __forceinline__ void AwaitBatch(const RankRows<kThreads>& rows, int batch,
                                           const uint32_t* keys, int count,
                                           uint32_t (&stored)[kRowsAhead]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int last = 0;
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    stored[i] = rows.RowOf(batch, i) * kRowKeys + lane < count ? 0 : 1;
    if (stored[i] == 0) last = i;
  }
  bool all = true;
  while (true) {
    int missing = 0;
    bool waits_for_last = false;
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      if (stored[i] == 0 && (all || i == last)) {
        stored[i] = LookForKey(keys + rows.RowOf(batch, i) * kRowKeys + lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      missing += stored[i] == 0 ? 1 : 0;
      if (i == last) waits_for_last = stored[i] == 0;
    }
    if (missing == 0) break;
    all = !waits_for_last || missing <= kRowsAhead / 2;
    __nanosleep(all ? 40 : 200);
  }
  __syncwarp();
}

__device__ __forceinline__ bool Competes(const TopKBudget& budget, int id) {
  return static_cast<uint32_t>(id - budget.sink) <
         static_cast<uint32_t>(budget.blocks - budget.local - budget.sink);
}

// The span of the batch's keys that compete, over the CTA. Has a barrier inside.
template <int kThreads>
__device__ __forceinline__ KeySpan SpanOfBatch(const RankRows<kThreads>& rows,
                                               const TopKBudget& budget,
                                               const uint32_t (&stored)[kRowsAhead],
                                               RankShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  KeySpan span = {UINT32_MAX, 0};
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    const int id = rows.RowOf(0, i) * kRowKeys + lane;
    if (Competes(budget, id)) {
      span.least = min(span.least, ~stored[i]);
      span.greatest = max(span.greatest, ~stored[i]);
    }
  }
  span = {__reduce_min_sync(kAllLanes, span.least), __reduce_max_sync(kAllLanes, span.greatest)};
  if (lane == 0) shared.span_of_warp[threadIdx.x / 32] = span;
  __syncthreads();
  span = shared.span_of_warp[lane % (kThreads / 32)];
  return {__reduce_min_sync(kAllLanes, span.least), __reduce_max_sync(kAllLanes, span.greatest)};
}

// Takes the unit's keys to `to`, up to whole rows, with kTopKForcedKey at the forced blocks and
// past the end, and counts the others.
template <int kThreads>
__device__ __forceinline__ RankBins TakeKeys(RankShared& shared, const uint32_t* keys,
                                             const TopKBudget& budget, uint32_t* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RankRows<kThreads> rows(budget.blocks);
  const int batches = rows.Batches();
  RankBins bins({UINT32_MAX, 0}, true);
#pragma unroll 1
  for (int batch = 0; batch < batches; ++batch) {
    uint32_t stored[kRowsAhead];
    AwaitBatch(rows, batch, keys, budget.blocks, stored);
    if (batch == 0) bins = RankBins(SpanOfBatch(rows, budget, stored, shared), batches == 1);
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const int row = rows.RowOf(batch, i);
      const int id = row * kRowKeys + lane;
      if (row >= rows.rows) break;  // Later ones lie higher.
      const bool competes = Competes(budget, id);
      const uint32_t key = competes ? ~stored[i] : kTopKForcedKey;
      to[id] = key;
      if (competes) atomicAdd(&shared.topk.histogram[bins.Of(key)], 1u);
    }
  }
  return bins;
}

// The cut among all candidates, of which the `ties` largest are kept: a few threads compare each
// candidate with all others. Has a barrier inside.
template <int kThreads>
__device__ __forceinline__ TopKInterval CutAmong(RankShared& shared, int count, uint32_t ties) {
  constexpr int kGroup = kThreads / kMaxComparedKeys;
  static_assert(kGroup <= 32 && (kGroup & (kGroup - 1)) == 0);
  const int own = static_cast<int>(threadIdx.x) / kGroup;
  const uint32_t key = shared.candidates[min(own, count - 1)];
  uint32_t greater = 0, before = 0;
  for (int i = static_cast<int>(threadIdx.x) % kGroup; i < count; i += kGroup) {
    const uint32_t other = shared.candidates[i];
    greater += other > key ? 1 : 0;
    before += other == key && i < own ? 1 : 0;
  }
#pragma unroll
  for (int step = 1; step < kGroup; step *= 2) {
    greater += __shfl_xor_sync(kAllLanes, greater, step);
    before += __shfl_xor_sync(kAllLanes, before, step);
  }
  if (own < count && greater + before + 1 == ties && threadIdx.x % kGroup == 0) {
    shared.cut = {key, key, ties - greater};
  }
  __syncthreads();
  return shared.cut;
}

// Writes the ids of the budget's kept blocks to ids[0, budget.keep). `keys` are the unit's, in
// global memory, of as many whole rows as it has; shared_keys have room for `capacity`, whole rows.
// REQUIRES budget.ScoresDecide(), and ClearTopK and a barrier before the first unit.
template <int kThreads>
__device__ void RankUnit(RankShared& shared, uint32_t* keys, const TopKBudget& budget,
                         uint32_t* shared_keys, int capacity, int32_t* ids) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int count = budget.blocks;
  const bool fits = count <= capacity;
  uint32_t* const own = fits ? shared_keys : keys;
  if (thread == 0) shared.num_candidates = 0;
  const RankBins bins = TakeKeys<kThreads>(shared, keys, budget, own);
  __syncthreads();
  const auto wanted = static_cast<uint32_t>(budget.keep - budget.sink - budget.local);
  ScanTopKBins<kThreads>(shared.topk, wanted);
  const uint32_t equal = shared.topk.equal;
  TopKInterval cut = bins.KeysOf(shared.topk.bin, wanted - shared.topk.above);
  const bool parted = cut.ties == equal || cut.low == cut.high;
  const bool few = !parted && equal <= kMaxRankCandidates;

  constexpr int kTurn = kThreads * 32;
  // What a thread has found out of its keys of each turn is kept where keys do not lie.
  const bool remembers = !fits && (count + kTurn - 1) / kTurn * 2 * kThreads <= capacity;
  uint32_t* const memory = shared_keys + thread;
  uint32_t above = 0, ties = 0;
  int begin = 0;
  const auto classify = [&](int base, bool again) {
    const int vectors = (min(count - base, kTurn) + kThreads * 4 - 1) / (kThreads * 4);
    begin = base + thread * vectors * 4;
    if (!again) ClassifyKeys(own, count, cut, begin, vectors, &above, &ties);
  };
  if (few) {
#pragma unroll 1
    for (int base = 0, at = 0; base < count; base += kTurn, at += 2 * kThreads) {
      classify(base, false);
      if (remembers) {
        memory[at] = above;
        memory[at + kThreads] = ties;
      }
      for (uint32_t rest = ties; rest != 0; rest &= rest - 1) {
        shared.candidates[atomicAdd(&shared.num_candidates, 1u)] =
            own[begin + __ffs(static_cast<int>(rest)) - 1];
      }
    }
    if (thread < 4) shared.candidates[equal + thread] = kTopKForcedKey;
    __syncthreads();
  }
  if (few && equal <= kMaxComparedKeys) {
    cut = CutAmong<kThreads>(shared, static_cast<int>(equal), cut.ties);
  } else if (!parted) {
    cut = FindTopKInterval<kThreads>(shared.topk, few ? shared.candidates : own,
                                     few ? static_cast<int>(equal) : count, cut);
  }
  int above_done = 0, ties_done = 0;
#pragma unroll 1
  for (int base = 0, turn = 0; base < count; base += kTurn, ++turn) {
    // Of keys already looked at, only the candidates are still to be parted.
    const bool again = few && (count <= kTurn || remembers);
    classify(base, again);
    if (again) {
      if (remembers) {
        above = memory[turn * 2 * kThreads];
        ties = memory[turn * 2 * kThreads + kThreads];
      }
      for (uint32_t rest = ties; rest != 0; rest &= rest - 1) {
        const uint32_t bit = rest & (0u - rest);
        const uint32_t key = own[begin + __ffs(static_cast<int>(rest)) - 1];
        if (key < cut.low || key > cut.high) ties ^= bit;
        if (key > cut.high) above |= bit;
      }
    }
    WriteTurn<kThreads>(shared.topk.warp_counts[turn % 2], above, ties, begin,
                        static_cast<int>(cut.ties), &above_done, &ties_done, ids);
  }
  const int whole_rows = (count + kRowKeys - 1) / kRowKeys * kRowKeys;
  for (int i = thread * 4; i < whole_rows; i += kThreads * 4) {
    *reinterpret_cast<uint4*>(keys + i) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_RANK_CUH_
