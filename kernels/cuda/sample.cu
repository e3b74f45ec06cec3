// Sampling: one cluster of CTAs per row, which holds the whole row in its shared memory.
//
//   logits [R, V] f32 -> SampleResult[R]; the order of the steps is that of SampleRow in params.h
//
// A thread reads its part of the row (sample_row.cuh) from global memory once and meets the same
// elements in every later pass:
// - load: maximum with its lowest id, whether all is finite, and the sum of exponentials;
// - bias and penalties, where there are any, and the new maximum;
// - filters: logits become distances from the maximum (u below), and the bounds of top_k and top_p
//   are searched for (sample_search.cuh). What is kept is all below a bound, and of tokens that tie
//   at it those with the lowest ids;
// - draw: the first id at which the running weight passes u times the whole, found by sums of
//   slices, runs, steps, lanes.
// Greedy rows end after the load.
//
// Bound: 4 V bytes per row, once, which for few rows is far less than the barriers' latency.
// Measured at V = 151936, rows not in the L2, 1 / 32 rows: greedy 6.3 / 12.3 us, temperature alone
// 11 / 19, top_p 20 / 34, top_k and top_p 30 / 49, 20 logprobs 20 / 39 (peaked logits; where they
// are flat, filters and logprobs take 1.4 to 2.3 times as long). 32 rows of greedy are 1.6 TB/s, 35
// % of the reads' ceiling.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sample_row.cuh"
#include "kernels/cuda/sample_search.cuh"
#include "kernels/philox.h"

namespace resa::kernels::cuda {
namespace {

using namespace sampling;  // NOLINT: the other half of this file.

constexpr int kBatch = 5;  // Steps that a thread holds in registers.
// The distance of a token without weight, 88: exp(-88) is less than the smallest normal float.
constexpr uint32_t kGone = 0x42b00000;

struct SampleArgs {
  const float* logits;  // [R, V]
  int32_t vocabulary;
  int steps;     // Per warp.
  bool aligned;  // Rows may be read 16 bytes at a time.
  const SampleRow* rows;
  SampleResult* out;
};

struct Shared {
  SampleRow row;
  Partial warp_partial[kWarps];
  Partial cta_partial[2][kCluster];
  SearchShared search;
  PickShared pick;
  uint32_t num_top;  // The first CTA's, like all below: the top logits, in any order.
  uint64_t top[kMaxTopLogprobs];
  SampleResult result;
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
  __device__ Sampler(const SampleArgs& args, Shared* shared, float4* values)
      : args_(args), row_(shared->row), shared_(*shared), slice_(values, args.steps) {}

  __device__ void Run();

 private:
  __device__ __forceinline__ void CopyStep(const float* raw, int at);
  __device__ Partial Load(const float* raw);
  __device__ Partial Combine(const Partial& own, bool with_sum);
  __device__ void GatherTop(float top);
  __device__ void ReportTop(double log_sum);
  __device__ bool ChangesLogits() const;
  __device__ void ChangeLogits();
  __device__ Kept Filter();
  __device__ int32_t Draw(float top);
  __device__ void Finish(bool finite, int32_t token, const Partial& raw);
  template <class By, class Enough>
  __device__ __forceinline__ Found Find(const By& by, uint32_t end, const Enough& enough) {
    return Search(slice_, shared_.search).Run(by, end, enough);
  }
  // The first id at which the running weight_of(value, id) passes target(the whole).
  template <class WeightOf, class Target>
  __device__ __forceinline__ int32_t PickToken(const WeightOf& weight_of, const Target& target) {
    return Pick(slice_, shared_.pick, weight_of, target);
  }

