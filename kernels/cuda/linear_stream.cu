// Linear for a few rows: out [T, cols] (+)= x [T, in] weight^T [in, cols] + bias, T <= 8, up to
// three products of one x in a launch; x normed before, or two products gated behind.
//
//   bound   reading the weights once: cols x in x 2 bytes at the speed of memory.
//   grid    one CTA per multiprocessor. The columns of all products, one behind the other, are
//   split
//           evenly over the CTAs, down to single columns: they are rows of weight, and each takes
//           one copy.
//   CTA     takes its columns in passes of up to 64. Four warps fill a ring of stages in shared
//           memory with chunks of a pass's columns by bulk copies, a fifth copies x. Eight multiply
//           with mma.m16n8k16, 16 columns being M and the rows of x N: one or two share the columns
//           of a pass, the others the steps along `in`. As many as share columns add up and store,
//           while the next pass is multiplied.
//   sums    f32. Those of the warps that share columns meet in shared memory, in a fixed order.
//   norm    rstd * ((x o w) W^T): x is multiplied by the norm's weight as it is read from shared
//           memory, and its squares are added up beside the products.
//   gate    a warp's 32 columns are 16 of gate and the same 16 of up.
//   launch  overlapped: the ring fills with weights before the kernel that makes x has ended.
//
//   reached in a graph of launches, norm and gate included, T = 1 / 8: Qwen2.5-7B qkv 3.2 / 3.1
//   TB/s
//           (10.3 us), o 3.25 / 2.9, gate and up 4.25 / 4.2, down 4.1 / 4.05; Llama-3.1-8B qkv 3.5,
//           o 3.3 / 3.2, gate and up 4.1 / 4.0, down 4.1. What is missing is the time between the
//           last sums of one launch and the first weights of the next, about 3 us.
//
// Memory shares itself out unevenly among multiprocessors that ask for too much at a time, and a
// launch takes as long as the slowest: hence ChooseCut() below.
//
// The order of a sum depends on the number of rows, since more of them may be cut otherwise.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_shared.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kConsumers = 8;    // Warps that multiply.
constexpr int kWeightWarps = 4;  // Warps that copy weights; one more copies x.
constexpr int ThreadsOf(int column_warps) {
  return (kConsumers + kWeightWarps + 1 + column_warps) * 32;
}
constexpr int kMaxStages = 8;
constexpr size_t kMostHeldBytes = size_t{80} << 10;  // Of x.
constexpr int kUnit = 32;                            // Of `in`: what a warp takes at a time.
constexpr int kTile = 64;                            // Columns of a pass at most.
constexpr int kFragments = 2;                        // Of 16 columns, of a warp.
// A stage holds kTile rows of kChunk, half as many of twice as much, and so on.
constexpr int kChunk = 256;
// More than half of a multiprocessor's shared memory: two CTAs of one launch there would take twice
// as long.
constexpr size_t kAloneBytes = size_t{116} << 10;
constexpr size_t kMostBytes = size_t{200} << 10;  // The kernels between find room beside it.

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
  // Where a product's columns begin among all; when gated, both products begin at 0.
  int32_t begin[kMaxProducts + 1];
  const __nv_bfloat16* x;  // [rows, in]
  const float* norm;       // [in]: x is to be normed; or null.
  float eps, inverse_in;
  int32_t rows, in;
  int32_t columns;  // To deal out; when gated, pairs of columns.
  int32_t passes;
  int32_t part,
      longer;  // Columns of a part, one for each CTA and pass; so many parts have one more.
  int32_t chunk, chunks;  // Of `in`: in a stage, and how many.
  int32_t stage_rows;     // Weights of the largest pass, then rows of x unless they are held.
  int32_t stages;
  uint32_t stage_bytes;
  // Bytes between rows: of a stage, and of x where it is held. Half the banks on, so that the lanes
  // that read 64 bytes of two rows meet no conflict.
  uint32_t stride, held_stride;
  uint32_t norm_bytes, held_bytes;  // Of shared memory, for the norm's weight and for x.
  bool hold_x;                      // It is copied in the first pass and stays.
};

__device__ __forceinline__ int ProductOf(const Args& a, int column) {
  return (column >= a.begin[1] ? 1 : 0) + (column >= a.begin[2] ? 1 : 0);
}

