#ifndef RESA_KERNELS_CUDA_SAMPLE_SEARCH_CUH_
#define RESA_KERNELS_CUDA_SAMPLE_SEARCH_CUH_

// The search for a bound in a row of logits: the lowest below which there are enough tokens, by
// their number (top_k, top logprobs) or their weight (top_p). The tokens under eight thresholds are
// counted and weighed per pass, each pass inside the interval that the last one left, until few
// enough are undecided to sort them.

#include <cstdint>

#include "kernels/cuda/sample_row.cuh"

namespace resa::kernels::cuda::sampling {

inline constexpr int kThresholds = 8;  // Per pass of a search,
inline constexpr uint32_t kFew = 256;  // whose passes end when no more tokens are undecided.

// The weight of a token at distance u (the bits of a float >= 0).
__device__ __forceinline__ float Weight(uint32_t u) { return QuickExp(-__uint_as_float(u)); }

// What a search goes by: a key that falls with the logit, the weight of a key, and the keys at some
// distances below the highest logit, where its first pass looks.
struct ByDistance {  // What shared memory holds are distances.
  __device__ __forceinline__ uint32_t Key(float x) const { return __float_as_uint(x); }
  __device__ __forceinline__ float WeightOf(uint32_t key) const { return Weight(key); }
  __device__ __forceinline__ uint32_t At(float distance) const { return __float_as_uint(distance); }
};
struct ByLogit {                                // They are logits; nobody asks for weights.
  static constexpr uint32_t kEnd = 0xff800000;  // The key of -infinity.
  float top;
  __device__ __forceinline__ uint32_t Key(float x) const { return ~OrderedKey(x); }
  __device__ __forceinline__ float WeightOf(uint32_t) const { return 0.0f; }
  __device__ __forceinline__ uint32_t At(float distance) const { return Key(top - distance); }
};

// What a search found: tokens with keys below `lo` are kept, those from `hi` on are not. Between
// them lies one token, which is kept, or hi == lo + 1 and the tokens there tie.
struct Found {
  uint32_t lo, hi;
  uint32_t count_lo, count_hi;
  double weight_lo, weight_hi;
};

// How many tokens lie below each of some thresholds, and their weight.
struct Tally {
  double weight[kThresholds];
  uint32_t count[kThresholds];
};

struct SearchShared {
  Tally warp_tally[kWarps];
  Tally cta_tally[2][kCluster];
  uint32_t num_listed;  // Zero between searches.
  uint32_t listed[kFew];
  alignas(16) uint32_t few[kFew];
  uint32_t sorted[kFew];
};

// By all threads of a row's cluster together.
class Search {
 public:
  __device__ Search(RowSlice& slice, SearchShared& shared) : slice_(slice), shared_(shared) {}

  template <class By, class Enough>
  __device__ Found Run(const By& by, uint32_t end, const Enough& enough);

 private:
  template <class By>
  __device__ void TallyBelow(const By& by, uint32_t from, uint32_t threshold, uint32_t* count,
                             double* weight);
  template <class By, class Enough>
  __device__ void Settle(const By& by, const Enough& enough, uint32_t of_cta, double whole,
                         Found* found);

  RowSlice& slice_;
  SearchShared& shared_;
};

// The row's tokens with keys in [from, threshold) and their weight, for the lane's threshold; lanes
// l and l + kThresholds have the same.
template <class By>
__device__ void Search::TallyBelow(const By& by, uint32_t from, uint32_t threshold, uint32_t* count,
                                   double* weight) {
  uint32_t thresholds[kThresholds];
#pragma unroll
  for (int j = 0; j < kThresholds; ++j) thresholds[j] = __shfl_sync(~0u, threshold, j);
  uint32_t counts[kThresholds] = {};
  float weights[kThresholds] = {};
  slice_.ForSteps([&](const float4& v, int) {
    uint32_t keys[4] = {by.Key(v.x), by.Key(v.y), by.Key(v.z), by.Key(v.w)};
    float w[4];
    uint32_t nearest = kNone;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool in = keys[i] >= from && keys[i] < thresholds[kThresholds - 1];
      w[i] = in ? by.WeightOf(keys[i]) : 0.0f;
      counts[kThresholds - 1] += in;
      weights[kThresholds - 1] += w[i];
      keys[i] = in ? keys[i] : kNone;
      nearest = min(nearest, keys[i]);
    }
    if (nearest >= thresholds[kThresholds - 2]) return;  // In the first pass most are further out.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kThresholds - 1; ++j) {
        if (keys[i] < thresholds[j]) {
          ++counts[j];
          weights[j] += w[i];
        }
      }
    }
  });
  double wide[kThresholds];
