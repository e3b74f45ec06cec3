// Exact causal attention of runs of consecutive rows over the paged pool.
//
//   out[r, h] = sum_t softmax_t(q[r, h] . k[t, h / G] / sqrt(d)) v[t, h / G],  t <= position of r
//
// q, out [T, Hq * d] bf16; K and V [page][Hk][16][d] bf16. A piece of work is 128 packed rows
// (packed row p is row p / G, head p % G of the KV head's group) over a range of keys; CTAs stay
// and take the next piece when they are done. Bound: the tensor cores, 4 * d FLOP per row, head and
// key; 224 packed rows of a rectification window fill its two tiles to 87.5 %. Measured, in useful
// TFLOP/s of the 788 that a bf16 product of 8192^3 reaches: prefill of 32K 620-690, windows of 32
// rows with group 7 537 (one at 128K) and 584 (eight at 256K); with group 4 they read K and V at
// 4.1-4.2 TB/s, which bounds them.
//
// A CTA is three warpgroups. The first feeds: warp 0 takes pieces and copies K and V, one box per
// page, into a ring of three stages each; its other warps gather the queries of the next piece. The
// other two own 64 packed rows each: S = Q K^T by wgmma from shared memory, softmax in registers, O
// += P V with P in registers. While a warpgroup's tensor products of the next S and of this O run,
// the other one takes exponentials; named barriers keep them in turn.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/cuda/chunk_plan.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kTileRows = kChunkTileRows;
constexpr int kTileKeys = 128;
constexpr int kTilePages = kTileKeys / kPageTokens;
constexpr int kStages = 3;
constexpr int kPieceSlots = 2;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kQueryWarps = 3;  // The feeding warpgroup less the warp that copies K and V.
constexpr int kFeedRegisters = 40;
constexpr int kConsumerRegisters = 232;
// Named barriers: the first two let one warpgroup each issue products, the next two are one
// warpgroup's own, the last is all consumers'.
constexpr int kTurnBarrier = 1;
constexpr int kOwnBarrier = kTurnBarrier + kConsumers;
constexpr int kConsumerBarrier = kOwnBarrier + kConsumers;
// Width of a tile's columns in shared memory, in elements: 128 bytes.
constexpr int kColumn = 64;
constexpr int kColumnRowBytes = kColumn * 2;
constexpr int kAtomBytes = 8 * kColumnRowBytes;
// A maximum that no score reaches: every exponential is then zero.
constexpr float kBeyondScores = 1e30f;
// A tile of K or V lies in groups of 8 rows, each one atom of 8 x 64 after the other, so that a
// page (two groups) is contiguous.
template <int kHeadDim>
constexpr int kGroupBytes = (kHeadDim / kColumn) * kAtomBytes;

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
  // Works times KV heads make the pieces; piece i is of head i % Hk.
  const ChunkCounts* counts = nullptr;
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

// ---- feeding ----------------------------------------------------------------------------------

// Copies the tile of the pages in `page_row` (lane i has the first row of page i; the first `count`
// exist) once the stage is free.
template <int kHeadDim>
__device__ __forceinline__ void FeedTile(typename AttendShared<kHeadDim>::Tile& to,
                                         const CUtensorMap* map, int page_row, int count,
                                         uint64_t* full, uint64_t* empty, uint32_t parity) {
  BarrierWait(empty, parity ^ 1);
  if (threadIdx.x == 0) BarrierArriveExpect(full, count * kPageTokens * kHeadDim * 2);
  __syncwarp();
  const int page = threadIdx.x;
  if (page >= count) return;
  CopyBox4(&to[page * 2], map, 0, 0, 0, page_row / 8, full);
}

