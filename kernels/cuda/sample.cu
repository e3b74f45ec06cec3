// Sampling: one cluster of CTAs per row, which holds the whole row in its shared memory.
//
//   logits [R, V] f32 -> SampleResult[R]; the order of the steps is that of SampleRow in params.h
//
// The row is cut into one slice of ids per CTA, a slice into one run per warp, a run into steps of
// 128 ids, four to a lane. So a thread reads its part of the row from global memory once, meets the
// same elements in every later pass, and the passes need barriers only for what they exchange:
// - load: maximum with its lowest id, whether all is finite, and the sum of exponentials;
// - bias and penalties, where there are any, and the new maximum;
// - filters: logits become distances from the maximum (u below), and the bounds of top_k and top_p
//   are found by counting and weighing the tokens under eight thresholds per pass, each pass inside
//   the interval that the last one left, until few enough are undecided to sort them. What is kept
//   is all below a bound, and of tokens that tie at it those with the lowest ids;
// - draw: the first id at which the running weight passes u times the whole, found by sums of
//   slices, runs, steps, lanes.
// Every sum has an order fixed by the vocabulary's size. Greedy rows end after the load.
//
// Bound: 4 V bytes per row, once, which for few rows is far less than the barriers' latency.
// Measured at V = 151936, rows not in the L2, 1 / 32 rows: greedy 6.3 / 12.3 us, temperature alone
// 11 / 19, top_p 20 / 34, top_k and top_p 30 / 49, 20 logprobs 20 / 39 (peaked logits; where they
// are flat, filters and logprobs take 1.4 to 2.3 times as long). 32 rows of greedy are 1.6 TB/s, 35
// % of the reads' ceiling.

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample_warp.cuh"
#include "kernels/philox.h"

namespace resa::kernels::cuda {
namespace {

namespace cg = cooperative_groups;
using namespace sampling;  // NOLINT: the warp's half of this file.

// Of 8, only 30 clusters with two CTAs per multiprocessor fit an H200: 32 rows would be two waves.
constexpr int kCluster = 7;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStep = 4 * kWarp;  // Ids that a warp takes at a time.
constexpr int kBatch = 5;         // Steps that a thread holds in registers.
constexpr int kMaxSteps = 25;     // Of a warp's run: 200 KiB of shared memory.
constexpr int kThresholds = 8;    // Per pass of a search,
constexpr uint32_t kFew = 256;    // whose passes end when no more tokens are undecided.
// The distance of a token without weight, 88: exp(-88) is less than the smallest normal float.
constexpr uint32_t kGone = 0x42b00000;
static_assert(kCluster <= kWarps && kWarps <= kWarp && kMaxSteps <= kWarp);

struct SampleArgs {
  const float* logits;  // [R, V]
  int32_t vocabulary;
  int steps;     // Per warp.
  bool aligned;  // Rows may be read 16 bytes at a time.
  const SampleRow* rows;
  SampleResult* out;
};

// How many tokens lie below each of some thresholds, and their weight.
struct Tally {
  double weight[kThresholds];
  uint32_t count[kThresholds];
};

// What is exchanged between CTAs is written into both halves of a double buffer in turn: a CTA may
// be one cluster barrier ahead of another, never two.
struct Shared {
  SampleRow row;
  Partial warp_partial[kWarps];
  Partial cta_partial[2][kCluster];
  Tally warp_tally[kWarps];
  Tally cta_tally[2][kCluster];
  uint32_t num_listed;  // Zero between searches.
  uint32_t listed[kFew];
  alignas(16) uint32_t few[kFew];
  uint32_t sorted[kFew];
  double warp_weight[kWarps];
  float step_weight[kWarps][kWarp];
  double cta_weight[2][kCluster];
  int32_t picked;
  uint32_t num_top;  // The first CTA's, like all below: the top logits, in any order.
  uint64_t top[kMaxTopLogprobs];
  SampleResult result;
};

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

// The tokens that may be drawn: u < end, but of those with u == tie only the first `ties` by id.
struct Kept {
  uint32_t end = kGone;
  uint32_t tie = kNone;
  uint32_t ties = 0;
  int32_t last_tie = 0x7fffffff;  // The id of the last of them.

