// Linear for a few rows: out [T, cols] (+)= x [T, in] weight^T [in, cols] + bias, T <= 8, up to
// three products of one x in a launch.
//
//   bound   reading the weights once: cols x in x 2 bytes at the speed of memory.
//   grid    clusters of 1 or 2 CTAs, one CTA per multiprocessor. The columns of all products, one
//           behind the other, are split evenly over the clusters, down to single columns: they are
//           rows of weight, and each takes one copy. A cluster's CTAs share columns and take every
//           second chunk of `in`.
//   CTA     takes its columns in passes of up to 32 kColumnWarps. Five warps fill a ring of stages
//   in
//           shared memory (one chunk of a pass's columns and of all rows of x) by bulk copies.
//           Eight multiply with mma.m16n8k16, 16 columns being M and the rows of x N: kColumnWarps
//           warps share the columns of a pass, 8 / kColumnWarps the steps along `in`.
//   sums    f32. Those of the warps that share columns meet in shared memory, those of a cluster's
//           CTAs in the shared memory of the one that stores them, both added in a fixed order.
//   launch  overlapped: the ring fills with weights before the kernel that makes x has ended.
//   reached in a graph of launches, T = 1: Qwen2.5-7B qkv 3.3 TB/s (10.0 us), o 3.2, down 3.9;
//           Llama-3.1-8B 3.5, 3.4 and 4.0. What is missing is the time between the last sums of one
//           launch and the first weights of the next, about 3 us.
//
// Neither the split of the sums nor their order depends on T: with one configuration a row's bits
// are its own.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_shared.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kConsumers = 8;    // Warps that multiply.
constexpr int kWeightWarps = 4;  // Warps that copy weights; one more copies x.
constexpr int kThreads = (kConsumers + kWeightWarps + 1) * 32;
constexpr int kMaxStages = 32;
constexpr int kUnit = 32;  // Of `in`: what a warp takes at a time.
constexpr int kUnits = 2;  // Of a chunk, per warp.

struct Product {
  const __nv_bfloat16* weight;  // [cols, in]
  const float* bias;
  void* out;  // [T, cols]
  int32_t cols;
  bool f32_out;
  bool accumulate;
};

struct Args {
  Product products[kMaxProducts];
  int32_t begin[kMaxProducts + 1];  // Where a product's columns begin among all.
  const __nv_bfloat16* x;           // [rows, in]
  int32_t rows, in;
  int32_t stages;
  int32_t passes;
  int32_t stage_rows;  // Columns of the largest pass, then rows of x.
  int32_t unit;        // Columns are dealt out in multiples of this.
};

__device__ __forceinline__ int ProductOf(const Args& a, int column) {
  return (column >= a.begin[1] ? 1 : 0) + (column >= a.begin[2] ? 1 : 0);
}

// A CTA's columns and chunks.
struct Share {
  Deal deal;  // In units of a.unit columns.
  int unit, columns, rank, cluster, chunk, chunks;

  __device__ Share(const Args& a, int of_cluster, int in_cluster, int of_chunk)
      : deal{(a.begin[kMaxProducts] + a.unit - 1) / a.unit, a.passes, of_cluster},
        unit(a.unit),
        columns(a.begin[kMaxProducts]),
        rank(in_cluster),
        cluster(of_cluster),
        chunk(of_chunk) {
    const int all = (a.in + chunk - 1) / chunk;
    chunks = all > rank ? (all - rank + cluster - 1) / cluster : 0;
  }
  __device__ int Begin(int pass) const { return min(deal.Begin(pass) * unit, columns); }
  __device__ int End(int pass) const { return min(deal.End(pass) * unit, columns); }
  __device__ int K(int i) const { return (rank + i * cluster) * chunk; }
};

