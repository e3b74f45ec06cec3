// Exact softmax attention of single rows over the paged pool: over a list of blocks, or over all.
//
//   out[row, h] = sum_t softmax_t(q[row, h] . k[t, h / G] / sqrt(d)) v[t, h / G]
//
// q, out [T, Hq * d] bf16; K and V [page][Hk][16][d] bf16; ids [Hk][keep] of each row, ascending.
//
// An item is one split (a fixed range of ranks in the id list) of one (row, KV head). A persistent
// CTA takes items, the first two by its index, the rest from a queue, and keeps the memory busy
// from one item into the next:
//   the scout     (a warp; decode_scout.cuh) finds items' rows, ids and pages ahead of the data;
//   8 consumers   (here) take units of 16 tokens (a page, two blocks of 8, four of 4) in turn, warp
//                 w those of rank w, w + 8, ... of the split, so that no order depends on timing.
//                 Each copies its own units ahead by cp.async into its own ring of K and V, which
//                 needs no barrier, and computes S^T = K Q^T and O^T += V^T P^T by mma.m16n8k16
//                 with the tokens as M and the group's heads as N: a group of up to 8 wastes none;
//   the finishers (decode_merge.cuh) merge the consumers' states after each item.
// In the end all warps combine the splits of the rows, in order, without another launch.
//
// Bound: the bytes of K and V attended to, at the read bandwidth. Measured (28 query heads on 4 KV
// heads of 128, pages scattered, one layer after the other in a graph): 8 x 256K tokens densely
// 4.44 to 4.55 TB/s, 95 to 97 % of the reads measured; a tenth of them in blocks of 8 or 16 4.0 to
// 4.1 TB/s, 86 to 88 %. A short context is bound by latencies: 1 x 1K takes 4.2 us, 1 x 32K 19.9,
// 14.4 of them its bytes.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/decode_scout.cuh"
#include "kernels/cuda/decode_shared.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr float kMaxSlack = 8.0f;  // A maximum is raised only when passed by 2^8.

// A row of d elements in a slot: 16-byte chunk c of token t lies at c ^ (t % 8), so that neither
// the copies nor ldmatrix meet a bank twice.
template <int kHeadDim, int kHeadTiles, int kRuns>
class Consumer {
 public:
  using S = DecodeShared<kHeadDim, kHeadTiles, kRuns>;

  __device__ Consumer(S& shared, const DecodeArgs& args)
      : s_(shared), args_(args), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {
    ring_ = SharedAddress(s_.ring[warp_]);
    const int token = lane_ / kRowChunks;  // Of the first 512 bytes of a slot.
    copy_at_ = token * kRowBytes + ((lane_ % kRowChunks) ^ token) * 16;
    k_at_ = lane_ % 16 * kRowBytes + ((lane_ / 16) ^ (lane_ % 8)) * 16;
    v_at_ = (lane_ % 8 + lane_ / 16 * 8) * kRowBytes + ((lane_ / 8 % 2) ^ (lane_ % 8)) * 16;
  }

  __device__ void Run() {
#pragma unroll 1
    for (int i = 0; i < S::kAhead; ++i) {
      LookUp(i);
      if (i == 0) {
        Prefetch();
        WaitForPrevious();
      }
      Copy(args_.k, 2 * i);
      Copy(args_.v, 2 * i + 1);
    }
    int slot = 0;  // Of the current unit's K.
    for (int i = 0;; ++i) {
      LookUp(i + S::kAhead);
      Copy(args_.k, slot == 0 ? S::kSlots - 1 : slot - 1);
      const Octet<kRuns>& octet = s_.octets[i % kOctets];
      if (octet.end) break;
      if (octet.first) Begin();
      const uint32_t tokens = octet.tokens[warp_];
      CopyAsyncWait<S::kSlots - 1>();
      __syncwarp();
      uint32_t weight[kHeadTiles][2];
      if (tokens != 0) Weigh(tokens, ring_ + slot * S::kSlotBytes, weight);
      __syncwarp();
      Copy(args_.v, slot);
      if (++slot == S::kSlots) slot = 0;
      CopyAsyncWait<S::kSlots - 1>();
      __syncwarp();
      if (tokens != 0) Add(tokens, slot, weight);
      if (++slot == S::kSlots) slot = 0;
      const bool last = octet.last;
      __syncwarp();
      BarrierArrive(&s_.octet_empty[i % kOctets]);
      if (last) End();
    }
    CopyAsyncWait<0>();
  }

