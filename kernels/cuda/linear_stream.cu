// Linear for few rows: out [T, cols] (+)= x [T, in] weight^T [in, cols] + bias, T <= 64, up to
// three products of one x in a launch.
//
//   bound   reading the weights once: cols x in x 2 bytes at the speed of memory.
//   grid    clusters of 1 to 4 CTAs, one CTA per multiprocessor. The columns of all products, one
//           behind the other, are split evenly over the clusters, down to single columns: they are
//           rows of weight, and each takes one copy.
//   CTA     takes its columns in passes of up to 32 kRowWarps, and of `in` every cluster-th chunk.
//           One warp fills a ring of stages in shared memory (a stage: one chunk of the pass's
//           columns and of all rows of x) by bulk copies. Eight warps multiply with mma.m16n8k16,
//           the weights being the 16 x 16 operand, so that rows of x come in eights: kRowWarps
//           warps share the columns, and 8 / kRowWarps the steps of 16 along `in`.
//   sums    f32. Those of the warps that share columns meet in shared memory, those of a cluster's
//           CTAs in the shared memory of the one that stores them, both added in a fixed order.
//   launch  overlapped: the ring is full of weights before the kernel that makes x has ended.
//
// Neither the split of the sums nor their order depends on T: with one configuration a row's bits
// are its own.

#include <cuda_bf16.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kConsumers = 8;  // Warps that multiply.
constexpr int kProducers = 4;  // Warps that copy.
constexpr int kThreads = (kConsumers + kProducers) * 32;
constexpr int kMaxStages = 32;
constexpr int kMaxProducts = 3;
constexpr int kStep = 16;          // Of `in`, per instruction.
constexpr int kStagePadding = 16;  // Bytes between rows of a stage: ldmatrix without conflicts.

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
  int32_t chunk;       // Of `in`, per stage: 64, 128 or 256.
  int32_t log_pieces;  // log2(chunk / 8)
  int32_t stages;
  int32_t unit;  // Columns are dealt out in multiples of this.
};

__device__ __forceinline__ int ProductOf(const Args& a, int column) {
  return (column >= a.begin[1] ? 1 : 0) + (column >= a.begin[2] ? 1 : 0);
}

// A CTA's columns [begin, end), its chunks and how it goes through both.
struct Share {
  int begin, end, passes, first_chunk, chunk_step, chunks;

  __device__ Share(const Args& a, int cluster, int rank, int tile) {
    const int units = (a.begin[kMaxProducts] + a.unit - 1) / a.unit;
    const int clusters = static_cast<int>(gridDim.x) / cluster;
    const int id = static_cast<int>(blockIdx.x) / cluster;
    begin = Part(units, id, clusters) * a.unit;
    end = min(Part(units, id + 1, clusters) * a.unit, a.begin[kMaxProducts]);
    passes = (end - begin + tile - 1) / tile;
    first_chunk = rank;
    chunk_step = cluster;
    const int all = (a.in + a.chunk - 1) / a.chunk;
    chunks = all > rank ? (all - rank + cluster - 1) / cluster : 0;
  }
  // Where part i of n equal parts of `whole` begins.
  static __device__ int Part(int whole, int i, int n) {
    return static_cast<int>(int64_t{whole} * i / n);
  }
  __device__ int PassBegin(int pass) const { return begin + Part(end - begin, pass, passes); }
  __device__ int K(const Args& a, int i) const { return (first_chunk + i * chunk_step) * a.chunk; }
};

// Copies 16 bytes to shared memory past the registers and the first cache.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}
// Arrives once all copies that this thread has asked for have landed.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}
__device__ __forceinline__ void LdMatrix2(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address)
               : "memory");
}

