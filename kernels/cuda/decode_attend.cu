// Exact softmax attention of single rows over the paged pool: over a list of blocks, or over all.
//
//   out[row, h] = sum_t softmax_t(q[row, h] . k[t, h / G] / sqrt(d)) v[t, h / G]
//
// q, out [T, Hq * d] bf16; K and V [page][Hk][16][d] bf16; ids [Hk][keep] of each row, ascending.
//
// An item is one split (a fixed range of ranks in the id list) of one (row, KV head). A persistent
// CTA takes items, the first by its index, the rest from a queue. Its producer warp walks ids and
// page tables ahead of the data and copies units of 16 tokens (one page, two blocks of 8, four of
// 4) with the tensor copy engine into a ring that takes almost all of shared memory: what is in
// flight does not drop while a row is looked up or a split is finished. Eight consumer warps take
// units in turn, warp w those of rank w, w + 8, ... of the split, so that no order depends on
// timing. A warp computes S^T = K Q^T and O^T += V^T P^T with mma.m16n8k16, the 16 tokens as M and
// the group's heads as N, so a group of up to 8 pays no padding in M. At the end of a split the
// warps' states are merged in shared memory, warp w taking head w. The last split to arrive merges
// those of its (row, head) in order, in two levels of 16, without another launch.
//
// Bound: the bytes of K and V attended to, at the read bandwidth.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kConsumers = 8;  // Warps.
constexpr int kConsumerThreads = 32 * kConsumers;
constexpr int kThreads = kConsumerThreads + 32;
constexpr int kItemSlots = 8;      // Items that the producer may be ahead.
constexpr int kMergeSplits = 16;   // Partial results merged by one warp at a time.
constexpr float kNoMax = -1e30f;   // Below every score, and its differences are finite.
constexpr float kMaxSlack = 8.0f;  // A maximum is raised only when passed by 2^8.

struct DecodeArgs {
  const __nv_bfloat16* q = nullptr;     // [T, Hq * d]
  __nv_bfloat16* out = nullptr;         // [T, Hq * d]
  const SparseRow* rows = nullptr;      // [num_rows]
  const int32_t* item_begin = nullptr;  // [num_rows + 1]
  const int32_t* ids = nullptr;         // Null: all blocks.
  const int32_t* pages = nullptr;       // [S, page_stride]
  int64_t page_stride = 0;
  float* partials = nullptr;     // [items] of PartialFloats()
  uint32_t* counters = nullptr;  // The queue, then [items][group]
  int num_rows = 0;
  int num_heads = 0;
  int kv_heads = 0;
  int group = 0;
  int block_tokens = 0;  // 16 when all is attended.
  int split_tokens = 0;
  float scale_log2 = 0;  // log2(e) / sqrt(d)
};

// A partial result of a split: o[group][d], then (m, l)[group], in whole float4s.
constexpr int64_t PartialFloats(int group, int head_dim) {
  return (int64_t{group} * (head_dim + 2) + 3) / 4 * 4;
}

// What the producer tells the consumers of an item.
struct Item {
  int32_t row = 0;  // In the flat batch.
  int32_t kv_head = 0;
  int32_t split = 0;
  int32_t splits = 0;  // Of the row.
  int32_t begin = 0;   // Item of the row's split 0 and KV head 0.
  int32_t units = 0;   // Of 16 tokens; negative: there is no further item.
};

template <int kHeadDim>
struct Unit {
  std::byte k[kPageTokens * kHeadDim * 2];
  std::byte v[kPageTokens * kHeadDim * 2];
};

// kHeadTiles: tiles of 8 heads.
template <int kHeadDim, int kHeadTiles>
struct alignas(1024) Shared {
  static constexpr int kStages = kHeadDim == 128 ? (kHeadTiles == 1 ? 24 : 18) : 40;
  static constexpr int kHeads = 8 * kHeadTiles;

  Unit<kHeadDim> ring[kStages];
  float o[kConsumers][kHeads][kHeadDim + 4];  // The pad spreads a fragment over all banks.
  float2 ml[kConsumers][kHeads];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t item_full[kItemSlots];
  uint64_t item_empty[kItemSlots];
  uint32_t tokens[kStages];  // Bit t: token t of the unit is attended to.
  Item items[kItemSlots];
};

