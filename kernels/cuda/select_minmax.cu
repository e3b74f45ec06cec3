// The paper's selector (arXiv 2506.04108): q = mean over the group's heads, f32, and
//   s_i = sum_j max(q_j kmin_ij, q_j kmax_ij) = q+ . kmax_i + q- . kmin_i      since kmin <= kmax,
// then the exact top-k of select_topk.cuh; scoring and ranking are one launch.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk][2][d] bf16, pages through the page table;
//   ids [row][KV head][keep] out.
//
// A cluster of CTAs has one (row, KV head), each CTA a contiguous range of its blocks. A warp reads
// 8 descriptors at a time, each of them one contiguous run of 512 bytes (d = 128) that lies
// anywhere: 16 bytes per lane, the lower bounds in the first half of the lanes. It asks for the
// next 8 before it sums the products of these.
//
// The keys go straight to the shared memory of the cluster's first CTA, which ranks them alone
// behind a single barrier of the cluster. Rows with more blocks than fit there are ranked by the
// whole cluster, each CTA with its own keys in shared memory or, for the longest, in global
// scratch.
//
// Bound: the bytes of the descriptors at the device's read bandwidth, plus 4 us.

#include <cooperative_groups.h>

#include <algorithm>
#include <array>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxClusterSize = 16;
constexpr int kLoads = 8;                  // Of 16 bytes that a lane has in flight.
constexpr int kElementsPerLane = 8;        // 16 bytes.
constexpr int kMaxSharedKeys = 24 * 1024;  // 96 KB, so that two CTAs share a multiprocessor.

struct MinMaxArgs {
  const uint16_t* q;
  const SparseRow* rows;
  PageTables tables;
  const std::byte* descriptors;
  int32_t* ids;
  uint32_t* key_scratch;  // [row][KV head][stride], for what does not fit shared memory; or null.
  int num_kv_heads;
  int group;
  int shared_keys;  // Capacity.
};

// The least and the greatest of some keys.
struct KeySpan {
  uint32_t least;
  uint32_t greatest;

  __device__ __forceinline__ void Add(uint32_t key) {
    least = min(least, key);
    greatest = max(greatest, key);
  }
};

__device__ __forceinline__ KeySpan NoKeys() { return {UINT32_MAX, 0}; }

// Over the warp.
__device__ __forceinline__ KeySpan SpanOfWarp(const KeySpan& of_lane) {
  return {__reduce_min_sync(kAllLanes, of_lane.least),
          __reduce_max_sync(kAllLanes, of_lane.greatest)};
}

// At the same place in every CTA of the cluster; keys follow.
struct MinMaxShared {
  union {
    TopKShared of_cluster;
    TopKCtaShared of_cta;
  } topk;
  alignas(16) float mean[kMaxHeadDim];
  KeySpan of_warp[kWarps];
  KeySpan of_rank[kMaxClusterSize];  // In the first CTA, written by all.
};

// How a warp's loads fall on blocks: a run of 4 d bytes takes kLanes lanes, so that a load reads
// kPerLoad blocks, and a step of kLoads loads kBlocks of them.
template <int kHeadDim>
struct Step {
  static constexpr int kLanes = kHeadDim * 4 / 16;
  static constexpr int kPerLoad = 32 / kLanes;
  static constexpr int kBlocks = kLoads * kPerLoad;
  static constexpr int kAhead = 32 / kBlocks;  // Steps whose page ids the lanes of a warp hold.
};

__device__ __forceinline__ float Dot(const float (&q)[kElementsPerLane], const uint4& words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(q[2 * i], __uint_as_float(pairs[i] << 16), sum);
    sum = fmaf(q[2 * i + 1], __uint_as_float(pairs[i] & 0xffff0000u), sum);
  }
  return sum;
}

// Sums each of the 8 values over aligned groups of kWidth lanes (16 or 32): afterwards a lane has
// the sum of value lane % kWidth / (kWidth / 8). A step halves the values along with the lanes.
template <int kWidth>
__device__ __forceinline__ float TransposedSum(float (&values)[kLoads]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = kLoads / 2, step = kWidth / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half];
      const float kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, step);
    }
  }
  float sum = values[0];
