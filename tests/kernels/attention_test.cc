// Dense and sparse attention: against float64, and bit by bit across batches, chunks and threads.

#include "kernels/cpu/cpu_ops.h"
#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using kernels::DenseChunk;
using kernels::SelectorKind;
using kernels::SelectorSpec;
using kernels::SparseRow;

constexpr SelectorSpec kSketch8 = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}};

// Scores are d products rounded to 2^-24 each, at most about 8 here, so exp() of them is good to
// 8 * sqrt(128) * 2^-24 = 5e-6; the weighted mean cancels further digits. K and V are compared as
// stored, so their type does not matter.
constexpr double kTolerance = 2e-5;
// Where activations are bf16, the result is rounded to it and the matrix unit takes the softmax's
// weights so: each at most 2^-8 off, by 1.5e-3 in the root mean square over all mantissas (of
// variance 7 / 3 with an error of variance 2^-16 / 3). Both together: 2.1e-3 over many rows. Of a
// single one, of few heads that look at few tokens, both may be at their worst.
constexpr double kToleranceBf16 = 3e-3;
constexpr double kRowToleranceBf16 = 2 * 0x1p-8;

class AttentionTest : public OpsTest {
 protected:
  // A row, and at the end of a case all of its rows together.
  void ExpectRow(std::span<const float> got, const Doubles& want, const HeadCase& heads,
                 const std::string& what) {
    const bool bf16 = activation_dtype() == kernels::DType::kBF16;
    EXPECT_EQ(Compare(got, want, heads.head_dim, bf16 ? kRowToleranceBf16 : kTolerance), "")
        << heads.Name() << ", " << what;
    got_.insert(got_.end(), got.begin(), got.end());
    want_.insert(want_.end(), want.begin(), want.end());
  }
  void ExpectRowsTogether(const HeadCase& heads) {
    const bool bf16 = activation_dtype() == kernels::DType::kBF16;
    EXPECT_EQ(Compare(got_, want_, heads.head_dim, bf16 ? kToleranceBf16 : kTolerance), "")
        << heads.Name();
    got_.clear();
    want_.clear();
  }

  // The same rows computed in another way: cut into other chunks, or over a list that keeps all.
  // A GPU has a kernel for each way, whose sums run in another order, so their results differ by
  // what each may be off.
  std::string CompareOtherWay(std::span<const float> got, std::span<const float> want,
                              size_t columns) const {
    if (!IsCuda()) return CompareBits(got, want, columns);
    return Compare(got, Doubles(want.begin(), want.end()), columns, 2 * kToleranceBf16);
  }

  // A pool of sequences full of random K and V; also the batch of all their queries.
  struct World {
    HeadCase heads;
    std::vector<int> lengths;
    std::unique_ptr<TestPool> pool;
    std::vector<float> q;  // [sum of lengths, heads * d]
    int64_t rows = 0;

    int64_t width() const { return int64_t{heads.heads()} * heads.head_dim; }
  };

