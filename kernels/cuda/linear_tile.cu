// Linear for some tens of rows: out [T, cols] (+)= x [T, in] weight^T [in, cols] + bias, T <= 128,
// up to three products of one x in a launch. Like linear_stream.cu it is bound by reading the
// weights once; with more rows than that kernel takes, x needs larger copies and the products need
// wgmma.
//
//   grid    clusters of 1, 2 or 4 CTAs, one CTA per multiprocessor. The columns of all products, in
//           units of 16, are split evenly over the clusters; a cluster's CTAs share columns and
//           take turns along `in`, so that each reads a part of x.
//   CTA     takes its columns in passes of up to 128: they are M of wgmma, 64 for each of two
//   consumer
//           warpgroups. x, padded to kRows rows, is N. A third warpgroup asks for boxes of 16
//           columns x 64 and kRows rows x 64 of `in`, 128-byte swizzled, in a ring of stages.
//   sums    f32; those of a cluster's CTAs meet in the shared memory of the one that stores them
//   and
//           are added by rank.
//   launch  overlapped: the ring fills with weights before the kernel that makes x has ended.
//   reached in a graph of launches, T = 32 / 64: Qwen2.5-7B gate and up 4.1 / 4.0 TB/s, down 3.7
//   / 3.6,
//           lm_head 4.2 at 32; Llama-3.1-8B gate and up 4.1 / 4.0, down 3.7 / 3.4.
//
// A row's bits are its own wherever the size of the clusters is the same.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_shared.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kConsumers = 2;  // Warpgroups that multiply.
constexpr int kGroup = 128;    // Threads of a warpgroup.
constexpr int kThreads = (kConsumers + 1) * kGroup;
constexpr int kWeightWarps = 3;  // Of the third; its last warp copies x.
constexpr int kMaxStages = 16;
constexpr int kUnit = 16;  // Columns of a box.
constexpr int kBoxK = 64;  // Of `in`, in a box.
constexpr int kSpan = 2;   // Boxes that follow each other belong to one CTA of a cluster.
constexpr int kUnitBytes = kUnit * kBoxK * 2;
constexpr int kPassUnits = kConsumers * 64 / kUnit;
constexpr int kWeightBytes = kPassUnits * kUnitBytes;  // Of a box along `in`.

struct Product {
  const float* bias;
  void* out;  // [T, cols]
  int32_t cols;
  bool f32_out;
  bool accumulate;
};

struct Args {
  CUtensorMap weights[kMaxProducts];  // [cols, in]
  CUtensorMap x;                      // [T, in]
  Product products[kMaxProducts];
  int32_t begin[kMaxProducts + 1];  // Where a product's units begin among all.
  int32_t rows;
  int32_t boxes;  // Along `in`: ceil(in / kBoxK).
  int32_t stages;
  int32_t passes;
};

__device__ __forceinline__ int ProductOf(const Args& a, int unit) {
  return (unit >= a.begin[1] ? 1 : 0) + (unit >= a.begin[2] ? 1 : 0);
}