 private:
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kCopies = S::kSlotBytes / 512;  // By a warp at a time.

  // Finds this warp's unit of octet i, whose copies are next.
  __device__ void LookUp(int i) {
    ahead_ = false;
    if (ended_) return;
    BarrierWait(&s_.octet_full[i % kOctets], i / kOctets & 1);
    const Octet<kRuns>& octet = s_.octets[i % kOctets];
    ended_ = octet.end;
    if (ended_ || octet.tokens[warp_] == 0) return;
    ahead_ = true;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      offset_[run] = int64_t{octet.run[warp_][run]} * kRowBytes + lane_ * 16;
    }
  }

  // Asks the L2 for the unit looked up, while the kernel before this one runs: that this one may
  // still write a token there does no harm. Ids, and so units, are not known then.
  __device__ void Prefetch() const {
    constexpr int kLines = S::kSlotBytes / 128;
    if (!ahead_ || args_.ids != nullptr || lane_ >= kLines) return;
    const int64_t at = offset_[0] + lane_ * (128 - 16);
    PrefetchL2(args_.k + at);
    PrefetchL2(args_.v + at);
  }

  // Starts the copy of K or V of the unit looked up, always a group of its own.
  __device__ void Copy(const std::byte* from, int slot) const {
    if (ahead_) {
      const uint32_t to = ring_ + slot * S::kSlotBytes + copy_at_;
      constexpr int kRunCopies = kCopies / kRuns;
      constexpr int kTokens = 512 / kRowBytes;  // Of one copy by the warp.
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        CopyAsync16((to ^ (i * kTokens % 8 * 16)) + i * 512,
                    from + offset_[i / kRunCopies] + i % kRunCopies * 512, policy_);
      }
    }
    CopyAsyncCommit();
  }

  // The group's queries as B fragments, and an empty state.
  __device__ void Begin() {
    const int slot = items_ % S::kItemSlots;
    BarrierWait(&s_.item_full[slot], items_ / S::kItemSlots & 1);
    ++items_;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const uint32_t q =
          SharedAddress(&s_.q[slot][tile * 8 + lane_ % 8]) + static_cast<uint32_t>(lane_ / 8 * 16);
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t b[4];
        LdMatrix4(b, q + step * 32);
        q_[tile][step][0] = b[0];
        q_[tile][step][1] = b[1];
        q_[tile][step + 1][0] = b[2];
        q_[tile][step + 1][1] = b[3];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[tile][step][i] = 0;
      }
      m_[tile][0] = m_[tile][1] = kNoMax;
      l_[tile][0] = l_[tile][1] = 0;
    }
  }

  // The weights of a unit's tokens, rounded to bf16, as B fragments; the maximum of a head is
  // raised, and its sums rescaled, only when a score passes it by far.
  __device__ void Weigh(uint32_t tokens, uint32_t k, uint32_t (&weight)[kHeadTiles][2]) {
    float score[kHeadTiles][4];
    Scores(k, score);
    if (tokens != 0xffff) MaskScores(tokens, score);
    bool raise = false;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[tile][i] *= args_.scale_log2;
        raise |= score[tile][i] > m_[tile][i % 2] + kMaxSlack;
      }
    }
    if (__any_sync(kDecodeLanes, raise)) RaiseMaximum(score);
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

  // score[tile]: (token, head), (token, head + 1), (token + 8, head), (token + 8, head + 1) with
  // token = lane / 4 and head = 8 tile + lane % 4 * 2. Two chains of sums hide the latency.
  __device__ void Scores(uint32_t k, float (&score)[kHeadTiles][4]) const {
    float even[kHeadTiles][4] = {};
    float odd[kHeadTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      LdMatrix4(a, (k + k_at_) ^ (step * 32));
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

  __device__ void RaiseMaximum(const float (&score)[kHeadTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = fmaxf(score[tile][i], score[tile][i + 2]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          m = fmaxf(m, __shfl_xor_sync(kDecodeLanes, m, step));
        }
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

  // Adds the weighted values of a unit.
  __device__ void Add(uint32_t tokens, int slot, const uint32_t (&weight)[kHeadTiles][2]) {
    if (tokens != 0xffff) ZeroValues(tokens, slot);
    const uint32_t v = ring_ + slot * S::kSlotBytes + v_at_;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      LdMatrix4Transposed(a, v ^ (step * 32));
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        Mma16x8x16(o_[tile][step], a, weight[tile][0], weight[tile][1]);
      }
    }
  }

  // Weight 0 does not keep a NaN out of a sum; a value of 0 does.
  __device__ void ZeroValues(uint32_t tokens, int slot) {
    uint4* const v = reinterpret_cast<uint4*>(s_.ring[warp_][slot]);
    for (int i = lane_; i < kPageTokens * kRowChunks; i += 32) {
      if ((tokens >> (i / kRowChunks) & 1) == 0) v[i] = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }

  // Hands the item's state to the finishers.
  __device__ void End() {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      BarrierWait(&s_.merge_empty, (merges_++ + 1) & 1);
      const int head = lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float l = l_[tile][i];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) l += __shfl_xor_sync(kDecodeLanes, l, step);
        if (lane_ < 4) s_.ml[warp_][head + i] = {m_[tile][i], l};
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s_.o[warp_][head + i % 2][step * 16 + i / 2 * 8 + lane_ / 4] = o_[tile][step][i];
        }
      }
      BarrierArrive(&s_.merge_full);
    }
  }

  S& s_;
  const DecodeArgs& args_;
  const int warp_;
  const int lane_;
  uint32_t ring_;
  uint32_t copy_at_;  // Where this lane's 16 of the first 512 bytes go.
  uint32_t k_at_;     // Where this lane's row begins for ldmatrix.
  uint32_t v_at_;
  // K and V must not push page tables, partial results and instructions out of the L2.
  const uint64_t policy_ = EvictFirstPolicy();
  int64_t offset_[kRuns];  // Of this lane's first bytes of each run.
  bool ahead_ = false;     // There is a unit to copy.
  bool ended_ = false;
  uint32_t items_ = 0;
  uint32_t merges_ = 0;
  uint32_t q_[kHeadTiles][kSteps][2];
  float o_[kHeadTiles][kSteps][4];  // O^T: dims 16 step + lane / 4 (+ 8), heads as the scores'.
  float m_[kHeadTiles][2];          // The same in all lanes of a head.
  float l_[kHeadTiles][2];          // Of this lane's tokens.
};