#pragma unroll
  for (int step = kWidth / kLoads / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  return sum;
}

// Reads the descriptors of a range of blocks, a warp every kWarps-th step of it.
template <int kHeadDim>
class Reader {
 public:
  using S = Step<kHeadDim>;

  __device__ __forceinline__ Reader(const MinMaxArgs& args, const SparseRow& row, int kv_head,
                                    const TopKRange& range)
      : pages_(args.tables.pages + row.table * args.tables.stride + range.first),
        vectors_(reinterpret_cast<const uint4*>(args.descriptors) + kv_head * S::kLanes +
                 threadIdx.x % S::kLanes),
        page_vectors_(static_cast<uint32_t>(args.num_kv_heads * S::kLanes)),
        count_(range.count) {}

  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ int Steps() const { return (count_ + S::kBlocks - 1) / S::kBlocks; }
  // Whether the warp has anything to read.
  __device__ __forceinline__ bool HasStep() const {
    return static_cast<int>(threadIdx.x) / 32 * S::kBlocks < count_;
  }
  // The page ids of `step` and of the warp's kAhead - 1 steps after it, a lane each. Past the end
  // the last page is read again.
  __device__ __forceinline__ int LoadPages(int step) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int block = (step + lane / S::kBlocks * kWarps) * S::kBlocks + lane % S::kBlocks;
    return pages_[min(block, count_ - 1)];
  }
  // `at`: which of the steps whose pages are given.
  __device__ __forceinline__ void Load(int pages, int at, uint4 (&words)[kLoads]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int source = at * S::kBlocks + i * S::kPerLoad + lane / S::kLanes;
      const auto page = static_cast<uint32_t>(__shfl_sync(kAllLanes, pages, source));
      words[i] = __ldcs(vectors_ + static_cast<uint64_t>(page) * page_vectors_);
    }
  }

 private:
  const int32_t* pages_;
  const uint4* vectors_;
  uint32_t page_vectors_;
  int count_;
};

// The unit's mean query and the descriptors of the warp's first step, all asked for before either
// is waited for. `pages` are of the warp's first steps; the mean is there after a barrier.
template <int kHeadDim>
__device__ __forceinline__ void LoadFirst(const Reader<kHeadDim>& reader, int pages,
                                          const uint16_t* q, int group, float* mean,
                                          uint4 (&words)[kLoads]) {
  const auto j = static_cast<int>(threadIdx.x);
  if (j < kHeadDim) {
    float values[kMaxGroup];
#pragma unroll
    for (int g = 0; g < kMaxGroup; ++g) {
      values[g] = g < group ? __uint_as_float(uint32_t{q[g * kHeadDim + j]} << 16) : 0.0f;
    }
    if (reader.HasStep()) reader.Load(pages, 0, words);
    float sum = 0;
#pragma unroll
    for (int g = 0; g < kMaxGroup; ++g) sum += values[g];
    mean[j] = sum * (1.0f / static_cast<float>(group));
  } else if (reader.HasStep()) {
    reader.Load(pages, 0, words);
  }
}