// Warp 0: takes pieces of work and keeps the rings of K and V full.
template <int kHeadDim>
__device__ void FeedKeys(const AttendArgs& args, AttendShared<kHeadDim>& shared) {
  const int lane = threadIdx.x;
  const int pieces = args.counts->works * args.kv_heads;
  Turn<kPieceSlots> turn;
  Turn<kStages> k_turn;
  Turn<kStages> v_turn;
  for (int next = blockIdx.x;;) {
    Piece piece;
    if (next < pieces) {
      piece.work = args.work[next / args.kv_heads];
      piece.head = next % args.kv_heads;
    }
    BarrierWait(&shared.piece_empty[turn.slot], turn.parity ^ 1);
    if (lane == 0) {
      shared.piece[turn.slot] = piece;
      BarrierArrive(&shared.piece_full[turn.slot]);
    }
    turn.Advance();
    if (piece.work.key_end == 0) break;
    const int32_t* pages = args.pages + piece.work.table * args.page_stride;
    const int page_end = (piece.work.key_end + kPageTokens - 1) / kPageTokens;
    // Lane i looks up the tile's page i, one tile ahead of the copies.
    int page = piece.work.key_begin / kPageTokens + lane;
    int id = lane < kTilePages && page < page_end ? pages[page] : 0;
    // No kernel writes the plan or the page tables, so they may be read before.
    WaitForPrevious();
    for (int key = piece.work.key_begin; key < piece.work.key_end; key += kTileKeys) {
      const int row = (id * args.kv_heads + piece.head) * kPageTokens;
      const int count = min(kTilePages, page_end - key / kPageTokens);
      page += kTilePages;
      id = lane < kTilePages && page < page_end ? pages[page] : 0;
      FeedTile<kHeadDim>(shared.k[k_turn.slot], &args.k, row, count, &shared.k_full[k_turn.slot],
                         &shared.k_empty[k_turn.slot], k_turn.parity);
      k_turn.Advance();
      FeedTile<kHeadDim>(shared.v[v_turn.slot], &args.v, row, count, &shared.v_full[v_turn.slot],
                         &shared.v_empty[v_turn.slot], v_turn.parity);
      v_turn.Advance();
    }
    if (lane == 0) next = gridDim.x + atomicAdd(args.next_work, 1u);
    next = __shfl_sync(~0u, next, 0);
  }
}

// Which row of q and of the output, taken as [T * Hq, d], a packed row of a head is.
__device__ __forceinline__ int QueryRow(const AttendArgs& args, int row_begin, int packed,
                                        int head) {
  const int r = packed / args.group;
  return ((row_begin + r) * args.kv_heads + head) * args.group + packed - r * args.group;
}

// Gathers a piece's queries, swizzled as wgmma wants them; one of kQueryWarps warps. Rows that do
// not exist are zero: products of zeros draw less power, and power is what bounds the clock.
template <int kHeadDim>
__device__ __forceinline__ void GatherQueries(const AttendArgs& args,
                                              AttendShared<kHeadDim>& shared, const ChunkWork& work,
                                              int head, int warp) {
  constexpr int kUnits = kHeadDim / 8;  // Of 16 bytes, in a row.
  constexpr int kRowsAtOnce = 32 / kUnits;
  constexpr int kNoRow = -1;
  const int lane = threadIdx.x % 32;
  const int unit = lane % kUnits;
#pragma unroll
  for (int block = 0; block < kTileRows; block += 32) {
    // Each lane works out where one row is; the rows are then copied by all lanes.
    const int packed = work.packed_begin + block + lane;
    const int from =
        packed < work.packed_end ? QueryRow(args, work.row_begin, packed, head) : kNoRow;
    for (int i = warp * kRowsAtOnce; i < 32; i += kQueryWarps * kRowsAtOnce) {
      const int row = i + lane / kUnits;
      const int64_t begin = __shfl_sync(~0u, from, row);
      __nv_bfloat16* to = &shared.q[unit / 8][block + row][((unit % 8) ^ (row % 8)) * 8];
      if (begin == kNoRow) {
        *reinterpret_cast<uint4*>(to) = uint4{};
      } else {
        CopyAsync16(SharedAddress(to), args.q + begin * kHeadDim + unit * 8);
      }
    }
  }
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  ProxyFence();
}

// The other warps of the feeding warpgroup.
template <int kHeadDim>
__device__ void FeedQueries(const AttendArgs& args, AttendShared<kHeadDim>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - 1;
  Turn<kPieceSlots> turn;
  WaitForPrevious();
  for (uint32_t parity = 0;; parity ^= 1) {
    BarrierWait(&shared.piece_full[turn.slot], turn.parity);
    const Piece piece = shared.piece[turn.slot];
    turn.Advance();
    BarrierWait(&shared.query_empty, parity ^ 1);
    if (piece.work.key_end > 0) GatherQueries(args, shared, piece.work, piece.head, warp);
    BarrierArrive(&shared.query_full);
    if (piece.work.key_end == 0) return;
  }
}

