#ifndef RESA_KERNELS_CUDA_SAMPLE_ROW_CUH_
#define RESA_KERNELS_CUDA_SAMPLE_ROW_CUH_

// A row of logits in the shared memory of a cluster of CTAs: how it is cut, how threads walk it,
// how the CTAs exchange what they found, and the pick of a token by the running weight.
//
// A row is cut into one slice of ids per CTA, a slice into one run per warp, a run into steps of
// 128 ids, four to a lane: a thread meets the same elements in every pass, so passes need barriers
// only for what they exchange. Every sum has an order that is fixed by the vocabulary's size.

#include <cooperative_groups.h>

#include <cstdint>
#include <utility>

#include "kernels/cuda/sample_warp.cuh"

namespace resa::kernels::cuda::sampling {

// Of 8, only 30 clusters with two CTAs per multiprocessor fit an H200: 32 rows would be two waves.
inline constexpr int kCluster = 7;
inline constexpr int kWarps = 16;
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kStep = 4 * kWarp;  // Ids that a warp takes at a time.
inline constexpr int kMaxSteps = 25;     // Of a warp's run: 200 KiB of shared memory.
static_assert(kCluster <= kWarps && kWarps <= kWarp && kMaxSteps <= kWarp);

// One CTA's slice of a row, as one thread sees it.
class RowSlice {
 public:
  __device__ RowSlice(float4* values, int steps)
      : values_(values),
        steps_(steps),
        cluster_(cooperative_groups::this_cluster()),
        rank_(static_cast<int>(cluster_.block_rank())),
        begin_(rank_ * kWarps * steps * kStep) {}

  __device__ __forceinline__ float4* values() const { return values_; }  // [kWarps * steps * kWarp]
  __device__ __forceinline__ int steps() const { return steps_; }        // Per warp.
  __device__ __forceinline__ int rank() const { return rank_; }          // Of the CTA.
  __device__ __forceinline__ int begin() const { return begin_; }        // The first id.
  __device__ __forceinline__ int end() const { return begin_ + kWarps * steps_ * kStep; }

  // Calls body(the lane's four values, the id of the first) for each step of the warp.
  template <class Body>
  __device__ __forceinline__ void ForSteps(const Body& body) const {
    const int first = Warp() * steps_;
#pragma unroll 2
    for (int s = 0; s < steps_; ++s) {
      const int at = (first + s) * kWarp + Lane();
      body(values_[at], begin_ + 4 * at);
    }
  }
  template <class Body>
  __device__ __forceinline__ void ForTokens(const Body& body) const {
    ForSteps([&](float4& v, int id) {
      body(v.x, id);
      body(v.y, id + 1);
      body(v.z, id + 2);
      body(v.w, id + 3);
    });
  }

  // Where `mine` lies in another CTA of the cluster.
  template <class T>
  __device__ __forceinline__ T* Of(int cta, T* mine) const {
    return cluster_.map_shared_rank(mine, static_cast<unsigned>(cta));
  }
  // Which half of the double buffers is to be written. What CTAs exchange is written into both in
  // turn: a CTA may be one barrier of the cluster ahead of another, never two.
  __device__ __forceinline__ int turn() const { return turn_; }
  // Everything that was written before is seen after, in the whole cluster.
  __device__ __forceinline__ void SyncCluster() {
    cluster_.sync();
    turn_ ^= 1;
  }
  // The same in two halves, for before the first exchange.
  __device__ __forceinline__ auto Arrive() { return cluster_.barrier_arrive(); }
  template <class Token>
  __device__ __forceinline__ void Wait(Token&& token) {
    cluster_.barrier_wait(std::forward<Token>(token));
  }

 private:
  float4* const values_;
  const int steps_;
  const cooperative_groups::cluster_group cluster_;
  const int rank_;
  const int begin_;
  int turn_ = 0;
};

struct PickShared {
  double warp_weight[kWarps];
  float step_weight[kWarps][kWarp];
  double cta_weight[2][kCluster];
  int32_t picked;
};

// The first id at which the running weight_of(value in shared memory, id) passes target(the whole).
template <class WeightOf, class Target>
__device__ int32_t Pick(RowSlice& slice, PickShared& shared, const WeightOf& weight_of,
                        const Target& target) {
  const auto of_four = [&](const float4& v, int id) {
    return weight_of(v.x, id) + weight_of(v.y, id + 1) + weight_of(v.z, id + 2) +
           weight_of(v.w, id + 3);
  };
  const int lane = Lane();
  double warp_weight = 0;
  for (int s = 0; s < slice.steps(); s += 8) {
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = (Warp() * slice.steps() + s + i) * kWarp + lane;
      weights[i] =
          s + i < slice.steps() ? of_four(slice.values()[at], slice.begin() + 4 * at) : 0.0f;
    }
    const float step = WarpSumOfEight(weights);
    if (lane % 4 == 0) {
      shared.step_weight[Warp()][s + lane / 4] = step;
      warp_weight += step;
    }
  }
  warp_weight = WarpSum(warp_weight);
  if (lane == 0) shared.warp_weight[Warp()] = warp_weight;
  __syncthreads();
  if (Warp() == 0) {
    const double sum = PairSum<kWarps, double>([&](int i) { return shared.warp_weight[i]; });
    if (lane < kCluster) *slice.Of(lane, &shared.cta_weight[slice.turn()][slice.rank()]) = sum;
  }
  const int turn = slice.turn();
  slice.SyncCluster();
  if (Warp() == 0) {
    const double* const of_cta = shared.cta_weight[turn];
    double left = target(PairSum<kCluster, double>([&](int i) { return of_cta[i]; }));
    if (PickLane(lane < kCluster ? of_cta[lane] : 0.0, &left) == slice.rank()) {
      const int warp = PickLane(lane < kWarps ? shared.warp_weight[lane] : 0.0, &left);
      const int step =
          PickLane(lane < slice.steps() ? double{shared.step_weight[warp][lane]} : 0.0, &left);
      const int at = (warp * slice.steps() + step) * kWarp;
      const float4 v = slice.values()[at + lane];
      const int picked = PickLane(double{of_four(v, slice.begin() + 4 * (at + lane))}, &left);
      // The lane's four, one to a lane.
      const float* const four = reinterpret_cast<const float*>(slice.values() + at + picked);
      const int id = slice.begin() + 4 * (at + picked);
      const int part =
          PickLane(lane < 4 ? double{weight_of(four[lane % 4], id + lane)} : 0.0, &left);
      if (lane < kCluster) *slice.Of(lane, &shared.picked) = id + part;
    }
  }
  slice.SyncCluster();
  return shared.picked;
}

}  // namespace resa::kernels::cuda::sampling

#endif  // RESA_KERNELS_CUDA_SAMPLE_ROW_CUH_