__device__ __forceinline__ void CopyBox2(uint32_t to, const CUtensorMap* map, int x, int y,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void CopyBox2(uint32_t to, const CUtensorMap* map, int x, int y,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

// ---- wgmma: d [64 x 2 kCount] += a b^T ----------------------------------------------------------

__device__ __forceinline__ void Multiply(float (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, 1, 1, 1, 0, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void Multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, 1, 1, 1, 0, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void Multiply(float (&d)[64], uint64_t a, uint64_t b) {
  Wgmma(d, a, b, true);
}

// ---- shared memory ------------------------------------------------------------------------------

template <int kRows, int kCluster>
struct Shared {
  static constexpr int kDepth = kRows <= 64 ? 2 : 1;  // Boxes along `in`, per stage.
  static constexpr int kXBytes = kRows * kBoxK * 2;
  static constexpr int kBoxBytes = kWeightBytes + kXBytes;
  static constexpr int kStageBytes = kDepth * kBoxBytes;
  static constexpr int kTiles = kRows / 8;  // Of a result, 8 rows of x each.
  static constexpr int kOwnTiles = kTiles / kCluster;
  static_assert(kSpan % kDepth == 0 && kTiles % kCluster == 0);

  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  // Only in clusters: of each rank, this CTA's tiles.
  float4 sums[kCluster > 1 ? kCluster : 0][kConsumers][kOwnTiles][kGroup];
  // The ring follows, 1024-byte aligned. A stage: for each box along `in` the weights in blocks of
  // 64 columns, then x.
};

// A CTA's units and boxes along `in`.
struct Share {
  Deal deal;
  int rank, cluster, boxes;

  __device__ Share(const Args& a, int of_cluster, int in_cluster)
      : deal{a.begin[kMaxProducts], a.passes, of_cluster}, rank(in_cluster), cluster(of_cluster) {
    const int spans = (a.boxes + kSpan - 1) / kSpan;
    boxes = spans > rank ? (spans - rank + cluster - 1) / cluster * kSpan : 0;
  }
  __device__ int Begin(int pass) const { return deal.Begin(pass); }
  __device__ int End(int pass) const { return deal.End(pass); }
  // Where box i of this CTA begins along `in`; it may lie past the end, and is zeros there.
  __device__ int K(int i) const {
    return ((i / kSpan * cluster + rank) * kSpan + i % kSpan) * kBoxK;
  }
};

// ---- producers ----------------------------------------------------------------------------------

// Warps 0 to 2: the weights, which no kernel writes.
template <class SharedT>
__device__ void ProduceWeights(const Args& a, const Share& share, uint32_t ring, SharedT& shared,
                               int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint64_t policy = EvictFirstPolicy();
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const int begin = share.Begin(pass), units = share.End(pass) - begin;
    const int index = lane * kWeightWarps + warp;  // Box of a stage.
    const int depth = index / kPassUnits, local = index % kPassUnits;
    const bool active = depth < SharedT::kDepth && local < units;
    const int unit = begin + (active ? local : 0);
    const int product = ProductOf(a, unit);
    const CUtensorMap* const map = &a.weights[product];
    const int row = (unit - a.begin[product]) * kUnit;
    const uint32_t offset = static_cast<uint32_t>(depth * SharedT::kBoxBytes + local * kUnitBytes);
    for (int i = 0; i < share.boxes; i += SharedT::kDepth, slot.Next(a.stages)) {
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      if (active) {
        CopyBox2(ring + static_cast<uint32_t>(slot.stage * SharedT::kStageBytes) + offset, map,
                 share.K(i + depth), row, &shared.full[slot.stage], policy);
      }
      __syncwarp();
    }
  }
}

// One thread: x, and the count of all bytes.
template <class SharedT>
__device__ void ProduceX(const Args& a, const Share& share, uint32_t ring, SharedT& shared) {
  WaitForPrevious();
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const int units = share.End(pass) - share.Begin(pass);
    for (int i = 0; i < share.boxes; i += SharedT::kDepth, slot.Next(a.stages)) {
      uint64_t* const full = &shared.full[slot.stage];
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      BarrierArriveExpect(
          full, static_cast<uint32_t>(SharedT::kDepth * (units * kUnitBytes + SharedT::kXBytes)));
#pragma unroll
      for (int depth = 0; depth < SharedT::kDepth; ++depth) {
        CopyBox2(ring + static_cast<uint32_t>(slot.stage * SharedT::kStageBytes +
                                              depth * SharedT::kBoxBytes + kWeightBytes),
                 &a.x, share.K(i + depth), 0, full);
      }
    }
  }
}

// ---- consumers ----------------------------------------------------------------------------------

// Where a warp stores the results of its unit of 16 columns.
struct Target {
  const Product* product;
  int column;     // The unit's first.
  float bias[2];  // Of the lane's columns, lane / 4 and lane / 4 + 8.

  __device__ Target(const Args& a, int unit) {
    const int index = ProductOf(a, unit), lane = static_cast<int>(threadIdx.x) % 32;
    product = &a.products[index];
    column = (unit - a.begin[index]) * kUnit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = column + lane / 4 + 8 * i;
      bias[i] = product->bias != nullptr && own < product->cols ? product->bias[own] : 0.0f;
    }
  }

  // Stores rows [row, row + 8) of x, of which `rows` are there; a lane holds rows 2 (lane % 4) and
  // 2 (lane % 4) + 1 of its columns.
  __device__ __forceinline__ void Store(int row, int rows, float4 sums) const {
    sums = {sums.x + bias[0], sums.y + bias[0], sums.z + bias[1], sums.w + bias[1]};
    if (product->f32_out || product->cols % 2 != 0) {
      StoreSingly(row, rows, sums);
    } else {
      StorePairs(row, rows, sums);
    }
  }

  __device__ __forceinline__ void StoreSingly(int row, int rows, float4 sums) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float values[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int col = column + lane / 4 + 8 * i, x_row = row + lane % 4 * 2 + j;
        if (col >= product->cols || x_row >= rows) continue;
        const int64_t at = int64_t{x_row} * product->cols + col;
        float sum = values[i][j];
        if (product->f32_out) {
          float* const out = static_cast<float*>(product->out) + at;
          *out = product->accumulate ? *out + sum : sum;
        } else {
          auto* const out = static_cast<__nv_bfloat16*>(product->out) + at;
          *out = __float2bfloat16(product->accumulate ? __bfloat162float(*out) + sum : sum);
        }
      }
    }
  }

  // Transposed within the warp, so that a lane has neighbouring columns 2 (lane % 4) and
  // 2 (lane % 4) + 1 of row lane / 4.
  __device__ __forceinline__ void StorePairs(int row, int rows, float4 sums) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int x_row = row + lane / 4, col = column + lane % 4 * 2;
    auto* const out =
        static_cast<__nv_bfloat16*>(product->out) + int64_t{x_row} * product->cols + col;
    const bool accumulate = product->accumulate;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 sum = i == 0 ? float2{sums.x, sums.y} : float2{sums.z, sums.w};
      const bool mine = x_row < rows && col + 8 * i < product->cols;
      auto* const pair = reinterpret_cast<uint32_t*>(out + 8 * i);
      if (accumulate) {
        // What is there, brought into the order of the sums.
        const uint32_t before = TransposeMatrix(mine ? *pair : 0);
        sum.x += __uint_as_float(before << 16);
        sum.y += __uint_as_float(before & 0xffff0000u);
      }
      const uint32_t packed = TransposeMatrix(PackBf16(sum.x, sum.y));
      if (mine) *pair = packed;
    }
  }
};