// ---- clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of the same place in another CTA of the cluster.
__device__ __forceinline__ uint32_t AddressIn(uint32_t address, int rank) {
  uint32_t to;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address), "r"(rank));
  return to;
}
__device__ __forceinline__ void StoreIn(uint32_t address, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}
__device__ __forceinline__ void ArriveIn(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void WaitForCluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// ---- shared memory ------------------------------------------------------------------------------

// A warp's sums: fragments of 16 columns x 8 rows, lane l holding columns l / 4 and l / 4 + 8 of
// rows 2 (l % 4) and 2 (l % 4) + 1 as {column, row}: {0, 0}, {0, 1}, {8, 0}, {8, 1}.
template <int kRowTiles, int kRowWarps, int kCluster>
struct Shared {
  static constexpr int kFragments = 2 * kRowTiles;  // Per warp.
  static constexpr int kStepWarps = kConsumers / kRowWarps;

  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  // Small enough to have one for even and one for odd passes.
  static constexpr int kBuffers = kRowTiles <= 2 ? 2 : 1;

  uint64_t gathered;
  float4 warp_sums[kBuffers][kStepWarps - 1][kRowWarps][kFragments][32];
  float4 cta_sums[kCluster > 1 ? 2 : 0][kCluster]
                 [(kRowWarps * kFragments + kCluster - 1) / kCluster][32];
  // The ring follows, 128-byte aligned.
};

struct Ring {
  uint32_t base;
  uint32_t stride;       // Bytes from row to row.
  uint32_t stage_bytes;  // Columns of weight first, then rows of x.
};

template <int kTile>
__device__ Ring RingOf(const Args& a, uint32_t base) {
  const auto stride = static_cast<uint32_t>(a.chunk * 2 + kStagePadding);
  return {base, stride, stride * static_cast<uint32_t>(kTile + a.rows)};
}

// ---- producers ----------------------------------------------------------------------------------

// Calls copy(row, piece) for this lane's part of `rows` rows of `pieces` 16-byte pieces; a chunk
// has 2^log_pieces of them, whole or not. Warp `warp` of `warps`.
template <class Copy>
__device__ __forceinline__ void ForPieces(int warp, int warps, int rows, int pieces, int log_pieces,
                                          const Copy& copy) {
  const int index = warp * 32 + static_cast<int>(threadIdx.x) % 32;
  const int piece = index & ((1 << log_pieces) - 1);
  if (piece >= pieces) return;
  const int step = (warps * 32) >> log_pieces;
#pragma unroll 4
  for (int row = index >> log_pieces; row < rows; row += step) copy(row, piece);
}

// The ring as a producer goes through it.
struct Slot {
  int stage = 0;
  uint32_t parity = 1;  // A barrier that has seen no phase lets this one pass.
  __device__ void Next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// The warps that copy weights, before x can be read too.
template <int kTile, class SharedT>
__device__ void ProduceWeights(const Args& a, const Share& share, const Ring& ring, SharedT& shared,
                               int warp, int warps) {
  const uint64_t policy = EvictFirstPolicy();
  const int64_t row_bytes = int64_t{a.in} * 2;
  const std::byte* base[kMaxProducts];  // Of column 0 among all, were they all this product's.
  for (int i = 0; i < kMaxProducts; ++i) {
    base[i] = reinterpret_cast<const std::byte*>(a.products[i].weight) - a.begin[i] * row_bytes;
  }
  Slot slot;
  for (int pass = 0; pass < share.passes; ++pass) {
    const int begin = share.PassBegin(pass), columns = share.PassBegin(pass + 1) - begin;
    for (int i = 0; i < share.chunks; ++i, slot.Next(a.stages)) {
      const int k = share.K(a, i);
      const uint32_t to = ring.base + static_cast<uint32_t>(slot.stage) * ring.stage_bytes;
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      ForPieces(
          warp, warps, columns, min(a.chunk, a.in - k) / 8, a.log_pieces, [&](int row, int piece) {
            const int column = begin + row;
            const std::byte* from = column >= a.begin[2]   ? base[2]
                                    : column >= a.begin[1] ? base[1]
                                                           : base[0];
            CopyAsync(
                to + static_cast<uint32_t>(row) * ring.stride + static_cast<uint32_t>(piece) * 16,
                from + column * row_bytes + k * 2 + piece * 16, policy);
          });
      ArriveAfterCopies(&shared.full[slot.stage]);
    }
  }
}

// The warps that copy x.
template <int kTile, class SharedT>
__device__ void ProduceX(const Args& a, const Share& share, const Ring& ring, SharedT& shared,
                         int warp, int warps) {
  const auto* const x = reinterpret_cast<const std::byte*>(a.x);
  Slot slot;
  WaitForPrevious();
  for (int pass = 0; pass < share.passes; ++pass) {
    for (int i = 0; i < share.chunks; ++i, slot.Next(a.stages)) {
      const int k = share.K(a, i);
      const uint32_t to = ring.base + static_cast<uint32_t>(slot.stage) * ring.stage_bytes +
                          static_cast<uint32_t>(kTile) * ring.stride;
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      ForPieces(
          warp, warps, a.rows, min(a.chunk, a.in - k) / 8, a.log_pieces, [&](int row, int piece) {
            CopyAsync(
                to + static_cast<uint32_t>(row) * ring.stride + static_cast<uint32_t>(piece) * 16,
                x + (int64_t{row} * a.in + k) * 2 + piece * 16);
          });
      ArriveAfterCopies(&shared.full[slot.stage]);
    }
  }
}

// ---- consumers ----------------------------------------------------------------------------------

template <int kRowTiles>
using Sums = float[2][kRowTiles][4];  // 32 columns x 8 kRowTiles rows.

// sums += this warp's steps of a stage.
template <int kRowTiles, int kStepWarps>
__device__ __forceinline__ void MultiplyStage(uint32_t weights, uint32_t x, uint32_t stride,
                                              int first_step, int steps, Sums<kRowTiles>& sums) {
  const uint32_t lane = threadIdx.x % 32;
  // ldmatrix: lanes 0-7, 8-15, 16-23 and 24-31 address the rows of four 8 x 8 matrices. Of the
  // weights: columns 0-7 and 8-15 at k, the same at k + 8. Of x: rows 0-7 at k and k + 8, 8-15.
  const uint32_t weight_at = weights + (lane % 16) * stride + lane / 16 * 16;
  const uint32_t x_at =
      x + (kRowTiles == 1 ? (lane % 8) * stride + lane / 8 % 2 * 16
                          : (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16);
#pragma unroll 2
  for (int step = first_step; step < steps; step += kStepWarps) {
    const auto k = static_cast<uint32_t>(step) * kStep * 2;
    uint32_t w[2][4];
    LdMatrix4(w[0], weight_at + k);
    LdMatrix4(w[1], weight_at + 16 * stride + k);
    if constexpr (kRowTiles == 1) {
      uint32_t b[2];
      LdMatrix2(b, x_at + k);
      Mma16x8x16(sums[0][0], w[0], b[0], b[1]);
      Mma16x8x16(sums[1][0], w[1], b[0], b[1]);
    } else {
#pragma unroll
      for (int n = 0; n < kRowTiles; n += 2) {
        uint32_t b[4];
        LdMatrix4(b, x_at + static_cast<uint32_t>(n) * 8 * stride + k);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Mma16x8x16(sums[m][n], w[m], b[0], b[1]);
          Mma16x8x16(sums[m][n + 1], w[m], b[2], b[3]);
        }
      }
    }
  }
}

__device__ __forceinline__ float4 Add(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ void StoreColumn(const Args& a, int column, int end, int row, float s0,
                                            float s1) {
  if (column >= end) return;
  const int product = ProductOf(a, column);
  const Product& p = a.products[product];
  const int own = column - a.begin[product];
  const float bias = p.bias == nullptr ? 0.0f : p.bias[own];
  const float sums[2] = {s0 + bias, s1 + bias};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + i >= a.rows) return;
    const int64_t at = int64_t{row + i} * p.cols + own;
    if (p.f32_out) {
      float* const out = static_cast<float*>(p.out) + at;
      *out = p.accumulate ? *out + sums[i] : sums[i];
    } else {
      auto* const out = static_cast<__nv_bfloat16*>(p.out) + at;
      *out = __float2bfloat16(p.accumulate ? __bfloat162float(*out) + sums[i] : sums[i]);
    }
  }
}

// Stores a fragment whose first column is `column` and first row `row`.
__device__ __forceinline__ void StoreFragment(const Args& a, int column, int end, int row,
                                              float4 sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  column += lane / 4;
  row += lane % 4 * 2;
  StoreColumn(a, column, end, row, sums.x, sums.y);
  StoreColumn(a, column + 8, end, row, sums.z, sums.w);
}

template <int kRowTiles, int kRowWarps, int kCluster, class SharedT>
__device__ void Consume(const Args& a, const Share& share, int rank, const Ring& ring,
                        SharedT& shared) {
  constexpr int kTile = 32 * kRowWarps;
  constexpr int kStepWarps = SharedT::kStepWarps;
  constexpr int kFragments = SharedT::kFragments;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row_warp = warp % kRowWarps, step_warp = warp / kRowWarps;
  int stage = 0;
  uint32_t parity = 0;
  WaitForPrevious();
  for (int pass = 0; pass < share.passes; ++pass) {
    Sums<kRowTiles> sums = {};
    for (int i = 0; i < share.chunks; ++i) {
      BarrierWait(&shared.full[stage], parity);
      const uint32_t at = ring.base + static_cast<uint32_t>(stage) * ring.stage_bytes;
      const int steps = min(a.chunk, a.in - share.K(a, i)) / kStep;
      MultiplyStage<kRowTiles, kStepWarps>(at + static_cast<uint32_t>(32 * row_warp) * ring.stride,
                                           at + kTile * ring.stride, ring.stride, step_warp, steps,
                                           sums);
      __syncwarp();
      if (lane == 0) BarrierArrive(&shared.empty[stage]);
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }

    // The sums of the warps that share columns meet in the first of them.
    const int buffer = pass % SharedT::kBuffers;
    if constexpr (kStepWarps > 1) {
      if (SharedT::kBuffers == 1 && pass > 0) NamedBarrier(1, kConsumers * 32);
      if (step_warp > 0) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const float(&s)[4] = sums[f / kRowTiles][f % kRowTiles];
          shared.warp_sums[buffer][step_warp - 1][row_warp][f][lane] = {s[0], s[1], s[2], s[3]};
        }
      }
      NamedBarrier(1, kConsumers * 32);
    }
    if (step_warp > 0) continue;
    const int begin = share.PassBegin(pass), end = share.PassBegin(pass + 1);
    float4 total[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float(&s)[4] = sums[f / kRowTiles][f % kRowTiles];
      total[f] = {s[0], s[1], s[2], s[3]};
#pragma unroll
      for (int w = 0; w < kStepWarps - 1; ++w) {
        total[f] = Add(total[f], shared.warp_sums[buffer][w][row_warp][f][lane]);
      }
    }

    const int first_column = begin + 32 * row_warp;
    if constexpr (kCluster == 1) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        StoreFragment(a, first_column + f / kRowTiles * 16, end, f % kRowTiles * 8, total[f]);
      }
    } else {
      // Fragment j of the tile belongs to rank j % kCluster.
      if (pass == 0) ClusterWait();
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const int j = row_warp * kFragments + f;
        const uint32_t own = SharedAddress(&shared.cta_sums[pass % 2][rank][j / kCluster][lane]);
        StoreIn(AddressIn(own, j % kCluster), total[f]);
      }
      __syncwarp();
      if (lane < kCluster) ArriveIn(AddressIn(SharedAddress(&shared.gathered), lane));
      WaitForCluster(&shared.gathered, static_cast<uint32_t>(pass % 2));
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const int j = row_warp * kFragments + f;
        if (j % kCluster != rank) continue;
        float4 sum = shared.cta_sums[pass % 2][0][j / kCluster][lane];