// A CTA's columns in a pass. The CTAs take part after part together: what is read at a time lies
// close by.
struct Columns {
  int begin, count;
  __device__ __forceinline__ Columns(const Args& a, int pass) {
    const int index = pass * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    begin = index * a.part + min(index, a.longer);
    count = a.part + (index < a.longer ? 1 : 0);
  }
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
// Not volatile: the compiler may ask for several at a time. BarrierWait() holds them back.
__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  return *static_cast<const uint4*>(__cvta_shared_to_generic(address));
}

// ---- shared memory ------------------------------------------------------------------------------

// A warp's sums are kFragments fragments of 16 columns x 8 rows; lane l holds columns l / 4 and
// l / 4 + 8 of rows 2 (l % 4) and 2 (l % 4) + 1, as {column, row}: {0, 0}, {0, 1}, {8, 0}, {8, 1}.

struct Shared {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t norm_full;
  // Twice, for even and odd passes, so that a pass need not wait for the one before.
  uint64_t sums_full[2];
  uint64_t sums_empty[2];
  float4 sums[2][kConsumers][kFragments][32];
  float squares[kConsumers][kMaxStreamRows];  // Each warp's sums of x^2.
  // Then, each 128-byte aligned: the norm's weight, x where it is held, the ring.
};

__host__ __device__ constexpr uint32_t RoundUp(size_t bytes) {
  return static_cast<uint32_t>((bytes + 127) / 128 * 128);
}

struct Places {
  uint32_t norm, held, ring;
  __device__ Places(const Args& a, const Shared& shared)
      : norm(SharedAddress(&shared) + RoundUp(sizeof(Shared))),
        held(norm + a.norm_bytes),
        ring(held + a.held_bytes) {}
};

// ---- producers ----------------------------------------------------------------------------------

// The weights, by kWeightWarps warps that take rows of a stage in turn: one warp alone could not
// ask often enough. No kernel writes weights: there is nothing to wait for.
template <bool kGated>
__device__ void ProduceWeights(const Args& a, const Places& places, Shared& shared, int warp) {
  static_assert(kTile <= 32 * kWeightWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane * kWeightWarps + warp;
  const uint64_t policy = EvictFirstPolicy();
  const uint32_t to = places.ring + static_cast<uint32_t>(row) * a.stride;
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const Columns columns(a, pass);
    // When gated, the columns of gate come first, then those of up.
    const bool up = kGated && row >= columns.count;
    const bool mine = row < (kGated ? 2 * columns.count : columns.count);
    const int column = columns.begin + (mine ? row - (up ? columns.count : 0) : 0);
    const int product = kGated ? int{up} : ProductOf(a, column);
    const __nv_bfloat16* const from =
        a.products[product].weight + int64_t{column - a.begin[product]} * a.in;
    for (int i = 0; i < a.chunks; ++i, slot.Next(a.stages)) {
      const int k = i * a.chunk;
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      if (mine) {
        CopyOnce(to + static_cast<uint32_t>(slot.stage) * a.stage_bytes, from + k,
                 static_cast<uint32_t>(min(a.chunk, a.in - k)) * 2, &shared.full[slot.stage],
                 policy);
      }
      __syncwarp();
    }
  }
}

// x, by one warp, which also announces the bytes of a stage; and the norm's weight.
template <bool kGated>
__device__ void ProduceX(const Args& a, const Places& places, Shared& shared) {
  const int row = static_cast<int>(threadIdx.x) % 32;
  const __nv_bfloat16* const from = a.x + int64_t{min(row, a.rows - 1)} * a.in;
  const uint32_t to =
      a.hold_x ? places.held + static_cast<uint32_t>(row) * a.held_stride
               : places.ring + static_cast<uint32_t>(a.stage_rows - a.rows + row) * a.stride;
  if (a.norm != nullptr && row == 0) {
    const auto bytes = static_cast<uint32_t>(a.in) * 4;
    BarrierArriveExpect(&shared.norm_full, bytes);
    CopyBulk(places.norm, a.norm, bytes, &shared.norm_full);
  }
  WaitForPrevious();
  Slot slot(1);
  for (int pass = 0; pass < a.passes; ++pass) {
    const int weights = Columns(a, pass).count * (kGated ? 2 : 1);
    const int rows = a.hold_x && pass > 0 ? 0 : a.rows;
    for (int i = 0; i < a.chunks; ++i, slot.Next(a.stages)) {
      const int k = i * a.chunk;
      const auto bytes = static_cast<uint32_t>(min(a.chunk, a.in - k)) * 2;
      uint64_t* const full = &shared.full[slot.stage];
      BarrierWait(&shared.empty[slot.stage], slot.parity);
      if (row == 0) BarrierArriveExpect(full, bytes * static_cast<uint32_t>(weights + rows));
      if (row < rows) {
        const uint32_t offset = a.hold_x ? static_cast<uint32_t>(k) * 2
                                         : static_cast<uint32_t>(slot.stage) * a.stage_bytes;
        CopyBulk(to + offset, from + k, bytes, full);
      }
      __syncwarp();
    }
  }
}

