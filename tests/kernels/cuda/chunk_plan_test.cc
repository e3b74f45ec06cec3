// The plan of ChunkAttend's work, which is made on the host: every row meets every key that it may
// see once, in pieces that the device can share evenly.

#include "kernels/cuda/chunk_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/support/test_seed.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kSms = 132;
constexpr int kTileKeys = 128;

ChunkShape Shape(int group, int kv_heads, bool fixed_splits = false) {
  return ChunkShape{group, kv_heads, kSms, kTileKeys, fixed_splits};
}

std::vector<DenseChunk> Windows(int count, int rows, int position) {
  std::vector<DenseChunk> chunks;
  for (int i = 0; i < count; ++i) chunks.push_back({i * rows, rows, position, i});
  return chunks;
}

int64_t Length(const ChunkWork& work) {
  return (work.key_end - work.key_begin + kTileKeys - 1) / kTileKeys;
}

// Of all the work, as tiles of keys per multiprocessor; and of the multiprocessor that has most
// when each takes the next piece as it gets free.
struct Load {
  double even = 0;
  double longest = 0;
};
Load LoadOf(const ChunkPlan& plan, const ChunkShape& shape) {
  Load load;
  for (const ChunkPass& pass : plan.passes) {
    std::vector<int64_t> busy(kSms, 0);
    for (int i = pass.work_begin; i < pass.work_begin + pass.works; ++i) {
      for (int head = 0; head < shape.kv_heads; ++head) {
        *std::min_element(busy.begin(), busy.end()) += Length(plan.work[i]);
        load.even += static_cast<double>(Length(plan.work[i])) / kSms;
      }
    }
    load.longest += static_cast<double>(*std::max_element(busy.begin(), busy.end()));
  }
  return load;
}

void ExpectCovers(const std::vector<DenseChunk>& chunks, const ChunkShape& shape) {
  const ChunkPlan plan = PlanChunks(chunks.data(), static_cast<int64_t>(chunks.size()), shape);
  // Keys seen by the tile that begins at a packed row of a chunk, piece after piece.
  std::vector<std::vector<int>> keys(chunks.size());
  for (size_t c = 0; c < chunks.size(); ++c) keys[c].assign(chunks[c].rows * shape.group, 0);
  for (const ChunkPass& pass : plan.passes) {
    std::vector<ChunkWork> pieces(plan.work.begin() + pass.work_begin,
                                  plan.work.begin() + pass.work_begin + pass.works);
    std::sort(pieces.begin(), pieces.end(),
              [](const ChunkWork& a, const ChunkWork& b) { return a.key_begin < b.key_begin; });
    for (const ChunkWork& work : pieces) {
      const auto chunk = std::find_if(chunks.begin(), chunks.end(), [&](const DenseChunk& c) {
        return c.row_begin == work.row_begin;
      });
      ASSERT_NE(chunk, chunks.end());
      EXPECT_EQ(work.position, chunk->position);
      EXPECT_EQ(work.table, chunk->table);
      EXPECT_EQ(work.packed_begin % kChunkTileRows, 0);
      EXPECT_EQ(work.packed_end,
                std::min(work.packed_begin + kChunkTileRows, chunk->rows * shape.group));
      EXPECT_EQ(work.key_begin % kTileKeys, 0);
      int& seen = keys[chunk - chunks.begin()][work.packed_begin];
      EXPECT_EQ(work.key_begin, seen) << "a gap between two pieces, or keys seen twice";
      seen = work.key_end;
      const int last = chunk->position + (work.packed_end - 1) / shape.group;
      EXPECT_LE(work.key_end, last + 1);
      if (work.key_end <= last) {
        EXPECT_EQ(work.key_end % kTileKeys, 0);
      }
      EXPECT_EQ(work.partial < 0, work.merge < 0);
      EXPECT_EQ(work.partial < 0, work.key_begin == 0 && work.key_end == last + 1);
      if (work.merge < 0) continue;
      ASSERT_LT(work.merge, pass.merges);
      const ChunkMerge& merge = plan.merge[pass.merge_begin + work.merge];
      EXPECT_EQ(merge.row_begin, work.row_begin);
      EXPECT_EQ(merge.packed_begin, work.packed_begin);
      EXPECT_GE(work.partial, merge.partial_begin);
      EXPECT_LT(work.partial, merge.partial_begin + merge.partials);
    }
    for (int i = 0; i < pass.merges; ++i) {
      const ChunkMerge& merge = plan.merge[pass.merge_begin + i];
      EXPECT_EQ(merge.partials, std::count_if(pieces.begin(), pieces.end(),
                                              [&](const ChunkWork& w) { return w.merge == i; }));
      EXPECT_LE(merge.partial_begin + merge.partials, plan.partials);
    }
    EXPECT_LE(pass.merges, plan.merges);
  }
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (size_t p = 0; p < keys[c].size(); p += kChunkTileRows) {
      const size_t last = std::min(p + kChunkTileRows, keys[c].size()) - 1;
      EXPECT_EQ(keys[c][p], chunks[c].position + static_cast<int>(last) / shape.group + 1);
    }
  }
}

