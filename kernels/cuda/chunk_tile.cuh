#ifndef RESA_KERNELS_CUDA_CHUNK_TILE_CUH_
#define RESA_KERNELS_CUDA_CHUNK_TILE_CUH_

// What a warpgroup computes for one tile of keys: S = Q K^T, the weights that the running softmax
// makes of it, and O += P V.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/chunk_shared.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace resa::kernels::cuda::chunk {

// The queries of a warp's 16 rows, `first` the tile's row of the first, as wgmma takes them from
// registers.
template <int kHeadDim>
__device__ __forceinline__ void LoadQueries(uint32_t (&to)[kHeadDim / 16][4],
                                            const AttendShared<kHeadDim>& shared, int first) {
  const int lane = threadIdx.x % 32;
  const int row = first + lane % 16;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int unit = step * 2 + lane / 16;
    LdMatrix4(to[step], SharedAddress(&shared.q[unit / 8][row][((unit % 8) ^ (row % 8)) * 8]));
  }
}

// s = Q K^T for 64 rows and a tile of keys, begun.
template <int kHeadDim>
__device__ __forceinline__ void BeginScores(float (&s)[kTileKeys / 2],
                                            const uint32_t (&q)[kHeadDim / 16][4], uint64_t k) {
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int column = step / 4;
    const int inside = step % 4 * 32;
    Wgmma(s, q[step], AdvanceOperand(k, column * kAtomBytes + inside), step > 0);
  }
  WgmmaCommit();
}

// o += P V, begun.
template <int kHeadDim>
__device__ __forceinline__ void BeginOutput(float (&o)[kHeadDim / 2],
                                            const uint32_t (&p)[kTileKeys / 16][4], uint64_t v) {
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    WgmmaBt(o, p[step], AdvanceOperand(v, step * 2 * kGroupBytes<kHeadDim>), true);
  }
  WgmmaCommit();
}

// The running softmax of a thread's two rows: maximum, and the sum of its own columns.
struct Softmax {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {0, 0};

  // s becomes exp2(scale (s - maximum)). `shrink` is what sums of the earlier tiles are to be
  // multiplied by; exactly 1 when the maximum stays, so that tiles which are masked for a row
  // leave its bits alone.
  __device__ __forceinline__ void Take(float (&s)[kTileKeys / 2], float scale, float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        top = fmaxf(top, fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : __fmul_rn(top, scale);
      shrink[i] = Exp2(__fsub_rn(__fmul_rn(m[i], scale), base));
      m[i] = top;
      float sum[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[4 * n + 2 * i + j];
          x = Exp2(fmaf(x, scale, -base));
          sum[j] += x;
        }
      }
      l[i] = fmaf(l[i], shrink[i], sum[0] + sum[1]);
    }
  }

  // Adds up the columns of the four threads that share a row.
  __device__ __forceinline__ void Finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(~0u, l[i], 1);
      l[i] += __shfl_xor_sync(~0u, l[i], 2);
    }
  }
};

// Without it the compiler moves the wait for O += P V up, before the exponentials that are to be
// taken while it runs: a branch that needs their sums holds it back. It is never taken.
__device__ __forceinline__ void KeepOverlap(const Softmax& softmax) {
  if (softmax.l[0] + softmax.l[1] < 0) __nanosleep(0);
}

// Keys past a row's own position count for nothing, whatever the products gave: columns after
// `limit` of the tile (own position less the tile's first key) become -infinity.
__device__ __forceinline__ void Mask(float (&s)[kTileKeys / 2], const int (&limit)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 + column > limit[i / 2]) s[4 * n + i] = -INFINITY;
    }
  }
}

__device__ __forceinline__ void PackWeights(const float (&s)[kTileKeys / 2],
                                            uint32_t (&p)[kTileKeys / 16][4]) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 4; ++i) p[i / 4][i % 4] = PackBf16(s[2 * i], s[2 * i + 1]);
}

// Zeroes the rows of V from `valid` on: whatever a page holds past the tokens written to it would
// otherwise enter the sums times zero, and it may be NaN. Both warpgroups do so, each for itself.
template <int kHeadDim>
__device__ __forceinline__ void ZeroTail(typename AttendShared<kHeadDim>::Tile& v, int valid,
                                         int warpgroup) {
  constexpr int kUnits = kColumn / 8;
  for (int i = threadIdx.x % kWarpgroup; i < (kTileKeys - valid) * kUnits; i += kWarpgroup) {
#pragma unroll
    for (int column = 0; column < kHeadDim / kColumn; ++column) {
      const int row = valid + i / kUnits;
      *reinterpret_cast<uint4*>(&v[row / 8][column][row % 8][i % kUnits * 8]) = uint4{};
    }
  }
  ProxyFence();
  NamedBarrier(kOwnBarrier + warpgroup, kWarpgroup);
}

}  // namespace resa::kernels::cuda::chunk

#endif  // RESA_KERNELS_CUDA_CHUNK_TILE_CUH_