// Scores the reader's blocks, forced ones like any other, and stores their keys; the span is of
// those that the lane has stored. `pages` are of the warp's first steps, words those of the first.
template <int kHeadDim>
__device__ __forceinline__ KeySpan ScoreRange(const Reader<kHeadDim>& reader, int pages,
                                              uint4 (&words)[kLoads], const float* mean,
                                              uint32_t* keys) {
  using S = Step<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The lane's part of the query: of q- in lanes that read lower bounds, of q+ in the others.
  float q[kElementsPerLane];
  const bool lower = lane % S::kLanes < S::kLanes / 2;
#pragma unroll
  for (int i = 0; i < kElementsPerLane; ++i) {
    const float x = mean[lane % (S::kLanes / 2) * kElementsPerLane + i];
    q[i] = lower ? fminf(x, 0.0f) : fmaxf(x, 0.0f);
  }
  // After TransposedSum: which block of the step the lane's sum is of, if it is the first lane that
  // has it.
  constexpr int kLanesPerSum = S::kLanes / kLoads;
  const int of_step = lane % S::kLanes / kLanesPerSum * S::kPerLoad + lane / S::kLanes;
  const bool stores = lane % kLanesPerSum == 0;

  KeySpan span = NoKeys();
  const int steps = reader.Steps();
  int step = static_cast<int>(threadIdx.x) / 32;
  if (step >= steps) return span;
  int pages_ahead = reader.LoadPages(step + S::kAhead * kWarps);
  for (int at = 0;;) {
    float sums[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sums[i] = Dot(q, words[i]);
    const uint32_t key = TopKKey(TransposedSum<S::kLanes>(sums));
    const int block = step * S::kBlocks + of_step;
    step += kWarps;
    if (++at == S::kAhead) {
      at = 0;
      pages = pages_ahead;
      pages_ahead = reader.LoadPages(step + S::kAhead * kWarps);
    }
    if (step < steps) reader.Load(pages, at, words);
    if (stores && block < reader.count()) {
      span.Add(key);
      keys[block] = key;
    }
    if (step >= steps) return span;
  }
}

// Copies the CTA's keys to where the first CTA of the cluster ranks them, `of_first` for those of
// all blocks, with the forced ones made so.
__device__ __forceinline__ void SendKeys(const uint32_t* keys, const TopKRange& range,
                                         const TopKBudget& budget, uint32_t* of_first) {
  for (int i = static_cast<int>(threadIdx.x) * 4; i < range.count; i += kThreads * 4) {
    uint4 four = *reinterpret_cast<const uint4*>(keys + i);
    const int id = range.first + i;
    if (budget.Forces(id)) four.x = kTopKForcedKey;
    if (budget.Forces(id + 1)) four.y = kTopKForcedKey;
    if (budget.Forces(id + 2)) four.z = kTopKForcedKey;
    if (budget.Forces(id + 3)) four.w = kTopKForcedKey;
    *reinterpret_cast<uint4*>(of_first + id) = four;
  }
}

// Not inlined: the registers of its many loads are then not those of the scoring loop.
__device__ __noinline__ void RankInCluster(TopKShared& shared, const uint32_t* keys,
                                           TopKRange range, TopKBudget budget, int32_t* ids) {
  const auto key_at = [keys](int i) { return keys[i]; };
  const TopKCut cut = FindTopKCut<kThreads, true>(shared, key_at, range, budget);
  WriteTopKIds<kThreads>(shared, key_at, range, budget, cut, ids + cut.Offset());
  FinishTopK<true>();
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) SelectMinMaxKernel(const MinMaxArgs args) {
  __shared__ MinMaxShared shared;
  extern __shared__ __align__(16) uint32_t shared_keys[];
  const auto cluster = cg::this_cluster();
  const int size = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int unit = static_cast<int>(blockIdx.x) / size;
  const int kv_head = unit % args.num_kv_heads;
  const auto thread = static_cast<int>(threadIdx.x);
  // No kernel writes the list of rows and the page tables, so they may be read while the kernel
  // before this one still runs.
  const SparseRow row = args.rows[unit / args.num_kv_heads];
  const TopKBudget budget = TopKBudgetOf(row, kPageTokens);
  int32_t* const ids = args.ids + row.ids_begin + static_cast<int64_t>(kv_head) * row.keep_blocks;
  if (!budget.ScoresDecide()) {
    WaitForPrevious();
    for (int i = rank * kThreads + thread; i < budget.keep; i += size * kThreads) {
      ids[i] = budget.UnscoredId(i);
    }
    return;
  }
  cluster.barrier_arrive();
  constexpr int kStepBlocks = Step<kHeadDim>::kBlocks;
  const int per_cta =
      ((budget.blocks + kStepBlocks - 1) / kStepBlocks + size - 1) / size * kStepBlocks;
  TopKRange range;
  range.first = min(budget.blocks, rank * per_cta);
  range.count = min(budget.blocks - range.first, per_cta);
  const bool ranked_by_one = budget.blocks <= args.shared_keys;
  uint32_t* keys = shared_keys;
  if (ranked_by_one) {
    keys += range.first;
  } else if (per_cta > args.shared_keys) {
    keys = args.key_scratch + unit * args.tables.stride + range.first;
  }
  const Reader<kHeadDim> reader(args, row, kv_head, range);
  const int pages = reader.LoadPages(thread / 32);
  ClearTopK<kThreads>(shared.topk.of_cta);
  WaitForPrevious();

  const int64_t head = (static_cast<int64_t>(row.row) * args.num_kv_heads + kv_head) * args.group;
  uint4 words[kLoads];
  LoadFirst(reader, pages, args.q + head * kHeadDim, args.group, shared.mean, words);
  __syncthreads();
  KeySpan span = SpanOfWarp(ScoreRange(reader, pages, words, shared.mean, keys));
  if (thread % 32 == 0) shared.of_warp[thread / 32] = span;
  LetNextStart();
  cluster.barrier_wait();  // All CTAs have started: their shared memory may be written.
  if (!ranked_by_one) {
    RankInCluster(shared.topk.of_cluster, keys, range, budget, ids);
    return;
  }
  __syncthreads();
  SendKeys(keys, range, budget, cluster.map_shared_rank(shared_keys, 0));
  if (thread < 32) {
    span = SpanOfWarp(thread < kWarps ? shared.of_warp[thread] : NoKeys());
    if (thread == 0) *cluster.map_shared_rank(&shared.of_rank[rank], 0) = span;
  }
  cluster.sync();
  if (rank != 0) return;
  span = SpanOfWarp(thread % 32 < size ? shared.of_rank[thread % 32] : NoKeys());
  SelectTopKInCta<kThreads>(shared.topk.of_cta, shared_keys, budget, span.least, span.greatest,
                            ids);
}

// The most CTAs to a cluster with which all units run at once.
template <int kHeadDim>
int ClusterSize(int64_t units) {
  static const std::array<int, 5> active = [] {  // By log2 of the size.
    const auto kernel = SelectMinMaxKernel<kHeadDim>;
    constexpr size_t kBytes = kMaxSharedKeys * sizeof(uint32_t);
    RESA_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    RESA_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    std::array<int, 5> clusters = {};
    for (size_t i = 0; i < clusters.size(); ++i) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = 1u << i;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(1u << i);
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = kBytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      RESA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters[i], kernel, &config));
    }
    return clusters;
  }();
  for (size_t i = active.size() - 1; i > 0; --i) {
    if (units <= active[i]) return 1 << i;
  }
  return 1;
}