  // `rows`: of the batch, where it is not to hold all tokens' queries.
  World MakeWorld(const HeadCase& heads, std::vector<int> lengths,
                  const SelectorSpec& selector = kSketch8, int rows = 0) {
    World world{heads, lengths, std::make_unique<TestPool>(heads, selector, lengths, rng()), {}, 0};
    const size_t width = static_cast<size_t>(heads.kv_heads) * heads.head_dim;
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int t = 0; t < lengths[s]; ++t) {
        world.pool->Write(static_cast<int>(s), t, Normal(width), Normal(width));
      }
      world.rows += lengths[s];
    }
    if (rows > 0) world.rows = rows;
    world.q = Activations(static_cast<size_t>(world.rows * world.width()), 1.5f);
    return world;
  }

  // Every third of kLengths, another third with each call.
  std::vector<int> SomeLengths() {
    std::vector<int> lengths;
    for (size_t i = turn_++ % 3; i < kLengths.size(); i += 3) lengths.push_back(kLengths[i]);
    return lengths;
  }

  std::vector<float> Dense(kernels::Ops& ops, World& world, const std::vector<DenseChunk>& chunks) {
    std::vector<float> out = Poison(world.q.size());
    ops.ChunkAttend({.q = AsMatrix(world.q, world.rows, world.width()),
                     .num_heads = world.heads.heads(),
                     .chunks = chunks.data(),
                     .num_chunks = static_cast<int64_t>(chunks.size()),
                     .tables = world.pool->tables(),
                     .layout = world.pool->layout(),
                     .kv = world.pool->layer(),
                     .out = AsMatrix(out, world.rows, world.width())});
    return out;
  }

  std::vector<float> Sparse(kernels::Ops& ops, World& world, const std::vector<SparseRow>& rows,
                            const std::vector<int32_t>& ids) {
    std::vector<float> out = Poison(world.q.size());
    ops.SparseAttend({.q = AsMatrix(world.q, world.rows, world.width()),
                      .num_heads = world.heads.heads(),
                      .rows = rows.data(),
                      .num_rows = static_cast<int64_t>(rows.size()),
                      .ids = ids.data(),
                      .tables = world.pool->tables(),
                      .layout = world.pool->layout(),
                      .kv = world.pool->layer(),
                      .out = AsMatrix(out, world.rows, world.width())});
    return out;
  }

  // Row `row` of the batch, at `position` of `sequence`, over `positions`.
  static Doubles Expected(const World& world, int64_t row, int sequence,
                          const std::vector<std::vector<int>>& positions_of_head) {
    Doubles out;
    const auto d = static_cast<size_t>(world.heads.head_dim);
    for (int kv_head = 0; kv_head < world.heads.kv_heads; ++kv_head) {
      std::vector<Doubles> keys, values;
      for (int position : positions_of_head[static_cast<size_t>(kv_head)]) {
        keys.push_back(world.pool->Key(sequence, position, kv_head));
        values.push_back(world.pool->Value(sequence, position, kv_head));
      }
      for (int g = 0; g < world.heads.group; ++g) {
        const auto head = static_cast<size_t>(kv_head * world.heads.group + g);
        const auto query =
            std::span(world.q).subspan(static_cast<size_t>(row * world.width()) + head * d, d);
        for (double x : ReferenceAttention(query, keys, values)) out.push_back(x);
      }
    }
    return out;
  }

  static std::span<const float> Row(const World& world, const std::vector<float>& out,
                                    int64_t row) {
    return std::span(out).subspan(static_cast<size_t>(row * world.width()),
                                  static_cast<size_t>(world.width()));
  }

  static std::vector<std::vector<int>> AllUpTo(const World& world, int position) {
    std::vector<int> all(static_cast<size_t>(position) + 1);
    for (int t = 0; t <= position; ++t) all[static_cast<size_t>(t)] = t;
    return std::vector<std::vector<int>>(static_cast<size_t>(world.heads.kv_heads), all);
  }

 private:
  size_t turn_ = 0;
  std::vector<float> got_;  // Of the rows of a case so far.
  Doubles want_;
};

TEST_P(AttentionTest, DenseRowsMatchFloat64AtEveryLength) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, SomeLengths());
    const std::vector<int>& lengths = world.lengths;
    // The last token of each sequence as a chunk of one row: a dense decode step.
    std::vector<DenseChunk> chunks;
    int32_t row = -1;
    for (size_t s = 0; s < lengths.size(); ++s) {
      row += lengths[s];
      chunks.push_back({row, 1, lengths[s] - 1, static_cast<int32_t>(s)});
    }
    const std::vector<float> out = Dense(*ops, world, chunks);
    for (const DenseChunk& chunk : chunks) {
      const Doubles want =
          Expected(world, chunk.row_begin, chunk.table, AllUpTo(world, chunk.position));
      ExpectRow(Row(world, out, chunk.row_begin), want, heads,
                "length " + std::to_string(chunk.position + 1));
    }
    ExpectRowsTogether(heads);
  }
}