// ---- the products and the softmax -------------------------------------------------------------

// s = Q K^T for 64 rows and a tile of keys, begun.
template <int kHeadDim>
__device__ __forceinline__ void BeginScores(float (&s)[kTileKeys / 2], uint64_t q, uint64_t k) {
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int column = step / 4;
    const int inside = step % 4 * 32;
    Wgmma(s, AdvanceOperand(q, column * kTileRows * kColumnRowBytes + inside),
          AdvanceOperand(k, column * kAtomBytes + inside), step > 0);
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
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(
                   &args.arrived[work.merge * args.kv_heads + head])
               : "memory");
}

// One of the warpgroups that compute: 64 packed rows of every piece.
template <int kHeadDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const AttendArgs& args, AttendShared<kHeadDim>& shared,
                                      int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup) {}

  // Takes part in every piece of the CTA.
  __device__ __forceinline__ void Run() {
    if (warpgroup_ == 1) PassTurn();
    Turn<kPieceSlots> turn;
    for (uint32_t parity = 0;; parity ^= 1) {
      BarrierWait(&shared_.query_full, parity);
      const Piece piece = shared_.piece[turn.slot];
      if (piece.work.key_end == 0) return;
      __syncwarp();
      Signal(&shared_.piece_empty[turn.slot]);
      turn.Advance();
      Attend(piece.work, piece.head);
    }
  }

 private:
  __device__ __forceinline__ void Attend(const ChunkWork& work, int head) {
    const Rows rows(args_, work, warpgroup_);
    const int tiles = (work.key_end - work.key_begin + kTileKeys - 1) / kTileKeys;
    // Tiles from this one on have keys past the warpgroup's first row.
    const int first_row = min(work.packed_begin + warpgroup_ * 64, work.packed_end - 1);
    const int first_own = work.position + first_row / args_.group;
    const int masked_from = max(0, first_own + 1 - work.key_begin) / kTileKeys;
    const auto mask = [&](float(&scores)[kTileKeys / 2], int tile) {
      if (tile < masked_from) return;
      const int key = work.key_begin + tile * kTileKeys;
      const int limit[2] = {rows.own[0] - key, rows.own[1] - key};
      Mask(scores, limit);
    };
    Softmax softmax;
    // Rows that do not exist get weights of zero too.
    if (!rows.exists[0]) softmax.m[0] = kBeyondScores;
    if (!rows.exists[1]) softmax.m[1] = kBeyondScores;
    float shrink[2];
    float s[kTileKeys / 2];
    uint32_t p[kTileKeys / 16][4];
    float o[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0;

    WaitForKeys();
    BeginKeys(s);
    WgmmaWait<0>();
    EndKeys(s);
    mask(s, 0);
    softmax.Take(s, args_.scale_log2, shrink);
    PackWeights(s, p);
    for (int tile = 1; tile < tiles; ++tile) {
      WaitForKeys();
      NamedBarrier(kTurnBarrier + warpgroup_, kConsumers * kWarpgroup);
      BeginKeys(s);
      BeginValues(o, p);
      PassTurn();
      WgmmaWait<1>();
      EndKeys(s);
      mask(s, tile);
      softmax.Take(s, args_.scale_log2, shrink);
      KeepOverlap(softmax);
      WgmmaWait<0>();
      EndValues(o);
      // After a while maxima seldom rise. Times one would change nothing.
      if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= shrink[i / 2 % 2];
      }
      PackWeights(s, p);
    }
    Signal(&shared_.query_empty);
    BarrierWait(&shared_.v_full[v_turn_.slot], v_turn_.parity);
    const int valid = work.key_end - work.key_begin - (tiles - 1) * kTileKeys;
    if (valid < kTileKeys) ZeroTail<kHeadDim>(shared_.v[v_turn_.slot], valid, warpgroup_);
    BeginValues(o, p);
    WgmmaWait<0>();
    EndValues(o);
    softmax.Finish();
    if (work.partial < 0) {
      WriteOutput<kHeadDim>(args_, work, head, rows, o, softmax.l);
    } else {
      WritePartial<kHeadDim>(args_, work, head, rows, o, softmax);
      ReportPartial(args_, work, head, warpgroup_);
    }
  }

  __device__ __forceinline__ void WaitForKeys() {
    BarrierWait(&shared_.k_full[k_turn_.slot], k_turn_.parity);
  }
  // The products of the next tile of keys and of values. A WgmmaWait stands between Begin and End.
  __device__ __forceinline__ void BeginKeys(float (&s)[kTileKeys / 2]) {
    BeginScores<kHeadDim>(s, MakeOperand(&shared_.q[0][warpgroup_ * 64], kAtomBytes, 16),
                          MakeOperand(shared_.k[k_turn_.slot], kGroupBytes<kHeadDim>, 16));
  }
  __device__ __forceinline__ void EndKeys(float (&s)[kTileKeys / 2]) {
    KeepInOrder(s);
    Signal(&shared_.k_empty[k_turn_.slot]);
    k_turn_.Advance();
  }
  __device__ __forceinline__ void BeginValues(float (&o)[kHeadDim / 2],
                                              const uint32_t (&p)[kTileKeys / 16][4]) {
    BarrierWait(&shared_.v_full[v_turn_.slot], v_turn_.parity);
    BeginOutput<kHeadDim>(o, p,
                          MakeOperand(shared_.v[v_turn_.slot], kGroupBytes<kHeadDim>, kAtomBytes));
  }
  __device__ __forceinline__ void EndValues(float (&o)[kHeadDim / 2]) {
    KeepInOrder(o);
    Signal(&shared_.v_empty[v_turn_.slot]);
    v_turn_.Advance();
  }

  // Lets the other warpgroup issue its products.
  __device__ __forceinline__ void PassTurn() {
    NamedBarrierArrive(kTurnBarrier + (warpgroup_ ^ 1), kConsumers * kWarpgroup);
  }
  // One arrival per warp.
  __device__ __forceinline__ void Signal(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) BarrierArrive(barrier);
  }

  const AttendArgs& args_;
  AttendShared<kHeadDim>& shared_;
  const int warpgroup_;
  Turn<kStages> k_turn_;
  Turn<kStages> v_turn_;
};