#pragma unroll
        for (int r = 1; r < kCluster; ++r) {
          sum = Add(sum, shared.cta_sums[pass % 2][r][j / kCluster][lane]);
        }
        StoreFragment(a, first_column + f / kRowTiles * 16, end, f % kRowTiles * 8, sum);
      }
    }
  }
  if constexpr (kCluster > 1) {
    if (step_warp > 0 || share.passes == 0) ClusterWait();
  }
}

template <int kRowTiles, int kRowWarps, int kCluster>
__global__ __launch_bounds__(kThreads, kRowTiles <= 2
                                           ? 2
                                           : 1) void StreamKernel(const __grid_constant__ Args a) {
  using SharedT = Shared<kRowTiles, kRowWarps, kCluster>;
  constexpr int kTile = 32 * kRowWarps;
  extern __shared__ __align__(128) std::byte memory[];
  SharedT& shared = *reinterpret_cast<SharedT*>(memory);
  const Ring ring = RingOf<kTile>(a, SharedAddress(memory) + (sizeof(SharedT) + 127) / 128 * 128);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      BarrierInit(&shared.full[i], kProducers * 32);
      BarrierInit(&shared.empty[i], kConsumers);
    }
    BarrierInit(&shared.gathered, kCluster * kRowWarps);
    BarrierInitFence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) ClusterArrive();
  const int rank = kCluster > 1 ? ClusterRank() : 0;
  const Share share(a, kCluster, rank, kTile);
  LetNextStart();
  const int producer = static_cast<int>(threadIdx.x) / 32 - kConsumers;
  if (producer >= 0) {
    constexpr int kX = kRowTiles >= 4 ? 2 : 1;
    if (producer < kX) {
      ProduceX<kTile>(a, share, ring, shared, producer, kX);
    } else {
      ProduceWeights<kTile>(a, share, ring, shared, producer - kX, kProducers - kX);
    }
    if constexpr (kCluster > 1) ClusterWait();
  } else {
    Consume<kRowTiles, kRowWarps, kCluster>(a, share, rank, ring, shared);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <int kRowTiles, int kRowWarps, int kCluster>
void Launch(Context& context, Args args, const StreamConfig& config) {
  constexpr int kTile = 32 * kRowWarps;
  const auto kernel = StreamKernel<kRowTiles, kRowWarps, kCluster>;
  const size_t fixed = (sizeof(Shared<kRowTiles, kRowWarps, kCluster>) + 127) / 128 * 128;
  // Rows of x are read in eights: what follows the last stage must be memory of the CTA.
  const size_t stage =
      static_cast<size_t>(args.chunk * 2 + kStagePadding) * static_cast<size_t>(kTile + args.rows);
  const size_t slack = static_cast<size_t>(args.chunk * 2 + kStagePadding) *
                       static_cast<size_t>(8 * kRowTiles - args.rows);
  RESA_CHECK(fixed + slack + 2 * stage <= config.shared_bytes);
  args.stages = static_cast<int32_t>(
      std::min<size_t>(kMaxStages, (config.shared_bytes - fixed - slack) / stage));
  const size_t bytes = fixed + slack + stage * static_cast<size_t>(args.stages);

  static const int max_clusters = [&] {
    RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(context.device.shared_bytes_per_block)));
    if (kCluster == 1) return context.device.sms;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(kCluster);
    launch.blockDim = dim3(kThreads);
    launch.dynamicSmemBytes = context.device.shared_bytes_per_block;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    int clusters = 0;
    RESA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch));
    return clusters;
  }();
  const int columns = args.begin[kMaxProducts];
  const int clusters = std::min(max_clusters, columns);
  args.unit = columns / clusters >= 64 ? 8 : 1;
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(clusters * kCluster)),
                   dim3(kThreads), bytes, kCluster, args);
}