// Part of a row of weights, read once, to shared memory; `barrier` counts the bytes.
__device__ __forceinline__ void CopyOnce(uint32_t to, const void* from, uint32_t bytes,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// ---- shared memory ------------------------------------------------------------------------------

// A warp's sums are kFragments fragments of 16 columns x 8 rows; lane l holds columns l / 4 and
// l / 4 + 8 of rows 2 (l % 4) and 2 (l % 4) + 1, as {column, row}: {0, 0}, {0, 1}, {8, 0}, {8, 1}.
constexpr int kFragments = 2;

template <int kColumnWarps, int kCluster>
struct Shared {
  static constexpr int kTile = 16 * kFragments * kColumnWarps;
  static constexpr int kStepWarps = kConsumers / kColumnWarps;
  static constexpr int kChunk = kUnit * kUnits * kStepWarps;  // Of `in`, per stage.
  // Bytes between a stage's rows: half the banks on, so that the lanes that read 64 bytes of two
  // rows meet no conflict.
  static constexpr uint32_t kStride = kChunk * 2 + 64;
  static constexpr int kOwnFragments = kColumnWarps * kFragments / kCluster;
  static_assert(kOwnFragments * kCluster == kColumnWarps * kFragments);

  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t gathered;
  // Both twice, for even and odd passes, so that a pass need not wait for the one before.
  float4 warp_sums[2][kStepWarps - 1][kColumnWarps][kFragments][32];
  float4 cta_sums[2][kCluster][kOwnFragments][32];  // Only used in clusters.
  // The ring follows, 128-byte aligned.
};

// ---- producers ----------------------------------------------------------------------------------

// The weights, by kWeightWarps warps that take rows of a stage in turn: one warp alone could not
// ask often enough. No kernel writes weights: there is nothing to wait for.
template <class SharedT>
__device__ void ProduceWeights(const Args& a, const Share& share, uint32_t ring, SharedT& shared,
                               int warp) {
  static_assert(SharedT::kTile <= 32 * kWeightWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane * kWeightWarps + warp;
  const uint64_t policy = EvictFirstPolicy();
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const int begin = share.Begin(pass), columns = share.End(pass) - begin;
    const int column = begin + min(row, columns - 1);
    const int product = ProductOf(a, column);
    const __nv_bfloat16* const from =
        a.products[product].weight + int64_t{column - a.begin[product]} * a.in;
    for (int i = 0; i < share.chunks; ++i, slot.Next(a.stages)) {
      const int k = share.K(i);
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      if (row < columns) {
        CopyOnce(ring + static_cast<uint32_t>(slot.stage * a.stage_rows + row) * SharedT::kStride,
                 from + k, static_cast<uint32_t>(min(SharedT::kChunk, a.in - k)) * 2,
                 &shared.full[slot.stage], policy);
      }
      __syncwarp();
    }
  }
}

// x, by one warp, which also announces the bytes of a stage.
template <class SharedT>
__device__ void ProduceX(const Args& a, const Share& share, uint32_t ring, SharedT& shared) {
  const int row = static_cast<int>(threadIdx.x) % 32;
  const __nv_bfloat16* const from = a.x + int64_t{min(row, a.rows - 1)} * a.in;
  const int first_row = a.stage_rows - a.rows;
  WaitForPrevious();
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const int columns = share.End(pass) - share.Begin(pass);
    for (int i = 0; i < share.chunks; ++i, slot.Next(a.stages)) {
      const int k = share.K(i);
      const auto bytes = static_cast<uint32_t>(min(SharedT::kChunk, a.in - k)) * 2;
      uint64_t* const full = &shared.full[slot.stage];
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      if (row == 0) BarrierArriveExpect(full, bytes * static_cast<uint32_t>(columns + a.rows));
      if (row < a.rows) {
        CopyBulk(ring + static_cast<uint32_t>(slot.stage * a.stage_rows + first_row + row) *
                            SharedT::kStride,
                 from + k, bytes, full);
      }
      __syncwarp();
    }
  }
}

// ---- consumers ----------------------------------------------------------------------------------

// sums += one unit. `weights` and `x`: the lane's row and place in the unit. Lane l reads eight
// consecutive values of rows l / 4 of both: the operands of two instructions of 16, since both take
// the values along `in` in the same order.
__device__ __forceinline__ void MultiplyUnit(uint32_t weights, uint32_t x, uint32_t stride,
                                             float (&sums)[kFragments][4]) {
  const uint4 b = LoadShared(x);
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    const uint32_t at = weights + static_cast<uint32_t>(16 * f) * stride;
    const uint4 low = LoadShared(at), high = LoadShared(at + 8 * stride);
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    Mma16x8x16(sums[f], first, b.x, b.y);
    Mma16x8x16(sums[f], second, b.z, b.w);
  }
}

