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
//   the interval that the last one left. No sort: what is kept is all below a bound, and of tokens
//   that tie at it those with the lowest ids;
// - draw: the first id at which the running weight passes u times the whole, found by sums of
//   slices, runs, steps, lanes.
// Every sum has an order fixed by the vocabulary's size. Greedy rows end after the load.
//
// Bound: 4 V bytes per row, once, from L2 where the product has just left them.

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/philox.h"

namespace resa::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarp = 32;
constexpr int kCluster = 8;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStep = 4 * kWarp;        // Ids that a warp takes at a time.
constexpr int kMaxSteps = 26;           // Of a warp's run: 208 KiB of shared memory.
constexpr int kThresholds = 8;          // Per pass of a search.
constexpr uint32_t kGone = 0x7f800000;  // The distance of a token without weight: +infinity.
constexpr uint32_t kNone = 0xffffffff;

struct SampleArgs {
  const float* logits;  // [R, V]
  int32_t vocabulary;
  int steps;     // Per warp.
  bool aligned;  // Rows may be read 16 bytes at a time.
  const SampleRow* rows;
  SampleResult* out;
};

// The highest logit of some tokens, and the sum of exp(logit - top).
struct Partial {
  double sum;
  float top;
  int32_t id;    // The lowest that has it.
  uint32_t bad;  // Non-zero when one is NaN or +infinity.
};
// How many tokens lie below each of some thresholds, and their weight.
struct Tally {
  double weight[kThresholds];
  uint32_t count[kThresholds];
};