// ---- kernel and launcher ----------------------------------------------------------------------

// Wide groups need the registers of some finishers.
constexpr int FinishersOf(int head_tiles) { return head_tiles == 1 ? 7 : 3; }
constexpr int ThreadsOf(int head_tiles) { return 32 * (kConsumers + FinishersOf(head_tiles) + 1); }

// By one warp. Where warps arrive all their lanes do: compute-sanitizer does not see that what the
// others wrote before __syncwarp() is covered by the arrival of one.
template <class S>
__device__ void InitBarriers(S& shared, int finishers) {
  const int i = static_cast<int>(threadIdx.x % 32);
  if (i < kOctets) {
    BarrierInit(&shared.octet_full[i], 32);
    BarrierInit(&shared.octet_empty[i], 32 * kConsumers);
  } else if (i < kOctets + S::kItemSlots) {
    BarrierInit(&shared.item_full[i - kOctets], 1);
    BarrierInit(&shared.item_empty[i - kOctets], 32 * finishers);
  } else if (i == kOctets + S::kItemSlots) {
    BarrierInit(&shared.merge_full, 32 * kConsumers);
    BarrierInit(&shared.merge_empty, 32 * finishers);
  }
  BarrierInitFence();
  __syncwarp();
}

// By the first threads of the CTA. The copies fill the group's rows of queries only; what stands in
// the others must not raise a maximum.
template <class S>
__device__ void ZeroQueries(S& shared, int group) {
  constexpr int kHeads = std::extent_v<decltype(S::q), 1>;
  constexpr int kChunks = std::extent_v<decltype(S::q), 2> / 8;
  static_assert(kHeads * kChunks <= 32 * kConsumers);
  const int chunk = static_cast<int>(threadIdx.x);
  if (chunk < group * kChunks || chunk >= kHeads * kChunks) return;
#pragma unroll
  for (int slot = 0; slot < S::kItemSlots; ++slot) {
    reinterpret_cast<uint4*>(shared.q[slot])[chunk] = uint4{0, 0, 0, 0};
  }
}

