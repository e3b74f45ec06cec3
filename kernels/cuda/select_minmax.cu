// The paper's selector (arXiv 2506.04108): q = mean over the group's heads, f32, and
//   s_i = sum_j max(q_j kmin_ij, q_j kmax_ij) = q+ . kmax_i + q- . kmin_i      since kmin <= kmax,
// then the exact top-k; scoring and ranking are one launch.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk][2][d] bf16, pages through the page table;
//   ids [row][KV head][keep] out.
//
// Two CTAs run on a multiprocessor. A unit is a (row, KV head); each unit has a CTA that ranks it
// (or shares one, when there are more units than multiprocessors), and all other CTAs score. Every
// unit gets a share of the scoring warps by its number of blocks, and each warp scores adjacent
// blocks of one unit without any other warp: rows of any lengths keep all multiprocessors busy to
// the end. A warp reads 8 descriptors at a time, each of them one contiguous run of 512 bytes
// (d = 128) that lies anywhere: 16 bytes per lane, the lower bounds in the first half of the lanes.
//
// Keys of scores go, 32 at a time, through the L2 to the CTA that ranks the unit, which counts them
// as they come (select_rank.cuh). Scoring waits for nothing, and scoring CTAs come first in the
// grid, so those that rank may wait for them.
//
// A score depends on the block alone and ranking on the scores, so who scores what changes no
// result.
//
// Bound: the bytes of the descriptors at the device's read bandwidth, plus 4 us. On an H200 a layer
// of 8 x 256K tokens, 28 / 4 heads, takes 81 us, 73 % of the bytes alone (scoring 64 us, waiting
// for the last warp 4, ranking 5, starting 7); 4 x 128K takes 27 us, 54 %; 1 x 32K 6.9 us and
// 1 x 8K 5.5 us.

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_rank.cuh"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 8;            // Of 16 bytes that a lane has in flight.
constexpr int kElementsPerLane = 8;  // 16 bytes.
// In a CTA's shared memory. The rest of the multiprocessor's 256 KB is the L1 that loads in flight
// need: with 200 KB of keys they are 5 % slower.
constexpr int64_t kMaxSharedKeys = 18 << 10;

struct MinMaxArgs {
  const uint16_t* q;
  const SparseRow* rows;
  PageTables tables;
  const std::byte* descriptors;
  int32_t* ids;
  uint32_t* keys;  // [unit][key_stride], as select_rank.cuh has them; zero between launches.
  int64_t key_stride;
  int num_rows;
  int num_kv_heads;
  int group;
  int scorers;      // CTAs. The others rank.
  int shared_keys;  // Capacity.
};

// How a warp's loads fall on blocks: a run of 4 d bytes takes kLanes lanes, so that a load reads
// kPerLoad blocks, and a step of kLoads loads kBlocks of them. A round is the steps whose page ids
// the lanes of a warp hold.
template <int kHeadDim>
struct Step {
  static constexpr int kLanes = kHeadDim * 4 / 16;
  static constexpr int kPerLoad = 32 / kLanes;
  static constexpr int kBlocks = kLoads * kPerLoad;
  static constexpr int kPerRound = 32 / kBlocks;
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

// The lane's part of the mean query: of q- in lanes that read lower bounds, of q+ in the others.
// The warp reads a head's query at once and sums; then the lanes exchange what they have.
template <int kHeadDim>
__device__ __forceinline__ void LoadSignedMean(const uint16_t* q, int group,
                                               float (&part)[kElementsPerLane]) {
  constexpr int kPairs = kHeadDim / 64;  // Of elements that a lane reads of a head.
  constexpr int kBatch = 8 / kPairs;     // Heads whose loads are on their way together.
  constexpr int kHalf = Step<kHeadDim>::kLanes / 2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto* const pairs = reinterpret_cast<const uint32_t*>(q) + lane * kPairs;
  float sums[2 * kPairs] = {};
  for (int begin = 0; begin < group; begin += kBatch) {
    uint32_t read[kBatch][kPairs];
#pragma unroll
    for (int g = 0; g < kBatch; ++g) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        read[g][i] = begin + g < group ? pairs[(begin + g) * (kHeadDim / 2) + i] : 0;
      }
    }
#pragma unroll
    for (int g = 0; g < kBatch; ++g) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        sums[2 * i] += __uint_as_float(read[g][i] << 16);
        sums[2 * i + 1] += __uint_as_float(read[g][i] & 0xffff0000u);
      }
    }
  }
  const float share = 1.0f / static_cast<float>(group);
  const bool lower = lane % Step<kHeadDim>::kLanes < kHalf;