  __device__ __forceinline__ float WeightOf(uint32_t u, int32_t id) const {
    return u < end && (u != tie || id <= last_tie) ? Weight(u) : 0.0f;
  }
};

// One CTA's part of a row.
class Sampler {
 public:
  __device__ Sampler(const SampleArgs& args, Shared* shared, float4* slice)
      : args_(args),
        row_(shared->row),
        shared_(*shared),
        slice_(slice),
        cluster_(cg::this_cluster()),
        rank_(static_cast<int>(cluster_.block_rank())),
        begin_(rank_ * kWarps * args.steps * kStep) {}

  __device__ void Run();

 private:
  // Calls body(the lane's four values, the id of the first, the step) for each step of the warp.
  template <class Body>
  __device__ __forceinline__ void ForSteps(const Body& body) {
    const int first = Warp() * args_.steps;
#pragma unroll 2
    for (int s = 0; s < args_.steps; ++s) {
      const int at = (first + s) * kWarp + Lane();
      body(slice_[at], begin_ + 4 * at, s);
    }
  }
  template <class Body>
  __device__ __forceinline__ void ForTokens(const Body& body) {
    ForSteps([&](float4& v, int id, int) {
      body(v.x, id);
      body(v.y, id + 1);
      body(v.z, id + 2);
      body(v.w, id + 3);
    });
  }
  template <class T>
  __device__ __forceinline__ T* Of(int cta, T* mine) {
    return cluster_.map_shared_rank(mine, static_cast<unsigned>(cta));
  }
  // Everything that was written before is seen after, in the whole cluster.
  __device__ __forceinline__ void SyncCluster() {
    cluster_.sync();
    turn_ ^= 1;
  }

  __device__ __forceinline__ void CopyStep(const float* raw, int at);
  __device__ Partial Load(const float* raw);
  __device__ Partial Combine(const Partial& own, bool with_sum);
  __device__ void GatherTop(float top);
  __device__ void ReportTop(double log_sum);
  __device__ bool ChangesLogits() const;
  __device__ void ChangeLogits();
  template <class By>
  __device__ void TallyBelow(const By& by, uint32_t from, uint32_t threshold, uint32_t* count,
                             double* weight);
  template <class By, class Enough>
  __device__ Found Search(const By& by, uint32_t end, const Enough& enough);
  template <class By, class Enough>
  __device__ void Settle(const By& by, const Enough& enough, uint32_t of_cta, double whole,
                         Found* found);
  __device__ Kept Filter();
  template <class WeightOf, class Target>
  __device__ int32_t Pick(const WeightOf& weight_of, const Target& target);
  __device__ int32_t Draw(float top);
  __device__ void Finish(bool finite, int32_t token, const Partial& raw);

  const SampleArgs& args_;
  const SampleRow& row_;
  Shared& shared_;
  float4* const slice_;  // [kWarps * steps * kWarp]
  const cg::cluster_group cluster_;
  const int rank_;
  const int begin_;  // The slice's first id.
  int turn_ = 0;     // Of the double buffers.
};

// ---- load ---------------------------------------------------------------------------------------

// Brings four logits into shared memory, -infinity past the vocabulary.
__device__ __forceinline__ void Sampler::CopyStep(const float* raw, int at) {
  const int id = begin_ + 4 * at;
  if (args_.aligned && id + 4 <= args_.vocabulary) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(slice_ + at))),
                 "l"(raw + id)
                 : "memory");
    return;
  }
  const auto one = [&](int i) { return i < args_.vocabulary ? raw[i] : -INFINITY; };
  slice_[at] = make_float4(one(id), one(id + 1), one(id + 2), one(id + 3));
}

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;"); }
// Until all but the `behind` latest groups of the thread's copies are there.
__device__ __forceinline__ void WaitForCopies(int behind) {
  static_assert((kMaxSteps + kBatch - 1) / kBatch <= 5);
  switch (behind) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 4;" ::: "memory");
      break;
  }
}