// ---- consumers ----------------------------------------------------------------------------------

// Eight values of x by as many of the norm's weight; their squares are added to *squares.
__device__ __forceinline__ uint4 Weighted(uint4 x, uint32_t norm, float* squares) {
  const uint4 low = LoadShared(norm), high = LoadShared(norm + 16);
  const uint32_t weights[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = __uint_as_float(pairs[i] << 16);
    const float b = __uint_as_float(pairs[i] & 0xffff0000u);
    *squares = fmaf(a, a, *squares);
    *squares = fmaf(b, b, *squares);
    pairs[i] =
        PackBf16(a * __uint_as_float(weights[2 * i]), b * __uint_as_float(weights[2 * i + 1]));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// One of kConsumers warps that multiply.
template <int kColumnWarps, bool kGated>
class Consumer {
 public:
  __device__ Consumer(const Args& args, const Places& places, Shared& shared, int warp)
      : a_(args),
        places_(places),
        shared_(shared),
        warp_(warp),
        lane_(static_cast<int>(threadIdx.x) % 32),
        normed_(args.norm != nullptr) {
    // Past the last row of x, that one again: it is not stored.
    const int row = min(lane_ / 4, a_.rows - 1);
    x_ = static_cast<uint32_t>(lane_ % 4 * 16) +
         (a_.hold_x
              ? places_.held + static_cast<uint32_t>(row) * a_.held_stride
              : places_.ring + static_cast<uint32_t>(a_.stage_rows - a_.rows + row) * a_.stride);
    norm_ = places_.norm + static_cast<uint32_t>(lane_ % 4 * 32);
  }

  __device__ void Run() {
    Slot turn(1);  // Of both places for sums.
    if (normed_) BarrierWait(&shared_.norm_full, 0);
    for (int pass = 0; pass < a_.passes; ++pass, turn.Next(2)) {
      float sums[kFragments][4] = {};
      float squares = Multiply(Columns(a_, pass).count, sums);
      BarrierWait(&shared_.sums_empty[turn.stage], turn.parity);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        shared_.sums[turn.stage][warp_][f][lane_] = {sums[f][0], sums[f][1], sums[f][2],
                                                     sums[f][3]};
      }
      if (pass == 0 && normed_) {
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        if (lane_ % 4 == 0) shared_.squares[warp_][lane_ / 4] = squares;
      }
      BarrierArrive(&shared_.sums_full[turn.stage]);  // By every lane for what it stored.
    }
  }

 private:
  static constexpr int kStep = kConsumers / kColumnWarps;  // Units from one to the next.

  // sums += kCount units from `unit` on. Lane l reads eight consecutive values of rows l / 4 of
  // weights and of x: the operands of two instructions of 16, since both take the values along `in`
  // in the same order.
  template <int kCount>
  __device__ __forceinline__ void MultiplyUnits(const uint32_t (&rows)[kFragments][2],
                                                uint32_t stage, uint32_t x, uint32_t norm, int unit,
                                                float (&sums)[kFragments][4], float* squares) {
    uint4 b[kCount], low[kCount][kFragments], high[kCount][kFragments];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto at = static_cast<uint32_t>(unit + i * kStep) * (kUnit * 2);
      b[i] = LoadShared(x + at);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        low[i][f] = LoadShared(rows[f][0] + stage + at);
        high[i][f] = LoadShared(rows[f][1] + stage + at);
      }
    }
    if (normed_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto at = static_cast<uint32_t>(unit + i * kStep) * (kUnit * 4);
        b[i] = Weighted(b[i], norm + at, squares);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const uint32_t first[4] = {low[i][f].x, high[i][f].x, low[i][f].y, high[i][f].y};
        const uint32_t second[4] = {low[i][f].z, high[i][f].z, low[i][f].w, high[i][f].w};
        Mma16x8x16(sums[f], first, b[i].x, b[i].y);
        Mma16x8x16(sums[f], second, b[i].z, b[i].w);
      }
    }
  }

  // This warp's steps of a pass. Returns the sum of the lane's squares of x, when that is normed.
  __device__ __forceinline__ float Multiply(int columns, float (&sums)[kFragments][4]) {
    // The lane's rows of a stage; past the last column, that one again: it is not stored.
    const int column_warp = warp_ % kColumnWarps;
    uint32_t rows[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own =
            lane_ / 4 + 8 * i + (kGated ? 16 * column_warp : 16 * (kFragments * column_warp + f));
        const int row = max(min(own, columns - 1), 0) + (kGated ? f * columns : 0);
        rows[f][i] = places_.ring + static_cast<uint32_t>(row) * a_.stride +
                     static_cast<uint32_t>(lane_ % 4 * 16);
      }
    }
    float squares = 0;
    for (int i = 0; i < a_.chunks; ++i, slot_.Next(a_.stages)) {
      const int k = i * a_.chunk;
      const int units = min(a_.chunk, a_.in - k) / kUnit;
      const uint32_t stage = static_cast<uint32_t>(slot_.stage) * a_.stage_bytes;
      const uint32_t x = x_ + (a_.hold_x ? static_cast<uint32_t>(k) * 2 : stage);
      const uint32_t norm = norm_ + static_cast<uint32_t>(k) * 4;
      BarrierWait(&shared_.full[slot_.stage], slot_.parity);
      int u = warp_ / kColumnWarps;
      for (; u + kStep < units; u += 2 * kStep) {
        MultiplyUnits<2>(rows, stage, x, norm, u, sums, &squares);
      }
      if (u < units) MultiplyUnits<1>(rows, stage, x, norm, u, sums, &squares);
      __syncwarp();
      if (lane_ == 0) BarrierArrive(&shared_.empty[slot_.stage]);
    }
    return squares;
  }

  const Args& a_;
  const Places& places_;
  Shared& shared_;
  const int warp_, lane_;
  const bool normed_;
  uint32_t x_, norm_;  // Where the lane's values begin.
  Slot slot_{0};
};