  const SampleArgs& args_;
  const SampleRow& row_;
  Shared& shared_;
  RowSlice slice_;
};

// ---- load ---------------------------------------------------------------------------------------

// Brings four logits into shared memory, -infinity past the vocabulary.
__device__ __forceinline__ void Sampler::CopyStep(const float* raw, int at) {
  const int id = slice_.begin() + 4 * at;
  if (args_.aligned && id + 4 <= args_.vocabulary) {
    CopyAsync16(SharedAddress(slice_.values() + at), raw + id);
    return;
  }
  const auto one = [&](int i) { return i < args_.vocabulary ? raw[i] : -INFINITY; };
  slice_.values()[at] = make_float4(one(id), one(id + 1), one(id + 2), one(id + 3));
}

// Until all but the `behind` latest groups of the thread's copies are there.
__device__ __forceinline__ void WaitForCopies(int behind) {
  static_assert((kMaxSteps + kBatch - 1) / kBatch <= 5);
  switch (behind) {
    case 0:
      CopyAsyncWait<0>();
      break;
    case 1:
      CopyAsyncWait<1>();
      break;
    case 2:
      CopyAsyncWait<2>();
      break;
    case 3:
      CopyAsyncWait<3>();
      break;
    default:
      CopyAsyncWait<4>();
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
    CopyAsyncCommit();
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
      v[i] = slice_.values()[at];
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
    const float4 v = slice_.values()[top_at];
    own.id = slice_.begin() + 4 * top_at +
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
    if (Lane() < kCluster)
      *slice_.Of(Lane(), &shared_.cta_partial[slice_.turn()][slice_.rank()]) = part;
  }
  const int turn = slice_.turn();
  slice_.SyncCluster();
  return MergeLanes(Lane() < kCluster ? shared_.cta_partial[turn][Lane()] : kEmpty,
                    with_sum && slice_.rank() == 0);
}

// ---- bias and penalties -------------------------------------------------------------------------

__device__ bool Sampler::ChangesLogits() const {
  return row_.num_bias > 0 ||
         (row_.num_counts > 0 && (row_.repetition_penalty != 1.0f ||
                                  row_.presence_penalty != 0.0f || row_.frequency_penalty != 0.0f));
}

__device__ void Sampler::ChangeLogits() {
  float* const x = reinterpret_cast<float*>(slice_.values());
  const int end = min(slice_.end(), args_.vocabulary);
  const auto mine = [&](int32_t id) { return id >= slice_.begin() && id < end; };
  __syncthreads();
  // The thread of an id's first entry adds all of its entries in their order.
  for (int64_t i = threadIdx.x; i < row_.num_bias; i += kThreads) {
    const int32_t id = row_.bias[i].id;
    if (!mine(id)) continue;
    bool first = true;
    for (int64_t j = 0; j < i && first; ++j) first = row_.bias[j].id != id;
    if (!first) continue;
    float value = x[id - slice_.begin()];
    for (int64_t j = i; j < row_.num_bias; ++j) {
      if (row_.bias[j].id == id) value += row_.bias[j].bias;
    }
    x[id - slice_.begin()] = value;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < row_.num_counts; i += kThreads) {
    const TokenCount count = row_.counts[i];
    if (!mine(count.id)) continue;
    float value = x[count.id - slice_.begin()];
    if (count.in_prompt || count.output_count > 0) {
      value = value > 0 ? value / row_.repetition_penalty : value * row_.repetition_penalty;
    }
    if (count.output_count > 0) {
      value -= __fadd_rn(row_.presence_penalty,
                         __fmul_rn(row_.frequency_penalty, static_cast<float>(count.output_count)));
    }
    x[count.id - slice_.begin()] = value;
  }
  __syncthreads();
}

// ---- filters ------------------------------------------------------------------------------------
// What top_k and top_p leave; min_p has been applied to the distances.
__device__ Kept Sampler::Filter() {
  Kept kept;
  double whole = 0;
  if (row_.top_k > 0) {
    const auto wanted = static_cast<uint32_t>(row_.top_k);
    const Found found =
        Find(ByDistance(), kGone, [&](uint32_t count, double, double) { return count >= wanted; });
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
    const Found found = Find(ByDistance(), kept.end, [&](uint32_t, double weight, double all) {
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
    return PickToken([&](float x, int) { return Weight(distance(x)); }, target);
  }
  slice_.ForTokens([&](float& x, int) { x = __uint_as_float(distance(x)); });
  Kept kept = Filter();
  if (kept.tie < kept.end) {
    kept.last_tie =
        PickToken([&](float x, int) { return __float_as_uint(x) == kept.tie ? 1.0f : 0.0f; },
                  [&](double) { return static_cast<double>(kept.ties) - 1.0; });
  }
  return PickToken([&](float x, int id) { return kept.WeightOf(__float_as_uint(x), id); }, target);
}

// ---- top logprobs -------------------------------------------------------------------------------

// Sends the row's highest raw logits to the first CTA, before bias and penalties change them.
__device__ void Sampler::GatherTop(float top) {
  const ByLogit by = {top};
  const auto wanted = static_cast<uint32_t>(row_.top_logprobs);
  const auto enough = [&](uint32_t count, double, double) { return count >= wanted; };
  Found found = Find(by, by.At(24.0f), enough);  // A search among few tokens is fast.
  if (found.count_hi < wanted) found = Find(by, ByLogit::kEnd, enough);
  const uint32_t tied = found.count_hi - found.count_lo;
  const uint32_t ties = wanted - found.count_lo;
  int32_t last_tie = 0x7fffffff;
  if (tied > 1 && ties < tied) {
    last_tie = PickToken([&](float x, int) { return by.Key(x) == found.lo ? 1.0f : 0.0f; },
                         [&](double) { return static_cast<double>(ties) - 1.0; });
  }
  slice_.ForTokens([&](float x, int id) {
    const uint32_t key = by.Key(x);
    if (key >= found.hi || (key == found.lo && id > last_tie)) return;
    const uint32_t place = atomicAdd(slice_.Of(0, &shared_.num_top), 1u);
    *slice_.Of(0, &shared_.top[place]) = uint64_t{~key} << 32 | ~static_cast<uint32_t>(id);
  });
  slice_.SyncCluster();
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
  if (slice_.rank() != 0) return;
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
    shared_.search.num_listed = 0;
    shared_.num_top = 0;
  }
  auto started = slice_.Arrive();
  const Partial own = Load(args_.logits + int64_t{row->row} * args_.vocabulary);
  // Other CTAs' shared memory may be written once they run.
  slice_.Wait(std::move(started));
  const Partial raw = Combine(own, true);
  if (raw.bad != 0 || raw.top == -INFINITY) return Finish(false, 0, raw);
  if (row_.top_logprobs > 0) GatherTop(raw.top);
  if (row_.forced_token >= 0) return Finish(true, row_.forced_token, raw);
  Partial peak = raw;
  if (ChangesLogits()) {
    ChangeLogits();
    Partial changed = {.sum = 0, .top = -INFINITY, .id = 0x7fffffff, .bad = 0};
    slice_.ForTokens([&](float x, int id) {
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