template <int kHeadDim, int kHeadTiles, int kRuns>
__global__ void __launch_bounds__(ThreadsOf(kHeadTiles), 1)
    DecodeAttendKernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ std::byte shared_bytes[];
  constexpr int kFinishers = FinishersOf(kHeadTiles);
  auto& shared = *reinterpret_cast<DecodeShared<kHeadDim, kHeadTiles, kRuns>*>(shared_bytes);
  const int warp = static_cast<int>(threadIdx.x / 32);
  LetNextStart();
  if (warp == kConsumers) {
    InitBarriers(shared, kFinishers);
  } else {
    ZeroQueries(shared, args.group);
  }
  __syncthreads();
  if (warp < kConsumers) {
    Consumer<kHeadDim, kHeadTiles, kRuns>(shared, args).Run();
  } else if (warp == kConsumers) {
    // The lists were copied to the device before any kernel of the step was launched.
    const DecodeRows<kRuns> rows(args);
    DecodeScout<kHeadDim, kHeadTiles, kRuns>(shared, args, rows).Run();
  } else {
    DecodeFinisher<kHeadDim, kHeadTiles, kRuns, kFinishers>(shared, args, warp - kConsumers - 1)
        .Run();
  }
  CombineSplits<kHeadDim>(args);
}

template <int kHeadDim, int kHeadTiles, int kRuns>
void Launch(Context& context, const DecodeArgs& args, int64_t items_capacity) {
  constexpr int kBytes = sizeof(DecodeShared<kHeadDim, kHeadTiles, kRuns>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = &DecodeAttendKernel<kHeadDim, kHeadTiles, kRuns>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  RESA_CUDA_CHECK(allowed);
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(context.device.sms, items_capacity));
  LaunchOverlapped(context.stream, kernel, ctas, ThreadsOf(kHeadTiles), kBytes, 1, args);
}

template <int kHeadDim, int kHeadTiles>
void LaunchBlocks(Context& context, const DecodeArgs& args, int block_tokens, int64_t capacity) {
  if (block_tokens == 16) return Launch<kHeadDim, kHeadTiles, 1>(context, args, capacity);
  if (block_tokens == 8) return Launch<kHeadDim, kHeadTiles, 2>(context, args, capacity);
  RESA_CHECK(block_tokens == 4) << "blocks of " << block_tokens << " tokens";
  Launch<kHeadDim, kHeadTiles, 4>(context, args, capacity);
}

}  // namespace

void DecodeAttend(Context& context, const SparseAttendParams& p, const DecodePlan& plan) {
  if (p.num_rows == 0) return;
  const int d = p.layout.head_dim;
  const int group = p.num_heads / p.layout.num_kv_heads;
  RESA_CHECK(p.layout.kv_dtype == DType::kBF16) << "K and V are bf16 on a GPU";
  RESA_CHECK(d == 64 || d == 128) << "head size " << d;
  RESA_CHECK(group >= 1 && group <= kMaxGroup) << group << " query heads per KV head";
  RESA_CHECK_LT(p.layout.num_pages * p.layout.num_kv_heads * kPageTokens, int64_t{1} << 31);
  DecodeArgs args;
  args.q = reinterpret_cast<const __nv_bfloat16*>(p.q.b16());
  args.out = reinterpret_cast<__nv_bfloat16*>(p.out.b16());
  args.k = p.kv.k;
  args.v = p.kv.v;
  args.rows = p.rows;
  args.item_begin = plan.item_begin;
  args.ids = p.ids;
  args.pages = p.tables.pages;
  args.page_stride = p.tables.stride;
  args.num_rows = static_cast<int>(p.num_rows);
  args.num_heads = p.num_heads;
  args.kv_heads = p.layout.num_kv_heads;
  args.group = group;
  args.scale_log2 = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(d)));
  args.partials = context.decode_partials.Reserve(
      static_cast<size_t>(plan.items_capacity * PartialWords(group, d)), context.stream);
  args.queue = context.decode_counters.Reserve(1, context.stream);
  const int block_tokens = p.ids == nullptr ? kPageTokens : p.layout.selector.block_tokens;
  if (d == 128) {
    if (group <= 8) return LaunchBlocks<128, 1>(context, args, block_tokens, plan.items_capacity);
    return LaunchBlocks<128, 2>(context, args, block_tokens, plan.items_capacity);
  }
  if (group <= 8) return LaunchBlocks<64, 1>(context, args, block_tokens, plan.items_capacity);
  LaunchBlocks<64, 2>(context, args, block_tokens, plan.items_capacity);
}

}  // namespace resa::kernels::cuda
