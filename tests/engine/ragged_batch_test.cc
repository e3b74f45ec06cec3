#include "engine/ragged_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace resa::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

kernels::KvLayout Layout() {
  kernels::KvLayout layout;
  layout.num_layers = 1;
  layout.num_pages = 10;
  layout.num_kv_heads = 3;
  layout.head_dim = 64;
  layout.selector.block_tokens = 8;
  return layout;
}

BatchLimits Limits() { return {.max_rows = 12, .max_segments = 4, .max_pages_per_sequence = 5}; }

SegmentInput Segment(const std::vector<int32_t>& tokens, int32_t position,
                     const std::vector<int32_t>& pages) {
  SegmentInput segment;
  segment.tokens = tokens;
  segment.position = position;
  segment.pages = pages;
  return segment;
}

MATCHER_P4(IsRun, row, rows, position, table, "") {
  return arg.row_begin == row && arg.rows == rows && arg.position == position && arg.table == table;
}

TEST(RaggedBatchTest, LaysSegmentsFlatAndSortsThemByAttention) {
  const std::vector<int32_t> prompt = {1, 2, 3, 4, 5}, one = {6}, window = {7, 8, 9}, dense = {10};
  const std::vector<int32_t> pages0 = {9}, pages1 = {4, 0, 5}, pages2 = {3, 8}, pages3 = {1};
  std::vector<SegmentInput> segments = {Segment(prompt, 0, pages0), Segment(one, 40, pages1),
                                        Segment(window, 21, pages2), Segment(dense, 15, pages3)};
  segments[1].sparse = SparseBudget{.keep_blocks = 4, .local_blocks = 2, .sink_blocks = 1};
  segments[1].sample = kernels::SampleRow{.row = 77, .seed = 1};
  segments[2].sample = kernels::SampleRow{.row = 77, .seed = 2};
  RaggedBatch batch(Limits(), Layout());
  batch.Build(segments);

  EXPECT_EQ(batch.rows(), 10);
  EXPECT_THAT(batch.tokens(), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10));
  EXPECT_THAT(batch.positions(), ElementsAre(0, 1, 2, 3, 4, 40, 21, 22, 23, 15));
  EXPECT_THAT(batch.runs(), ElementsAre(IsRun(0, 5, 0, 0), IsRun(5, 1, 40, 1), IsRun(6, 3, 21, 2),
                                        IsRun(9, 1, 15, 3)));
  EXPECT_THAT(batch.dense_chunks(),
              ElementsAre(IsRun(0, 5, 0, 0), IsRun(6, 3, 21, 2), IsRun(9, 1, 15, 3)));
  ASSERT_EQ(batch.sparse_rows().size(), 1u);
  const kernels::SparseRow& sparse = batch.sparse_rows()[0];
  EXPECT_EQ(sparse.row, 5);
  EXPECT_EQ(sparse.position, 40);
  EXPECT_EQ(sparse.table, 1);
  EXPECT_EQ(sparse.keep_blocks, 4);
  EXPECT_EQ(sparse.local_blocks, 2);
  EXPECT_EQ(sparse.sink_blocks, 1);
  EXPECT_EQ(sparse.ids_begin, 0);
  EXPECT_EQ(batch.num_block_ids(), 4 * 3);

  const kernels::PageTables tables = batch.tables();
  EXPECT_EQ(tables.stride, 5);
  EXPECT_THAT(absl::MakeSpan(tables.pages + 5, 3), ElementsAre(4, 0, 5));
  EXPECT_THAT(absl::MakeSpan(tables.pages + 10, 2), ElementsAre(3, 8));

  // The last row of each segment that samples; the executor numbers the rows of the logits.
  EXPECT_THAT(batch.sampled_rows(), ElementsAre(5, 8));
  ASSERT_EQ(batch.samples().size(), 2u);
  EXPECT_EQ(batch.samples()[0].row, 0);
  EXPECT_EQ(batch.samples()[0].seed, 1u);
  EXPECT_EQ(batch.samples()[1].row, 1);
  EXPECT_EQ(batch.samples()[1].seed, 2u);
}

TEST(RaggedBatchTest, IdsOfSparseRowsLieOneAfterAnother) {
  const std::vector<int32_t> token = {1};
  const std::vector<int32_t> pages0 = {0, 1, 2}, pages1 = {3, 4, 5}, pages2 = {6, 7, 8, 9};
  std::vector<SegmentInput> segments = {Segment(token, 47, pages0), Segment(token, 33, pages1),
                                        Segment(token, 63, pages2)};
  segments[0].sparse = SparseBudget{6, 1, 0};  // Every block there is.
  segments[1].sparse = SparseBudget{2, 1, 1};
  segments[2].sparse = SparseBudget{1, 1, 0};
  RaggedBatch batch(Limits(), Layout());
  batch.Build(segments);
  ASSERT_EQ(batch.sparse_rows().size(), 3u);
  EXPECT_EQ(batch.sparse_rows()[0].ids_begin, 0);
  EXPECT_EQ(batch.sparse_rows()[1].ids_begin, 6 * 3);
  EXPECT_EQ(batch.sparse_rows()[2].ids_begin, 8 * 3);
  EXPECT_EQ(batch.num_block_ids(), 9 * 3);
  EXPECT_LE(batch.num_block_ids(), batch.max_block_ids());
  EXPECT_THAT(batch.dense_chunks(), IsEmpty());
}

