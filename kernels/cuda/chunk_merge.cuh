#ifndef RESA_KERNELS_CUDA_CHUNK_MERGE_CUH_
#define RESA_KERNELS_CUDA_CHUNK_MERGE_CUH_

// What becomes of a piece's result. Where it saw all the keys of its rows it is the output; else it
// is stored as a partial result, and when no piece is left all warps merge those, a row each, as
// soon as all parts of a row are there.
//
// CTAs wait for each other there. They can: the grid is no larger than what is resident at a time,
// and a CTA that waits has no more pieces of its own.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/chunk_shared.cuh"
#include "kernels/cuda/chunk_tile.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda::chunk {

// Transposes 4 x 4 words among the four lanes of a quad: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void TransposeQuad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, high ? x[i] : x[i | bit], bit);
      x[i] = high ? got : x[i];
      x[i | bit] = high ? x[i | bit] : got;
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void WriteOutput(const AttendArgs& args, const ChunkWork& work, int head,
                                            const Rows& rows, const float (&o)[kHeadDim / 2],
                                            const float (&l)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = 1.0f / l[i];
    const int64_t at = QueryRow(args, work.row_begin, rows.packed[i], head);
    __nv_bfloat16* to = args.out + at * kHeadDim + threadIdx.x % 4 * 8;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = PackBf16(o[4 * (n + j) + 2 * i] * inverse, o[4 * (n + j) + 2 * i + 1] * inverse);
      }
      TransposeQuad(x);
      if (rows.exists[i])
        *reinterpret_cast<uint4*>(to + n * 8) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void WritePartial(const AttendArgs& args, const ChunkWork& work,
                                             int head, const Rows& rows,
                                             const float (&o)[kHeadDim / 2],
                                             const Softmax& softmax) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!rows.exists[i]) continue;
    const int64_t at =
        (static_cast<int64_t>(work.partial) * args.kv_heads + head) * kTileRows + rows.tile_row[i];
    float* to = args.partials + at * kHeadDim + column;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(o[4 * n + 2 * i], o[4 * n + 2 * i + 1]);
    }
    if (column == 0) {
      args.partial_ml[at] = make_float2(__fmul_rn(softmax.m[i], args.scale_log2), softmax.l[i]);
    }
  }
}

// Counts the warpgroup's part of a merge as written.
__device__ __forceinline__ void ReportPartial(const AttendArgs& args, const ChunkWork& work,
                                              int head, int warpgroup) {
  NamedBarrier(kOwnBarrier + warpgroup, kWarpgroup);
  if (threadIdx.x % kWarpgroup != 0) return;
  CountRelease(&args.arrived[work.merge * args.kv_heads + head]);
}

// Packed row `row` of a merge's tile, by one warp: the partial results in the order of their keys.
template <int kHeadDim>
__device__ __forceinline__ void MergeRow(const AttendArgs& args, const ChunkMerge& merge, int head,
                                         int row) {
  constexpr int kPer = kHeadDim / 32;
  const int lane = threadIdx.x % 32;
  const auto at = [&](int i) {
    return (static_cast<int64_t>(merge.partial_begin + i) * args.kv_heads + head) * kTileRows + row;
  };
  float m = -INFINITY;
  for (int i = lane; i < merge.partials; i += 32) m = fmaxf(m, args.partial_ml[at(i)].x);
  for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
  float o[kPer] = {};
  float l = 0;
  for (int begin = 0; begin < merge.partials; begin += 32) {
    float weight = 0;
    float sum = 0;
    if (begin + lane < merge.partials) {
      const float2 ml = args.partial_ml[at(begin + lane)];
      weight = exp2f(ml.x - m);
      sum = weight * ml.y;
    }
    const int count = min(32, merge.partials - begin);
#pragma unroll 16
    for (int i = 0; i < count; ++i) {
      const float* from = args.partials + at(begin + i) * kHeadDim + lane * kPer;
      const float w = __shfl_sync(~0u, weight, i);
      l += __shfl_sync(~0u, sum, i);
      if constexpr (kPer == 4) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        o[0] += w * x.x;
        o[1] += w * x.y;
        o[2] += w * x.z;
        o[3] += w * x.w;
      } else {
        const float2 x = *reinterpret_cast<const float2*>(from);
        o[0] += w * x.x;
        o[1] += w * x.y;
      }
    }
  }
  const float inverse = 1.0f / l;
  const int64_t to = QueryRow(args, merge.row_begin, merge.packed_begin + row, head);
#pragma unroll
  for (int j = 0; j < kPer; j += 2) {
    *reinterpret_cast<uint32_t*>(args.out + to * kHeadDim + lane * kPer + j) =
        PackBf16(o[j] * inverse, o[j + 1] * inverse);
  }
}

// When no piece is left, the consumers' warps of all CTAs share the rows to merge.
template <int kHeadDim>
__device__ void MergeRows(const AttendArgs& args) {
  const int warp = static_cast<int>(threadIdx.x - kWarpgroup) / 32;
  const int units = args.merges * args.kv_heads * kTileRows;
  for (int unit = blockIdx.x * kConsumerWarps + warp; unit < units;
       unit += gridDim.x * kConsumerWarps) {
    const int row = unit % kTileRows;
    const int which = unit / kTileRows;
    const ChunkMerge merge = args.merge[which / args.kv_heads];
    if (merge.partials == 0) return;
    if (merge.packed_begin + row >= merge.packed_end) continue;
    const auto parts = static_cast<uint32_t>(kConsumers * merge.partials);
    while (LoadAcquire(&args.arrived[which]) != parts) __nanosleep(20);
    __syncwarp();
    MergeRow<kHeadDim>(args, merge, which % args.kv_heads, row);
  }
}

// The last CTA to come here leaves all counters at zero.
__device__ __forceinline__ void LeaveCounters(const AttendArgs& args) {
  NamedBarrier(kConsumerBarrier, kConsumers * kWarpgroup);
  if (threadIdx.x != kWarpgroup) return;
  __threadfence();
  if (atomicAdd(args.next_work + 1, 1u) != gridDim.x - 1) return;
  args.next_work[0] = 0;
  args.next_work[1] = 0;
  for (int i = 0; i < args.merges * args.kv_heads; ++i) args.arrived[i] = 0;
}

}  // namespace resa::kernels::cuda::chunk

#endif  // RESA_KERNELS_CUDA_CHUNK_MERGE_CUH_