// All of the thread's part of the row is under way at once; what has come is looked at meanwhile,
// its exponentials summed up relative to the maximum so far.
__device__ Partial Sampler::Load(const float* raw) {
  const int first = Warp() * args_.steps;
  const int batches = (args_.steps + kBatch - 1) / kBatch;
  for (int batch = 0; batch < batches; ++batch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int s = batch * kBatch + i;
      if (s < args_.steps) CopyStep(raw, (first + s) * kWarp + Lane());
    }
    CommitCopies();
  }
  Partial own = {.sum = 0, .top = -INFINITY, .id = 0x7fffffff, .bad = 0};
  int top_at = -1;
  float sum = 0;
  for (int batch = 0; batch < batches; ++batch) {
    WaitForCopies(batches - 1 - batch);
    float4 v[kBatch];
    const float top_before = own.top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int s = batch * kBatch + i;
      if (s >= args_.steps) break;
      const int at = (first + s) * kWarp + Lane();
      v[i] = slice_[at];
      const float highest = fmaxf(fmaxf(v[i].x, v[i].y), fmaxf(v[i].z, v[i].w));
      if (highest > own.top) {
        own.top = highest;
        top_at = at;
      }
    }
    // Until there is a maximum, everything counts as itself: nothing, or NaN.
    const float base = own.top == -INFINITY ? 0.0f : own.top;
    if (top_before != base) sum *= QuickExp(top_before - base);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (batch * kBatch + i >= args_.steps) break;
      sum += QuickExp(v[i].x - base) + QuickExp(v[i].y - base) + QuickExp(v[i].z - base) +
             QuickExp(v[i].w - base);
    }
  }
  if (top_at >= 0) {
    const float4 v = slice_[top_at];
    own.id = begin_ + 4 * top_at +
             (v.x == own.top   ? 0
              : v.y == own.top ? 1
              : v.z == own.top ? 2
                               : 3);
  }
  // NaN makes the sum NaN, and so does +infinity less itself.
  own.bad = isnan(sum) ? 1 : 0;
  own.sum = double{sum};
  return own;
}

// Threads' parts to the row's. The first CTA alone learns the sum.
__device__ Partial Sampler::Combine(const Partial& own, bool with_sum) {
  constexpr Partial kEmpty = {.sum = 0, .top = -INFINITY, .id = 0x7fffffff, .bad = 0};
  Partial part = MergeLanes(own, with_sum);
  if (Lane() == 0) shared_.warp_partial[Warp()] = part;
  __syncthreads();
  if (Warp() == 0) {
    part = MergeLanes(Lane() < kWarps ? shared_.warp_partial[Lane()] : kEmpty, with_sum);
    if (Lane() < kCluster) *Of(Lane(), &shared_.cta_partial[turn_][rank_]) = part;
  }
  const int turn = turn_;
  SyncCluster();
  return MergeLanes(Lane() < kCluster ? shared_.cta_partial[turn][Lane()] : kEmpty,
                    with_sum && rank_ == 0);
}

// ---- bias and penalties -------------------------------------------------------------------------

__device__ bool Sampler::ChangesLogits() const {
  return row_.num_bias > 0 ||
         (row_.num_counts > 0 && (row_.repetition_penalty != 1.0f ||
                                  row_.presence_penalty != 0.0f || row_.frequency_penalty != 0.0f));
}