TEST_P(AttentionTest, PrefillRowsMatchFloat64) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, {147, 570});
    const std::vector<float> out = Dense(*ops, world, {{0, 147, 0, 0}, {147, 570, 0, 1}});
    for (int64_t row = 0; row < world.rows; row += Uniform(1, 40)) {
      const int sequence = row < 147 ? 0 : 1;
      const int position = static_cast<int>(sequence == 0 ? row : row - 147);
      const Doubles want = Expected(world, row, sequence, AllUpTo(world, position));
      ExpectRow(Row(world, out, row), want, heads, "position " + std::to_string(position));
    }
    ExpectRowsTogether(heads);
  }
}

TEST_P(AttentionTest, ChunkBoundariesAndThreadsDoNotChangeABit) {
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, {600});
    auto one = MakeOps(1);
    const std::vector<float> whole = Dense(*one, world, {{0, 600, 0, 0}});
    for (int threads : {1, 2, 5}) {
      auto ops = MakeOps(threads);
      EXPECT_EQ(CompareBits(Dense(*ops, world, {{0, 600, 0, 0}}), whole, world.width()), "")
          << heads.Name() << ", " << threads << " threads";
      // Cut anywhere, in random pieces, in any order.
      std::vector<DenseChunk> pieces;
      for (int begin = 0; begin < 600;) {
        const int rows = std::min(600 - begin, Uniform(1, threads == 2 ? 9 : 90));
        pieces.push_back({begin, rows, begin, 0});
        begin += rows;
      }
      std::shuffle(pieces.begin(), pieces.end(), rng());
      EXPECT_EQ(CompareOtherWay(Dense(*ops, world, pieces), whole, world.width()), "")
          << heads.Name() << " in pieces, " << threads << " threads";
      // Alone: few units, so the splits are tasks of their own.
      const std::vector<float> last = Dense(*ops, world, {{599, 1, 599, 0}});
      EXPECT_EQ(CompareOtherWay(Row(world, last, 599), Row(world, whole, 599), heads.head_dim), "")
          << heads.Name() << " alone, " << threads << " threads";
    }
  }
}

TEST_P(AttentionTest, EveryCutOfAChunkGivesTheSameBits) {
  World world = MakeWorld({2, 3, 64, kernels::DType::kBF16}, {80});
  auto ops = MakeOps(2);
  const std::vector<float> whole = Dense(*ops, world, {{0, 80, 0, 0}});
  for (int cut = 1; cut < 80; ++cut) {
    const std::vector<float> out = Dense(*ops, world, {{0, cut, 0, 0}, {cut, 80 - cut, cut, 0}});
    ASSERT_EQ(CompareOtherWay(out, whole, world.width()), "") << "cut at " << cut;
  }
}

TEST_P(AttentionTest, OtherChunksOfTheBatchDoNotChangeABit) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, {300, 129, 700, 33});
    // A prefill, a window, and rows on their own.
    const std::vector<DenseChunk> chunks = {
        {0, 300, 0, 0}, {300 + 90, 32, 90, 1}, {429 + 699, 1, 699, 2}, {1129 + 32, 1, 32, 3}};
    const std::vector<float> together = Dense(*ops, world, chunks);
    for (const DenseChunk& chunk : chunks) {
      const std::vector<float> alone = Dense(*ops, world, {chunk});
      for (int row = chunk.row_begin; row < chunk.row_begin + chunk.rows; ++row) {
        ASSERT_EQ(CompareBits(Row(world, together, row), Row(world, alone, row), heads.head_dim),
                  "")
            << heads.Name() << ", row " << row;
      }
    }
  }
}

TEST_P(AttentionTest, PageTablesDoNotChangeABit) {
  const HeadCase heads = {2, 4, 128, kernels::DType::kBF16};
  World world = MakeWorld(heads, {300});
  auto ops = MakeOps(2);
  const std::vector<float> want = Dense(*ops, world, {{0, 300, 0, 0}});
  auto moved = std::make_unique<TestPool>(heads, kSketch8, world.lengths, rng());
  for (int t = 0; t < 300; ++t) {
    std::vector<float> k, v;
    for (int h = 0; h < heads.kv_heads; ++h) {
      for (double x : world.pool->Key(0, t, h)) k.push_back(static_cast<float>(x));
      for (double x : world.pool->Value(0, t, h)) v.push_back(static_cast<float>(x));
    }
    moved->Write(0, t, k, v);
  }
  world.pool = std::move(moved);
  EXPECT_EQ(CompareBits(Dense(*ops, world, {{0, 300, 0, 0}}), want, world.width()), "");
}

