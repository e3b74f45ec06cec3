#include "kernels/cuda/step_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/check.h"

namespace resa::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;
size_t Padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A cursor over the block: `Take` gives the same places for the same sizes.
class Packer {
 public:
  Packer(std::byte* host, std::byte* device) : host_(host), device_(device) {}

  // Copies `count` values to the host block and says where the device will have them.
  template <class T>
  const T* Take(const T* from, size_t count) {
    if (count > 0) std::memcpy(host_ + used_, from, count * sizeof(T));
    const T* const there = reinterpret_cast<const T*>(device_ + used_);
    used_ += Padded(count * sizeof(T));
    return there;
  }
  size_t used() const { return used_; }

 private:
  std::byte* const host_;
  std::byte* const device_;
  size_t used_ = 0;
};

template <class T>
size_t PaddedBytes(const std::vector<T>& list) {
  return Padded(list.size() * sizeof(T));
}

}  // namespace

StepMemory::~StepMemory() {
  cudaFreeHost(host_block_);
  cudaFree(device_block_);
  cudaFreeHost(host_tables_);
  cudaFree(device_tables_);
  if (copied_ != nullptr) cudaEventDestroy(copied_);
}

void StepMemory::Stage(const StepLists& lists, cudaStream_t stream) {
  if (copied_ == nullptr) {
    RESA_CUDA_CHECK(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming));
  } else {
    RESA_CUDA_CHECK(cudaEventSynchronize(copied_));
  }
  lists_ = lists;
  MakeLists();
  CopyTables(stream);
  Pack(stream);
  RESA_CUDA_CHECK(cudaEventRecord(copied_, stream));
  key_ = {.owner = lists.owner,
          .rows = lists.rows,
          .sparse_rows = lists.num_sparse_rows,
          .single_rows = device_.num_single_rows,
          .chunks = static_cast<int64_t>(chunks_.size()),
          .writes = device_.num_writes,
          .samples = lists.num_samples,
          .sparse_items = device_.sparse_plan.items_capacity,
          .dense_items = device_.single_plan.items_capacity,
          .table_stride = table_stride_,
          .chunk_capacity = {}};
}

void StepMemory::AddWrites(const KvRun& run) {
  const int32_t* const pages = lists_.tables.pages + run.table * lists_.tables.stride;
  for (int32_t i = 0; i < run.rows;) {
    const int32_t position = run.position + i;
    const int32_t slot = position % kPageTokens;
    const int32_t slots = std::min(kPageTokens - slot, run.rows - i);
    writes_.push_back({pages[position / kPageTokens], run.row_begin + i, slot, slots});
    i += slots;
  }
}

void StepMemory::MakeLists() {
  places_.resize(static_cast<size_t>(lists_.rows));
  writes_.clear();
  for (int64_t r = 0; r < lists_.num_runs; ++r) {
    const KvRun& run = lists_.runs[r];
    for (int32_t i = 0; i < run.rows; ++i) {
      places_[static_cast<size_t>(run.row_begin + i)] = {run.position + i, run.table};
    }
    AddWrites(run);
  }
  sparse_rows_.assign(lists_.sparse_rows, lists_.sparse_rows + lists_.num_sparse_rows);
  single_rows_.clear();
  chunks_.clear();
  for (int64_t c = 0; c < lists_.num_chunks; ++c) {
    const DenseChunk& chunk = lists_.chunks[c];
    if (chunk.rows == 1) {
      single_rows_.push_back(
          {.row = chunk.row_begin, .position = chunk.position, .table = chunk.table});
    } else {
      chunks_.push_back(chunk);
    }
  }
  device_.num_writes = static_cast<int64_t>(writes_.size());
  device_.num_single_rows = static_cast<int64_t>(single_rows_.size());
}

// How many (split, KV head) items each row has; see DecodePlan.
DecodePlan StepMemory::PlanOf(const std::vector<SparseRow>& rows, bool sparse) {
  std::vector<int32_t>& begin = sparse ? sparse_items_ : single_items_;
  begin.assign(1, 0);
  int64_t items = 0;
  for (const SparseRow& row : rows) {
    const int64_t tokens = sparse ? int64_t{row.keep_blocks} * lists_.layout.selector.block_tokens
                                  : int64_t{row.position} + 1;
    const int split = DecodeSplitTokens(tokens);
    items += (tokens + split - 1) / split * lists_.layout.num_kv_heads;
    RESA_CHECK_LE(items, INT32_MAX);
    begin.push_back(static_cast<int32_t>(items));
  }
  const auto capacity = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(items, 64)));
  return {nullptr, static_cast<int64_t>(capacity)};
}

void StepMemory::GrowBlock(size_t bytes) {
  if (bytes <= block_bytes_) return;
  RESA_CUDA_CHECK(cudaDeviceSynchronize());
  cudaFreeHost(host_block_);
  cudaFree(device_block_);
  block_bytes_ = std::max<size_t>(2 * bytes, size_t{1} << 20);
  RESA_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&host_block_), block_bytes_));
  RESA_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device_block_), block_bytes_));
  ++generation_;
}