// sums = this warpgroup's 64 columns of a pass by all rows.
template <int kRows, class SharedT>
__device__ __forceinline__ void MultiplyPass(const Args& a, const Share& share, std::byte* ring,
                                             SharedT& shared, Slot& slot,
                                             float (&sums)[kRows / 2]) {
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const bool first_thread = threadIdx.x % kGroup == 0;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) sums[i] = 0;
  int before = -1;  // The stage before, which may still be read.
  for (int i = 0; i < share.boxes; i += SharedT::kDepth, slot.Next(a.stages)) {
    BarrierWait(&shared.full[slot.stage], slot.parity);
    WgmmaFence();
#pragma unroll
    for (int depth = 0; depth < SharedT::kDepth; ++depth) {
      std::byte* const at = ring + slot.stage * SharedT::kStageBytes + depth * SharedT::kBoxBytes;
      const uint64_t weights = MakeOperand(at + group * (64 * kBoxK * 2), 1024, 0);
      const uint64_t x = MakeOperand(at + kWeightBytes, 1024, 0);
#pragma unroll
      for (uint32_t k = 0; k < kBoxK * 2; k += 32) {
        Multiply(sums, AdvanceOperand(weights, k), AdvanceOperand(x, k));
      }
    }
    WgmmaCommit();
    WgmmaWait<1>();
    if (before >= 0 && first_thread) BarrierArrive(&shared.empty[before]);
    before = slot.stage;
  }
  WgmmaWait<0>();
  KeepInOrder(sums);
  if (before >= 0 && first_thread) BarrierArrive(&shared.empty[before]);
}