// ---- merging ----------------------------------------------------------------------------------

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

// When no piece is left, the consumers' warps of all CTAs share the rows to merge. Every piece has
// been taken by a CTA that runs by then, so waiting for it ends.
template <int kHeadDim>
__device__ void MergeRows(const AttendArgs& args) {
  const int warp = static_cast<int>(threadIdx.x - kWarpgroup) / 32;
  const int units = args.counts->merges * args.kv_heads * kTileRows;
  for (int unit = blockIdx.x * kConsumerWarps + warp; unit < units;
       unit += gridDim.x * kConsumerWarps) {
    const int row = unit % kTileRows;
    const int which = unit / kTileRows;
    const ChunkMerge merge = args.merge[which / args.kv_heads];
    if (merge.packed_begin + row >= merge.packed_end) continue;
    for (;;) {
      uint32_t arrived;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(&args.arrived[which])
                   : "memory");
      if (arrived == static_cast<uint32_t>(kConsumers * merge.partials)) break;
      __nanosleep(20);
    }
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
  const int merges = args.counts->merges * args.kv_heads;
  for (int i = 0; i < merges; ++i) args.arrived[i] = 0;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    ChunkAttendKernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<kHeadDim>*>(shared_bytes);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&args.k);
    PrefetchTensorMap(&args.v);
    BarrierInit(&shared.query_full, kQueryWarps * 32);
    BarrierInit(&shared.query_empty, kConsumerWarps);
    for (int i = 0; i < kPieceSlots; ++i) {
      BarrierInit(&shared.piece_full[i], 1);
      BarrierInit(&shared.piece_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&shared.k_full[i], 1);
      BarrierInit(&shared.k_empty[i], kConsumerWarps);
      BarrierInit(&shared.v_full[i], 1);
      BarrierInit(&shared.v_empty[i], kConsumerWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    LowerRegisters<kFeedRegisters>();
    if (threadIdx.x < 32) {
      FeedKeys<kHeadDim>(args, shared);
    } else {
      FeedQueries<kHeadDim>(args, shared);
    }
    LetNextStart();
  } else {
    RaiseRegisters<kConsumerRegisters>();
    WaitForPrevious();
    Consumer<kHeadDim>(args, shared, static_cast<int>(threadIdx.x) / kWarpgroup - 1).Run();
    LetNextStart();
    MergeRows<kHeadDim>(args);
    LeaveCounters(args);
  }
}