// What is exchanged between CTAs is written into both halves of a double buffer in turn: a CTA may
// be one cluster barrier ahead of another, never two.
struct Shared {
  Partial warp_partial[kWarps];
  Partial cta_partial[2][kCluster];
  Tally warp_tally[kWarps];
  Tally cta_tally[2][kCluster];
  double warp_weight[kWarps];
  float step_weight[kWarps][kMaxSteps];
  double cta_weight[2][kCluster];
  int32_t picked;
  uint64_t warp_top[kWarps][kMaxTopLogprobs];
  uint64_t cta_top[kMaxTopLogprobs];
  uint64_t cluster_top[kCluster][kMaxTopLogprobs];  // Of the first CTA.
  SampleResult result;
};

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int Warp() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ double WarpSum(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Unsigned keys in the order of floats; -0 counts as +0. No NaN.
__device__ __forceinline__ uint32_t OrderedKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float FromOrderedKey(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

// The weight of a token at distance u (the bits of a float >= 0).
__device__ __forceinline__ float Weight(uint32_t u) { return expf(-__uint_as_float(u)); }

// What a search found: tokens at distances below `lo` are kept, those from `hi` on are not. Between
// them lies one token, which is kept, or hi == lo + 1 and tokens that tie.
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
  __device__ Sampler(const SampleArgs& args, const SampleRow& row, Shared* shared, float4* slice)
      : args_(args),
        row_(row),
        shared_(*shared),
        slice_(slice),
        cluster_(cg::this_cluster()),
        rank_(static_cast<int>(cluster_.block_rank())),
        begin_(rank_ * kWarps * args.steps * kStep),
        raw_(args.logits + int64_t{row.row} * args.vocabulary) {}

  __device__ void Run();

 private:
  // Calls body(the lane's four values, the id of the first) for each step of the warp.
  template <class Body>
  __device__ __forceinline__ void ForSteps(const Body& body) {
    const int first = Warp() * args_.steps;
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

  __device__ __forceinline__ float4 LoadStep(int at) const;
  __device__ void Load(float* top, int32_t* id, bool* bad);
  __device__ Partial Combine(float top, int32_t id, bool bad, bool sum);
  __device__ void SendTopLogprobs();
  __device__ void MergeTopLogprobs(double log_sum);
  __device__ bool ChangesLogits() const;
  __device__ void ChangeLogits();
  __device__ void TallyBelow(const uint32_t (&thresholds)[kThresholds], uint32_t from,
                             uint32_t* count, double* weight);
  template <class Enough>
  __device__ Found Search(uint32_t end, const Enough& enough);
  __device__ Kept Filter();
  template <class WeightOf, class Target>
  __device__ int32_t Pick(const WeightOf& weight_of, const Target& target);
  __device__ int32_t Draw(float top);
  __device__ void Finish(bool finite, int32_t token, double log_sum);

  const SampleArgs& args_;
  const SampleRow& row_;
  Shared& shared_;
  float4* const slice_;  // [kWarps * steps * kWarp]
  const cg::cluster_group cluster_;
  const int rank_;
  const int begin_;         // The slice's first id.
  const float* const raw_;  // The row in global memory.
  int turn_ = 0;            // Of the double buffers.
};

// ---- load ---------------------------------------------------------------------------------------

// Four logits; -infinity past the vocabulary.
__device__ __forceinline__ float4 Sampler::LoadStep(int at) const {
  const int id = begin_ + 4 * at;
  if (args_.aligned && id + 4 <= args_.vocabulary) {
    return __ldg(reinterpret_cast<const float4*>(raw_ + id));
  }
  const auto one = [&](int i) { return i < args_.vocabulary ? raw_[i] : -INFINITY; };
  return make_float4(one(id), one(id + 1), one(id + 2), one(id + 3));
}

__device__ void Sampler::Load(float* top, int32_t* id, bool* bad) {
  constexpr int kUnroll = 4;
  const int first = Warp() * args_.steps;
  *top = -INFINITY;
  *id = 0;
  *bad = false;
  const auto look = [&](float x, int32_t at) {
    if (x > *top) {
      *top = x;
      *id = at;
    }
    *bad |= !(x < INFINITY);
  };
  for (int s = 0; s < args_.steps; s += kUnroll) {
    float4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (s + i < args_.steps) v[i] = LoadStep((first + s + i) * kWarp + Lane());
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (s + i >= args_.steps) break;
      const int at = (first + s + i) * kWarp + Lane();
      slice_[at] = v[i];
      look(v[i].x, begin_ + 4 * at);
      look(v[i].y, begin_ + 4 * at + 1);
      look(v[i].z, begin_ + 4 * at + 2);
      look(v[i].w, begin_ + 4 * at + 3);
    }
  }
}

// Threads' maxima (and, with `sum`, the exponentials of their tokens) to the row's.
__device__ Partial Sampler::Combine(float top, int32_t id, bool bad, bool sum) {
  const uint32_t key = OrderedKey(top);
  const uint32_t best = __reduce_max_sync(~0u, key);
  const auto lowest =
      static_cast<int32_t>(__reduce_min_sync(~0u, key == best ? static_cast<uint32_t>(id) : kNone));
  const bool any_bad = __any_sync(~0u, bad);
  const float warp_top = FromOrderedKey(best);
  float own = 0;
  if (sum && warp_top != -INFINITY) ForTokens([&](float x, int) { own += expf(x - warp_top); });
  const double warp_sum = sum ? WarpSum(double{own}) : 0.0;
  if (Lane() == 0) shared_.warp_partial[Warp()] = {warp_sum, warp_top, lowest, any_bad};
  __syncthreads();

  // Ids rise with warps and with CTAs, so that the first of equal maxima has the lowest.
  const auto merge = [](const Partial* parts, int count) {
    Partial all = parts[0];
    for (int i = 1; i < count; ++i) {
      all.bad |= parts[i].bad;
      if (parts[i].top > all.top) {
        all.top = parts[i].top;
        all.id = parts[i].id;
      }
    }
    all.sum = 0;
    if (all.top == -INFINITY) return all;
    for (int i = 0; i < count; ++i) {
      all.sum += parts[i].sum * static_cast<double>(expf(parts[i].top - all.top));
    }
    return all;
  };
  if (threadIdx.x < kCluster) {
    *Of(static_cast<int>(threadIdx.x), &shared_.cta_partial[turn_][rank_]) =
        merge(shared_.warp_partial, kWarps);
  }
  const int turn = turn_;
  SyncCluster();
  return merge(shared_.cta_partial[turn], kCluster);
}

// ---- top logprobs -------------------------------------------------------------------------------

// A token as one number that rises with its logit and falls with its id; 0 is no token.
__device__ __forceinline__ uint64_t TopKey(float x, int32_t id) {
  return x == -INFINITY ? 0 : uint64_t{OrderedKey(x)} << 32 | ~static_cast<uint32_t>(id);
}

// Every warp takes out its highest tokens one by one, the CTA ranks the warps' lists, and the first
// CTA gets the CTAs' lists.
__device__ void Sampler::SendTopLogprobs() {
  const int wanted = row_.top_logprobs;
  uint64_t below = ~uint64_t{0};
  for (int i = 0; i < wanted; ++i) {
    // The lane's highest that is not out yet; only the lane of the last one has to look again.
    uint64_t mine = 0;
    ForTokens([&](float x, int id) {
      const uint64_t key = TopKey(x, id);
      if (key < below && key > mine) mine = key;
    });
    const uint32_t high = __reduce_max_sync(~0u, static_cast<uint32_t>(mine >> 32));
    const uint32_t low = __reduce_max_sync(
        ~0u, static_cast<uint32_t>(mine >> 32) == high ? static_cast<uint32_t>(mine) : 0u);
    below = uint64_t{high} << 32 | low;
    if (Lane() == 0) shared_.warp_top[Warp()][i] = below;
  }
  if (threadIdx.x < kMaxTopLogprobs) shared_.cta_top[threadIdx.x] = 0;
  __syncthreads();
  const int entries = kWarps * wanted;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const uint64_t key = shared_.warp_top[i / wanted][i % wanted];
    if (key == 0) continue;
    int place = 0;
    for (int j = 0; j < entries; ++j) place += shared_.warp_top[j / wanted][j % wanted] > key;
    if (place < wanted) shared_.cta_top[place] = key;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < wanted) {
    *Of(0, &shared_.cluster_top[rank_][threadIdx.x]) = shared_.cta_top[threadIdx.x];
  }
}

