// Exact causal attention of runs of consecutive rows over the paged pool.
//
//   out[r, h] = sum_t softmax_t(q[r, h] . k[t, h / G] / sqrt(d)) v[t, h / G],  t <= position of r
//
// q, out [T, Hq * d] bf16; K and V [page][Hk][16][d] bf16. A piece of work is 128 packed rows
// (packed row p is row p / G, head p % G of the KV head's group) over a range of keys; CTAs stay
// and take the next piece when they are done. Bound: the tensor cores, 4 * d FLOP per row, head and
// key; 224 packed rows of a rectification window fill its two tiles to 87.5 %. Measured, in useful
// TFLOP/s of the 788 that a bf16 product of 8192^3 reaches: prefill of 32K 600-640, windows of 32
// rows with group 7 470-547 (one at 128K) and 511-581 (eight at 256K), which the power limit makes
// of the same binary; with group 4 480-512 and 515-548, where they read K and V at up to 4.28 TB/s.
//
// A CTA is three warpgroups. The first feeds: warp 0 takes pieces and copies K and V, one box per
// page, into a ring of three stages each; its other warps gather the queries of the next piece. The
// other two own 64 packed rows each: S = Q K^T by wgmma with Q in registers, the softmax there, O
// += P V with P in registers too. While a warpgroup's tensor products of the next S and of this O
// run, the other one takes exponentials; named barriers keep them in turn.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/cuda/chunk_merge.cuh"
#include "kernels/cuda/chunk_plan.h"
#include "kernels/cuda/chunk_shared.cuh"
#include "kernels/cuda/chunk_tile.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace resa::kernels::cuda {
namespace {

using namespace chunk;  // NOLINT: the rest of this kernel.

// ---- feeding ----------------------------------------------------------------------------------

// Copies the tile of the pages in `page_row` (lane i has the first row of page i; the first `count`
// exist) once the stage is free. Keys and values leave the L2
// first: the CTAs that share some read them at about the same time, and partial results matter
// more.
template <int kHeadDim>
__device__ __forceinline__ void FeedTile(typename AttendShared<kHeadDim>::Tile& to,
                                         const CUtensorMap* map, int page_row, int count,
                                         uint64_t* full, uint64_t* empty, uint32_t parity) {
  BarrierWait(empty, parity ^ 1);
  if (threadIdx.x == 0) BarrierArriveExpect(full, count * kPageTokens * kHeadDim * 2);
  __syncwarp();
  const int page = threadIdx.x;
  if (page >= count) return;
  CopyBox4(&to[page * 2], map, 0, 0, 0, page_row / 8, full, EvictFirstPolicy());
}

// Warp 0: takes pieces of work and keeps the rings of K and V full.
template <int kHeadDim>
__device__ void FeedKeys(const AttendArgs& args, AttendShared<kHeadDim>& shared) {
  const int lane = threadIdx.x;
  Turn<kPieceSlots> turn;
  Turn<kStages> k_turn;
  Turn<kStages> v_turn;
  for (int next = blockIdx.x;;) {
    Piece piece;
    if (next < args.pieces) {
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

// Gathers a piece's queries, swizzled as wgmma wants them; one of kWarps warps. Rows that do not
// exist are zero: products of zeros draw less power, and power is what bounds the clock.
template <int kHeadDim, int kWarps>
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
    for (int i = warp * kRowsAtOnce; i < 32; i += kWarps * kRowsAtOnce) {
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

// The other warps of the feeding warpgroup. The first piece's queries are not theirs: three warps
// would take so long to ask for them that they queue behind all the keys of the first tiles.
template <int kHeadDim>
__device__ void FeedQueries(const AttendArgs& args, AttendShared<kHeadDim>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - 1;
  WaitForPrevious();
  if (args.work[blockIdx.x / args.kv_heads].key_end == 0) return;
  Turn<kPieceSlots> turn;
  turn.Advance();
  for (uint32_t parity = 0;; parity ^= 1) {
    BarrierWait(&shared.piece_full[turn.slot], turn.parity);
    const Piece piece = shared.piece[turn.slot];
    turn.Advance();
    BarrierWait(&shared.query_empty, parity);
    if (piece.work.key_end > 0) {
      GatherQueries<kHeadDim, kQueryWarps>(args, shared, piece.work, piece.head, warp);
    }
    BarrierArrive(&shared.query_full);
    if (piece.work.key_end == 0) return;
  }
}

// ---- computing --------------------------------------------------------------------------------

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
    BarrierWait(&shared_.piece_full[turn.slot], turn.parity);
    GatherFirst(shared_.piece[turn.slot]);
    for (uint32_t parity = 0;; parity ^= 1) {
      const Piece piece = shared_.piece[turn.slot];
      if (piece.work.key_end == 0) return;
      BarrierArrive(&shared_.piece_empty[turn.slot]);
      turn.Advance();
      Attend(piece.work, piece.head);
      BarrierWait(&shared_.query_full, parity);
    }
  }

 private:
  // The queries of the CTA's first piece, by all who compute with them.
  __device__ __forceinline__ void GatherFirst(const Piece& piece) {
    if (piece.work.key_end == 0) return;
    const int warp = static_cast<int>(threadIdx.x - kWarpgroup) / 32;
    GatherQueries<kHeadDim, kConsumerWarps>(args_, shared_, piece.work, piece.head, warp);
    NamedBarrier(kConsumerBarrier, kConsumers * kWarpgroup);
  }

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

    uint32_t q[kHeadDim / 16][4];
    LoadQueries<kHeadDim>(q, shared_, warpgroup_ * 64 + threadIdx.x % kWarpgroup / 32 * 16);
    BarrierArrive(&shared_.query_empty);
    WaitForKeys();
    BeginKeys(s, q);
    WgmmaWait<0>();
    EndKeys(s);
    mask(s, 0);
    softmax.Take(s, args_.scale_log2, shrink);
    PackWeights(s, p);
    for (int tile = 1; tile < tiles; ++tile) {
      WaitForKeys();
      NamedBarrier(kTurnBarrier + warpgroup_, kConsumers * kWarpgroup);
      BeginKeys(s, q);
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
  __device__ __forceinline__ void BeginKeys(float (&s)[kTileKeys / 2],
                                            const uint32_t (&q)[kHeadDim / 16][4]) {
    BeginScores<kHeadDim>(s, q, MakeOperand(shared_.k[k_turn_.slot], kGroupBytes<kHeadDim>, 16));
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
  // One arrival per warp, for what the tensor cores have read. What lanes read themselves, each
  // gives back itself.
  __device__ __forceinline__ void Signal(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) BarrierArrive(barrier);
  }

  const AttendArgs& args_;
  AttendShared<kHeadDim>& shared_;
  const int warpgroup_;
  Turn<kStages> k_turn_;
  Turn<kStages> v_turn_;
};

// ---- the kernel -------------------------------------------------------------------------------

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    ChunkAttendKernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<kHeadDim>*>(shared_bytes);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&args.k);
    PrefetchTensorMap(&args.v);
    BarrierInit(&shared.query_full, kQueryWarps * 32);
    BarrierInit(&shared.query_empty, kConsumerWarps * 32);
    for (int i = 0; i < kPieceSlots; ++i) {
      BarrierInit(&shared.piece_full[i], 1);
      BarrierInit(&shared.piece_empty[i], kConsumerWarps * 32);
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
                         {kColumn, 8, kHeadDim / kColumn, kPageTokens / 8},
                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
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
  for (const ChunkPass& pass : plan.passes) {
    // One pass takes all the room there is, so that its launch may be recorded.
    const bool alone = plan.passes.size() == 1;
    args.work = planner.work() + pass.work_begin;
    args.pieces = (alone ? planner.capacity().works : pass.works) * kv_heads;
    args.merge = planner.merge() + pass.merge_begin;
    args.merges = alone ? planner.capacity().merges : pass.merges;
    LaunchOverlapped(context.stream, ChunkAttendKernel<kHeadDim>,
                     std::min(args.pieces, context.device.sms), kThreads, kSharedBytes, 1, args);
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