#pragma unroll
  for (int i = 0; i < kElementsPerLane; ++i) {
    const int source = lane % kHalf * (kElementsPerLane / (2 * kPairs)) + i / (2 * kPairs);
    const float x = __shfl_sync(kAllLanes, sums[i % (2 * kPairs)], source) * share;
    part[i] = lower ? fminf(x, 0.0f) : fmaxf(x, 0.0f);
  }
}

// ---- who scores what ---------------------------------------------------------------------------

// How many warps score each unit; they stand in the order (row, KV head).
struct WorkList {
  const int32_t* row_begin;  // [num_rows + 1] Warps of the rows before; in shared memory.
  int num_rows;
  int num_kv_heads;

  __device__ __forceinline__ int total() const { return row_begin[num_rows]; }
  // Of each of the row's units; 0 when scores decide nothing.
  __device__ __forceinline__ int UnitWarps(int row) const {
    return (row_begin[row + 1] - row_begin[row]) / num_kv_heads;
  }
  __device__ __forceinline__ int RowOf(int warp) const {
    int low = 0, high = num_rows;  // row_begin[low] <= warp < row_begin[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (row_begin[middle] <= warp ? low : high) = middle;
    }
    return low;
  }
};

// Fills row_begin. A unit gets its share of all warps, but at least one, and at most one per step.
// A warp's work; a barrier must follow.
template <int kStepBlocks>
__device__ __forceinline__ void MakeWorkList(const MinMaxArgs& args, int32_t* row_begin) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto unit_steps = [&](int row) {
    if (row >= args.num_rows) return 0;
    const TopKBudget budget = TopKBudgetOf(args.rows[row], kPageTokens);
    return budget.ScoresDecide() ? (budget.blocks + kStepBlocks - 1) / kStepBlocks : 0;
  };
  int steps = 0;
#pragma unroll 1
  for (int base = 0; base < args.num_rows; base += 32) steps += unit_steps(base + lane);
  const int total = __reduce_add_sync(kAllLanes, steps) * args.num_kv_heads;
  const float share = static_cast<float>(args.scorers * kWarps) / static_cast<float>(max(total, 1));
  int before = 0;
  if (lane == 0) row_begin[0] = 0;
#pragma unroll 1
  for (int base = 0; base < args.num_rows; base += 32) {
    steps = unit_steps(base + lane);
    const int warps = min(steps, max(1, static_cast<int>(static_cast<float>(steps) * share)));
    int inclusive = warps * args.num_kv_heads;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    if (base + lane < args.num_rows) row_begin[base + lane + 1] = before + inclusive;
    before += __shfl_sync(kAllLanes, inclusive, 31);
  }
}

// ---- scoring ------------------------------------------------------------------------------------

// Where a warp's descriptors are.
template <int kHeadDim>
struct Source {
  const int32_t* pages;  // Of the sequence.
  const uint4* vectors;  // The lane's part of the KV head's run in page 0.
  uint32_t page_vectors;
  int last_block;  // Of the warp's part.

  // The pages of the 32 blocks from `block` on, a lane each. Past the end the last is read again.
  __device__ __forceinline__ uint32_t LoadPages(int block) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return static_cast<uint32_t>(pages[min(block + lane, last_block)]);
  }
  // Step `at` of a round whose pages are given.
  __device__ __forceinline__ void Load(uint32_t of_round, int at, uint4 (&words)[kLoads]) const {
    using S = Step<kHeadDim>;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t page =
          __shfl_sync(kAllLanes, of_round, at * S::kBlocks + i * S::kPerLoad + lane / S::kLanes);
      words[i] = __ldcs(vectors + static_cast<uint64_t>(page) * page_vectors);
    }
  }
};