// ---- producer ---------------------------------------------------------------------------------

// An item as the producer sees it, the same in all lanes. A run is a block: contiguous tokens.
struct Work {
  Item item;
  int position = 0;
  const int32_t* table = nullptr;
  const int32_t* ids = nullptr;  // Of this split; null: all blocks.
  int first_run = 0;             // Of this split, in the row's list.
  int runs = 0;
  bool valid = false;
};

// Finds rows of items. The rows of a small batch stay in registers, one a lane.
class Rows {
 public:
  __device__ explicit Rows(const DecodeArgs& args) : args_(args), lane_(threadIdx.x % 32) {
    total_ = __ldg(args.item_begin + args.num_rows);
    cached_ = args.num_rows <= 32;
    if (cached_ && lane_ < args.num_rows) {
      begin_ = __ldg(args.item_begin + lane_);
      row_ = args.rows[lane_];
    }
  }
  __device__ int total() const { return total_; }

  __device__ Work Find(int index) const {
    int low = 0;
    int count = args_.num_rows;
    while (count > 32) {
      const int step = (count + 31) / 32;
      const int at = lane_ * step;
      const int begin = at < count ? __ldg(args_.item_begin + low + at) : INT32_MAX;
      const int taken = (__popc(__ballot_sync(kAll, begin <= index)) - 1) * step;
      low += taken;
      count = min(step, count - taken);
    }
    int begin = begin_;
    if (!cached_) begin = lane_ < count ? __ldg(args_.item_begin + low + lane_) : INT32_MAX;
    const int lane = __popc(__ballot_sync(kAll, begin <= index)) - 1;
    const int r = low + lane;
    begin = __shfl_sync(kAll, begin, lane);
    const int end = __ldg(args_.item_begin + r + 1);
    return Split(Row(r), begin, end, index);
  }

 private:
  __device__ SparseRow Row(int r) const {
    if (!cached_) return args_.rows[r];
    SparseRow row;
    row.row = __shfl_sync(kAll, row_.row, r);
    row.position = __shfl_sync(kAll, row_.position, r);
    row.table = __shfl_sync(kAll, row_.table, r);
    row.keep_blocks = __shfl_sync(kAll, row_.keep_blocks, r);
    row.ids_begin = __shfl_sync(kAll, row_.ids_begin, r);
    return row;
  }

  __device__ Work Split(const SparseRow& row, int begin, int end, int index) const {
    Work work;
    work.valid = true;
    const int local = index - begin;
    work.item.row = row.row;
    work.item.begin = begin;
    work.item.splits = (end - begin) / args_.kv_heads;
    work.item.split = local / args_.kv_heads;
    work.item.kv_head = local - work.item.split * args_.kv_heads;
    work.position = row.position;
    work.table = args_.pages + row.table * args_.page_stride;
    const int tokens = args_.block_tokens;
    int row_runs = (row.position + tokens) / tokens;
    if (args_.ids != nullptr) row_runs = min(row_runs, row.keep_blocks);
    const int split_runs = args_.split_tokens / tokens;
    work.first_run = work.item.split * split_runs;
    work.runs = max(0, min(split_runs, row_runs - work.first_run));
    work.item.units = (work.runs * tokens + kPageTokens - 1) / kPageTokens;
    if (args_.ids != nullptr) {
      work.ids =
          args_.ids + row.ids_begin + int64_t{work.item.kv_head} * row.keep_blocks + work.first_run;
    }
    return work;
  }

  const DecodeArgs& args_;
  int lane_;
  int total_ = 0;
  bool cached_ = false;
  int begin_ = INT32_MAX;
  SparseRow row_;
};

// Up to 32 runs of an item, one a lane, on their way from ids to pages to copies.
struct Batch {
  Work work;
  int first = 0;  // Run of the work's split that lane 0 has.
  int id = 0;
  int page = 0;

