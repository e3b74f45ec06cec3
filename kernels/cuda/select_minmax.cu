// The paper's selector (arXiv 2506.04108): q = mean over the group's heads, f32, and
//   s_i = sum_j max(q_j kmin_ij, q_j kmax_ij) = q+ . kmax_i + q- . kmin_i      since kmin <= kmax,
// then the exact top-k of select_topk.cuh; scoring and ranking are one launch.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk][2][d] bf16, pages through the page table;
//   ids [row][KV head][keep] out.
//
// A cluster of CTAs has one (row, KV head), each CTA a contiguous range of its blocks. A warp reads
// 8 descriptors at a time, each of them one contiguous run of 512 bytes (d = 128) that lies
// anywhere: 16 bytes per lane, the lower bounds in the first half of the lanes. The keys stay in
// shared memory, or in global scratch when the longest row that the page tables can hold would not
// fit. Bound: the bytes of the descriptors at the device's read bandwidth, plus 4 us.

#include <cooperative_groups.h>

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;            // Descriptors (pairs of them at d = 64) a warp has in flight.
constexpr int kElementsPerLane = 8;  // 16 bytes.
constexpr size_t kMaxKeyBytes = 96 * 1024;  // So that two CTAs share a multiprocessor.

struct MinMaxArgs {
  const uint16_t* q;
  const SparseRow* rows;
  PageTables tables;
  const std::byte* descriptors;
  int32_t* ids;
  uint32_t* key_scratch;  // [row][KV head][stride], or null: keys are in shared memory.
  int num_kv_heads;
  int group;
};

template <int kHeadDim>
constexpr int kRunLanes = kHeadDim * 4 / 16;

// The lane's part of the mean query: of q- in lanes that read lower bounds, of q+ in the others.
template <int kHeadDim>
__device__ void LoadSignedMean(const uint16_t* q, int group, float (&part)[kElementsPerLane]) {
  constexpr int kHalf = kRunLanes<kHeadDim> / 2;
  const int lane = static_cast<int>(threadIdx.x) % kRunLanes<kHeadDim>;
  const int begin = lane % kHalf * kElementsPerLane;
  for (float& x : part) x = 0;
  for (int g = 0; g < group; ++g) {
    const uint4 words = *reinterpret_cast<const uint4*>(q + g * kHeadDim + begin);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part[2 * i] += __uint_as_float(pairs[i] << 16);
      part[2 * i + 1] += __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
  const float share = 1.0f / static_cast<float>(group);
  for (float& x : part) x = lane < kHalf ? fminf(x * share, 0.0f) : fmaxf(x * share, 0.0f);
}

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

// The keys of up to 32 blocks: pages[0 .. count) are theirs. A warp's work.
template <int kHeadDim>
__device__ __forceinline__ void ScoreBlocks(const std::byte* descriptors, int num_kv_heads,
                                            int kv_head, const int32_t* pages, int count,
                                            const float (&q)[kElementsPerLane], uint32_t* keys) {
  constexpr int kLanes = kRunLanes<kHeadDim>;
  constexpr int kPerLoad = 32 / kLanes;
  constexpr int kPerStep = kLoads * kPerLoad;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t page = pages[min(lane, count - 1)];
  const int64_t run = (page * num_kv_heads + kv_head) * kLanes;
  const auto* const vectors = reinterpret_cast<const uint4*>(descriptors) + lane % kLanes;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kPerStep) {
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int block = begin + i * kPerLoad + lane / kLanes;
      words[i] = __ldcs(vectors + __shfl_sync(kAllLanes, run, block));
    }
    float sums[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sums[i] = Dot(q, words[i]);
    const float score = TransposedSum<kLanes>(sums);
    const int block = begin + lane % kLanes / (kLanes / kLoads) * kPerLoad + lane / kLanes;
    if (lane % (kLanes / kLoads) == 0 && block < count) keys[block] = TopKKey(score);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) SelectMinMaxKernel(const MinMaxArgs args) {
  __shared__ TopKShared shared;
  extern __shared__ uint32_t shared_keys[];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const auto cluster = cooperative_groups::this_cluster();
  const int size = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int unit = static_cast<int>(blockIdx.x) / size;
  const int kv_head = unit % args.num_kv_heads;
  const SparseRow row = args.rows[unit / args.num_kv_heads];
  const TopKBudget budget = TopKBudgetOf(row, kPageTokens);
  int32_t* const ids = args.ids + row.ids_begin + static_cast<int64_t>(kv_head) * row.keep_blocks;
  if (!budget.ScoresDecide()) {
    for (int i = rank * kThreads + static_cast<int>(threadIdx.x); i < budget.keep;
         i += size * kThreads) {
      ids[i] = budget.UnscoredId(i);
    }
    return;
  }

  const int per_cta = ((budget.blocks + 31) / 32 + size - 1) / size * 32;
  TopKRange range;
  range.first = min(budget.blocks, rank * per_cta);
  range.count = min(budget.blocks - range.first, per_cta);
  uint32_t* const keys = args.key_scratch == nullptr
                             ? shared_keys
                             : args.key_scratch + unit * args.tables.stride + range.first;
  float q[kElementsPerLane];
  const int64_t head = (static_cast<int64_t>(row.row) * args.num_kv_heads + kv_head) * args.group;
  LoadSignedMean<kHeadDim>(args.q + head * kHeadDim, args.group, q);
  const int32_t* const pages = args.tables.pages + row.table * args.tables.stride + range.first;
  for (int begin = static_cast<int>(threadIdx.x) / 32 * 32; begin < range.count;
       begin += kThreads) {
    ScoreBlocks<kHeadDim>(args.descriptors, args.num_kv_heads, kv_head, pages + begin,
                          min(32, range.count - begin), q, keys + begin);
  }

  const auto key_at = [keys](int i) { return keys[i]; };
  const TopKCut cut = FindTopKCut<kThreads, true>(shared, key_at, range, budget);
  WriteTopKIds<kThreads>(shared, key_at, range, budget, cut, ids + cut.Offset());
  FinishTopK<true>();
}

template <int kHeadDim>
void Launch(Context& context, MinMaxArgs args, int64_t num_rows) {
  const int64_t units = num_rows * args.num_kv_heads;
  int size = 16;
  while (size > 1 && units * size > context.device.sms) size /= 2;
  const int64_t groups = (args.tables.stride + 31) / 32;
  size_t key_bytes = static_cast<size_t>((groups + size - 1) / size) * 32 * sizeof(uint32_t);
  if (key_bytes > kMaxKeyBytes) {
    const size_t bytes = static_cast<size_t>(units * args.tables.stride) * sizeof(uint32_t);
    args.key_scratch = reinterpret_cast<uint32_t*>(context.select.Reserve(bytes));
    key_bytes = 0;
  }
  const auto kernel = SelectMinMaxKernel<kHeadDim>;
  static const bool configured = [&] {
    RESA_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(kMaxKeyBytes)));
    return true;
  }();
  static_cast<void>(configured);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(units * size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = key_bytes;
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  RESA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
  RESA_CUDA_CHECK(cudaGetLastError());
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
