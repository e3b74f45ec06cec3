#ifndef RESA_KERNELS_CUDA_CHUNK_PLAN_H_
#define RESA_KERNELS_CUDA_CHUNK_PLAN_H_

// How ChunkAttend's work is cut. The query heads of a KV head are packed into the rows of a tile:
// packed row p of a chunk is row p / group, head p % group, so that K and V are read once for the
// whole group. A piece of work is 128 packed rows by a range of keys; every KV head does each.
//
// Keys are cut where a multiple of `split_keys` lies, so that few tiles over many keys fill the
// device. A tile whose keys were cut leaves one partial result per piece, which are merged in the
// order of the keys.

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr int kChunkTileRows = 128;

struct ChunkWork {
  int32_t row_begin = 0;     // Of the chunk, in the flat batch.
  int32_t position = 0;      // Of the chunk's first row.
  int32_t table = 0;         // Row of the page tables.
  int32_t packed_begin = 0;  // First packed row of the tile.
  int32_t packed_end = 0;    // One past its last, at most packed_begin + kChunkTileRows.
  int32_t key_begin = 0;     // A multiple of the shape's tile_keys.
  int32_t key_end = 0;       // At most one past the position of the tile's last row.
  int32_t partial = -1;      // Where the partial result goes; -1: this is all, write the output.
  int32_t merge = -1;        // Of its pass, that takes up the partial result.
};

struct ChunkMerge {
  int32_t row_begin = 0;
  int32_t packed_begin = 0;
  int32_t packed_end = 0;
  int32_t partial_begin = 0;
  int32_t partials = 0;
};

// One launch's worth: the partial results of a pass take up bounded memory.
struct ChunkPass {
  int32_t work_begin = 0;
  int32_t works = 0;
  int32_t merge_begin = 0;
  int32_t merges = 0;
};

// Room for a plan, in powers of two: all that a launch depends on, so that a recorded one may be
// replayed with another plan of the same capacity. What a plan leaves of it is empty: works without
// keys, merges of nothing.
struct ChunkCapacity {
  int32_t passes = 0;  // Exact. More than one are not recorded.
  int32_t works = 0;
  int32_t merges = 0;
  int32_t partials = 0;
  friend bool operator==(const ChunkCapacity&, const ChunkCapacity&) = default;
};

struct ChunkPlan {
  std::vector<ChunkWork> work;    // Within a pass the longest first.
  std::vector<ChunkMerge> merge;  // Partials count from 0 in each pass.
  std::vector<ChunkPass> passes;
  int32_t partials = 0;  // The most that a pass has.
};

// What a plan depends on beside the chunks.
struct ChunkShape {
  int group = 0;
  int kv_heads = 0;
  int sms = 0;
  int tile_keys = 0;  // How many keys the kernel takes at a time; a multiple of kPageTokens.
  // Cut at a fixed number of keys, so that a row's bits do not depend on the rest of the batch.
  bool fixed_splits = false;

  friend bool operator==(const ChunkShape&, const ChunkShape&) = default;
};

ChunkPlan PlanChunks(const DenseChunk* chunks, int64_t num_chunks, const ChunkShape& shape);

// The plan of a step on the device. It is made when the list of chunks changes, that is once per
// step, and read by every layer. Plans of one capacity lie at the same addresses.
class ChunkPlanner {
 public:
  ChunkPlanner() = default;
  ChunkPlanner(const ChunkPlanner&) = delete;
  ChunkPlanner& operator=(const ChunkPlanner&) = delete;
  ~ChunkPlanner();

  // Enqueues the copy on `stream` when the plan is new.
  const ChunkPlan& Plan(const DenseChunk* chunks, int64_t num_chunks, const ChunkShape& shape,
                        cudaStream_t stream);
  const ChunkCapacity& capacity() const { return capacity_; }
  const ChunkWork* work() const { return work_; }     // device
  const ChunkMerge* merge() const { return merge_; }  // device
  // Device memory at zero: two counters, and one for each merge of a pass and KV head.
  uint32_t* counters() const { return zeros_; }
  // Grows whenever addresses have changed.
  int generation() const { return device_.generation() + counters_.generation(); }

 private:
  struct Stage {
    std::byte* pinned = nullptr;
    size_t bytes = 0;
    cudaEvent_t copied = nullptr;
  };
  void Upload(cudaStream_t stream);

  std::vector<DenseChunk> chunks_;
  ChunkShape shape_;
  ChunkPlan plan_;
  ChunkCapacity capacity_;
  Scratch device_;
  ZeroedScratch counters_;
  // Used in turn, so that a plan is written while the last one may still be being copied.
  Stage stages_[4];
  int next_stage_ = 0;
  const ChunkWork* work_ = nullptr;
  const ChunkMerge* merge_ = nullptr;
  uint32_t* zeros_ = nullptr;
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_CHUNK_PLAN_H_
