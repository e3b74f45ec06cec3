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
#include "kernels/cuda/launch.cuh"
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

// Over groups of kLanes neighbours.
template <int kLanes = 32>
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kDecodeLanes, x, step));
  }
  return x;
}
template <int kLanes = 32>
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kDecodeLanes, x, step);
  return x;
}

// ---- partial results --------------------------------------------------------------------------
//
// A word of a partial result says itself that it is there: the memory is zero before, a zero is
// stored as -0, and whoever has combined the results makes the memory zero again. So a result takes
// one way through the L2, not three: store and wait for it, count, load.

__device__ __forceinline__ uint32_t* PartialOf(const DecodeArgs& args, int64_t item, int head_dim) {
  return args.partials + item * PartialWords(args.group, head_dim);
}

__device__ __forceinline__ uint32_t NotZero(float x) {
  return x == 0 ? 0x80000000u : __float_as_uint(x);
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
    WaitForPrevious();
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
        BarrierArrive(&s_.merge_empty);
      }
      BarrierArrive(&s_.item_empty[slot]);
    }
  }

 private:
  // The states of a head, in the order of the consumers.
  __device__ State Merge(int head, int count) const {
    const int mine = lane_ % kConsumers;
    const float2 ml = mine < count ? s_.ml[mine][head] : float2{kNoMax, 0};
    State state;
    state.m = WarpMax<kConsumers>(ml.x);
    const float weight = Exp2(ml.x - state.m);
    state.l = WarpSum<kConsumers>(weight * ml.y);
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
    constexpr int kParts = kHeadDim / kPartDims;
    uint32_t* const to = PartialOf(
        args_, item.begin + int64_t{item.split} * args_.kv_heads + item.kv_head, kHeadDim);
    uint32_t* const o = to + head * kHeadDim + lane_ * kCount;
    if constexpr (kCount == 4) {
      StoreRelaxed(o, uint4{NotZero(state.o.at[0]), NotZero(state.o.at[1]), NotZero(state.o.at[2]),
                            NotZero(state.o.at[3])});
    } else {
      StoreRelaxed(o, uint2{NotZero(state.o.at[0]), NotZero(state.o.at[1])});
    }
    if (lane_ < kParts) {
      StoreRelaxed(to + args_.group * kHeadDim + (head * kParts + lane_) * 2,
                   uint2{NotZero(state.m), NotZero(state.l)});
    }
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

// Makes the compiler forget what it knows of a value: its multiples would take all registers.
__device__ __forceinline__ void Renew(int64_t* value) { asm volatile("" : "+l"(*value)); }

// Calls function(i) for i from 0 to count, rounded up to a multiple of 8.
template <class Function>
__device__ __forceinline__ void ForSplits(int count, const Function& function) {
#pragma unroll
  for (int begin = 0; begin < kCombineBatch; begin += 8) {
    if (begin >= count) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) function(begin + i);
  }
}

// Combines the splits of 32 dimensions of a head, in order, once they are all stored.
template <int kHeadDim>
__device__ __forceinline__ void CombineHead(const DecodeArgs& args, int list, int q_head,
                                            int part) {
  constexpr int kParts = kHeadDim / kPartDims;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int begin = __ldg(args.item_begin + list);
  const int splits = (__ldg(args.item_begin + list + 1) - begin) / args.kv_heads;
  if (splits <= 1) return;
  const int64_t row = args.rows[list].row;
  const int head = q_head % args.group;
  uint32_t* from = PartialOf(args, begin + q_head / args.group, kHeadDim);
  int64_t step = args.kv_heads * PartialWords(args.group, kHeadDim);

  float m = kNoMax, l = 0, o = 0;
#pragma unroll 1
  for (int first = 0; first < splits; first += kCombineBatch) {
    const int count = min(kCombineBatch, splits - first);
    uint32_t* const o_at = from + head * kHeadDim + part * kPartDims + lane;
    uint32_t* const ml_at = from + lane * step + args.group * kHeadDim + (head * kParts + part) * 2;
    uint2 ml = {0, 0};
    uint32_t x[kCombineBatch] = {};
    bool missing;
#pragma unroll 1
    do {
      if (lane < count && (ml.x == 0 || ml.y == 0)) ml = LoadRelaxed2(ml_at);
      uint32_t* at = o_at;
      Renew(&step);
      ForSplits(count, [&](int i) {
        if (i < count && x[i] == 0) x[i] = LoadRelaxed(at);
        at += step;
      });
      missing = lane < count && (ml.x == 0 || ml.y == 0);
      ForSplits(count, [&](int i) { missing |= i < count && x[i] == 0; });
    } while (__any_sync(kDecodeLanes, missing));
    const float split_m = lane < count ? __uint_as_float(ml.x) : kNoMax;
    const float new_m = fmaxf(m, WarpMax(split_m));
    const float before = Exp2(m - new_m);
    const float weight = Exp2(split_m - new_m);
    m = new_m;
    l = l * before + WarpSum(weight * __uint_as_float(ml.y));
    o *= before;
    ForSplits(count,
              [&](int i) { o += __shfl_sync(kDecodeLanes, weight, i) * __uint_as_float(x[i]); });
    if (lane < count) *reinterpret_cast<uint2*>(ml_at) = uint2{0, 0};
    uint32_t* at = o_at;
    Renew(&step);
    ForSplits(count, [&](int i) {
      if (i < count) *at = 0;
      at += step;
    });
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