__device__ void Sampler::MergeTopLogprobs(double log_sum) {
  const int wanted = row_.top_logprobs;
  const int entries = kCluster * wanted;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const uint64_t key = shared_.cluster_top[i / wanted][i % wanted];
    if (key == 0) continue;
    int place = 0;
    for (int j = 0; j < entries; ++j) place += shared_.cluster_top[j / wanted][j % wanted] > key;
    if (place >= wanted) continue;
    shared_.result.top_ids.begin()[place] = static_cast<int32_t>(~static_cast<uint32_t>(key));
    shared_.result.top_logprobs.begin()[place] =
        static_cast<float>(double{FromOrderedKey(static_cast<uint32_t>(key >> 32))} - log_sum);
    atomicAdd(&shared_.result.num_top, 1);
  }
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

// Sums of eight values per lane over the warp: afterwards lane l has the sum of value l / 4.
template <class T>
__device__ __forceinline__ T WarpSumOfEight(T (&v)[8]) {
#pragma unroll
  for (int width = 4; width >= 1; width /= 2) {
    const int offset = 4 * width;
    const bool upper = (Lane() & offset) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const T other = __shfl_xor_sync(~0u, upper ? v[i] : v[i + width], offset);
      v[i] = (upper ? v[i + width] : v[i]) + other;
    }
  }
  v[0] += __shfl_xor_sync(~0u, v[0], 2);
  return v[0] + __shfl_xor_sync(~0u, v[0], 1);
}