__device__ void Sampler::ChangeLogits() {
  float* const x = reinterpret_cast<float*>(slice_);
  const int end = min(begin_ + kWarps * args_.steps * kStep, args_.vocabulary);
  const auto mine = [&](int32_t id) { return id >= begin_ && id < end; };
  __syncthreads();
  // The thread of an id's first entry adds all of its entries in their order.
  for (int64_t i = threadIdx.x; i < row_.num_bias; i += kThreads) {
    const int32_t id = row_.bias[i].id;
    if (!mine(id)) continue;
    bool first = true;
    for (int64_t j = 0; j < i && first; ++j) first = row_.bias[j].id != id;
    if (!first) continue;
    float value = x[id - begin_];
    for (int64_t j = i; j < row_.num_bias; ++j) {
      if (row_.bias[j].id == id) value += row_.bias[j].bias;
    }
    x[id - begin_] = value;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < row_.num_counts; i += kThreads) {
    const TokenCount count = row_.counts[i];
    if (!mine(count.id)) continue;
    float value = x[count.id - begin_];
    if (count.in_prompt || count.output_count > 0) {
      value = value > 0 ? value / row_.repetition_penalty : value * row_.repetition_penalty;
    }
    if (count.output_count > 0) {
      value -= __fadd_rn(row_.presence_penalty,
                         __fmul_rn(row_.frequency_penalty, static_cast<float>(count.output_count)));
    }
    x[count.id - begin_] = value;
  }
  __syncthreads();
}

// ---- filters ------------------------------------------------------------------------------------