// ---- finishers ----------------------------------------------------------------------------------

// Where a lane stores two rows of a column, and what stands there beside the products: bias, and
// what `out` held.
struct Target {
  std::byte* at = nullptr;  // Of the lane's first row; null: of no column.
  int32_t row_bytes = 0;
  bool f32 = false;
  float start[2] = {};

  __device__ __forceinline__ Target(const Product& p, int column, bool there, int row, int rows) {
    if (!there) return;
    f32 = p.f32_out;
    row_bytes = p.cols * (f32 ? 4 : 2);
    at = static_cast<std::byte*>(p.out) + int64_t{row} * row_bytes + column * (f32 ? 4 : 2);
    if (p.bias != nullptr) start[0] = start[1] = p.bias[column];
    if (!p.accumulate) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + i >= rows) continue;
      const std::byte* const from = at + i * row_bytes;
      start[i] += f32 ? *reinterpret_cast<const float*>(from)
                      : __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(from));
    }
  }

  // `there`: which of the two rows there are.
  __device__ __forceinline__ void Store(const bool (&there)[2], float s0, float s1) const {
    if (at == nullptr) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!there[i]) continue;
      const float sum = i == 0 ? s0 : s1;
      if (f32) {
        *reinterpret_cast<float*>(at + i * row_bytes) = sum;
      } else {
        *reinterpret_cast<__nv_bfloat16*>(at + i * row_bytes) = __float2bfloat16(sum);
      }
    }
  }
};

// 1 / sqrt(mean(x^2) + eps) of rows `row` and `row` + 1.
template <int kColumnWarps>
__device__ __forceinline__ float2 NormScale(const Args& a, const Shared& shared, int row) {
  float2 sums = {0, 0};
#pragma unroll
  for (int w = 0; w < kConsumers; w += kColumnWarps) {
    const float2 squares = *reinterpret_cast<const float2*>(&shared.squares[w][row]);
    sums.x += squares.x;
    sums.y += squares.y;
  }
  return {rsqrtf(fmaf(sums.x, a.inverse_in, a.eps)), rsqrtf(fmaf(sums.y, a.inverse_in, a.eps))};
}