TEST_P(AttentionTest, LaterTokensNeverTouchARow) {
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, {100});
    auto ops = MakeOps(2);
    // Alone, and together with the rows that attend to later tokens. A matrix unit multiplies whole
    // tiles: there a token that some row of a chunk attends to may enter its others times zero.
    std::vector<std::vector<DenseChunk>> ways = {{{40, 30, 40, 0}}};
    if (!IsCuda()) ways.push_back({{40, 60, 40, 0}});
    const std::vector<float> want = Dense(*ops, world, ways[0]);
    // Positions 70 on become NaN and infinite; rows 40 .. 69 must not notice.
    const size_t width = static_cast<size_t>(heads.kv_heads) * heads.head_dim;
    for (int t = 70; t < 100; ++t) {
      std::vector<float> bad = Poison(width);
      if (t % 2 == 0) bad.assign(width, std::numeric_limits<float>::infinity());
      world.pool->Write(0, t, bad, bad);
    }
    for (const std::vector<DenseChunk>& chunks : ways) {
      const std::vector<float> out = Dense(*ops, world, chunks);
      for (int row = 40; row < 70; ++row) {
        ASSERT_EQ(CompareBits(Row(world, out, row), Row(world, want, row), heads.head_dim), "")
            << heads.Name() << ", row " << row;
      }
    }
  }
}

TEST_P(AttentionTest, OnlyListedRowsAreWritten) {
  World world = MakeWorld(Supported({1, 4, 64, kernels::DType::kF32}), {20});
  auto ops = MakeOps(1);
  const std::vector<float> out = Dense(*ops, world, {{5, 3, 5, 0}});
  for (int row = 0; row < 20; ++row) {
    EXPECT_EQ(std::isnan(Row(world, out, row)[0]), row < 5 || row >= 8) << row;
  }
}

TEST_P(AttentionTest, SparseRowsMatchFloat64) {
  auto ops = MakeOps(2);
  int block = 2;
  for (const HeadCase& heads : HeadCases()) {
    block = block == 16 ? 4 : 2 * block;  // 4, 8, 16 in turn
    const SelectorSpec selector = {SelectorKind::kSketch, block, 1, {1.0f, 1.0f}};
    World world = MakeWorld(heads, SomeLengths(), selector);
    const std::vector<int>& lengths = world.lengths;
    std::vector<SparseRow> rows;
    std::vector<int32_t> ids;
    int32_t row = -1;
    for (size_t s = 0; s < lengths.size(); ++s) {
      row += lengths[s];
      const int blocks = (lengths[s] + block - 1) / block;
      const int keep = Uniform(1, blocks);
      rows.push_back({.row = row,
                      .position = lengths[s] - 1,
                      .table = static_cast<int32_t>(s),
                      .keep_blocks = keep,
                      .ids_begin = static_cast<int64_t>(ids.size())});
      for (int h = 0; h < heads.kv_heads; ++h) {
        std::vector<int32_t> all(static_cast<size_t>(blocks));
        for (int i = 0; i < blocks; ++i) all[static_cast<size_t>(i)] = i;
        std::shuffle(all.begin(), all.end(), rng());
        std::sort(all.begin(), all.begin() + keep);
        ids.insert(ids.end(), all.begin(), all.begin() + keep);
      }
    }
    const std::vector<float> out = Sparse(*ops, world, rows, ids);
    for (const SparseRow& r : rows) {
      std::vector<std::vector<int>> positions(static_cast<size_t>(heads.kv_heads));
      for (int h = 0; h < heads.kv_heads; ++h) {
        for (int i = 0; i < r.keep_blocks; ++i) {
          const int begin = ids[static_cast<size_t>(r.ids_begin + h * r.keep_blocks + i)] * block;
          for (int t = begin; t < std::min(begin + block, r.position + 1); ++t) {
            positions[static_cast<size_t>(h)].push_back(t);
          }
        }
      }
      ExpectRow(Row(world, out, r.row), Expected(world, r.row, r.table, positions), heads,
                "block " + std::to_string(block) + ", length " + std::to_string(r.position + 1));
    }
    ExpectRowsTogether(heads);
    // One row alone, with other numbers of threads.
    for (int threads : {1, 3}) {
      auto other = MakeOps(threads);
      const std::vector<float> alone = Sparse(*other, world, {rows.back()}, ids);
      EXPECT_EQ(CompareBits(Row(world, alone, rows.back().row), Row(world, out, rows.back().row),
                            heads.head_dim),
                "")
          << heads.Name();
    }
  }
}

