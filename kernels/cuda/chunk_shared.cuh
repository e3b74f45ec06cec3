#ifndef RESA_KERNELS_CUDA_CHUNK_SHARED_CUH_
#define RESA_KERNELS_CUDA_CHUNK_SHARED_CUH_

// What the roles of a chunk attention CTA share: its shape, the arguments, and shared memory.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/chunk_plan.h"

namespace resa::kernels::cuda::chunk {

inline constexpr int kTileRows = kChunkTileRows;
inline constexpr int kTileKeys = 128;
inline constexpr int kTilePages = kTileKeys / kPageTokens;
inline constexpr int kStages = 3;
inline constexpr int kPieceSlots = 2;
inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;
inline constexpr int kConsumerWarps = kConsumers * 4;
inline constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
inline constexpr int kQueryWarps = 3;  // The feeding warpgroup less the warp that copies K and V.
inline constexpr int kFeedRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
// Named barriers: the first two let one warpgroup each issue products, the next two are one
// warpgroup's own, the last is all consumers'.
inline constexpr int kTurnBarrier = 1;
inline constexpr int kOwnBarrier = kTurnBarrier + kConsumers;
inline constexpr int kConsumerBarrier = kOwnBarrier + kConsumers;
// Width of a tile's columns in shared memory, in elements: 128 bytes.
inline constexpr int kColumn = 64;
inline constexpr int kColumnRowBytes = kColumn * 2;
inline constexpr int kAtomBytes = 8 * kColumnRowBytes;
// A maximum that no score reaches: every exponential is then zero.
inline constexpr float kBeyondScores = 1e30f;
// A tile of K or V lies in groups of 8 rows, each one atom of 8 x 64 after the other, so that a
// page (two groups) is contiguous.
template <int kHeadDim>
inline constexpr int kGroupBytes = (kHeadDim / kColumn) * kAtomBytes;

struct AttendArgs {
  CUtensorMap k;  // [pages * Hk * 16 rows / 8][d / 64][8][64], in boxes of one page
  CUtensorMap v;
  const __nv_bfloat16* q = nullptr;
  __nv_bfloat16* out = nullptr;
  const int32_t* pages = nullptr;
  int64_t page_stride = 0;
  const ChunkWork* work = nullptr;
  uint32_t* next_work = nullptr;  // Pieces taken beyond each CTA's first, and CTAs that are done.
  const ChunkMerge* merge = nullptr;
  uint32_t* arrived = nullptr;   // [merges * Hk]: warpgroups that have written their part
  float* partials = nullptr;     // [partials * Hk][128][d]
  float2* partial_ml = nullptr;  // [partials * Hk][128]: maximum in powers of two, sum
  int pieces = 0;  // Works times KV heads, piece i is of head i % Hk; the last may be empty.
  int merges = 0;  // The last may be empty.
  int group = 0;
  int kv_heads = 0;
  float scale_log2 = 0;  // log2(e) / sqrt(d)
};

struct Piece {
  ChunkWork work;  // key_end 0: there is none left.
  int32_t head = 0;
};

template <int kHeadDim>
struct AttendShared {
  static constexpr int kColumns = kHeadDim / kColumn;
  using Tile = __nv_bfloat16[kTileKeys / 8][kColumns][8][kColumn];
  __nv_bfloat16 q[kColumns][kTileRows][kColumn];
  Tile k[kStages];
  Tile v[kStages];
  Piece piece[kPieceSlots];
  uint64_t piece_full[kPieceSlots];
  uint64_t piece_empty[kPieceSlots];
  uint64_t query_full;
  uint64_t query_empty;
  uint64_t k_full[kStages];
  uint64_t k_empty[kStages];
  uint64_t v_full[kStages];
  uint64_t v_empty[kStages];
};

// Where a thread stands in a ring of buffers.
template <int kSlots>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;  // Of the phase that fills the slot; the one that empties it has the other.

  __device__ __forceinline__ void Advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

// Which row of q and of the output, taken as [T * Hq, d], a packed row of a head is.
__device__ __forceinline__ int QueryRow(const AttendArgs& args, int row_begin, int packed,
                                        int head) {
  const int r = packed / args.group;
  return ((row_begin + r) * args.kv_heads + head) * args.group + packed - r * args.group;
}

// A thread's rows of a piece.
struct Rows {
  __device__ __forceinline__ Rows(const AttendArgs& args, const ChunkWork& work, int warpgroup) {
    const int in_tile = warpgroup * 64 + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tile_row[i] = in_tile + 8 * i;
      exists[i] = work.packed_begin + tile_row[i] < work.packed_end;
      packed[i] = min(work.packed_begin + tile_row[i], work.packed_end - 1);
      own[i] = work.position + packed[i] / args.group;
    }
  }
  int tile_row[2];
  int packed[2];
  int own[2];  // Position.
  bool exists[2];
};

}  // namespace resa::kernels::cuda::chunk

#endif  // RESA_KERNELS_CUDA_CHUNK_SHARED_CUH_