// The warp that adds up what the warps of column warp `index` have made, in a fixed order, and
// stores it. It looks for its places while they multiply.
template <int kColumnWarps, bool kGated>
__device__ void Finish(const Args& a, Shared& shared, int index) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 4 * 2;
  const bool there[2] = {row < a.rows, row + 1 < a.rows};
  Slot turn(0);
  float2 scale = {1, 1};
  WaitForPrevious();
  for (int pass = 0; pass < a.passes; ++pass, turn.Next(2)) {
    const Columns columns(a, pass);
    const int end = columns.begin + columns.count;
    const auto target = [&](int f, int i) {
      const int column =
          columns.begin + lane / 4 + 8 * i + (kGated ? 16 * index : 16 * (kFragments * index + f));
      const int product = kGated ? f : ProductOf(a, column);
      return Target(a.products[product], column - a.begin[product], column < end && there[0], row,
                    a.rows);
    };
    const Target targets[kFragments][2] = {{target(0, 0), target(0, 1)},
                                           {target(1, 0), target(1, 1)}};
    BarrierWait(&shared.sums_full[turn.stage], turn.parity);
    float4 sums[kFragments] = {};
#pragma unroll
    for (int w = 0; w < kConsumers; w += kColumnWarps) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        sums[f] = Add(sums[f], shared.sums[turn.stage][w + index][f][lane]);
      }
    }
    if (pass == 0 && a.norm != nullptr) scale = NormScale<kColumnWarps>(a, shared, row);
    BarrierArrive(&shared.sums_empty[turn.stage]);
    float out[kFragments][2][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const float(&low)[2] = targets[f][0].start;
      const float(&high)[2] = targets[f][1].start;
      out[f][0][0] = fmaf(sums[f].x, scale.x, low[0]);
      out[f][0][1] = fmaf(sums[f].y, scale.y, low[1]);
      out[f][1][0] = fmaf(sums[f].z, scale.x, high[0]);
      out[f][1][1] = fmaf(sums[f].w, scale.y, high[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kGated) {
        targets[0][i].Store(there, SiluTimes(out[0][i][0], out[1][i][0]),
                            SiluTimes(out[0][i][1], out[1][i][1]));
      } else {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          targets[f][i].Store(there, out[f][i][0], out[f][i][1]);
        }
      }
    }
  }
}

// ---- kernel -------------------------------------------------------------------------------------