template <int kRowTiles>
void LaunchRows(Context& context, const Args& args, const StreamConfig& config) {
  const int kind = config.row_warps * 10 + config.cluster;
  switch (kind) {
    case 11:
      return Launch<kRowTiles, 1, 1>(context, args, config);
    case 12:
      return Launch<kRowTiles, 1, 2>(context, args, config);
    case 21:
      return Launch<kRowTiles, 2, 1>(context, args, config);
    case 22:
      return Launch<kRowTiles, 2, 2>(context, args, config);
    case 41:
      return Launch<kRowTiles, 4, 1>(context, args, config);
    case 42:
      return Launch<kRowTiles, 4, 2>(context, args, config);
    case 44:
      return Launch<kRowTiles, 4, 4>(context, args, config);
  }
  RESA_CHECK(false) << "Linear: no kernel for " << config.row_warps << " warps of columns in "
                    << "clusters of " << config.cluster;
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool StreamSupports(const LinearParams* params, int count) {
  if (params[0].x.cols % kStep != 0 || !Aligned(params[0].x.data)) return false;
  int64_t columns = 0;
  for (int i = 0; i < count; ++i) {
    if (!Aligned(params[i].weight.data)) return false;
    columns += params[i].weight.rows;
  }
  return columns < (int64_t{1} << 30) && params[0].x.cols < (int64_t{1} << 30);
}

void LinearStreamWith(Context& context, const LinearParams* params, int count,
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
  RESA_CHECK(config.chunk == 64 || config.chunk == 128 || config.chunk == 256) << config.chunk;
  args.chunk = config.chunk;
  args.log_pieces = std::bit_width(static_cast<unsigned>(config.chunk)) - 4;
  if (x.rows <= 8) return LaunchRows<1>(context, args, config);
  if (x.rows <= 16) return LaunchRows<2>(context, args, config);
  if (x.rows <= 32) return LaunchRows<4>(context, args, config);
  LaunchRows<8>(context, args, config);
}

}  // namespace resa::kernels::cuda
