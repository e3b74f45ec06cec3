#ifndef RESA_KERNELS_CUDA_DECODE_MERGE_CUH_
#define RESA_KERNELS_CUDA_DECODE_MERGE_CUH_

// What becomes of a split once its tokens are attended to. The finishers of a CTA merge the states
// of its consumers while those go on with the next item, and store a partial result. When no item
// is left, all warps of all CTAs combine the partial results, each warp 32 dimensions of one head
// of one row, as soon as the splits of that head are there.
//
// CTAs wait for each other there. They can: the grid is no larger than what is resident at a time,
// and a CTA that waits has no more items of its own.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/decode_shared.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {

inline constexpr int kCombineBatch = 32;  // Partial results that a warp loads at a time.

// A lane's part of a head's vector of d.
template <int kCount>
struct alignas(4 * kCount) Floats {
  float at[kCount];
};

// The softmax of one head over some tokens: o = sum_t 2^(s_t - m) v_t, l the sum of the weights.
// m and l are the same in all lanes.
template <int kCount>
struct HeadState {
  float m = kNoMax;
  float l = 0;
  Floats<kCount> o = {};
};

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kDecodeLanes, x, step));
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kDecodeLanes, x, step);
  return x;
}

// Where a split's partial result is.
__device__ __forceinline__ float* PartialOf(const DecodeArgs& args, int64_t item, int head_dim) {
  return args.partials + item * PartialFloats(args.group, head_dim);
}

// kFinishers warps; finisher w has heads w, w + kFinishers, ... of a tile of 8.
template <int kHeadDim, int kHeadTiles, int kRuns, int kFinishers>
class DecodeFinisher {
 public:
  using S = DecodeShared<kHeadDim, kHeadTiles, kRuns>;
  static constexpr int kCount = kHeadDim / 32;
  using State = HeadState<kCount>;

  __device__ DecodeFinisher(S& shared, const DecodeArgs& args, int warp)
      : s_(shared), args_(args), warp_(warp), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    uint32_t merges = 0;
    for (int i = 0;; ++i) {
      const int slot = i % S::kItemSlots;
      BarrierWait(&s_.item_full[slot], i / S::kItemSlots & 1);
      const Item item = s_.items[slot];
      if (item.units < 0) return;
#pragma unroll 1
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        const int heads = min(8, args_.group - tile * 8);
        BarrierWait(&s_.merge_full, merges++ & 1);
#pragma unroll 1
        for (int head = warp_; head < heads; head += kFinishers) {
          const State state = Merge(head, min(kConsumers, item.units));
          if (item.splits == 1) {
            StoreOutput(item, tile * 8 + head, state);
          } else {
            StorePartial(item, tile * 8 + head, state);
          }
        }
        __syncwarp();
        if (lane_ == 0) BarrierArrive(&s_.merge_empty);
        if (item.splits == 1) continue;
#pragma unroll 1
        for (int head = warp_; head < heads; head += kFinishers) CountIn(item, tile * 8 + head);
      }
      __syncwarp();
      if (lane_ == 0) BarrierArrive(&s_.item_empty[slot]);
    }
  }

 private:
  // The states of a head, in the order of the consumers.
  __device__ State Merge(int head, int count) const {
    const float2 ml = lane_ < count ? s_.ml[lane_][head] : float2{kNoMax, 0};
    State state;
    state.m = WarpMax(ml.x);
    const float weight = Exp2(ml.x - state.m);
    state.l = WarpSum(weight * ml.y);
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      const float w = __shfl_sync(kDecodeLanes, weight, i);
      if (i >= count) continue;
      const auto part = *reinterpret_cast<const Floats<kCount>*>(&s_.o[i][head][lane_ * kCount]);
#pragma unroll
      for (int j = 0; j < kCount; ++j) state.o.at[j] += w * part.at[j];
    }
    return state;
  }

  __device__ void StorePartial(const Item& item, int head, const State& state) const {
    float* const to = PartialOf(
        args_, item.begin + int64_t{item.split} * args_.kv_heads + item.kv_head, kHeadDim);
    *reinterpret_cast<Floats<kCount>*>(to + head * kHeadDim + lane_ * kCount) = state.o;
    if (lane_ == 0) {
      reinterpret_cast<float2*>(to + args_.group * kHeadDim)[head] = {state.m, state.l};
    }
  }

  // Tells the warps that combine this head that one more split is stored.
  __device__ void CountIn(const Item& item, int head) const {
    constexpr int kParts = kHeadDim / kPartDims;
    const int64_t q_head = int64_t{item.list} * args_.num_heads + item.kv_head * args_.group + head;
    __syncwarp();
    if (lane_ < kParts) CountRelease(args_.counters + 1 + q_head * kParts + lane_);
  }

  __device__ void StoreOutput(const Item& item, int head, const State& state) const {
    const int64_t at =
        (int64_t{item.row} * args_.num_heads + item.kv_head * args_.group + head) * kHeadDim +
        lane_ * kCount;
    const float scale = __fdividef(1.0f, state.l);
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
};