// What is stored beside the products of a lane's two values of a column: bias, and what `out` held.
__device__ __forceinline__ float2 StartOf(const Args& a, int column, int end, int row) {
  float2 start = {0, 0};
  if (column >= end) return start;
  const int product = ProductOf(a, column);
  const Product& p = a.products[product];
  const int own = column - a.begin[product];
  if (p.bias != nullptr) start.x = start.y = p.bias[own];
  if (!p.accumulate) return start;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + i >= a.rows) continue;
    const int64_t at = int64_t{row + i} * p.cols + own;
    (i == 0 ? start.x : start.y) +=
        p.f32_out ? static_cast<const float*>(p.out)[at]
                  : __bfloat162float(static_cast<const __nv_bfloat16*>(p.out)[at]);
  }
  return start;
}

__device__ __forceinline__ void StoreColumn(const Args& a, int column, int end, int row, float s0,
                                            float s1) {
  if (column >= end) return;
  const int product = ProductOf(a, column);
  const Product& p = a.products[product];
  const float sums[2] = {s0, s1};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + i >= a.rows) continue;
    const int64_t at = int64_t{row + i} * p.cols + column - a.begin[product];
    if (p.f32_out) {
      static_cast<float*>(p.out)[at] = sums[i];
    } else {
      static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(sums[i]);
    }
  }
}

// A fragment whose first column is `column`.
__device__ __forceinline__ float4 StartOfFragment(const Args& a, int column, int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float2 low = StartOf(a, column + lane / 4, end, lane % 4 * 2);
  const float2 high = StartOf(a, column + lane / 4 + 8, end, lane % 4 * 2);
  return {low.x, low.y, high.x, high.y};
}
__device__ __forceinline__ void StoreFragment(const Args& a, int column, int end, float4 sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  StoreColumn(a, column + lane / 4, end, lane % 4 * 2, sums.x, sums.y);
  StoreColumn(a, column + lane / 4 + 8, end, lane % 4 * 2, sums.z, sums.w);
}

template <int kColumnWarps, int kCluster>
class Consumer {
  using SharedT = Shared<kColumnWarps, kCluster>;
  static constexpr int kStepWarps = SharedT::kStepWarps;

 public:
  __device__ Consumer(const Args& args, const Share& share, uint32_t ring, SharedT& shared)
      : a_(args),
        share_(share),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        column_warp_(static_cast<int>(threadIdx.x) / 32 % kColumnWarps),
        step_warp_(static_cast<int>(threadIdx.x) / 32 / kColumnWarps) {
    const auto place = static_cast<uint32_t>(step_warp_ * kUnit * 2 + lane_ % 4 * 16);
    const int column = 16 * kFragments * column_warp_ + lane_ / 4;
    // Past the last row of x, that row again; it is not stored.
    const int row = a_.stage_rows - a_.rows + min(lane_ / 4, a_.rows - 1);
    weights_at_ = ring + static_cast<uint32_t>(column) * SharedT::kStride + place;
    x_at_ = ring + static_cast<uint32_t>(row) * SharedT::kStride + place;
  }