#pragma unroll
  for (int j = 0; j < kThresholds; ++j) wide[j] = weights[j];
  const uint32_t warp_count = WarpSumOfEight(counts);
  const double warp_weight = WarpSumOfEight(wide);
  if (Lane() % 4 == 0) {
    shared_.warp_tally[Warp()].count[Lane() / 4] = warp_count;
    shared_.warp_tally[Warp()].weight[Lane() / 4] = warp_weight;
  }
  __syncthreads();
  const int j = Lane() % kThresholds;
  const int turn = slice_.turn();
  if (static_cast<int>(threadIdx.x) < kCluster * kThresholds) {
    const Tally* const from_warp = shared_.warp_tally;
    Tally* const to = slice_.Of(static_cast<int>(threadIdx.x) / kThresholds,
                                &shared_.cta_tally[turn][slice_.rank()]);
    to->count[j] = PairSum<kWarps, uint32_t>([&](int i) { return from_warp[i].count[j]; });
    to->weight[j] = PairSum<kWarps, double>([&](int i) { return from_warp[i].weight[j]; });
  }
  slice_.SyncCluster();
  const Tally* const from_cta = shared_.cta_tally[turn];
  *count = PairSum<kCluster, uint32_t>([&](int i) { return from_cta[i].count[j]; });
  *weight = PairSum<kCluster, double>([&](int i) { return from_cta[i].weight[j]; });
}

// The lowest bound for which enough(tokens below, their weight, the weight of all) holds, among the
// tokens with keys below `end`. When even all of those are not enough, lo == hi == end.
template <class By, class Enough>
__device__ Found Search::Run(const By& by, uint32_t end, const Enough& enough) {
  // Where the filters' bounds lie in most rows.
  constexpr float kFirst[kThresholds - 1] = {1.0f, 2.0f, 3.5f, 5.0f, 8.0f, 12.0f, 18.0f};
  const int own = Lane() % kThresholds;
  Found found = {.lo = 0, .hi = end, .count_lo = 0, .count_hi = 0, .weight_lo = 0, .weight_hi = 0};
  uint32_t threshold = end;
#pragma unroll
  for (int j = 0; j < kThresholds - 1; ++j) {
    if (own == j) threshold = min(by.At(kFirst[j]), end);
  }
  double whole = 0;
  for (bool first = true;; first = false) {
    if (!first) {
      threshold = found.lo + static_cast<uint32_t>(uint64_t{found.hi - found.lo} *
                                                   static_cast<uint32_t>(own + 1) / kThresholds);
    }
    uint32_t tallied = 0;
    double weight = 0;
    TallyBelow(by, found.lo, threshold, &tallied, &weight);
    const uint32_t count = tallied + found.count_lo;
    weight += found.weight_lo;
    if (first) whole = __shfl_sync(~0u, weight, kThresholds - 1);
    // That the upper end is enough is known from the second pass on.
    const bool lane_enough = enough(count, weight, whole) || (!first && own == kThresholds - 1);
    const uint32_t ballot = __ballot_sync(~0u, lane_enough);
    const int j = ballot == 0 ? kThresholds - 1 : __ffs(static_cast<int>(ballot)) - 1;
    const int before = ballot == 0 ? j : j - 1;
    found.count_hi = __shfl_sync(~0u, count, j);
    found.weight_hi = __shfl_sync(~0u, weight, j);
    found.hi = __shfl_sync(~0u, threshold, j);
    if (before >= 0) {
      found.count_lo = __shfl_sync(~0u, count, before);
      found.weight_lo = __shfl_sync(~0u, weight, before);
      found.lo = __shfl_sync(~0u, threshold, before);
    }
    const uint32_t undecided = found.count_hi - found.count_lo;
    if (undecided <= 1 || found.hi - found.lo <= 1) return found;
    if (undecided <= kFew) {
      // The last pass has counted each CTA's undecided tokens.
      const Tally* const tallies = shared_.cta_tally[slice_.turn() ^ 1];
      const int cta = min(Lane(), kCluster - 1);
      const uint32_t of_cta =
          tallies[cta].count[j] - (before >= 0 ? tallies[cta].count[before] : 0);
      Settle(by, enough, of_cta, whole, &found);
      return found;
    }
  }
}