void StepMemory::Pack(cudaStream_t stream) {
  const auto rows = static_cast<size_t>(lists_.rows);
  const auto samples = static_cast<size_t>(lists_.num_samples);
  device_.sparse_plan = PlanOf(sparse_rows_, true);
  device_.single_plan = PlanOf(single_rows_, false);
  size_t bytes = 2 * Padded(rows * sizeof(int32_t)) + PaddedBytes(places_) + PaddedBytes(writes_) +
                 PaddedBytes(sparse_rows_) + PaddedBytes(single_rows_) + PaddedBytes(chunks_) +
                 PaddedBytes(sparse_items_) + PaddedBytes(single_items_) +
                 Padded(samples * sizeof(int32_t)) + Padded(samples * sizeof(SampleRow));
  for (size_t i = 0; i < samples; ++i) {
    bytes += Padded(static_cast<size_t>(lists_.samples[i].num_counts) * sizeof(TokenCount)) +
             Padded(static_cast<size_t>(lists_.samples[i].num_bias) * sizeof(TokenBias));
  }
  GrowBlock(bytes);

  Packer packer(host_block_, device_block_);
  device_.ids = packer.Take(lists_.ids, lists_.ids == nullptr ? 0 : rows);
  device_.positions = packer.Take(lists_.positions, lists_.positions == nullptr ? 0 : rows);
  device_.places = packer.Take(places_.data(), places_.size());
  device_.writes = packer.Take(writes_.data(), writes_.size());
  device_.sparse_rows = packer.Take(sparse_rows_.data(), sparse_rows_.size());
  device_.single_rows = packer.Take(single_rows_.data(), single_rows_.size());
  device_.chunks = packer.Take(chunks_.data(), chunks_.size());
  device_.sparse_plan.item_begin = packer.Take(sparse_items_.data(), sparse_items_.size());
  device_.single_plan.item_begin = packer.Take(single_items_.data(), single_items_.size());
  device_.sampled_rows =
      packer.Take(lists_.sampled_rows, lists_.sampled_rows == nullptr ? 0 : samples);
  // Last, since their lengths follow from more than the counts: the rows' own lists. Nothing but
  // the rows points there. They are packed first to know where, behind the place of the rows.
  samples_.assign(lists_.samples, lists_.samples + samples);
  const size_t rows_at = packer.used();
  packer.Take(samples_.data(), samples);
  for (SampleRow& row : samples_) {
    row.counts = packer.Take(row.counts, static_cast<size_t>(row.num_counts));
    row.bias = packer.Take(row.bias, static_cast<size_t>(row.num_bias));
  }
  if (samples > 0) std::memcpy(host_block_ + rows_at, samples_.data(), samples * sizeof(SampleRow));
  device_.samples = reinterpret_cast<const SampleRow*>(device_block_ + rows_at);
  RESA_CHECK_LE(packer.used(), block_bytes_);
  RESA_CUDA_CHECK(
      cudaMemcpyAsync(device_block_, host_block_, packer.used(), cudaMemcpyHostToDevice, stream));
}

void StepMemory::ReserveTables(cudaStream_t stream) {
  const int64_t stride = lists_.tables.stride;
  const int64_t entries = lists_.num_tables * stride;
  if (entries <= table_entries_ && stride == table_stride_) return;
  RESA_CUDA_CHECK(cudaDeviceSynchronize());
  if (entries > table_entries_) {
    cudaFreeHost(host_tables_);
    cudaFree(device_tables_);
    table_entries_ = std::max<int64_t>(entries, 2 * table_entries_);
    const size_t bytes = static_cast<size_t>(table_entries_) * sizeof(int32_t);
    RESA_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&host_tables_), bytes));
    RESA_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device_tables_), bytes));
  }
  const size_t bytes = static_cast<size_t>(table_entries_) * sizeof(int32_t);
  std::memset(host_tables_, 0, bytes);
  RESA_CUDA_CHECK(cudaMemsetAsync(device_tables_, 0, bytes, stream));
  table_stride_ = stride;
  table_pages_.clear();
  ++generation_;
}

void StepMemory::CopyTables(cudaStream_t stream) {
  ReserveTables(stream);
  if (lists_.owner != tables_owner_ || lists_.known_pages == nullptr) table_pages_.clear();
  tables_owner_ = lists_.owner;
  if (static_cast<int64_t>(table_pages_.size()) < lists_.num_tables) {
    table_pages_.resize(static_cast<size_t>(lists_.num_tables));
  }
  device_.tables = {device_tables_, lists_.tables.stride};
  // A sequence's table is the same as in the last step but for a page now and then, as long as the
  // sequences keep their places.
  for (int64_t i = 0; i < lists_.num_runs; ++i) {
    const KvRun& run = lists_.runs[i];
    CopyTable(run.table, int64_t{run.position} + run.rows, stream);
  }
  if (lists_.num_runs > 0) return;  // They are all there is: every row of a step is in one.
  for (const SparseRow& row : sparse_rows_) CopyTable(row.table, row.position + 1, stream);
  for (int64_t i = 0; i < lists_.num_chunks; ++i) {
    const DenseChunk& chunk = lists_.chunks[i];
    CopyTable(chunk.table, int64_t{chunk.position} + chunk.rows, stream);
  }
}

void StepMemory::CopyTable(int32_t table, int64_t tokens, cudaStream_t stream) {
  const int64_t used = (tokens + kPageTokens - 1) / kPageTokens;
  int64_t known = 0;
  if (lists_.known_pages != nullptr) {
    known = std::min<int64_t>(lists_.known_pages[table], table_pages_[static_cast<size_t>(table)]);
  }
  table_pages_[static_cast<size_t>(table)] = std::max(known, used);
  if (used <= known) return;
  page_ids_staged_ += used - known;
  const int32_t* const from = lists_.tables.pages + table * table_stride_;
  int32_t* const to = host_tables_ + table * table_stride_;
  const auto first = std::mismatch(from + known, from + used, to + known).first - from;
  if (first == used) return;
  const size_t bytes = static_cast<size_t>(used - first) * sizeof(int32_t);
  std::memcpy(to + first, from + first, bytes);
  RESA_CUDA_CHECK(cudaMemcpyAsync(device_tables_ + table * table_stride_ + first, to + first, bytes,
                                  cudaMemcpyHostToDevice, stream));
}

}  // namespace resa::kernels::cuda