// Scores the blocks from `begin` to the source's last one, forced ones like any other, and puts
// their keys to keys[block]. A warp's work; `of_round` are the pages of the first round.
template <int kHeadDim>
__device__ __forceinline__ void ScoreBlocks(const Source<kHeadDim>& source, int begin,
                                            uint32_t of_round, const uint16_t* query, int group,
                                            uint32_t* keys) {
  using S = Step<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint4 words[kLoads];
  source.Load(of_round, 0, words);
  float q[kElementsPerLane];
  LoadSignedMean<kHeadDim>(query, group, q);
  // Of the step whose keys the lane takes, which lane has its key after TransposedSum.
  const int of_step = lane % S::kBlocks;
  const int has_key =
      of_step % S::kPerLoad * S::kLanes + of_step / S::kPerLoad * (S::kLanes / kLoads);
  uint32_t of_next = source.LoadPages(begin + 32);
  uint32_t key = 0;  // Of block lane of the round.
  int at = 0;
#pragma unroll 1
  for (int block = begin; block <= source.last_block;) {
    float sums[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sums[i] = Dot(q, words[i]);
    const uint32_t of_sum = TopKKey(TransposedSum<S::kLanes>(sums));
    const uint32_t moved = __shfl_sync(kAllLanes, of_sum, has_key);
    if (lane / S::kBlocks == at) key = moved;
    const int round = block - at * S::kBlocks;
    block += S::kBlocks;
    if (++at == S::kPerRound) {
      at = 0;
      of_round = of_next;
      of_next = source.LoadPages(block + 32);
    }
    const bool more = block <= source.last_block;
    if (more) source.Load(of_round, at, words);
    if ((at == 0 || !more) && round + lane < block && round + lane <= source.last_block) {
      PutKey(keys + round + lane, key);
    }
  }
}

// A warp's part in scoring a unit: `at` among the warps of the work list.
template <int kHeadDim>
__device__ __forceinline__ void ScorePart(const MinMaxArgs& args, const WorkList& work, int at) {
  using S = Step<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row_at = work.RowOf(at);
  const int warps = work.UnitWarps(row_at);
  const int in_row = at - work.row_begin[row_at];
  const int kv_head = in_row / warps;
  const int in_unit = in_row - kv_head * warps;
  const int unit = row_at * args.num_kv_heads + kv_head;
  const SparseRow& row = args.rows[row_at];
  const int blocks = (row.position + kPageTokens) / kPageTokens;
  const int steps = (blocks + S::kBlocks - 1) / S::kBlocks;
  const int begin = steps * in_unit / warps * S::kBlocks;
  const int end = min(blocks, steps * (in_unit + 1) / warps * S::kBlocks);
  const Source<kHeadDim> source = {
      args.tables.pages + row.table * args.tables.stride,
      reinterpret_cast<const uint4*>(args.descriptors) + kv_head * S::kLanes + lane % S::kLanes,
      static_cast<uint32_t>(args.num_kv_heads * S::kLanes), end - 1};
  const uint32_t of_round = source.LoadPages(begin);
  const int64_t head = (static_cast<int64_t>(row.row) * args.num_kv_heads + kv_head) * args.group;
  // No kernel writes the list of rows and the page tables, so what is above may be read while the
  // kernel before this one still runs.
  WaitForPrevious();
  ScoreBlocks(source, begin, of_round, args.q + head * kHeadDim, args.group,
              args.keys + unit * args.key_stride);
}

template <int kHeadDim>
__device__ __forceinline__ void Score(const MinMaxArgs& args, int32_t* row_begin) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == 0) MakeWorkList<Step<kHeadDim>::kBlocks>(args, row_begin);
  __syncthreads();
  const WorkList work = {row_begin, args.num_rows, args.num_kv_heads};
  const int total = work.total();
  // Few are spread over all CTAs.
  for (int at = warp * args.scorers + static_cast<int>(blockIdx.x); at < total;
       at += kWarps * args.scorers) {
    ScorePart<kHeadDim>(args, work, at);
  }
  LetNextStart();
}