  __device__ void Run() {
    WaitForPrevious();
    for (int pass = 0; pass < a_.passes; ++pass) {
      const int begin = share_.Begin(pass) + 16 * kFragments * column_warp_;
      const int end = share_.End(pass);
      // Asked for now, needed at the end.
      float4 start[kFragments];
      if (step_warp_ == 0) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          if (Owns(f)) start[f] = StartOfFragment(a_, begin + 16 * f, end);
        }
      }
      float4 sums[kFragments];
      Multiply(sums);
      GatherWarps(pass, sums);
      if (step_warp_ > 0) continue;
      if constexpr (kCluster > 1) GatherCluster(pass, sums);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if (Owns(f)) StoreFragment(a_, begin + 16 * f, end, Add(sums[f], start[f]));
      }
    }
    if (kCluster > 1 && step_warp_ > 0) ClusterWait();
  }

 private:
  // Fragment f among those of all column warps, and whether this CTA stores it.
  __device__ int Index(int f) const { return column_warp_ * kFragments + f; }
  __device__ bool Owns(int f) const { return Index(f) % kCluster == share_.rank; }

  // This warp's steps of a pass.
  __device__ __forceinline__ void Multiply(float4 (&to)[kFragments]) {
    float sums[kFragments][4] = {};
    for (int i = 0; i < share_.chunks; ++i, slot_.Next(a_.stages)) {
      const int units = min(SharedT::kChunk, a_.in - share_.K(i)) / kUnit;
      const uint32_t stage = static_cast<uint32_t>(slot_.stage * a_.stage_rows) * SharedT::kStride;
      BarrierWait(&shared_.full[slot_.stage], slot_.parity);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (step_warp_ + u * kStepWarps < units) {
          const uint32_t at = stage + static_cast<uint32_t>(u * kStepWarps * kUnit * 2);
          MultiplyUnit(weights_at_ + at, x_at_ + at, SharedT::kStride, sums);
        }
      }
      __syncwarp();
      if (lane_ == 0) BarrierArrive(&shared_.empty[slot_.stage]);
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      to[f] = {sums[f][0], sums[f][1], sums[f][2], sums[f][3]};
    }
  }

  // The sums of the warps that share columns meet in the first of them.
  __device__ __forceinline__ void GatherWarps(int pass, float4 (&sums)[kFragments]) {
    auto& others = shared_.warp_sums[pass % 2];
    if (step_warp_ > 0) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) others[step_warp_ - 1][column_warp_][f][lane_] = sums[f];
    }
    NamedBarrier(1, kConsumers * 32);
    if (step_warp_ > 0) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int w = 0; w < kStepWarps - 1; ++w) {
        sums[f] = Add(sums[f], others[w][column_warp_][f][lane_]);
      }
    }
  }

  // Each fragment goes to the CTA that stores it, and is added up there by rank.
  __device__ __forceinline__ void GatherCluster(int pass, float4 (&sums)[kFragments]) {
    auto& of_rank = shared_.cta_sums[pass % 2];
    if (pass == 0) ClusterWait();  // For the others to have begun.
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const uint32_t own = SharedAddress(&of_rank[share_.rank][Index(f) / kCluster][lane_]);
      StoreIn(AddressIn(own, Index(f) % kCluster), sums[f]);
    }
    __syncwarp();
    if (lane_ < kCluster) ArriveIn(AddressIn(SharedAddress(&shared_.gathered), lane_));
    WaitForCluster(&shared_.gathered, static_cast<uint32_t>(pass % 2));
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (!Owns(f)) continue;
      sums[f] = of_rank[0][Index(f) / kCluster][lane_];
#pragma unroll
      for (int r = 1; r < kCluster; ++r)
        sums[f] = Add(sums[f], of_rank[r][Index(f) / kCluster][lane_]);
    }
  }

  const Args& a_;
  const Share& share_;
  SharedT& shared_;
  const int lane_, column_warp_, step_warp_;
  uint32_t weights_at_, x_at_;  // In stage 0.
  Slot slot_{0};
};

template <int kColumnWarps, int kCluster>
__global__ __launch_bounds__(kThreads, 1) void StreamKernel(const __grid_constant__ Args a) {
  using SharedT = Shared<kColumnWarps, kCluster>;
  extern __shared__ __align__(128) std::byte memory[];
  SharedT& shared = *reinterpret_cast<SharedT*>(memory);
  const uint32_t ring = SharedAddress(memory) + (sizeof(SharedT) + 127) / 128 * 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], kConsumers);
    }
    BarrierInit(&shared.gathered, kCluster * kColumnWarps);
    BarrierInitFence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) ClusterArrive();
  LetNextStart();
  const Share share(a, kCluster, kCluster > 1 ? ClusterRank() : 0, SharedT::kChunk);
  const int producer = static_cast<int>(threadIdx.x) / 32 - kConsumers;
  if (producer < 0) {
    Consumer<kColumnWarps, kCluster>(a, share, ring, shared).Run();
    return;
  }
  if (producer < kWeightWarps) {
    ProduceWeights(a, share, ring, shared, producer);
  } else {
    ProduceX(a, share, ring, shared);
  }
  if constexpr (kCluster > 1) ClusterWait();
}

// ---- launcher -----------------------------------------------------------------------------------