template <int kHeadDim>
void Launch(Context& context, const ChunkAttendParams& params, const ChunkPlan& plan) {
  const ChunkPlanner& planner = *context.chunk_planner;
  const int kv_heads = params.layout.num_kv_heads;
  const size_t slots = static_cast<size_t>(planner.capacity().partials) * kv_heads * kTileRows;
  std::byte* partials =
      context.chunk_partials.Reserve(slots * (kHeadDim * sizeof(float) + sizeof(float2)));
  AttendArgs args;
  args.q = reinterpret_cast<const __nv_bfloat16*>(params.q.b16());
  args.out = reinterpret_cast<__nv_bfloat16*>(params.out.b16());
  const auto rows = static_cast<uint64_t>(params.layout.num_pages) * kv_heads * kPageTokens;
  const auto map = [&](const std::byte* pool) {
    return MakeTensorMap(pool, {kColumn, 8, kHeadDim / kColumn, rows / 8},
                         {kHeadDim * 2, kColumnRowBytes, kHeadDim * 16},
                         {kColumn, 8, kHeadDim / kColumn, kPageTokens / 8});
  };
  args.k = map(params.kv.k);
  args.v = map(params.kv.v);
  args.pages = params.tables.pages;
  args.page_stride = params.tables.stride;
  args.partials = reinterpret_cast<float*>(partials);
  args.partial_ml = reinterpret_cast<float2*>(partials + slots * kHeadDim * sizeof(float));
  args.group = params.num_heads / kv_heads;
  args.kv_heads = kv_heads;
  args.scale_log2 = 1.44269504088896f / sqrtf(static_cast<float>(kHeadDim));
  args.next_work = planner.counters();
  args.arrived = args.next_work + 2;
  constexpr int kSharedBytes = sizeof(AttendShared<kHeadDim>);
  static const cudaError_t raised = cudaFuncSetAttribute(
      ChunkAttendKernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  RESA_CUDA_CHECK(raised);
  const int grid = std::min(planner.capacity().works * kv_heads, context.device.sms);
  args.counts = planner.counts();
  for (const ChunkPass& pass : plan.passes) {
    args.work = planner.work() + pass.work_begin;
    args.merge = planner.merge() + pass.merge_begin;
    LaunchOverlapped(context.stream, ChunkAttendKernel<kHeadDim>, grid, kThreads, kSharedBytes, 1,
                     args);
    ++args.counts;
  }
}

}  // namespace

const ChunkPlan& PlanChunkAttend(Context& context, const DenseChunk* host_chunks,
                                 int64_t num_chunks, int num_heads, const KvLayout& layout) {
  RESA_CHECK(num_heads % layout.num_kv_heads == 0);
  if (context.chunk_planner == nullptr) context.chunk_planner = std::make_shared<ChunkPlanner>();
  const ChunkShape shape{num_heads / layout.num_kv_heads, layout.num_kv_heads, context.device.sms,
                         kTileKeys, context.deterministic};
  return context.chunk_planner->Plan(host_chunks, num_chunks, shape, context.stream);
}

void ChunkAttend(Context& context, const ChunkAttendParams& params, const DenseChunk* host_chunks) {
  if (params.num_chunks == 0) return;
  const KvLayout& layout = params.layout;
  RESA_CHECK(layout.kv_dtype == DType::kBF16) << "K and V are " << NameOf(layout.kv_dtype);
  const ChunkPlan& plan =
      PlanChunkAttend(context, host_chunks, params.num_chunks, params.num_heads, layout);
  switch (layout.head_dim) {
    case 64:
      return Launch<64>(context, params, plan);
    case 128:
      return Launch<128>(context, params, plan);
    default:
      RESA_CHECK(false) << "head size " << layout.head_dim << " is neither 64 nor 128";
  }
}

}  // namespace resa::kernels::cuda