template <int kHeadDim>
void Launch(Context& context, MinMaxArgs args, int64_t num_rows) {
  const int64_t units = num_rows * args.num_kv_heads;
  const int size = ClusterSize<kHeadDim>(units);
  const int64_t most_blocks = (args.tables.stride + 15) / 16 * 16;
  args.shared_keys = static_cast<int>(std::min<int64_t>(most_blocks, kMaxSharedKeys));
  if (most_blocks > int64_t{kMaxSharedKeys} * size) {
    const size_t bytes = static_cast<size_t>(units * args.tables.stride) * sizeof(uint32_t);
    args.key_scratch = reinterpret_cast<uint32_t*>(context.select.Reserve(bytes));
  }
  LaunchOverlapped(context.stream, SelectMinMaxKernel<kHeadDim>,
                   dim3(static_cast<unsigned>(units * size)), dim3(kThreads),
                   static_cast<size_t>(args.shared_keys) * sizeof(uint32_t), size, args);
}

}  // namespace

void SelectMinMax(Context& context, const SelectParams& params) {
  if (params.num_rows == 0) return;
  MinMaxArgs args = {};
  args.q = reinterpret_cast<const uint16_t*>(params.q.b16());
  args.rows = params.rows;
  args.tables = params.tables;
  args.descriptors = params.kv.descriptors;
  args.ids = params.ids;
  args.num_kv_heads = params.layout.num_kv_heads;
  args.group = params.num_heads / params.layout.num_kv_heads;
  switch (params.layout.head_dim) {
    case 64:
      return Launch<64>(context, args, params.num_rows);
    case 128:
      return Launch<128>(context, args, params.num_rows);
    default:
      RESA_CHECK(false) << "SelectMinMax: head size " << params.layout.head_dim;
  }
}

}  // namespace resa::kernels::cuda