template <int kColumnWarps, bool kGated>
__global__ __launch_bounds__(ThreadsOf(kColumnWarps),
                             1) void StreamKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], kConsumers);
    }
    BarrierInit(&shared.norm_full, 1);
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&shared.sums_full[i], kConsumers * 32);
      BarrierInit(&shared.sums_empty[i], kColumnWarps * 32);
    }
    BarrierInitFence();
  }
  __syncthreads();
  LetNextStart();
  const Places places(a, shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, producer = warp - kConsumers;
  if (producer < 0) {
    Consumer<kColumnWarps, kGated>(a, places, shared, warp).Run();
  } else if (producer < kWeightWarps) {
    ProduceWeights<kGated>(a, places, shared, producer);
  } else if (producer == kWeightWarps) {
    ProduceX<kGated>(a, places, shared);
  } else {
    Finish<kColumnWarps, kGated>(a, shared, producer - kWeightWarps - 1);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <int kColumnWarps, bool kGated>
void Launch(Context& context, const Args& args, int ctas, size_t bytes) {
  const auto kernel = StreamKernel<kColumnWarps, kGated>;
  static const int prepared = MaxClusters(context, kernel, ThreadsOf(kColumnWarps), 1);
  RESA_CHECK_GT(prepared, 0);
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(ctas)),
                   dim3(ThreadsOf(kColumnWarps)), bytes, 1, args);
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool Supports(const LinearsParams& params) {
  const Matrix& x = params.norm.weight != nullptr ? params.norm.x : params.products[0].x;
  if (x.cols % kUnit != 0 || x.cols >= (1 << 20)) return false;
  if (!Aligned(x.data) || !Aligned(params.norm.weight)) return false;
  int64_t columns = 0;
  for (const LinearParams& p : params.products) {
    if (!Aligned(p.weight.data)) return false;
    columns += p.weight.rows;
  }
  return columns < (1 << 24);
}

Args ArgsOf(const LinearsParams& params) {
  Args args = {};
  const Matrix& x = params.norm.weight != nullptr ? params.norm.x : params.products[0].x;
  args.x = static_cast<const __nv_bfloat16*>(x.data);
  args.norm = params.norm.weight;
  args.eps = params.norm.eps;
  args.rows = static_cast<int32_t>(x.rows);
  args.in = static_cast<int32_t>(x.cols);
  args.inverse_in = 1.0f / static_cast<float>(x.cols);
  for (size_t i = 0; i < kMaxProducts; ++i) {
    args.begin[i + 1] = args.begin[i];
    if (i >= params.products.size()) continue;
    const LinearParams& p = params.products[i];
    args.products[i] = {static_cast<const __nv_bfloat16*>(p.weight.data),
                        p.bias,
                        p.out.data,
                        static_cast<int32_t>(p.weight.rows),
                        p.out.dtype == DType::kF32,
                        p.accumulate};
    if (!params.gated) args.begin[i + 1] += args.products[i].cols;
  }
  args.columns = params.gated ? args.products[0].cols : args.begin[kMaxProducts];
  return args;
}

// How far a launch asks ahead: stages of the ring, and what of `in` is in one, both at most.
struct Cut {
  int stages, chunk;
};

// As measured. With many columns each multiprocessor reads for long, and what is under way must be
// little for all to read as fast; with few, the first bytes count.
Cut ChooseCut(int share, int in) {
  if (share >= 128) return {2, 512};
  if (share >= 64) return {3, 512};
  if (share >= 32) return {4, 512};
  return {in > 8192 ? 8 : 4, 1024};
}

// Cuts the work into passes and chunks so that it takes few stages. False when x does not fit.
bool Plan(Args* args, int of_column, int ctas) {
  args->held_stride = static_cast<uint32_t>(args->in + 63) / 64 * 128 + 64;
  const size_t held = size_t{args->held_stride} * static_cast<size_t>(args->rows);
  const int share = (args->columns + ctas - 1) / ctas * of_column;
  const Cut cut = ChooseCut(share, args->in);
  int best = INT32_MAX;
  for (int passes = (share + kTile - 1) / kTile; passes <= share; ++passes) {
    const int parts = ctas * passes;
    const int weights = (args->columns + parts - 1) / parts * of_column;
    const bool hold = passes > 1 && held <= kMostHeldBytes;
    const int stage_rows = weights + (hold ? 0 : args->rows);
    if (stage_rows > kTile) continue;
    int chunk = kChunk;
    while (stage_rows * (chunk / kChunk) * 2 <= kTile && chunk < cut.chunk) chunk *= 2;
    const int chunks = (args->in + chunk - 1) / chunk;
    if (chunks * passes >= best) continue;
    best = chunks * passes;
    args->passes = passes;
    args->part = args->columns / parts;
    args->longer = args->columns % parts;
    args->stage_rows = stage_rows;
    args->hold_x = hold;
    args->chunk = ((args->in + chunks - 1) / chunks + 63) / 64 * 64;
    args->chunks = (args->in + args->chunk - 1) / args->chunk;
  }
  if (best == INT32_MAX) return false;
  args->stages = std::min(cut.stages, args->passes * args->chunks);
  args->stride = static_cast<uint32_t>(args->chunk) * 2 + 64;
  args->stage_bytes = RoundUp(size_t{args->stride} * static_cast<size_t>(args->stage_rows));
  args->norm_bytes = args->norm != nullptr ? RoundUp(size_t{4} * static_cast<size_t>(args->in)) : 0;
  args->held_bytes = args->hold_x ? RoundUp(held) : 0;
  return true;
}

}  // namespace

bool LinearStream(Context& context, const LinearsParams& params) {
  if (!Supports(params)) return false;
  Args args = ArgsOf(params);
  RESA_CHECK(args.rows >= 1 && args.rows <= kMaxStreamRows) << args.rows << " rows to stream";
  const int ctas = std::min(context.device.sms, args.columns);
  const int of_column = params.gated ? 2 : 1;
  if (!Plan(&args, of_column, ctas)) return false;
  const size_t fixed = RoundUp(sizeof(Shared)) + args.norm_bytes + args.held_bytes;
  if (fixed + 2 * args.stage_bytes > kMostBytes) return false;
  args.stages = std::min(args.stages, static_cast<int>((kMostBytes - fixed) / args.stage_bytes));
  const size_t bytes =
      std::max(kAloneBytes, fixed + size_t{args.stage_bytes} * static_cast<size_t>(args.stages));
  const int weights = (args.part + (args.longer > 0 ? 1 : 0)) * of_column;
  const bool two = weights > 16 * kFragments;
  if (params.gated) {
    two ? Launch<2, true>(context, args, ctas, bytes) : Launch<1, true>(context, args, ctas, bytes);
  } else {
    two ? Launch<2, false>(context, args, ctas, bytes)
        : Launch<1, false>(context, args, ctas, bytes);
  }
  return true;
}

}  // namespace resa::kernels::cuda