TEST(ChunkPlanTest, EveryRowMeetsEveryKeyOnce) {
  const uint64_t seed = testing::TestSeed();
  SCOPED_TRACE(::testing::Message() << "RESA_TEST_SEED=" << seed);
  std::mt19937_64 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  for (int round = 0; round < 200; ++round) {
    std::vector<DenseChunk> chunks;
    int rows = 0;
    for (int count = 1 + below(10); count > 0; --count) {
      DenseChunk chunk{rows, 1 + below(below(4) == 0 ? 2000 : 40), below(below(3) ? 3000 : 200000),
                       static_cast<int32_t>(chunks.size())};
      rows += chunk.rows;
      chunks.push_back(chunk);
    }
    ExpectCovers(chunks, Shape(1 + below(16), 1 + below(8), round % 2 == 0));
  }
}

TEST(ChunkPlanTest, FewTilesOverManyKeysFillTheDevice) {
  for (const auto& [group, kv_heads] : {std::pair(7, 4), std::pair(4, 8)}) {
    for (const auto& [count, position] : {std::pair(1, 131040), std::pair(8, 262112)}) {
      const auto chunks = Windows(count, 32, position);
      const ChunkShape shape = Shape(group, kv_heads);
      const ChunkPlan plan = PlanChunks(chunks.data(), count, shape);
      const Load load = LoadOf(plan, shape);
      EXPECT_LT(load.longest, 1.02 * load.even);
      EXPECT_EQ(plan.passes.size(), 1);
    }
  }
}

TEST(ChunkPlanTest, LongPrefillIsNotSplit) {
  const std::vector<DenseChunk> chunks = {{0, 32768, 0, 0}};
  const ChunkShape shape = Shape(7, 4);
  const ChunkPlan plan = PlanChunks(chunks.data(), 1, shape);
  EXPECT_TRUE(plan.merge.empty());
  const Load load = LoadOf(plan, shape);
  EXPECT_LT(load.longest, 1.02 * load.even);
}

// The last round of equal tiles would leave most of the device idle.
TEST(ChunkPlanTest, LastRoundIsSplit) {
  for (const auto& [group, kv_heads] : {std::pair(7, 4), std::pair(4, 8)}) {
    for (const int rows : {2048, 8192}) {
      const std::vector<DenseChunk> chunks = {{0, rows, 131072, 0}};
      const ChunkShape shape = Shape(group, kv_heads);
      const ChunkPlan plan = PlanChunks(chunks.data(), 1, shape);
      const Load load = LoadOf(plan, shape);
      EXPECT_LT(load.longest, 1.02 * load.even);
      EXPECT_EQ(plan.passes.size(), 1);
    }
  }
}

TEST(ChunkPlanTest, WindowsOfManyLengthsAreEven) {
  std::vector<DenseChunk> chunks;
  for (const int position : {190000, 150000, 90000, 70000, 66000, 20000}) {
    const auto i = static_cast<int32_t>(chunks.size());
    chunks.push_back({32 * i, 32, position, i});
  }
  const ChunkShape shape = Shape(7, 4);
  const ChunkPlan plan = PlanChunks(chunks.data(), static_cast<int64_t>(chunks.size()), shape);
  const Load load = LoadOf(plan, shape);
  EXPECT_LT(load.longest, 1.03 * load.even);
}

TEST(ChunkPlanTest, FixedSplitsLieAtFixedKeys) {
  const auto cuts = [](const std::vector<DenseChunk>& chunks) {
    const ChunkPlan plan =
        PlanChunks(chunks.data(), static_cast<int64_t>(chunks.size()), Shape(7, 4, true));
    std::vector<int> begins;
    for (const ChunkWork& work : plan.work) {
      if (work.row_begin == 0) begins.push_back(work.key_begin);
    }
    std::sort(begins.begin(), begins.end());
    begins.erase(std::unique(begins.begin(), begins.end()), begins.end());
    return begins;
  };
  EXPECT_EQ(cuts(Windows(1, 32, 100000)), cuts(Windows(8, 32, 100000)));
  EXPECT_EQ(cuts({{0, 1, 100031, 0}}), cuts({{0, 4096, 95936, 0}}));
}

// The memory for partial results is bounded, however much is split.
TEST(ChunkPlanTest, PartialResultsAreBounded) {
  const std::vector<DenseChunk> chunks = {{0, 8192, 131072, 0}};
  const ChunkPlan plan = PlanChunks(chunks.data(), 1, Shape(7, 4, true));
  EXPECT_GT(plan.passes.size(), 1);
  EXPECT_LE(plan.partials * 4, 1024);
}

}  // namespace
}  // namespace resa::kernels::cuda