  __device__ bool Has(int lane) const { return first + lane < work.runs; }
  __device__ void LoadId(int lane) {
    id = work.first_run + first + lane;
    if (work.ids != nullptr && Has(lane)) id = __ldg(work.ids + first + lane);
  }
  __device__ void LoadPage(int lane, int block_tokens) {
    page = Has(lane) ? __ldg(work.table + id * block_tokens / kPageTokens) : 0;
  }
};

template <int kHeadDim, int kHeadTiles>
class Producer {
 public:
  using S = Shared<kHeadDim, kHeadTiles>;

  __device__ Producer(S& shared, const CUtensorMap* k_map, const CUtensorMap* v_map,
                      const DecodeArgs& args, const Rows& rows)
      : s_(shared), k_map_(k_map), v_map_(v_map), args_(args), rows_(rows) {
    lane_ = threadIdx.x % 32;
    policy_ = EvictFirstPolicy();
    first_items_ = min(static_cast<int>(gridDim.x), rows.total());
  }

  __device__ void Run() {
    TakeNext();
    Batch now;
    now.work = rows_.Find(blockIdx.x);
    now.LoadId(lane_);
    now.LoadPage(lane_, args_.block_tokens);
    Batch next = After(now);
    next.LoadId(lane_);
    while (now.work.valid) {
      if (now.first == 0) Announce(now.work.item);
      // The next batch's pages and the ids after them are fetched while this one's are copied.
      const int runs = min(32, now.work.runs - now.first);
      const int units = (runs * args_.block_tokens + kPageTokens - 1) / kPageTokens;
      Copy(now, 0, min(kConsumers, units));
      if (next.work.valid) next.LoadPage(lane_, args_.block_tokens);
      Batch later = After(next);
      later.LoadId(lane_);
      Copy(now, kConsumers, units);
      now = next;
      next = later;
    }
    Item end;
    end.units = -1;
    Announce(end);
  }

 private:
  // Asks the queue for the item after those already taken. Each CTA that has a first item asks
  // until it is told that there is none, so the requests are as many as the items, and the queue
  // wraps to zero.
  __device__ void TakeNext() {
    if (lane_ == 0) taken_ = atomicInc(args_.counters, rows_.total() - 1);
  }

  __device__ Batch After(const Batch& batch) {
    Batch next;
    if (!batch.work.valid) return next;
    if (batch.first + 32 < batch.work.runs) {
      next.work = batch.work;
      next.first = batch.first + 32;
      return next;
    }
    const int index = first_items_ + static_cast<int>(__shfl_sync(kAll, taken_, 0));
    if (index >= rows_.total()) return next;
    TakeNext();
    next.work = rows_.Find(index);
    return next;
  }

  __device__ void Announce(const Item& item) {
    const int slot = items_ % kItemSlots;
    BarrierWait(&s_.item_empty[slot], (items_ / kItemSlots + 1) & 1);
    if (lane_ == 0) {
      s_.items[slot] = item;
      BarrierArrive(&s_.item_full[slot]);
    }
    ++items_;
  }

  // Starts the copies of units [begin, end) of the batch.
  __device__ void Copy(const Batch& batch, int begin, int end) {
    const int tokens = args_.block_tokens;
    const int runs_per_unit = kPageTokens / tokens;
    const int run_bytes = tokens * kHeadDim * 2;
    const int position = batch.id * tokens;
    const int slot = lane_ % runs_per_unit;
    const bool has = batch.Has(lane_);
    // How many of the run's tokens exist, and with its neighbours: which of the unit's.
    const int valid = has ? min(tokens, batch.work.position + 1 - position) : 0;
    uint32_t mask = ((1u << max(valid, 0)) - 1) << (slot * tokens);
    uint32_t bytes = has ? 2 * run_bytes : 0;
    for (int step = 1; step < runs_per_unit; step *= 2) {
      mask |= __shfl_xor_sync(kAll, mask, step);
      bytes += __shfl_xor_sync(kAll, bytes, step);
    }
    const int source = (batch.page * args_.kv_heads + batch.work.item.kv_head) * kPageTokens +
                       position % kPageTokens;
    for (int unit = begin; unit < end; ++unit) {
      BarrierWait(&s_.empty[stage_], phase_ ^ 1);
      if (lane_ / runs_per_unit == unit) {
        if (slot == 0) {
          s_.tokens[stage_] = mask;
          BarrierArriveExpect(&s_.full[stage_], bytes);
        }
        if (has) {
          Unit<kHeadDim>& to = s_.ring[stage_];
          CopyBox3(to.k + slot * run_bytes, k_map_, 0, source, 0, &s_.full[stage_], policy_);
          CopyBox3(to.v + slot * run_bytes, v_map_, 0, source, 0, &s_.full[stage_], policy_);
        }
      }
      __syncwarp();
      if (++stage_ == S::kStages) {
        stage_ = 0;
        phase_ ^= 1;
      }
    }
  }