// ---- ranking ------------------------------------------------------------------------------------

__device__ __forceinline__ void Rank(const MinMaxArgs& args, RankShared& shared,
                                     uint32_t* shared_keys) {
  LetNextStart();
  ClearTopK<kThreads>(shared.topk);
  __syncthreads();
  const int units = args.num_rows * args.num_kv_heads;
  const int rankers = static_cast<int>(gridDim.x) - args.scorers;
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x) - args.scorers; unit < units; unit += rankers) {
    const SparseRow row = args.rows[unit / args.num_kv_heads];
    const TopKBudget budget = TopKBudgetOf(row, kPageTokens);
    int32_t* const ids =
        args.ids + row.ids_begin + static_cast<int64_t>(unit % args.num_kv_heads) * row.keep_blocks;
    WaitForPrevious();
    if (budget.ScoresDecide()) {
      RankUnit<kThreads>(shared, args.keys + unit * args.key_stride, budget, shared_keys,
                         args.shared_keys, ids);
    } else {
      for (auto i = static_cast<int>(threadIdx.x); i < budget.keep; i += kThreads) {
        ids[i] = budget.UnscoredId(i);
      }
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) SelectMinMaxKernel(const MinMaxArgs args) {
  __shared__ RankShared shared;
  extern __shared__ __align__(16) uint32_t dynamic[];
  if (static_cast<int>(blockIdx.x) < args.scorers) {
    Score<kHeadDim>(args, reinterpret_cast<int32_t*>(dynamic));
  } else {
    Rank(args, shared, dynamic);
  }
}

template <int kHeadDim>
void Launch(Context& context, MinMaxArgs args) {
  const auto kernel = SelectMinMaxKernel<kHeadDim>;
  constexpr int64_t kKeyBytes = sizeof(uint32_t);
  constexpr int64_t kMaxBytes = kMaxSharedKeys * kKeyBytes;
  static const bool configured = [&] {
    RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(kMaxBytes)));
    return true;
  }();
  static_cast<void>(configured);
  const int64_t units = int64_t{args.num_rows} * args.num_kv_heads;
  args.key_stride = (args.tables.stride + kRowKeys - 1) / kRowKeys * kRowKeys;
  args.shared_keys = static_cast<int>(std::min(args.key_stride, kMaxSharedKeys));
  const int64_t row_bytes = (int64_t{args.num_rows} + 1) * static_cast<int64_t>(sizeof(int32_t));
  RESA_CHECK(row_bytes <= kMaxBytes) << "SelectMinMax: " << args.num_rows << " rows";
  const int64_t shared_bytes = std::max(args.shared_keys * kKeyBytes, row_bytes);
  args.keys =
      context.select_counters.Reserve(static_cast<size_t>(units * args.key_stride), context.stream);
  // All run at once, two to a multiprocessor.
  const int rankers = static_cast<int>(std::min<int64_t>(units, context.device.sms));
  args.scorers = 2 * context.device.sms - rankers;
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(args.scorers + rankers)),
                   dim3(kThreads), static_cast<size_t>(shared_bytes), 1, args);
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
  args.num_rows = static_cast<int>(params.num_rows);
  args.num_kv_heads = params.layout.num_kv_heads;
  args.group = params.num_heads / params.layout.num_kv_heads;
  switch (params.layout.head_dim) {
    case 64:
      return Launch<64>(context, args);
    case 128:
      return Launch<128>(context, args);
    default:
      RESA_CHECK(false) << "SelectMinMax: head size " << params.layout.head_dim;
  }
}

}  // namespace resa::kernels::cuda
