#ifndef RESA_KERNELS_CUDA_STEP_MEMORY_H_
#define RESA_KERNELS_CUDA_STEP_MEMORY_H_

// A step's lists on the device: copied once, read by every layer's kernels.
//
// All lists but the page tables are packed into one block that travels in one copy. Where each lies
// follows from the counts of the step alone, so that a recorded graph finds the lists of another
// step with the same counts at the same addresses. Of the page tables only what changed travels.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/chunk_plan.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

// What tells recordings apart.
struct StepKey {
  const void* owner = nullptr;
  int64_t rows = 0;
  int64_t sparse_rows = 0;
  int64_t single_rows = 0;  // Dense chunks of one row.
  int64_t chunks = 0;       // Those of several.
  int64_t writes = 0;
  int64_t samples = 0;
  int64_t sparse_items = 0;  // Capacities of the plans: powers of two.
  int64_t dense_items = 0;
  int64_t table_stride = 0;
  ChunkCapacity chunk_capacity = {};  // Added by who plans the chunks.
  friend bool operator==(const StepKey&, const StepKey&) = default;
};

// Where the lists are on the device.
struct DeviceStep {
  const int32_t* ids = nullptr;
  const int32_t* positions = nullptr;
  const RowPlace* places = nullptr;
  const PageWrite* writes = nullptr;
  int64_t num_writes = 0;
  const SparseRow* sparse_rows = nullptr;
  DecodePlan sparse_plan;
  const SparseRow* single_rows = nullptr;  // Dense chunks of one row, as rows that keep everything.
  int64_t num_single_rows = 0;
  DecodePlan single_plan;
  const DenseChunk* chunks = nullptr;  // Those of several rows.
  PageTables tables;
  const int32_t* sampled_rows = nullptr;
  const SampleRow* samples = nullptr;
};

// Thread: the engine's.
class StepMemory {
 public:
  StepMemory() = default;
  StepMemory(const StepMemory&) = delete;
  StepMemory& operator=(const StepMemory&) = delete;
  ~StepMemory();

  // A list may be absent, as where a single op is run: what stands on it is then absent too.
  // Enqueues the copies. Waits for the copies of the last call, whose host memory it reuses, and
  // for the device when memory has to grow. REQUIRES that the lists outlive the step.
  void Stage(const StepLists& lists, cudaStream_t stream);

  const StepLists& lists() const { return lists_; }
  const DeviceStep& device() const { return device_; }
  const StepKey& key() const { return key_; }
  // The chunks of several rows, on the host.
  const std::vector<DenseChunk>& multi_row_chunks() const { return chunks_; }
  // OpCounters, over all calls.
  int64_t page_ids_staged() const { return page_ids_staged_; }
  // Grows whenever addresses have changed: recordings of earlier generations are stale.
  int generation() const { return generation_; }

 private:
  void MakeLists();
  void AddWrites(const KvRun& run);
  DecodePlan PlanOf(const std::vector<SparseRow>& rows, bool sparse);
  void Pack(cudaStream_t stream);
  void ReserveTables(cudaStream_t stream);
  void CopyTables(cudaStream_t stream);
  void CopyTable(int32_t table, int64_t tokens, cudaStream_t stream);
  void GrowBlock(size_t bytes);

  StepLists lists_;
  DeviceStep device_;
  StepKey key_;

  std::vector<RowPlace> places_;
  std::vector<PageWrite> writes_;
  std::vector<SparseRow> sparse_rows_;
  std::vector<SparseRow> single_rows_;
  std::vector<DenseChunk> chunks_;
  std::vector<int32_t> sparse_items_, single_items_;
  std::vector<SampleRow> samples_;

  std::byte* host_block_ = nullptr;  // Pinned.
  std::byte* device_block_ = nullptr;
  size_t block_bytes_ = 0;
  int32_t* host_tables_ = nullptr;  // Pinned; what the device has.
  int32_t* device_tables_ = nullptr;
  const void* tables_owner_ = nullptr;  // Of the last step.
  std::vector<int64_t> table_pages_;    // Entries of its tables that the device has.
  int64_t table_entries_ = 0;
  int64_t table_stride_ = 0;
  int64_t page_ids_staged_ = 0;
  cudaEvent_t copied_ = nullptr;
  int generation_ = 0;
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_STEP_MEMORY_H_