// Combines the splits of 32 dimensions of a head, in order, once they are all stored.
template <int kHeadDim>
__device__ __forceinline__ void CombineHead(const DecodeArgs& args, int list, int q_head,
                                            int part) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int begin = __ldg(args.item_begin + list);
  const int splits = (__ldg(args.item_begin + list + 1) - begin) / args.kv_heads;
  if (splits <= 1) return;
  const int head = q_head % args.group;
  const float* from = PartialOf(args, begin + q_head / args.group, kHeadDim);
  int64_t step = args.kv_heads * PartialFloats(args.group, kHeadDim);
  uint32_t* const counter =
      args.counters + 1 + (int64_t{list} * args.num_heads + q_head) * (kHeadDim / kPartDims) + part;
  const int64_t row = args.rows[list].row;
  while (LoadAcquire(counter) != static_cast<uint32_t>(splits)) __nanosleep(32);
  __syncwarp();
  if (lane == 0) *counter = 0;

  float m = kNoMax, l = 0, o = 0;
#pragma unroll 1
  for (int first = 0; first < splits; first += kCombineBatch) {
    float2 ml = {kNoMax, 0};
    if (first + lane < splits) {
      ml = __ldcg(reinterpret_cast<const float2*>(from + lane * step + args.group * kHeadDim) +
                  head);
    }
    float x[kCombineBatch];
    const float* at = from + head * kHeadDim + part * kPartDims + lane;
    // Not known to be the same in every round, or its multiples would take all registers.
    asm volatile("" : "+l"(step));
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) {
      x[i] = first + i < splits ? __ldcg(at) : 0.0f;
      at += step;
    }
    const float new_m = fmaxf(m, WarpMax(ml.x));
    const float before = Exp2(m - new_m);
    const float weight = Exp2(ml.x - new_m);
    m = new_m;
    l = l * before + WarpSum(weight * ml.y);
    o *= before;
#pragma unroll
    for (int i = 0; i < kCombineBatch; ++i) o += __shfl_sync(kDecodeLanes, weight, i) * x[i];
    from += kCombineBatch * step;
  }
  args.out[(row * args.num_heads + q_head) * kHeadDim + part * kPartDims + lane] =
      __float2bfloat16(__fdividef(o, l));
}

// All warps of the grid, when they have nothing else to do.
template <int kHeadDim>
__device__ __forceinline__ void CombineSplits(const DecodeArgs& args) {
  constexpr int kParts = kHeadDim / kPartDims;
  const int warps = static_cast<int>(blockDim.x / 32 * gridDim.x);
  const int jobs = args.num_rows * args.num_heads * kParts;
#pragma unroll 1
  for (int job = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x); job < jobs;
       job += warps) {
    const int head = job / kParts;
    CombineHead<kHeadDim>(args, head / args.num_heads, head % args.num_heads, job % kParts);
  }
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_DECODE_MERGE_CUH_
