#ifndef RESA_KERNELS_CUDA_KERNELS_H_
#define RESA_KERNELS_CUDA_KERNELS_H_

// The launchers of the CUDA backend, one family per file, and the lists that are worked out on the
// host once per step and read by every layer.
//
// Every pointer of the params is device memory here: cuda_ops.cc has copied the step's lists.
// A launcher may look at counts, shapes, strides and the layout, which are the same whenever a
// recorded graph is replayed. It may not look at what lists hold, nor depend on it: grids are sized
// by counts, by the number of multiprocessors, or not at all. ChunkAttend's plan alone is made by
// the host, for each step, before what is recorded; what its launch depends on is ChunkCapacity.
//
// A launcher enqueues on context.stream and returns. It allocates only through Context (outside
// recordings), never waits, and leaves cudaGetLastError() checked. Activations are bf16, K and V
// bf16, sums f32.

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kernels/ceilings.h"
#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

struct ChunkPlan;  // chunk_plan.h

// ---- lists made on the host -------------------------------------------------------------------

// A row of the flat batch: where its token stands.
struct RowPlace {
  int32_t position = 0;
  int32_t table = 0;
};

// A page that a run writes into, and which part of it: QkvPost's unit of work beside the KV head.
// A batch of single rows has exactly one per row.
struct PageWrite {
  int32_t page = 0;        // In the pool.
  int32_t row_begin = 0;   // First row of the batch that is written here.
  int32_t slot_begin = 0;  // Its slot in the page, 0 .. 15.
  int32_t slots = 0;       // Rows written; slots [0, slot_begin + slots) are then valid.
};

// Tokens of a split of a row that attends to `tokens`: a rule that looks at the row alone, so that
// its sums do not depend on the other rows. Few for a short row, whose splits spread over the
// multiprocessors; a 32nd of a longer one, so that with four KV heads each multiprocessor has one;
// not more than 4096, since a batch of long rows must spread too.
constexpr int DecodeSplitTokens(int64_t tokens) {
  if (tokens <= 1536) return 128;
  if (tokens <= 6144) return 256;
  if (tokens <= 12288) return 512;
  if (tokens > 131072) return 4096;
  return tokens <= 32768 ? 1024 : static_cast<int>((tokens + 4095) / 4096 * 128);
}

// The work of one attention op over single rows: item_begin[i] is the number of (split, KV head)
// items of the rows before row i, so row i has item_begin[i + 1] - item_begin[i] of them:
//   ceil(tokens attended / DecodeSplitTokens(tokens attended)) * num_kv_heads,
// where a list of ids attends to whole blocks. Splits are cut at fixed ranks of the id list (of the
// context, when all is attended).
struct DecodePlan {
  const int32_t* item_begin = nullptr;  // device [num_rows + 1]
  int64_t items_capacity = 0;  // At least item_begin[num_rows], of any step that replays this one.
};

// ---- launchers --------------------------------------------------------------------------------

void Embed(Context& context, const EmbedParams& params);
void RmsNorm(Context& context, const RmsNormParams& params);
void SiluMul(Context& context, const SiluMulParams& params);
void RopeTable(Context& context, const RopeTableParams& params);
void GatherRows(Context& context, const GatherRowsParams& params);
void CopyPages(Context& context, const CopyPagesParams& params);

// params.runs is null; `places` [T] and `writes` [num_writes] say the same.
void QkvPost(Context& context, const QkvPostParams& params, const RowPlace* places,
             const PageWrite* writes, int64_t num_writes);

// True when norm and gate were part of one launch with the products.
bool Linears(Context& context, const LinearsParams& params);

void SelectMinMax(Context& context, const SelectParams& params);
void SelectSketch(Context& context, const SelectParams& params);

// params.ids null: every row attends to all its tokens, 0 .. position (keep_blocks and ids_begin
// are then not read).
void DecodeAttend(Context& context, const SparseAttendParams& params, const DecodePlan& plan);

// Plans ChunkAttend for a step's chunks (host memory) and enqueues the copy: before anything that
// is recorded or replayed. context.chunk_planner then has the plan.
const ChunkPlan& PlanChunkAttend(Context& context, const DenseChunk* host_chunks,
                                 int64_t num_chunks, int num_heads, const KvLayout& layout);

// params.chunks is device memory; `host_chunks` the same list on the host, to plan from unless that
// has been done. Chunks of any number of rows from 1.
void ChunkAttend(Context& context, const ChunkAttendParams& params, const DenseChunk* host_chunks);

// One row to sample on the device: SampleRow with device pointers. `out` is device memory.
void Sample(Context& context, const SampleParams& params, SampleResult* out);

Ceilings MeasureCeilings(Context& context);

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_KERNELS_H_