  S& s_;
  const CUtensorMap* k_map_;
  const CUtensorMap* v_map_;
  const DecodeArgs& args_;
  const Rows& rows_;
  int lane_;
  uint64_t policy_;
  int first_items_;
  uint32_t taken_ = 0;  // Lane 0's.
  int items_ = 0;
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// ---- consumers --------------------------------------------------------------------------------

// Where a lane of ldmatrix finds its row of a unit's K or V: a run is [d / 64][block][64 elements],
// and 16-byte chunk c of 128-byte line i lies at c ^ (i % 8).
template <int kHeadDim>
struct LaneOffsets {
  uint32_t half[kHeadDim / 64];

  __device__ LaneOffsets(int token, int odd_chunk, int block_tokens) {
#pragma unroll
    for (int h = 0; h < kHeadDim / 64; ++h) {
      const int run = token / block_tokens;
      const int line = (run * (kHeadDim / 64) + h) * block_tokens + token % block_tokens;
      half[h] = line * 128 + ((odd_chunk ^ (line & 7)) << 4);
    }
  }
  // Of the 16 elements from 16 * step on.
  __device__ uint32_t At(uint32_t base, int step) const {
    return (base + half[step / 4]) ^ ((step % 4) << 5);
  }
};

// A lane's part of a head's vector of d.
template <int kCount>
struct alignas(4 * kCount) Floats {
  float at[kCount];
};

template <int kCount>
__device__ __forceinline__ Floats<kCount> LoadFromL2(const float* from) {
  Floats<kCount> to;
  if constexpr (kCount == 4) {
    const float4 x = __ldcg(reinterpret_cast<const float4*>(from));
    to = {{x.x, x.y, x.z, x.w}};
  } else {
    const float2 x = __ldcg(reinterpret_cast<const float2*>(from));
    to = {{x.x, x.y}};
  }
  return to;
}

// The softmax of one head over some tokens: sum_t 2^(s_t - m) v_t, l the sum of the weights. m and
// l are the same in all lanes.
template <int kCount>
struct HeadState {
  float m = kNoMax;
  float l = 0;
  Floats<kCount> o = {};
};

__device__ __forceinline__ float WarpMax(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Adds up to kMax states in order; lane i has (m, l) of state i, kNoMax and 0 past the last, and
// `load` gives its vector.
template <int kMax, int kCount, class Load>
__device__ __forceinline__ void MergeStates(int count, float2 ml, Load load,
                                            HeadState<kCount>* state) {
  Floats<kCount> part[kMax];
#pragma unroll
  for (int i = 0; i < kMax; ++i) {
    if (i < count) part[i] = load(i);
  }
  const float m = fmaxf(state->m, WarpMax(ml.x));
  const float weight = Exp2(ml.x - m);
  const float before = Exp2(state->m - m);
  state->m = m;
  state->l = state->l * before + WarpSum(weight * ml.y);
#pragma unroll
  for (int j = 0; j < kCount; ++j) state->o.at[j] *= before;
#pragma unroll
  for (int i = 0; i < kMax; ++i) {
    const float w = __shfl_sync(kAll, weight, i);
    if (i >= count) continue;
#pragma unroll
    for (int j = 0; j < kCount; ++j) state->o.at[j] += w * part[i].at[j];
  }
}

template <int kHeadDim, int kHeadTiles>
class Consumer {
 public:
  using S = Shared<kHeadDim, kHeadTiles>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kCount = kHeadDim / 32;

  __device__ Consumer(S& shared, const DecodeArgs& args)
      : s_(shared),
        args_(args),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        k_at_(lane_ % 16, lane_ / 16, args.block_tokens),
        v_at_(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2, args.block_tokens) {}

  __device__ void Run() {
    uint32_t units_before = 0;
    for (int i = 0;; ++i) {
      const int slot = i % kItemSlots;
      BarrierWait(&s_.item_full[slot], i / kItemSlots & 1);
      const Item item = s_.items[slot];
      __syncwarp();
      if (lane_ == 0) BarrierArrive(&s_.item_empty[slot]);
      if (item.units < 0) return;
      Begin(item);
      for (int unit = warp_; unit < item.units; unit += kConsumers) Attend(units_before + unit);
      units_before += item.units;
      Finish(item);
    }
  }

 private:
  // The group's queries as B fragments, and an empty state.
  __device__ void Begin(const Item& item) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const int head = tile * 8 + lane_ / 4;
      const __nv_bfloat16* from =
          args_.q +
          (int64_t{item.row} * args_.num_heads + item.kv_head * args_.group + head) * kHeadDim +
          lane_ % 4 * 2;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        q_[tile][step][0] = q_[tile][step][1] = 0;
        if (head < args_.group) {
          q_[tile][step][0] = *reinterpret_cast<const uint32_t*>(from + step * 16);
          q_[tile][step][1] = *reinterpret_cast<const uint32_t*>(from + step * 16 + 8);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[tile][step][i] = 0;
      }
      m_[tile][0] = m_[tile][1] = kNoMax;
      l_[tile][0] = l_[tile][1] = 0;
    }
  }