template <int kRows, int kCluster, class SharedT>
__device__ void Consume(const Args& a, const Share& share, std::byte* ring, SharedT& shared) {
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  Slot slot(0);
  WaitForPrevious();
  for (int pass = 0; pass < a.passes; ++pass) {
    float sums[kRows / 2];
    MultiplyPass<kRows>(a, share, ring, shared, slot, sums);
    const auto tile = [&](int n) {
      return float4{sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]};
    };
    // A warp holds 16 columns.
    const int unit = share.Begin(pass) + group * 4 + thread / 32;
    const bool stores = unit < share.End(pass);
    if constexpr (kCluster == 1) {
      if (!stores) continue;
      const Target target(a, unit);
#pragma unroll
      for (int n = 0; n < SharedT::kTiles; ++n) {
        if (8 * n < a.rows) target.Store(8 * n, a.rows, tile(n));
      }
    } else {
      // Tile n is stored by rank n % kCluster.
      ClusterWait();  // For the others to have begun.
#pragma unroll
      for (int n = 0; n < SharedT::kTiles; ++n) {
        const uint32_t own = SharedAddress(&shared.sums[share.rank][group][n / kCluster][thread]);
        if (8 * n < a.rows) StoreIn(AddressIn(own, n % kCluster), tile(n));
      }
      ClusterArrive();
      ClusterWait();
      if (!stores) continue;
      const Target target(a, unit);
#pragma unroll
      for (int n = 0; n < SharedT::kOwnTiles; ++n) {
        const int row = (n * kCluster + share.rank) * 8;
        if (row >= a.rows) continue;
        float4 sum = shared.sums[0][group][n][thread];
#pragma unroll
        for (int r = 1; r < kCluster; ++r) sum = Add(sum, shared.sums[r][group][n][thread]);
        target.Store(row, a.rows, sum);
      }
    }
  }
}

template <int kRows, int kCluster>
__global__ __launch_bounds__(kThreads, 1) void TileKernel(const __grid_constant__ Args a) {
  using SharedT = Shared<kRows, kCluster>;
  extern __shared__ __align__(1024) std::byte memory[];
  SharedT& shared = *reinterpret_cast<SharedT*>(memory);
  std::byte* const ring = memory + (sizeof(SharedT) + 1023) / 1024 * 1024;
  if (threadIdx.x < kMaxProducts) PrefetchTensorMap(&a.weights[threadIdx.x]);
  if (threadIdx.x == kMaxProducts) PrefetchTensorMap(&a.x);
  if (threadIdx.x == kThreads - 1) {
    for (int i = 0; i < a.stages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], kConsumers);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) ClusterArrive();
  LetNextStart();
  const Share share(a, kCluster, kCluster > 1 ? ClusterRank() : 0);
  const int producer = static_cast<int>(threadIdx.x) / 32 - kConsumers * kGroup / 32;
  if (producer < 0) {
    Consume<kRows, kCluster>(a, share, ring, shared);
    return;
  }
  if (producer < kWeightWarps) {
    ProduceWeights(a, share, SharedAddress(ring), shared, producer);
  } else if (threadIdx.x % 32 == 0) {
    ProduceX(a, share, SharedAddress(ring), shared);
  }
  __syncwarp();
  // In a cluster there is one pass: its start and its sums.
  if constexpr (kCluster > 1) {
    ClusterWait();
    ClusterArrive();
    ClusterWait();
  }
}

// ---- launcher -----------------------------------------------------------------------------------

// The same for every number of rows, so that a row's bits do not depend on it.
int MaxTileClusters(const Context& context, int cluster) {
  static const int of_two = MaxClusters(context, TileKernel<64, 1>, kThreads, 2);
  static const int of_four = MaxClusters(context, TileKernel<64, 1>, kThreads, 4);
  return cluster == 1 ? context.device.sms : cluster == 2 ? of_two : of_four;
}