// Contexts of many splits: a row on its own, a window of rows, and a row with a tenth of the
// blocks.
TEST_P(AttentionTest, LongContextsMatchFloat64) {
  if (!RunsLongTests()) GTEST_SKIP() << "another target or build runs it";
  auto ops = MakeOps(2);
  constexpr int kWindow = 32;
  for (const auto& [heads, length] :
       {std::pair{HeadCase{2, 7, 128, kernels::DType::kBF16}, 33333},
        std::pair{HeadCase{1, 4, 64, kernels::DType::kBF16}, 70001},
        std::pair{HeadCase{1, 16, 128, kernels::DType::kBF16}, 9007}}) {
    World world = MakeWorld(heads, {length, 40}, kSketch8, kWindow + 2);
    const std::vector<float> window = Dense(*ops, world, {{0, kWindow, length - kWindow, 0}});
    for (int row : {0, 17, kWindow - 1}) {
      const Doubles want = Expected(world, row, 0, AllUpTo(world, length - kWindow + row));
      ExpectRow(Row(world, window, row), want, heads, "row " + std::to_string(row));
    }
    const std::vector<float> single = Dense(*ops, world, {{kWindow, 1, length - 1, 0}});
    ExpectRow(Row(world, single, kWindow), Expected(world, kWindow, 0, AllUpTo(world, length - 1)),
              heads, "one row");

    const int blocks = (length + 7) / 8, keep = blocks / 10;
    const SparseRow row = {
        .row = kWindow + 1, .position = length - 1, .table = 0, .keep_blocks = keep};
    std::vector<int32_t> ids;
    std::vector<std::vector<int>> positions(static_cast<size_t>(heads.kv_heads));
    for (int h = 0; h < heads.kv_heads; ++h) {
      std::vector<int32_t> all(static_cast<size_t>(blocks));
      for (int i = 0; i < blocks; ++i) all[static_cast<size_t>(i)] = i;
      std::shuffle(all.begin(), all.end(), rng());
      std::sort(all.begin(), all.begin() + keep);
      ids.insert(ids.end(), all.begin(), all.begin() + keep);
      for (int i = 0; i < keep; ++i) {
        const int begin = all[static_cast<size_t>(i)] * 8;
        for (int t = begin; t < std::min(begin + 8, length); ++t) {
          positions[static_cast<size_t>(h)].push_back(t);
        }
      }
    }
    const std::vector<float> sparse = Sparse(*ops, world, {row}, ids);
    ExpectRow(Row(world, sparse, row.row), Expected(world, row.row, 0, positions), heads, "sparse");
    ExpectRowsTogether(heads);
  }
}

TEST_P(AttentionTest, KeepingEveryBlockIsDenseAttention) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeWorld(heads, {1100});
    const int blocks = (1100 + 7) / 8;
    std::vector<int32_t> ids;
    for (int h = 0; h < heads.kv_heads; ++h) {
      for (int i = 0; i < blocks; ++i) ids.push_back(i);
    }
    const SparseRow row = {.row = 7, .position = 1099, .table = 0, .keep_blocks = blocks};
    const std::vector<float> sparse = Sparse(*ops, world, {row}, ids);
    const std::vector<float> dense = Dense(*ops, world, {{7, 1, 1099, 0}});
    EXPECT_EQ(CompareOtherWay(Row(world, sparse, 7), Row(world, dense, 7), heads.head_dim), "")
        << heads.Name();
  }
}

RESA_INSTANTIATE_OPS_TEST(AttentionTest);

}  // namespace
}  // namespace resa::testing