  // One unit of 16 tokens.
  __device__ void Attend(uint32_t number) {
    const int stage = number % S::kStages;
    BarrierWait(&s_.full[stage], number / S::kStages & 1);
    Unit<kHeadDim>& unit = s_.ring[stage];
    float score[kHeadTiles][4];
    Scores(SharedAddress(unit.k), score);
    const uint32_t tokens = s_.tokens[stage];
    if (tokens != 0xffff) {
      MaskScores(tokens, score);
      ZeroValues(tokens, unit.v);
    }
    uint32_t weight[kHeadTiles][2];
    Weigh(score, weight);
    const uint32_t v = SharedAddress(unit.v);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      LdMatrix4Transposed(a, v_at_.At(v, step));
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        Mma16x8x16(o_[tile][step], a, weight[tile][0], weight[tile][1]);
      }
    }
    __syncwarp();
    if (lane_ == 0) BarrierArrive(&s_.empty[stage]);
  }

  // score[tile]: (token, head), (token, head + 1), (token + 8, head), (token + 8, head + 1) with
  // token = lane / 4 and head = 8 tile + lane % 4 * 2. Two chains of sums hide the latency.
  __device__ void Scores(uint32_t k, float (&score)[kHeadTiles][4]) const {
    float even[kHeadTiles][4] = {};
    float odd[kHeadTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      LdMatrix4(a, k_at_.At(k, step));
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        Mma16x8x16(step % 2 ? odd[tile] : even[tile], a, q_[tile][step][0], q_[tile][step][1]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[tile][i] = even[tile][i] + odd[tile][i];
    }
  }

  __device__ void MaskScores(uint32_t tokens, float (&score)[kHeadTiles][4]) const {
    const uint32_t mine = tokens >> (lane_ / 4);
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      if ((mine & 1) == 0) score[tile][0] = score[tile][1] = -INFINITY;
      if ((mine >> 8 & 1) == 0) score[tile][2] = score[tile][3] = -INFINITY;
    }
  }

  // Weight 0 does not keep a NaN out of a sum; a value of 0 does.
  __device__ void ZeroValues(uint32_t tokens, std::byte* v) const {
    constexpr int kChunks = kHeadDim / 8;
    for (int i = lane_; i < kPageTokens * kChunks; i += 32) {
      const int token = i / kChunks;
      if (tokens >> token & 1) continue;
      const int block = args_.block_tokens;
      const int line = (token / block * (kHeadDim / 64) + i % kChunks / 8) * block + token % block;
      *reinterpret_cast<uint4*>(v + line * 128 + i % 8 * 16) = uint4{0, 0, 0, 0};
    }
    ProxyFence();
    __syncwarp();
  }

  // Scores to weights, rounded to bf16 and transposed to B fragments. The maximum of a head is
  // raised, and its sums rescaled, only when a score passes it by far.
  __device__ void Weigh(float (&score)[kHeadTiles][4], uint32_t (&weight)[kHeadTiles][2]) {
    const float scale = args_.scale_log2;
    bool raise = false;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[tile][i] *= scale;
        raise |= score[tile][i] > m_[tile][i % 2] + kMaxSlack;
      }
    }
    if (__any_sync(kAll, raise)) RaiseMaximum(score);
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[i] = Exp2(score[tile][i] - m_[tile][i % 2]);
        l_[tile][i % 2] += p[i];
      }
      weight[tile][0] = TransposeMatrix(PackBf16(p[0], p[1]));
      weight[tile][1] = TransposeMatrix(PackBf16(p[2], p[3]));
    }
  }

  __device__ void RaiseMaximum(const float (&score)[kHeadTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = fmaxf(score[tile][i], score[tile][i + 2]);
        for (int step = 4; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(kAll, m, step));
        m = fmaxf(m, m_[tile][i]);
        rescale[i] = Exp2(m_[tile][i] - m);
        m_[tile][i] = m;
        l_[tile][i] *= rescale[i];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[tile][step][i] *= rescale[i % 2];
      }
    }
  }

  // Merges the warps' states, warp w for heads w and w + 8, and passes the result on.
  __device__ void Finish(const Item& item) {
    NamedBarrier(1, kConsumerThreads);  // The item before has been read.
    const int states = min(kConsumers, item.units);
    if (warp_ < states) StoreState();
    NamedBarrier(1, kConsumerThreads);
    for (int head = warp_; head < args_.group; head += kConsumers) {
      HeadState<kCount> state;
      const float2 ml = lane_ < states ? s_.ml[lane_][head] : float2{kNoMax, 0};
      MergeStates<kConsumers>(
          states, ml,
          [&](int i) {
            return *reinterpret_cast<const Floats<kCount>*>(&s_.o[i][head][lane_ * kCount]);
          },
          &state);
      if (item.splits == 1 || MergeSplits(item, head, &state)) StoreOutput(item, head, state);
    }
  }

  __device__ void StoreState() {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const int head = tile * 8 + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float l = l_[tile][i];
        for (int step = 4; step < 32; step *= 2) l += __shfl_xor_sync(kAll, l, step);
        if (lane_ < 4) s_.ml[warp_][head + i] = {m_[tile][i], l};
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s_.o[warp_][head + i % 2][step * 16 + i / 2 * 8 + lane_ / 4] = o_[tile][step][i];
        }
      }
    }
  }

  // Stores a split's state; the last of 16 neighbours merges them, and the last of those merges
  // all. True for the warp that has the whole row's state in the end.
  __device__ bool MergeSplits(const Item& item, int head, HeadState<kCount>* state) const {
    const int group = item.split / kMergeSplits;
    const int first = group * kMergeSplits;
    const int members = min(kMergeSplits, item.splits - first);
    StorePartial(item, item.split, head, *state);
    if (!LastToArrive(item, first, head, members)) return false;
    *state = MergePartials(item, first, 1, members, head);
    if (item.splits <= kMergeSplits) return true;
    const int groups = (item.splits + kMergeSplits - 1) / kMergeSplits;
    StorePartial(item, first, head, *state);
    if (!LastToArrive(item, 1, head, groups)) return false;
    *state = MergePartials(item, 0, kMergeSplits, groups, head);
    return true;
  }

  __device__ int64_t Slot(const Item& item, int split) const {
    return int64_t{item.begin} + int64_t{split} * args_.kv_heads + item.kv_head;
  }
  __device__ float* Partial(const Item& item, int split) const {
    return args_.partials + Slot(item, split) * PartialFloats(args_.group, kHeadDim);
  }

  __device__ void StorePartial(const Item& item, int split, int head,
                               const HeadState<kCount>& state) const {
    float* const to = Partial(item, split);
    *reinterpret_cast<Floats<kCount>*>(to + head * kHeadDim + lane_ * kCount) = state.o;
    if (lane_ == 0) {
      reinterpret_cast<float2*>(to + args_.group * kHeadDim)[head] = {state.m, state.l};
    }
  }

  // Counts this warp in among `members`; the counter is zero again after the last.
  __device__ bool LastToArrive(const Item& item, int split, int head, int members) const {
    uint32_t before = 0;
    __syncwarp();
    if (lane_ == 0) {
      __threadfence();
      before = atomicInc(args_.counters + 1 + Slot(item, split) * args_.group + head, members - 1);
      __threadfence();
    }
    return __shfl_sync(kAll, before, 0) == static_cast<uint32_t>(members - 1);
  }

  // Of splits first, first + stride, ...
  __device__ HeadState<kCount> MergePartials(const Item& item, int first, int stride, int count,
                                             int head) const {
    HeadState<kCount> state;
    for (int begin = 0; begin < count; begin += kMergeSplits) {
      const int members = min(kMergeSplits, count - begin);
      const auto partial = [&](int i) { return Partial(item, first + (begin + i) * stride); };
      float2 ml = {kNoMax, 0};
      if (lane_ < members) {
        ml =
            __ldcg(reinterpret_cast<const float2*>(partial(lane_) + args_.group * kHeadDim) + head);
      }
      MergeStates<kMergeSplits>(
          members, ml,
          [&](int i) { return LoadFromL2<kCount>(partial(i) + head * kHeadDim + lane_ * kCount); },
          &state);
    }
    return state;
  }

  __device__ void StoreOutput(const Item& item, int head, const HeadState<kCount>& state) const {
    const int64_t at =
        (int64_t{item.row} * args_.num_heads + item.kv_head * args_.group + head) * kHeadDim +
        lane_ * kCount;
    const float scale = 1.0f / state.l;
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      *reinterpret_cast<uint32_t*>(args_.out + at + j) =
          PackBf16(state.o.at[j] * scale, state.o.at[j + 1] * scale);
    }
  }

  S& s_;
  const DecodeArgs& args_;
  const int warp_;
  const int lane_;
  const LaneOffsets<kHeadDim> k_at_;
  const LaneOffsets<kHeadDim> v_at_;
  uint32_t q_[kHeadTiles][kSteps][2];
  float o_[kHeadTiles][kSteps][4];  // O^T: dims 16 step + lane / 4 (+ 8), heads as the scores'.
  float m_[kHeadTiles][2];          // The same in all lanes of a head.
  float l_[kHeadTiles][2];          // Of this lane's tokens.
};