// Ends a search: every CTA lists its undecided tokens, lane c knows how many CTA c has; all read
// the lists, sort the tokens, and add them one by one.
template <class By, class Enough>
__device__ void Search::Settle(const By& by, const Enough& enough, uint32_t of_cta, double whole,
                               Found* found) {
  slice_.ForTokens([&](float x, int) {
    const uint32_t key = by.Key(x);
    if (key < found->lo || key >= found->hi) return;
    shared_.listed[atomicAdd(&shared_.num_listed, 1u)] = key;
  });
  slice_.SyncCluster();
  if (threadIdx.x == 0) shared_.num_listed = 0;
  const uint32_t n = found->count_hi - found->count_lo;
  uint32_t mine = kNone;
  uint32_t at = threadIdx.x;
  for (int cta = 0; cta < kCluster; ++cta) {
    const uint32_t count = __shfl_sync(~0u, of_cta, cta);
    if (at < count) mine = *slice_.Of(cta, &shared_.listed[at]);
    at = at < count ? kNone : at - count;  // What is past the last is past all of them.
  }
  if (threadIdx.x < kFew) shared_.few[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x < n) {
    uint32_t place = 0;
    for (uint32_t i = 0; i < n; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(&shared_.few[i]);
      const uint32_t others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        place += others[k] < mine || (others[k] == mine && i + k < threadIdx.x);
      }
    }
    shared_.sorted[place] = mine;
  }
  __syncthreads();
  // Every warp finds the first that is enough; a lane adds up a few neighbours.
  constexpr uint32_t kEach = kFew / kWarp;
  const uint32_t begin = static_cast<uint32_t>(Lane()) * kEach;
  uint32_t keys[kEach];
  float weights[kEach];
  double own = 0;
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) {
    keys[i] = begin + i < n ? shared_.sorted[begin + i] : kNone;
    weights[i] = begin + i < n ? by.WeightOf(keys[i]) : 0.0f;
    own += weights[i];
  }
  double sum = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_up_sync(~0u, sum, step);
    if (Lane() >= step) sum += other;
  }
  sum += found->weight_lo - own;
  uint32_t first = kNone;
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) {
    sum += weights[i];
    const uint32_t count = found->count_lo + begin + i + 1;
    if (first == kNone && begin + i < n && enough(count, sum, whole)) first = begin + i;
  }
  first = min(__reduce_min_sync(~0u, first), n - 1);
  const uint32_t bound = shared_.sorted[first];
  uint32_t below = 0;
  uint32_t ties = 0;
  double weight_below = 0;
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) {
    below += keys[i] < bound;
    ties += keys[i] == bound;
    weight_below += keys[i] < bound ? double{weights[i]} : 0.0;
  }
  found->lo = bound;
  found->hi = bound + 1;
  found->count_lo += __reduce_add_sync(~0u, below);
  found->count_hi = found->count_lo + __reduce_add_sync(~0u, ties);
  found->weight_lo += WarpSum(weight_below);
  found->weight_hi = found->weight_lo +
                     static_cast<double>(by.WeightOf(bound)) * (found->count_hi - found->count_lo);
}

}  // namespace resa::kernels::cuda::sampling

#endif  // RESA_KERNELS_CUDA_SAMPLE_SEARCH_CUH_