// For the threshold l % 8 of lane l, over all of the row: the tokens at distances in
// [from, threshold) and their weight.
__device__ void Sampler::TallyBelow(const uint32_t (&thresholds)[kThresholds], uint32_t from,
                                    uint32_t* count, double* weight) {
  uint32_t counts[kThresholds] = {};
  float weights[kThresholds] = {};
  ForTokens([&](float x, int) {
    const uint32_t u = __float_as_uint(x);
    if (u < from || u >= thresholds[kThresholds - 1]) return;
    const float w = Weight(u);
#pragma unroll
    for (int j = 0; j < kThresholds; ++j) {
      counts[j] += u < thresholds[j];
      weights[j] += u < thresholds[j] ? w : 0.0f;
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
  if (threadIdx.x < kCluster * kThresholds) {
    const int j = static_cast<int>(threadIdx.x) % kThresholds;
    uint32_t n = 0;
    double w = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      n += shared_.warp_tally[i].count[j];
      w += shared_.warp_tally[i].weight[j];
    }
    Tally* const to =
        Of(static_cast<int>(threadIdx.x) / kThresholds, &shared_.cta_tally[turn_][rank_]);
    to->count[j] = n;
    to->weight[j] = w;
  }
  const int turn = turn_;
  SyncCluster();
  *count = 0;
  *weight = 0;
#pragma unroll
  for (int i = 0; i < kCluster; ++i) {
    *count += shared_.cta_tally[turn][i].count[Lane() % kThresholds];
    *weight += shared_.cta_tally[turn][i].weight[Lane() % kThresholds];
  }
}

// The lowest bound at which enough(tokens below, their weight), among the tokens below `end`. When
// even all of those are not enough, lo == hi == end.
template <class Enough>
__device__ Found Sampler::Search(uint32_t end, const Enough& enough) {
  // Distances 1/2, 1, 2, 3, 4, 6 and 9: most of what filters keep of a peaked row is there.
  constexpr uint32_t kFirst[kThresholds - 1] = {0x3f000000, 0x3f800000, 0x40000000, 0x40400000,
                                                0x40800000, 0x40c00000, 0x41100000};
  Found found = {.lo = 0, .hi = end, .count_lo = 0, .count_hi = 0, .weight_lo = 0, .weight_hi = 0};
  uint32_t thresholds[kThresholds];
#pragma unroll
  for (int j = 0; j < kThresholds; ++j) {
    thresholds[j] = j < kThresholds - 1 ? min(kFirst[j], end) : end;
  }
  for (bool first = true;; first = false) {
    uint32_t count = 0;
    double weight = 0;
    TallyBelow(thresholds, found.lo, &count, &weight);
    count += found.count_lo;
    weight += found.weight_lo;
    // That the upper end is enough is known from the second pass on.
    const bool lane_enough =
        enough(count, weight) || (!first && Lane() % kThresholds == kThresholds - 1);
    const uint32_t ballot = __ballot_sync(~0u, lane_enough) & 0xffu;
    const int j = ballot == 0 ? kThresholds - 1 : __ffs(static_cast<int>(ballot)) - 1;
    found.count_hi = __shfl_sync(~0u, count, j);
    found.weight_hi = __shfl_sync(~0u, weight, j);
    if (ballot == 0) {
      found.lo = found.hi;
      found.count_lo = found.count_hi;
      found.weight_lo = found.weight_hi;
      return found;
    }
    const uint32_t count_before = __shfl_sync(~0u, count, max(j - 1, 0));
    const double weight_before = __shfl_sync(~0u, weight, max(j - 1, 0));
    uint32_t lo = found.lo;
#pragma unroll
    for (int i = 0; i < kThresholds; ++i) {
      if (i == j) found.hi = thresholds[i];
      if (i == j - 1) lo = thresholds[i];
    }
    if (j > 0) {
      found.lo = lo;
      found.count_lo = count_before;
      found.weight_lo = weight_before;
    }
    if (found.count_hi - found.count_lo <= 1 || found.hi - found.lo <= 1) return found;
#pragma unroll
    for (int i = 0; i < kThresholds; ++i) {
      thresholds[i] = found.lo + static_cast<uint32_t>(uint64_t{found.hi - found.lo} *
                                                       static_cast<uint32_t>(i + 1) / kThresholds);
    }
  }
}

// What top_k and top_p leave; min_p has been applied to the distances.
__device__ Kept Sampler::Filter() {
  Kept kept;
  double whole = 0;
  if (row_.top_k > 0) {
    const auto wanted = static_cast<uint32_t>(row_.top_k);
    const Found found = Search(kGone, [&](uint32_t count, double) { return count >= wanted; });
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
    // Without top_k the whole is known after the first pass, which weighs all tokens: every lane
    // sees the total at the last threshold.
    double target = row_.top_k > 0 ? row_.top_p * whole : -1.0;
    const Found found = Search(kept.end, [&](uint32_t, double weight) {
      if (target < 0) target = row_.top_p * __shfl_sync(~0u, weight, kThresholds - 1);
      return weight >= target;
    });
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

// The first of `count` parts at which the running weight passes *target, or, when rounding leaves
// none, the last that has any weight. *target becomes what it is within that part.
template <class WeightAt>
__device__ __forceinline__ int PickPart(int count, const WeightAt& weight_at, double* target) {
  double sum = 0, before = 0;
  int chosen = 0;
  for (int i = 0; i < count; ++i) {
    const double weight = weight_at(i);
    if (weight <= 0) continue;
    chosen = i;
    before = sum;
    sum += weight;
    if (sum > *target) break;
  }
  *target -= before;
  return chosen;
}

// The first id at which the running weight_of(u, id) passes target(the whole).
template <class WeightOf, class Target>
__device__ int32_t Sampler::Pick(const WeightOf& weight_of, const Target& target) {
  const auto of_four = [&](const float4& v, int id) {
    return weight_of(__float_as_uint(v.x), id) + weight_of(__float_as_uint(v.y), id + 1) +
           weight_of(__float_as_uint(v.z), id + 2) + weight_of(__float_as_uint(v.w), id + 3);
  };
  double warp_weight = 0;
  ForSteps([&](const float4& v, int id, int s) {
    const float weight = WarpSum(of_four(v, id));
    warp_weight += weight;
    if (Lane() == 0) shared_.step_weight[Warp()][s] = weight;
  });
  if (Lane() == 0) shared_.warp_weight[Warp()] = warp_weight;
  __syncthreads();
  if (threadIdx.x < kCluster) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += shared_.warp_weight[i];
    *Of(static_cast<int>(threadIdx.x), &shared_.cta_weight[turn_][rank_]) = sum;
  }
  const int turn = turn_;
  SyncCluster();
  double whole = 0;
  for (int i = 0; i < kCluster; ++i) whole += shared_.cta_weight[turn][i];
  double left = target(whole);
  const int cta = PickPart(
      kCluster, [&](int i) { return shared_.cta_weight[turn][i]; }, &left);
  if (cta == rank_ && Warp() == 0) {
    const int warp = PickPart(
        kWarps, [&](int i) { return shared_.warp_weight[i]; }, &left);
    const int step = PickPart(
        args_.steps, [&](int i) { return double{shared_.step_weight[warp][i]}; }, &left);
    const int at = (warp * args_.steps + step) * kWarp + Lane();
    const float4 v = slice_[at];
    const int id = begin_ + 4 * at;
    const float own = of_four(v, id);
    const int lane = PickPart(
        kWarp, [&](int i) { return double{__shfl_sync(~0u, own, i)}; }, &left);
    if (Lane() == lane) {
      const float one[4] = {v.x, v.y, v.z, v.w};
      const int part = PickPart(
          4, [&](int i) { return double{weight_of(__float_as_uint(one[i]), id + i)}; }, &left);
      shared_.picked = id + part;
    }
    __syncwarp();
    if (Lane() < kCluster && Lane() != rank_) *Of(Lane(), &shared_.picked) = shared_.picked;
  }
  SyncCluster();
  return shared_.picked;
}

// Turns the slice's logits into distances from the maximum over the temperature, and draws.
__device__ int32_t Sampler::Draw(float top) {
  const float inverse = 1.0f / row_.temperature;
  const uint32_t cut = row_.min_p > 0.0f ? __float_as_uint(fabsf(logf(row_.min_p))) : kGone - 1;
  ForTokens([&](float& x, int) {
    const uint32_t u = __float_as_uint(fabsf((top - x) * inverse));
    x = __uint_as_float(u <= cut ? u : kGone);
  });
  Kept kept;
  if (row_.top_k > 0 || row_.top_p < 1.0f) kept = Filter();
  if (kept.tie != kNone) {
    kept.last_tie = Pick([&](uint32_t u, int) { return u == kept.tie ? 1.0f : 0.0f; },
                         [&](double) { return static_cast<double>(kept.ties) - 1.0; });
  }
  const double uniform = PhiloxUniform(row_.seed, row_.draw_index);
  return Pick([&](uint32_t u, int id) { return kept.WeightOf(u, id); },
              [&](double whole) { return uniform * whole; });
}

// ---- the row ------------------------------------------------------------------------------------

// The first CTA writes the result.
__device__ void Sampler::Finish(bool finite, int32_t token, double log_sum) {
  if (rank_ != 0) return;
  auto* const words = reinterpret_cast<uint32_t*>(&shared_.result);
  constexpr int kWords = sizeof(SampleResult) / 4;
  static_assert(sizeof(SampleResult) % 4 == 0 && kWords <= kThreads);
  if (threadIdx.x < kWords) words[threadIdx.x] = 0;
  __syncthreads();
  if (finite) {
    if (row_.top_logprobs > 0) MergeTopLogprobs(log_sum);
    if (threadIdx.x == 0) {
      shared_.result.token = token;
      shared_.result.finite = true;
      shared_.result.logprob = static_cast<float>(double{raw_[token]} - log_sum);
    }
    __syncthreads();
  }
  auto* const out = reinterpret_cast<uint32_t*>(args_.out + blockIdx.x / kCluster);
  if (threadIdx.x < kWords) out[threadIdx.x] = words[threadIdx.x];
}

__device__ void Sampler::Run() {
  float top = 0;
  int32_t id = 0;
  bool bad = false;
  Load(&top, &id, &bad);
  // Other CTAs' shared memory may be written once they run.
  cluster_.sync();
  if (row_.top_logprobs > 0) SendTopLogprobs();
  Partial all = Combine(top, id, bad, true);
  if (all.bad != 0 || all.top == -INFINITY) return Finish(false, 0, 0);
  const double log_sum = double{all.top} + log(all.sum);
  if (row_.forced_token >= 0) return Finish(true, row_.forced_token, log_sum);
  if (ChangesLogits()) {
    ChangeLogits();
    top = -INFINITY;
    id = 0;
    bad = false;
    ForTokens([&](float x, int at) {
      if (x > top) {
        top = x;
        id = at;
      }
      bad |= !(x < INFINITY);
    });
    all = Combine(top, id, bad, false);
    if (all.bad != 0 || all.top == -INFINITY) return Finish(false, 0, 0);
  }
  const bool greedy = row_.temperature == 0.0f || isinf(1.0f / row_.temperature);
  Finish(true, greedy ? all.id : Draw(all.top), log_sum);
}

__global__ void __launch_bounds__(kThreads, 2) SampleKernel(const SampleArgs args) {
  extern __shared__ float4 slice[];
  __shared__ __align__(16) unsigned char shared[sizeof(Shared)];
  WaitForPrevious();
  Sampler(args, args.rows[blockIdx.x / kCluster], reinterpret_cast<Shared*>(shared), slice).Run();
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
  static const bool allowed = [] {
    RESA_CUDA_CHECK(
        cudaFuncSetAttribute(SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(size_t{kMaxSteps} * kWarps * kStep * sizeof(float))));
    return true;
  }();
  (void)allowed;
  LaunchOverlapped(context.stream, SampleKernel, static_cast<unsigned>(params.num_rows * kCluster),
                   kThreads, shared_bytes, kCluster, args);
}

}  // namespace resa::kernels::cuda