template <int kColumnWarps, int kCluster>
bool Launch(Context& context, Args args, size_t most_shared_bytes) {
  using SharedT = Shared<kColumnWarps, kCluster>;
  const auto kernel = StreamKernel<kColumnWarps, kCluster>;
  static const int max_clusters = MaxClusters(context, kernel, kThreads, kCluster);
  const int columns = args.begin[kMaxProducts];
  const int clusters = std::min(max_clusters, columns);
  args.unit = columns / clusters >= 64 ? 8 : 1;
  const int units = (columns + args.unit - 1) / args.unit;
  const int share = (units + clusters - 1) / clusters * args.unit;
  args.passes = (share + SharedT::kTile - 1) / SharedT::kTile;
  const int parts = clusters * args.passes;
  RESA_CHECK(Deal::Fits(units, parts)) << "Linear: " << columns << " columns";
  args.stage_rows = (units + parts - 1) / parts * args.unit + args.rows;

  constexpr size_t kFixed = (sizeof(SharedT) + 127) / 128 * 128;
  const size_t stage = size_t{SharedT::kStride} * static_cast<size_t>(args.stage_rows);
  // Weights are read in whole tiles: what follows the last stage must be the CTA's memory.
  const size_t slack =
      size_t{SharedT::kStride} * static_cast<size_t>(std::max(0, SharedT::kTile - args.stage_rows));
  if (kFixed + slack + 2 * stage > most_shared_bytes) return false;
  args.stages = static_cast<int32_t>(
      std::min<size_t>(kMaxStages, (most_shared_bytes - kFixed - slack) / stage));
  const size_t bytes = kFixed + slack + stage * static_cast<size_t>(args.stages);
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(clusters * kCluster)),
                   dim3(kThreads), bytes, kCluster, args);
  return true;
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool StreamSupports(const LinearParams* params, int count) {
  if (params[0].x.cols % kUnit != 0 || !Aligned(params[0].x.data)) return false;
  int64_t columns = 0;
  for (int i = 0; i < count; ++i) {
    if (!Aligned(params[i].weight.data)) return false;
    columns += params[i].weight.rows;
  }
  return columns < (int64_t{1} << 30) && params[0].x.cols < (int64_t{1} << 30);
}

bool LinearStreamWith(Context& context, const LinearParams* params, int count,
                      const StreamConfig& config) {
  Args args = {};
  const Matrix& x = params[0].x;
  RESA_CHECK(x.rows >= 1 && x.rows <= kMaxStreamRows) << "Linear: " << x.rows << " rows to stream";
  args.x = static_cast<const __nv_bfloat16*>(x.data);
  args.rows = static_cast<int32_t>(x.rows);
  args.in = static_cast<int32_t>(x.cols);
  for (int i = 0; i < kMaxProducts; ++i) {
    args.begin[i + 1] = args.begin[i];
    if (i >= count) continue;
    const LinearParams& p = params[i];
    args.products[i] = {static_cast<const __nv_bfloat16*>(p.weight.data),
                        p.bias,
                        p.out.data,
                        static_cast<int32_t>(p.weight.rows),
                        p.out.dtype == DType::kF32,
                        p.accumulate};
    args.begin[i + 1] += args.products[i].cols;
  }
  switch (config.column_warps * 10 + config.cluster) {
    case 11:
      return Launch<1, 1>(context, args, config.shared_bytes);
    case 21:
      return Launch<2, 1>(context, args, config.shared_bytes);
    case 22:
      return Launch<2, 2>(context, args, config.shared_bytes);
  }
  RESA_CHECK(false) << "Linear: no kernel for " << config.column_warps << " warps of columns in "
                    << "clusters of " << config.cluster;
  return false;
}

// With few columns for each multiprocessor reading x takes as long as reading weights, unless two
// CTAs share the columns and each reads half of x.
void LinearStream(Context& context, const LinearParams* params, int count) {
  int64_t columns = 0;
  for (int i = 0; i < count; ++i) columns += params[i].weight.rows;
  const int64_t share = (columns + context.device.sms - 1) / context.device.sms;
  const bool one_row = params[0].x.rows == 1;
  StreamConfig config;
  if (share > 32) {
    config.column_warps = 2;
  } else if (share > 16 && !one_row) {
    config.column_warps = config.cluster = 2;
  }
  RESA_CHECK(LinearStreamWith(context, params, count, config));
}

}  // namespace resa::kernels::cuda
