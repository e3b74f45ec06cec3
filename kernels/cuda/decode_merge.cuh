#ifndef RESA_KERNELS_CUDA_DECODE_MERGE_CUH_
#define RESA_KERNELS_CUDA_DECODE_MERGE_CUH_

// What becomes of a split once its tokens are attended to: the finishers of a decode attention CTA
// merge the states of its consumer warps, and the last split to arrive those of its row. They do it
// while the consumers go on with the next item.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/decode_shared.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {

inline constexpr int kMergeSplits = 16;  // Partial results merged at a time.

// A lane's part of a head's vector of d.
template <int kCount>
struct alignas(4 * kCount) Floats {
  float at[kCount];
};

template <int kCount>
__device__ __forceinline__ Floats<kCount> LoadFromL2(const float* from) {
  if constexpr (kCount == 4) {
    const float4 x = __ldcg(reinterpret_cast<const float4*>(from));
    return {{x.x, x.y, x.z, x.w}};
  } else {
    const float2 x = __ldcg(reinterpret_cast<const float2*>(from));
    return {{x.x, x.y}};
  }
}

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

// Adds up to kMax states in order; lane i has (m, l) of state i, kNoMax and 0 past the last, and
// `load` gives its vector.
template <int kMax, int kCount, class Load>
__device__ __forceinline__ void MergeStates(int count, float2 ml, Load load,
                                            HeadState<kCount>* state) {
  Floats<kCount> part[kMax];
#pragma unroll
  for (int i = 0; i < kMax; ++i) {
    part[i] = i < count ? load(i) : Floats<kCount>{};
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
    const float w = __shfl_sync(kDecodeLanes, weight, i);
    if (i >= count) continue;
#pragma unroll
    for (int j = 0; j < kCount; ++j) state->o.at[j] += w * part[i].at[j];
  }
}

// kFinishers warps; finisher w has heads w, w + kFinishers, ...
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
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        BarrierWait(&s_.merge_full, merges++ & 1);
        Finish(item, tile * 8, min(8, args_.group - tile * 8));
      }
      __syncwarp();
      if (lane_ == 0) BarrierArrive(&s_.item_empty[slot]);
    }
  }

 private:
  static constexpr int kMost = (8 + kFinishers - 1) / kFinishers;  // Heads of a warp and tile.

  // `heads` heads of the group from first_head on, whose states lie in shared memory.
  __device__ void Finish(const Item& item, int first_head, int heads) {
    const int states = min(kConsumers, item.units);
    State state[kMost];
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int head = warp_ + n * kFinishers;
      if (head >= heads) continue;
      const float2 ml = lane_ < states ? s_.ml[lane_][head] : float2{kNoMax, 0};
      MergeStates<kConsumers>(
          states, ml,
          [&](int i) {
            return *reinterpret_cast<const Floats<kCount>*>(&s_.o[i][head][lane_ * kCount]);
          },
          &state[n]);
    }
    __syncwarp();
    if (lane_ == 0) BarrierArrive(&s_.merge_empty);
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int head = warp_ + n * kFinishers;
      if (head >= heads) continue;
      if (item.splits == 1 || MergeSplits(item, first_head + head, &state[n])) {
        StoreOutput(item, first_head + head, state[n]);
      }
    }
  }

  // Stores a split's state; the last of 16 neighbours merges them, and the last of those merges
  // all. True for the warp that has the whole row's state in the end.
  __device__ bool MergeSplits(const Item& item, int head, State* state) const {
    const int first = item.split / kMergeSplits * kMergeSplits;
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

  __device__ void StorePartial(const Item& item, int split, int head, const State& state) const {
    float* const to = Partial(item, split);
    *reinterpret_cast<Floats<kCount>*>(to + head * kHeadDim + lane_ * kCount) = state.o;
    if (lane_ == 0) {
      reinterpret_cast<float2*>(to + args_.group * kHeadDim)[head] = {state.m, state.l};
    }
  }

  // Counts this warp in among `members`; the counter is zero again after the last, which sees what
  // the others stored.
  __device__ bool LastToArrive(const Item& item, int split, int head, int members) const {
    uint32_t before = 0;
    __syncwarp();
    if (lane_ == 0) {
      before = CountIn(args_.counters + 1 + Slot(item, split) * args_.group + head, members - 1);
    }
    return __shfl_sync(kDecodeLanes, before, 0) == static_cast<uint32_t>(members - 1);
  }

  // Of splits first, first + stride, ...
  __device__ State MergePartials(const Item& item, int first, int stride, int count,
                                 int head) const {
    State state;
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

  __device__ void StoreOutput(const Item& item, int head, const State& state) const {
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
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_DECODE_MERGE_CUH_