// The row's tokens with keys in [from, threshold) and their weight, for the lane's threshold; lanes
// l and l + kThresholds have the same.
template <class By>
__device__ void Sampler::TallyBelow(const By& by, uint32_t from, uint32_t threshold,
                                    uint32_t* count, double* weight) {
  uint32_t thresholds[kThresholds];
#pragma unroll
  for (int j = 0; j < kThresholds; ++j) thresholds[j] = __shfl_sync(~0u, threshold, j);
  uint32_t counts[kThresholds] = {};
  float weights[kThresholds] = {};
  ForSteps([&](const float4& v, int, int) {
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
  const int turn = turn_;
  if (static_cast<int>(threadIdx.x) < kCluster * kThresholds) {
    const Tally* const from_warp = shared_.warp_tally;
    Tally* const to =
        Of(static_cast<int>(threadIdx.x) / kThresholds, &shared_.cta_tally[turn][rank_]);
    to->count[j] = PairSum<kWarps, uint32_t>([&](int i) { return from_warp[i].count[j]; });
    to->weight[j] = PairSum<kWarps, double>([&](int i) { return from_warp[i].weight[j]; });
  }
  SyncCluster();
  const Tally* const from_cta = shared_.cta_tally[turn];
  *count = PairSum<kCluster, uint32_t>([&](int i) { return from_cta[i].count[j]; });
  *weight = PairSum<kCluster, double>([&](int i) { return from_cta[i].weight[j]; });
}

// The lowest bound for which enough(tokens below, their weight, the weight of all) holds, among the
// tokens with keys below `end`. When even all of those are not enough, lo == hi == end.
template <class By, class Enough>
__device__ Found Sampler::Search(const By& by, uint32_t end, const Enough& enough) {
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
      const Tally* const tallies = shared_.cta_tally[turn_ ^ 1];
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
__device__ void Sampler::Settle(const By& by, const Enough& enough, uint32_t of_cta, double whole,
                                Found* found) {
  ForTokens([&](float x, int) {
    const uint32_t key = by.Key(x);
    if (key < found->lo || key >= found->hi) return;
    shared_.listed[atomicAdd(&shared_.num_listed, 1u)] = key;
  });
  SyncCluster();
  if (threadIdx.x == 0) shared_.num_listed = 0;
  const uint32_t n = found->count_hi - found->count_lo;
  uint32_t mine = kNone;
  uint32_t at = threadIdx.x;
  for (int cta = 0; cta < kCluster; ++cta) {
    const uint32_t count = __shfl_sync(~0u, of_cta, cta);
    if (at < count) mine = *Of(cta, &shared_.listed[at]);
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

// What top_k and top_p leave; min_p has been applied to the distances.
__device__ Kept Sampler::Filter() {
  Kept kept;
  double whole = 0;
  if (row_.top_k > 0) {
    const auto wanted = static_cast<uint32_t>(row_.top_k);
    const Found found = Search(ByDistance(), kGone,
                               [&](uint32_t count, double, double) { return count >= wanted; });
    kept.end = found.hi;
    whole = found.weight_hi;
    const uint32_t tied = found.count_hi - found.count_lo;
    if (tied > 1 && wanted - found.count_lo < tied) {
      kept.tie = found.lo;
      kept.ties = wanted - found.count_lo;
      whole = found.weight_lo + static_cast<double>(Weight(found.lo)) * kept.ties;
    }
  }
  if (row_.top_p < 1.0f) {
    const bool chosen = row_.top_k > 0;
    const Found found = Search(ByDistance(), kept.end, [&](uint32_t, double weight, double all) {
      if (!chosen) whole = all;
      return weight >= row_.top_p * whole;
    });
    const double target = row_.top_p * whole;
    kept.end = found.hi;
    const uint32_t tied = found.count_hi - found.count_lo;
    if (tied > 1) {
      const auto needed = static_cast<double>(
          ceil((target - found.weight_lo) / static_cast<double>(Weight(found.lo))));
      const uint32_t most = kept.tie == found.lo ? kept.ties : tied;
      kept.ties = needed < 1 ? 1 : needed < most ? static_cast<uint32_t>(needed) : most;
      kept.tie = kept.ties < tied ? found.lo : kNone;
    }
  }
  return kept;
}

// ---- draw ---------------------------------------------------------------------------------------

// The first id at which the running weight_of(value in shared memory, id) passes target(the whole).
template <class WeightOf, class Target>
__device__ int32_t Sampler::Pick(const WeightOf& weight_of, const Target& target) {
  const auto of_four = [&](const float4& v, int id) {
    return weight_of(v.x, id) + weight_of(v.y, id + 1) + weight_of(v.z, id + 2) +
           weight_of(v.w, id + 3);
  };
  const int lane = Lane();
  double warp_weight = 0;
  for (int s = 0; s < args_.steps; s += 8) {
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = (Warp() * args_.steps + s + i) * kWarp + lane;
      weights[i] = s + i < args_.steps ? of_four(slice_[at], begin_ + 4 * at) : 0.0f;
    }
    const float step = WarpSumOfEight(weights);
    if (lane % 4 == 0) {
      shared_.step_weight[Warp()][s + lane / 4] = step;
      warp_weight += step;
    }
  }
  warp_weight = WarpSum(warp_weight);
  if (lane == 0) shared_.warp_weight[Warp()] = warp_weight;
  __syncthreads();
  if (Warp() == 0) {
    const double sum = PairSum<kWarps, double>([&](int i) { return shared_.warp_weight[i]; });
    if (lane < kCluster) *Of(lane, &shared_.cta_weight[turn_][rank_]) = sum;
  }
  const int turn = turn_;
  SyncCluster();
  if (Warp() == 0) {
    const double* const of_cta = shared_.cta_weight[turn];
    double left = target(PairSum<kCluster, double>([&](int i) { return of_cta[i]; }));
    if (PickLane(lane < kCluster ? of_cta[lane] : 0.0, &left) == rank_) {
      const int warp = PickLane(lane < kWarps ? shared_.warp_weight[lane] : 0.0, &left);
      const int step =
          PickLane(lane < args_.steps ? double{shared_.step_weight[warp][lane]} : 0.0, &left);
      const int at = (warp * args_.steps + step) * kWarp;
      const float4 v = slice_[at + lane];
      const int picked = PickLane(double{of_four(v, begin_ + 4 * (at + lane))}, &left);
      // The lane's four, one to a lane.
      const float* const four = reinterpret_cast<const float*>(slice_ + at + picked);
      const int id = begin_ + 4 * (at + picked);
      const int part =
          PickLane(lane < 4 ? double{weight_of(four[lane % 4], id + lane)} : 0.0, &left);
      if (lane < kCluster) *Of(lane, &shared_.picked) = id + part;
    }
  }
  SyncCluster();
  return shared_.picked;
}

// Draws a token; distances are those from the maximum over the temperature.
__device__ int32_t Sampler::Draw(float top) {
  const float inverse = 1.0f / row_.temperature;
  const uint32_t cut =
      row_.min_p > 0.0f ? min(__float_as_uint(fabsf(logf(row_.min_p))), kGone - 1) : kGone - 1;
  const auto distance = [&](float x) {
    const uint32_t u = __float_as_uint(fabsf((top - x) * inverse));
    return u <= cut ? u : kGone;
  };
  const double uniform = PhiloxUniform(row_.seed, row_.draw_index);
  const auto target = [&](double whole) { return uniform * whole; };
  if (row_.top_k == 0 && row_.top_p >= 1.0f) {
    return Pick([&](float x, int) { return Weight(distance(x)); }, target);
  }
  ForTokens([&](float& x, int) { x = __uint_as_float(distance(x)); });
  Kept kept = Filter();
  if (kept.tie < kept.end) {
    kept.last_tie = Pick([&](float x, int) { return __float_as_uint(x) == kept.tie ? 1.0f : 0.0f; },
                         [&](double) { return static_cast<double>(kept.ties) - 1.0; });
  }
  return Pick([&](float x, int id) { return kept.WeightOf(__float_as_uint(x), id); }, target);
}

// ---- top logprobs -------------------------------------------------------------------------------

// Sends the row's highest raw logits to the first CTA, before bias and penalties change them.
__device__ void Sampler::GatherTop(float top) {
  const ByLogit by = {top};
  const auto wanted = static_cast<uint32_t>(row_.top_logprobs);
  const auto enough = [&](uint32_t count, double, double) { return count >= wanted; };
  Found found = Search(by, by.At(24.0f), enough);  // A search among few tokens is fast.
  if (found.count_hi < wanted) found = Search(by, ByLogit::kEnd, enough);
  const uint32_t tied = found.count_hi - found.count_lo;
  const uint32_t ties = wanted - found.count_lo;
  int32_t last_tie = 0x7fffffff;
  if (tied > 1 && ties < tied) {
    last_tie = Pick([&](float x, int) { return by.Key(x) == found.lo ? 1.0f : 0.0f; },
                    [&](double) { return static_cast<double>(ties) - 1.0; });
  }
  ForTokens([&](float x, int id) {
    const uint32_t key = by.Key(x);
    if (key >= found.hi || (key == found.lo && id > last_tie)) return;
    const uint32_t place = atomicAdd(Of(0, &shared_.num_top), 1u);
    *Of(0, &shared_.top[place]) = uint64_t{~key} << 32 | ~static_cast<uint32_t>(id);
  });
  SyncCluster();
}

// In the first CTA: what was gathered by falling logit, ties to the lower id.
__device__ void Sampler::ReportTop(double log_sum) {
  const uint32_t count = shared_.num_top;
  if (threadIdx.x == 0) shared_.result.num_top = static_cast<int32_t>(count);
  if (threadIdx.x >= count) return;
  const uint64_t mine = shared_.top[threadIdx.x];
  int place = 0;
  for (uint32_t i = 0; i < count; ++i) place += shared_.top[i] > mine;
  const float logit = FromOrderedKey(static_cast<uint32_t>(mine >> 32));
  shared_.result.top_ids.begin()[place] = static_cast<int32_t>(~static_cast<uint32_t>(mine));
  shared_.result.top_logprobs.begin()[place] = static_cast<float>(double{logit} - log_sum);
}

// ---- the row ------------------------------------------------------------------------------------

// The first CTA writes the result.
__device__ void Sampler::Finish(bool finite, int32_t token, const Partial& raw) {
  if (rank_ != 0) return;
  auto* const words = reinterpret_cast<uint32_t*>(&shared_.result);
  constexpr int kWords = sizeof(SampleResult) / 4;
  static_assert(sizeof(SampleResult) % 4 == 0 && kWords <= kThreads);
  if (threadIdx.x < kWords) words[threadIdx.x] = 0;
  __syncthreads();
  if (finite && Warp() == 0) {
    const double log_sum = double{raw.top} + log(raw.sum);
    if (row_.top_logprobs > 0) ReportTop(log_sum);
    if (Lane() == 0) {
      const float logit =
          token == raw.id ? raw.top : args_.logits[int64_t{row_.row} * args_.vocabulary + token];
      shared_.result.token = token;
      shared_.result.finite = true;
      shared_.result.logprob = static_cast<float>(double{logit} - log_sum);
    }
  }
  __syncthreads();
  auto* const out = reinterpret_cast<uint32_t*>(args_.out + blockIdx.x / kCluster);
  if (threadIdx.x < kWords) out[threadIdx.x] = words[threadIdx.x];
}

__device__ void Sampler::Run() {
  const SampleRow* const row = args_.rows + blockIdx.x / kCluster;
  static_assert(sizeof(SampleRow) % 4 == 0 && sizeof(SampleRow) / 4 <= kThreads);
  if (threadIdx.x < sizeof(SampleRow) / 4) {
    reinterpret_cast<uint32_t*>(&shared_.row)[threadIdx.x] =
        reinterpret_cast<const uint32_t*>(row)[threadIdx.x];
  }
  if (threadIdx.x == 0) {
    shared_.num_listed = 0;
    shared_.num_top = 0;
  }
  auto started = cluster_.barrier_arrive();
  const Partial own = Load(args_.logits + int64_t{row->row} * args_.vocabulary);
  // Other CTAs' shared memory may be written once they run.
  cluster_.barrier_wait(std::move(started));
  const Partial raw = Combine(own, true);
  if (raw.bad != 0 || raw.top == -INFINITY) return Finish(false, 0, raw);
  if (row_.top_logprobs > 0) GatherTop(raw.top);
  if (row_.forced_token >= 0) return Finish(true, row_.forced_token, raw);
  Partial peak = raw;
  if (ChangesLogits()) {
    ChangeLogits();
    Partial changed = {.sum = 0, .top = -INFINITY, .id = 0x7fffffff, .bad = 0};
    ForTokens([&](float x, int id) {
      if (x > changed.top) {
        changed.top = x;
        changed.id = id;
      }
      changed.bad |= x < INFINITY ? 0 : 1;
    });
    peak = Combine(changed, false);
    if (peak.bad != 0 || peak.top == -INFINITY) return Finish(false, 0, raw);
  }
  const bool greedy = row_.temperature == 0.0f || isinf(1.0f / row_.temperature);
  Finish(true, greedy ? peak.id : Draw(peak.top), raw);
}

__global__ void __launch_bounds__(kThreads, 2) SampleKernel(const SampleArgs args) {
  extern __shared__ float4 slice[];
  __shared__ __align__(16) unsigned char shared[sizeof(Shared)];
  WaitForPrevious();
  Sampler(args, reinterpret_cast<Shared*>(shared), slice).Run();
}

}  // namespace

void Sample(Context& context, const SampleParams& params, SampleResult* out) {
  if (params.num_rows == 0) return;
  const int64_t vocabulary = params.logits.cols;
  constexpr int64_t kPerStep = int64_t{kCluster} * kWarps * kStep;
  const int64_t steps = (vocabulary + kPerStep - 1) / kPerStep;
  RESA_CHECK(steps >= 1 && steps <= kMaxSteps)
      << "Sample: a vocabulary of " << vocabulary << ", expected 1 to " << kMaxSteps * kPerStep;
  const SampleArgs args = {
      .logits = params.logits.f32(),
      .vocabulary = static_cast<int32_t>(vocabulary),
      .steps = static_cast<int>(steps),
      .aligned = vocabulary % 4 == 0 && reinterpret_cast<uintptr_t>(params.logits.data) % 16 == 0,
      .rows = params.rows,
      .out = out,
  };
  const size_t shared_bytes = static_cast<size_t>(steps) * kWarps * kStep * sizeof(float);
  RESA_CUDA_CHECK(cudaFuncSetAttribute(SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
  LaunchOverlapped(context.stream, SampleKernel, static_cast<unsigned>(params.num_rows * kCluster),
                   kThreads, shared_bytes, kCluster, args);
}

}  // namespace resa::kernels::cuda