// ---- kernel and launcher ----------------------------------------------------------------------

template <int kHeadDim, int kHeadTiles>
__global__ void __launch_bounds__(kThreads, 1)
    DecodeAttendKernel(const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map,
                       const __grid_constant__ DecodeArgs args) {
  extern __shared__ std::byte shared_bytes[];
  using S = Shared<kHeadDim, kHeadTiles>;
  S& shared = *reinterpret_cast<S*>(shared_bytes);
  AllowNextKernel();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], 1);
    }
    for (int i = 0; i < kItemSlots; ++i) {
      BarrierInit(&shared.item_full[i], 1);
      BarrierInit(&shared.item_empty[i], kConsumers);
    }
    BarrierInitFence();
  }
  if (threadIdx.x >= kConsumerThreads) {
    // The lists were copied to the device before any kernel of the step was launched.
    const Rows rows(args);
    if (threadIdx.x % 32 == 0) {
      PrefetchTensorMap(&k_map);
      PrefetchTensorMap(&v_map);
    }
    WaitForPriorKernel();
    __syncthreads();
    if (static_cast<int>(blockIdx.x) < rows.total()) {
      Producer<kHeadDim, kHeadTiles>(shared, &k_map, &v_map, args, rows).Run();
    } else if (threadIdx.x % 32 == 0) {
      shared.items[0].units = -1;
      BarrierArrive(&shared.item_full[0]);
    }
  } else {
    WaitForPriorKernel();
    __syncthreads();
    Consumer<kHeadDim, kHeadTiles>(shared, args).Run();
  }
}

