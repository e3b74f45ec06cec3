#include "engine/ragged_batch.h"

#include <algorithm>

#include "kernels/check.h"

namespace resa::engine {
namespace {

int32_t CeilDivide(int32_t value, int32_t by) { return (value + by - 1) / by; }

}  // namespace

RaggedBatch::RaggedBatch(const BatchLimits& limits, const kernels::KvLayout& layout)
    : limits_(limits), layout_(layout) {
  RESA_CHECK_GT(limits.max_segments, 0);
  RESA_CHECK_LE(limits.max_segments, limits.max_rows);
  RESA_CHECK_GT(limits.max_pages_per_sequence, 0);
  tokens_.reserve(limits.max_rows);
  positions_.reserve(limits.max_rows);
  runs_.reserve(limits.max_segments);
  dense_chunks_.reserve(limits.max_segments);
  sparse_rows_.reserve(limits.max_segments);
  sampled_rows_.reserve(limits.max_segments);
  samples_.reserve(limits.max_segments);
  pages_.resize(static_cast<size_t>(limits.max_segments) * limits.max_pages_per_sequence);
  held_.resize(limits.max_segments);
  known_pages_.reserve(limits.max_segments);
}

int64_t RaggedBatch::MaxBlockIds(const BatchLimits& limits, const kernels::KvLayout& layout) {
  return int64_t{limits.max_segments} * layout.num_kv_heads * limits.max_pages_per_sequence *
         layout.BlocksPerPage();
}

void RaggedBatch::Build(absl::Span<const SegmentInput> segments) {
  RESA_CHECK_LE(segments.size(), static_cast<size_t>(limits_.max_segments));
  tokens_.clear();
  positions_.clear();
  runs_.clear();
  dense_chunks_.clear();
  sparse_rows_.clear();
  sampled_rows_.clear();
  samples_.clear();
  known_pages_.clear();
  num_block_ids_ = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    CheckSegment(segments[i]);
    AppendSegment(segments[i], static_cast<int32_t>(i));
  }
}

kernels::StepLists RaggedBatch::Lists(kernels::SampleResult* results) const {
  kernels::StepLists lists;
  lists.rows = rows();
  lists.ids = tokens_.data();
  lists.positions = positions_.data();
  lists.runs = runs_.data();
  lists.num_runs = static_cast<int64_t>(runs_.size());
  lists.sparse_rows = sparse_rows_.data();
  lists.num_sparse_rows = static_cast<int64_t>(sparse_rows_.size());
  lists.chunks = dense_chunks_.data();
  lists.num_chunks = static_cast<int64_t>(dense_chunks_.size());
  lists.tables = tables();
  lists.num_tables = lists.num_runs;
  lists.known_pages = known_pages_.data();
  lists.layout = layout_;
  lists.sampled_rows = sampled_rows_.data();
  lists.samples = samples_.data();
  lists.num_samples = static_cast<int64_t>(samples_.size());
  lists.results = results;
  return lists;
}

void RaggedBatch::CheckSegment(const SegmentInput& segment) const {
  RESA_CHECK(!segment.tokens.empty());
  RESA_CHECK_GE(segment.position, 0);
  const int64_t kv_len = segment.position + static_cast<int64_t>(segment.tokens.size());
  const int64_t pages = static_cast<int64_t>(segment.pages.size());
  RESA_CHECK_LE(pages, limits_.max_pages_per_sequence);
  RESA_CHECK_LE(kv_len, pages * kernels::kPageTokens);
  RESA_CHECK_LE(tokens_.size() + segment.tokens.size(), static_cast<size_t>(limits_.max_rows));
  if (!segment.sparse.has_value()) return;
  RESA_CHECK_EQ(segment.tokens.size(), 1u);
  const SparseBudget& budget = *segment.sparse;
  const int32_t blocks = CeilDivide(static_cast<int32_t>(kv_len), layout_.selector.block_tokens);
  RESA_CHECK(budget.keep_blocks >= 1 && budget.keep_blocks <= blocks)
      << budget.keep_blocks << " of " << blocks << " blocks";
  RESA_CHECK(budget.local_blocks >= 0 && budget.sink_blocks >= 0);
  RESA_CHECK_LE(budget.local_blocks + budget.sink_blocks, budget.keep_blocks);
}

void RaggedBatch::AppendSegment(const SegmentInput& segment, int32_t table) {
  const int32_t row_begin = rows();
  const int32_t count = static_cast<int32_t>(segment.tokens.size());
  tokens_.insert(tokens_.end(), segment.tokens.begin(), segment.tokens.end());
  for (int32_t i = 0; i < count; ++i) positions_.push_back(segment.position + i);
  TakeTable(segment, table);
  runs_.push_back({row_begin, count, segment.position, table});
  if (segment.sparse.has_value()) {
    sparse_rows_.push_back(MakeSparseRow(segment, row_begin, table));
    num_block_ids_ += int64_t{layout_.num_kv_heads} * segment.sparse->keep_blocks;
  } else {
    dense_chunks_.push_back({row_begin, count, segment.position, table});
  }

  if (segment.sample.has_value()) {
    samples_.push_back(*segment.sample);
    samples_.back().row = static_cast<int32_t>(sampled_rows_.size());
    sampled_rows_.push_back(row_begin + count - 1);
  }
}

void RaggedBatch::TakeTable(const SegmentInput& segment, int32_t table) {
  HeldTable& held = held_[table];
  int32_t* const to = pages_.data() + int64_t{table} * limits_.max_pages_per_sequence;
  const auto count = static_cast<int32_t>(segment.pages.size());
  const bool same = segment.pages_id != 0 && segment.pages_id == held.id;
  const int32_t known = same ? std::min(held.pages, count) : 0;
  // The promise of an id, where it is cheapest to break: at the end.
  RESA_CHECK(known == 0 || to[known - 1] == segment.pages[known - 1]) << "table " << held.id;
  for (int32_t i = known; i < count; ++i) {
    const int32_t page = segment.pages[i];
    RESA_CHECK(page >= 0 && page < layout_.num_pages) << "page " << page;
    to[i] = page;
  }
  held = {segment.pages_id, same ? std::max(held.pages, count) : count};
  known_pages_.push_back(known);
}

kernels::SparseRow RaggedBatch::MakeSparseRow(const SegmentInput& segment, int32_t row,
                                              int32_t table) const {
  kernels::SparseRow sparse;
  sparse.row = row;
  sparse.position = segment.position;
  sparse.table = table;
  sparse.keep_blocks = segment.sparse->keep_blocks;
  sparse.local_blocks = segment.sparse->local_blocks;
  sparse.sink_blocks = segment.sparse->sink_blocks;
  sparse.ids_begin = num_block_ids_;
  return sparse;
}

}  // namespace resa::engine