TEST(RaggedBatchTest, MaxBlockIdsHoldsEverySequenceKeepingEverything) {
  // 4 sequences x 3 KV heads x 5 pages x 2 blocks.
  EXPECT_EQ(RaggedBatch(Limits(), Layout()).max_block_ids(), 120);
}

TEST(RaggedBatchTest, BuildForgetsTheLastStepAndMovesNothing) {
  RaggedBatch batch(Limits(), Layout());
  const int32_t* tokens = batch.tokens().data();
  const int32_t* pages = batch.tables().pages;
  const std::vector<int32_t> prompt(12, 1), page = {0, 1, 2, 3, 4};
  std::vector<SegmentInput> first = {Segment(prompt, 68, page)};
  first[0].sample = kernels::SampleRow{};
  batch.Build(first);
  EXPECT_EQ(batch.rows(), 12);
  batch.Build({});
  EXPECT_EQ(batch.rows(), 0);
  EXPECT_THAT(batch.runs(), IsEmpty());
  EXPECT_THAT(batch.dense_chunks(), IsEmpty());
  EXPECT_THAT(batch.sampled_rows(), IsEmpty());
  EXPECT_THAT(batch.samples(), IsEmpty());
  EXPECT_EQ(batch.tokens().data(), tokens);
  EXPECT_EQ(batch.tables().pages, pages);
}

TEST(RaggedBatchTest, LooksOnlyAtWhatWasAppendedToATableItHolds) {
  RaggedBatch batch(Limits(), Layout());
  const std::vector<int32_t> one = {1};
  const auto step = [&](std::vector<std::pair<uint64_t, std::vector<int32_t>>> tables) {
    std::vector<SegmentInput> segments;
    for (auto& [id, pages] : tables) {
      segments.push_back(Segment(one, 0, pages));
      segments.back().pages_id = id;
    }
    batch.Build(segments);
    const int32_t* const known = batch.Lists(nullptr).known_pages;
    return std::vector<int32_t>(known, known + tables.size());
  };
  const auto table = [&](int row) {
    const int32_t* const pages = batch.tables().pages + row * batch.tables().stride;
    return std::vector<int32_t>(pages, pages + 3);
  };
  EXPECT_THAT(step({{7, {1, 2}}, {0, {3, 4}}}), ElementsAre(0, 0));
  // The same table, longer; and one of which nothing is known.
  EXPECT_THAT(step({{7, {1, 2, 5}}, {0, {3, 4}}}), ElementsAre(2, 0));
  EXPECT_THAT(table(0), ElementsAre(1, 2, 5));
  // What an id promises is not looked at again.
  EXPECT_THAT(step({{7, {9, 2, 5}}}), ElementsAre(3));
  EXPECT_THAT(table(0), ElementsAre(1, 2, 5));
  // Another table in its place, then the first one in another place.
  EXPECT_THAT(step({{8, {6, 2, 5}}, {7, {1, 2, 5}}}), ElementsAre(0, 0));
  EXPECT_THAT(table(0), ElementsAre(6, 2, 5));
  EXPECT_THAT(table(1), ElementsAre(1, 2, 5));
  // A row that stood out for a step still has its table; a shorter view of it is the same table.
  EXPECT_THAT(step({{8, {6, 2, 5}}}), ElementsAre(3));
  EXPECT_THAT(step({{8, {6}}, {7, {1, 2, 5}}}), ElementsAre(1, 3));
  EXPECT_THAT(step({{8, {6, 2, 5}}}), ElementsAre(3));
  EXPECT_THAT(table(0), ElementsAre(6, 2, 5));
}

using RaggedBatchDeathTest = ::testing::Test;

TEST(RaggedBatchDeathTest, RefusesWhatWouldReadOrWriteElsewhere) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::vector<int32_t> one = {1}, seventeen(17, 1), two_pages = {0, 1};
  const auto build = [](const SegmentInput& segment) {
    RaggedBatch batch({.max_rows = 20, .max_segments = 4, .max_pages_per_sequence = 2}, Layout());
    batch.Build({segment});
  };
  build(Segment(one, 31, two_pages));
  EXPECT_DEATH(build(Segment({}, 0, two_pages)), "tokens.empty");
  EXPECT_DEATH(build(Segment(one, -1, two_pages)), "position");
  EXPECT_DEATH(build(Segment(one, 32, two_pages)), "33 vs 32");
  const std::vector<int32_t> beyond = {0, 10}, negative = {-1}, three = {0, 1, 2};
  EXPECT_DEATH(build(Segment(one, 0, beyond)), "page 10");
  EXPECT_DEATH(build(Segment(one, 0, negative)), "page -1");
  EXPECT_DEATH(build(Segment(one, 0, three)), "3 vs 2");
  const std::vector<int32_t> many(21, 1);
  EXPECT_DEATH(build(Segment(many, 0, two_pages)), "21 vs 20");

  SegmentInput sparse = Segment(one, 31, two_pages);
  for (const SparseBudget& bad : {SparseBudget{5, 1, 0}, SparseBudget{0, 0, 0},
                                  SparseBudget{2, 2, 1}, SparseBudget{2, -1, 1}}) {
    sparse.sparse = bad;
    EXPECT_DEATH(build(sparse), "check failed");
  }
  SegmentInput chunk = Segment(seventeen, 0, two_pages);
  chunk.sparse = SparseBudget{1, 1, 0};
  EXPECT_DEATH(build(chunk), "17 vs 1");
}

}  // namespace
}  // namespace resa::engine