// K or V of a layer as [2 halves of 64 elements][page, KV head, token][64], read by whole blocks.
CUtensorMap MapOf(std::byte* data, const KvLayout& layout, int block_tokens) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    RESA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                     cudaEnableDefault, &result));
    RESA_CHECK(result == cudaDriverEntryPointSuccess) << "no cuTensorMapEncodeTiled in the driver";
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  const auto d = static_cast<cuuint64_t>(layout.head_dim);
  const cuuint64_t dims[] = {64,
                             static_cast<cuuint64_t>(layout.num_pages) *
                                 static_cast<cuuint64_t>(layout.num_kv_heads) * kPageTokens,
                             d / 64};
  const cuuint64_t strides[] = {d * 2, 128};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(block_tokens),
                            static_cast<cuuint32_t>(d / 64)};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, data, dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  RESA_CHECK(result == CUDA_SUCCESS) << "cuTensorMapEncodeTiled: " << static_cast<int>(result);
  return map;
}

template <int kHeadDim, int kHeadTiles>
void Launch(Context& context, const SparseAttendParams& p, const DecodeArgs& args,
            int64_t items_capacity) {
  constexpr int kBytes = sizeof(Shared<kHeadDim, kHeadTiles>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = &DecodeAttendKernel<kHeadDim, kHeadTiles>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  RESA_CUDA_CHECK(allowed);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(std::min<int64_t>(context.device.sms, items_capacity));
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = context.stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  RESA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, MapOf(p.kv.k, p.layout, args.block_tokens),
                                     MapOf(p.kv.v, p.layout, args.block_tokens), args));
  RESA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void DecodeAttend(Context& context, const SparseAttendParams& p, const DecodePlan& plan) {
  if (p.num_rows == 0) return;
  const int d = p.layout.head_dim;
  const int group = p.num_heads / p.layout.num_kv_heads;
  RESA_CHECK(p.layout.kv_dtype == DType::kBF16) << "K and V are bf16 on a GPU";
  RESA_CHECK(d == 64 || d == 128) << "head size " << d;
  RESA_CHECK(group >= 1 && group <= kMaxGroup) << group << " query heads per KV head";
  RESA_CHECK(plan.split_tokens > 0 && plan.split_tokens % kPageTokens == 0) << plan.split_tokens;
  RESA_CHECK_LT(p.layout.num_pages * p.layout.num_kv_heads * kPageTokens, int64_t{1} << 31);
  DecodeArgs args;
  args.q = reinterpret_cast<const __nv_bfloat16*>(p.q.b16());
  args.out = reinterpret_cast<__nv_bfloat16*>(p.out.b16());
  args.rows = p.rows;
  args.item_begin = plan.item_begin;
  args.ids = p.ids;
  args.pages = p.tables.pages;
  args.page_stride = p.tables.stride;
  args.num_rows = static_cast<int>(p.num_rows);
  args.num_heads = p.num_heads;
  args.kv_heads = p.layout.num_kv_heads;
  args.group = group;
  args.block_tokens = p.ids == nullptr ? kPageTokens : p.layout.selector.block_tokens;
  args.split_tokens = plan.split_tokens;
  args.scale_log2 = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(d)));
  args.partials = reinterpret_cast<float*>(context.decode_partials.Reserve(
      static_cast<size_t>(plan.items_capacity * PartialFloats(group, d)) * sizeof(float)));
  args.counters = context.decode_counters.Reserve(
      1 + static_cast<size_t>(plan.items_capacity * group), context.stream);
  if (d == 128) {
    if (group <= 8) {
      Launch<128, 1>(context, p, args, plan.items_capacity);
    } else {
      Launch<128, 2>(context, p, args, plan.items_capacity);
    }
  } else if (group <= 8) {
    Launch<64, 1>(context, p, args, plan.items_capacity);
  } else {
    Launch<64, 2>(context, p, args, plan.items_capacity);
  }
}

}  // namespace resa::kernels::cuda
