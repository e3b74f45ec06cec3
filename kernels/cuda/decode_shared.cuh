#ifndef RESA_KERNELS_CUDA_DECODE_SHARED_CUH_
#define RESA_KERNELS_CUDA_DECODE_SHARED_CUH_

// What the three roles of a decode attention CTA share: the arguments, and shared memory.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

#ifndef SLOTS
#define SLOTS 3
#endif
namespace resa::kernels::cuda {

inline constexpr uint32_t kDecodeLanes = 0xffffffffu;
inline constexpr int kConsumers = 8;     // Warps that compute; units of an octet.
inline constexpr int kOctets = 8;        // Octets between the scout and the consumers.
inline constexpr int kPartDims = 32;     // Of a head: what a warp combines, one a lane.
inline constexpr float kNoMax = -1e30f;  // Below every score, and its differences are finite.

struct DecodeArgs {
  const __nv_bfloat16* q = nullptr;     // [T, Hq * d]
  __nv_bfloat16* out = nullptr;         // [T, Hq * d]
  const std::byte* k = nullptr;         // [page][Hk][16][d] bf16
  const std::byte* v = nullptr;         // The same.
  const SparseRow* rows = nullptr;      // [num_rows]
  const int32_t* item_begin = nullptr;  // [num_rows + 1]
  const int32_t* ids = nullptr;         // Null: all blocks.
  const int32_t* pages = nullptr;       // [S, page_stride]
  int64_t page_stride = 0;
  uint32_t* partials = nullptr;  // [items] of PartialWords(); zero where there is no result yet.
  uint32_t* queue = nullptr;     // Items given out after each CTA's first two.
  int num_rows = 0;
  int num_heads = 0;
  int kv_heads = 0;
  int group = 0;
  float scale_log2 = 0;  // log2(e) / sqrt(d)
};

// A partial result of a split: o[group][d], then (m, l)[group][d / 32], once for each reader.
constexpr int64_t PartialWords(int group, int head_dim) {
  return int64_t{group} * (head_dim + head_dim / kPartDims * 2);
}

// One split of one (row, KV head).
struct Item {
  int32_t row = 0;  // In the flat batch.
  int32_t kv_head = 0;
  int32_t split = 0;
  int32_t splits = 0;  // Of the row.
  int32_t begin = 0;   // Item of the row's split 0 and KV head 0.
  int32_t units = 0;   // Of 16 tokens; negative: there is no further item.
};

// Eight units of an item, one a consumer warp. kRuns: blocks in a unit, each a run of tokens that
// lie together.
template <int kRuns>
struct Octet {
  int32_t run[kConsumers][kRuns];  // First token, counted through the pool of the layer.
  uint32_t tokens[kConsumers];     // Bit t: token t is attended to; 0: there is no unit.
  bool end = false;                // There is no further octet; the rest is not set.
  bool first = false;              // Of its item.
  bool last = false;
};

// kHeadTiles: tiles of 8 heads.
template <int kHeadDim, int kHeadTiles, int kRuns>
struct alignas(1024) DecodeShared {
  // K and V of a unit take a slot each, in turn. Odd, so that K is asked for when K was used and V
  // when V was.
  static constexpr int kSlots = kHeadDim == 128 ? 3 : 5;
  static constexpr int kSlotBytes = kPageTokens * kHeadDim * 2;
  static constexpr int kAhead = kSlots / 2;  // Units that a consumer asks for before it waits.
  // Items between the scout and the finishers: more than a consumer may be ahead by.
  static constexpr int kItemSlots = kAhead + 3;

  std::byte ring[kConsumers][kSlots][kSlotBytes];
  __nv_bfloat16 q[kItemSlots][8 * kHeadTiles][kHeadDim];  // Zero past the group.
  float o[kConsumers][8][kHeadDim + 4];  // States to merge. The pad spreads a fragment over banks.
  float2 ml[kConsumers][8];
  Octet<kRuns> octets[kOctets];
  Item items[kItemSlots];

  uint64_t octet_full[kOctets];
  uint64_t octet_empty[kOctets];
  uint64_t item_full[kItemSlots];
  uint64_t item_empty[kItemSlots];
  uint64_t merge_full;
  uint64_t merge_empty;
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_DECODE_SHARED_CUH_