template <int kRows, int kCluster>
void Launch(Context& context, Args args) {
  using SharedT = Shared<kRows, kCluster>;
  const auto kernel = TileKernel<kRows, kCluster>;
  static const int prepared = MaxClusters(context, kernel, kThreads, 1);
  RESA_CHECK_GT(prepared, 0);
  constexpr size_t kFixed = (sizeof(SharedT) + 1023) / 1024 * 1024;
  static_assert(kFixed + 3 * SharedT::kStageBytes <= 227 * 1024);
  args.stages = static_cast<int32_t>(std::min<size_t>(
      kMaxStages, (context.device.shared_bytes_per_block - kFixed) / SharedT::kStageBytes));
  const size_t bytes = kFixed + static_cast<size_t>(SharedT::kStageBytes * args.stages);
  const int units = args.begin[kMaxProducts];
  const int clusters = std::min(MaxTileClusters(context, kCluster), units);
  args.passes = ((units + clusters - 1) / clusters + kPassUnits - 1) / kPassUnits;
  RESA_CHECK(Deal::Fits(units, int64_t{clusters} * args.passes)) << "Linear: " << units << " units";
  RESA_CHECK(kCluster == 1 || args.passes == 1)
      << "Linear: " << units << " units for " << clusters << " clusters";
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(clusters * kCluster)),
                   dim3(kThreads), bytes, kCluster, args);
}

template <int kRows>
void LaunchRows(Context& context, const Args& args, int cluster) {
  if (cluster == 4) return Launch<kRows, 4>(context, args);
  if (cluster == 2) return Launch<kRows, 2>(context, args);
  Launch<kRows, 1>(context, args);
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool TileSupports(const LinearParams* params, int count) {
  if (params[0].x.cols % 8 != 0 || !Aligned(params[0].x.data)) return false;
  return std::all_of(params, params + count, [](const LinearParams& p) {
    return Aligned(p.weight.data) && p.weight.rows < (1 << 28);
  });
}

// As many CTAs share columns as leave each cluster one pass: each reads a part of x then.
void LinearTile(Context& context, const LinearParams* params, int count) {
  int64_t units = 0;
  for (int i = 0; i < count; ++i) units += (params[i].weight.rows + kUnit - 1) / kUnit;
  const auto one_pass = [&](int cluster) {
    return units <= int64_t{kPassUnits} * MaxTileClusters(context, cluster);
  };
  LinearTileWith(context, params, count, one_pass(4) ? 4 : one_pass(2) ? 2 : 1);
}

void LinearTileWith(Context& context, const LinearParams* params, int count, int cluster) {
  const Matrix& x = params[0].x;
  RESA_CHECK(x.rows >= 1 && x.rows <= kMaxTileRows) << "Linear: " << x.rows << " rows in a tile";
  const uint32_t rows = x.rows <= 32 ? 32 : x.rows <= 64 ? 64 : 128;
  const auto in = static_cast<uint64_t>(x.cols);
  Args args = {};
  args.rows = static_cast<int32_t>(x.rows);
  args.boxes = static_cast<int32_t>((x.cols + kBoxK - 1) / kBoxK);
  args.x = MakeTensorMap(x.data, {in, static_cast<uint64_t>(x.rows)}, {in * 2}, {kBoxK, rows});
  for (int i = 0; i < kMaxProducts; ++i) {
    args.begin[i + 1] = args.begin[i];
    if (i >= count) continue;
    const LinearParams& p = params[i];
    const auto cols = static_cast<uint64_t>(p.weight.rows);
    args.weights[i] = MakeTensorMap(p.weight.data, {in, cols}, {in * 2}, {kBoxK, kUnit});
    args.products[i] = {p.bias, p.out.data, static_cast<int32_t>(cols), p.out.dtype == DType::kF32,
                        p.accumulate};
    args.begin[i + 1] += static_cast<int32_t>((cols + kUnit - 1) / kUnit);
  }
  if (rows == 32) return LaunchRows<32>(context, args, cluster);
  if (rows == 64) return LaunchRows<64>(context, args, cluster);
  LaunchRows<128>(context, args, cluster);
}

}  // namespace resa::kernels::cuda
