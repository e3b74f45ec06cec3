// The checks and counters of the interface: every violated shape ends the process with the op and
// what was expected; counts are exact.

#include "kernels/ops.h"

#include <gmock/gmock.h>

#include <array>

#include "kernels/roofline.h"

namespace resa::kernels {
namespace {

// Does nothing but remember that it ran.
class NullOps : public Ops {
 public:
  int runs = 0;

  std::string Description() const override { return "null"; }
  DType activation_dtype() const override { return DType::kF32; }
  bool SupportsKvDtype(DType) const override { return true; }
  Ceilings MeasureCeilings() override { return {1, 1}; }
  std::unique_ptr<Buffer> Allocate(size_t) override { return nullptr; }
  const std::byte* ImportWeights(const std::byte* host, size_t) override { return host; }
  void Upload(std::byte*, const void*, size_t) override {}
  void Download(void*, const std::byte*, size_t) override {}

 private:
  void DoEmbed(const EmbedParams&) override { ++runs; }
  void DoRmsNorm(const RmsNormParams&) override { ++runs; }
  void DoLinear(const LinearParams&) override { ++runs; }
  void DoRopeTable(const RopeTableParams&) override { ++runs; }
  void DoQkvPost(const QkvPostParams&) override { ++runs; }
  void DoSelect(const SelectParams&) override { ++runs; }
  void DoSparseAttend(const SparseAttendParams&) override { ++runs; }
  void DoChunkAttend(const ChunkAttendParams&) override { ++runs; }
  void DoSiluMul(const SiluMulParams&) override { ++runs; }
  void DoGatherRows(const GatherRowsParams&) override { ++runs; }
  void DoCopyPages(const CopyPagesParams&) override { ++runs; }
  void DoSample(const SampleParams&) override { ++runs; }
};

class OpsCheckTest : public ::testing::Test {
 protected:
  OpsCheckTest() { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }

  Matrix F32(int64_t rows, int64_t cols) { return {memory_.data(), DType::kF32, rows, cols}; }
  Matrix Bf16(int64_t rows, int64_t cols) { return {memory_.data(), DType::kBF16, rows, cols}; }
  std::byte* Memory() { return memory_.data(); }

  KvLayout Layout() const {
    return {.num_layers = 1,
            .num_pages = 8,
            .num_kv_heads = 2,
            .head_dim = 64,
            .kv_dtype = DType::kBF16,
            .selector = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}}};
  }
  KvLayer Layer() { return {Memory(), Memory(), Memory()}; }
  PageTables Tables() const { return {pages_.data(), 4}; }

  SelectParams Select(const SparseRow* row) {
    return {.q = F32(5, 8 * 64),
            .num_heads = 8,
            .rows = row,
            .num_rows = 1,
            .tables = Tables(),
            .layout = Layout(),
            .kv = Layer(),
            .ids = ids_.data(),
            .num_ids = 16};
  }
  SparseAttendParams Sparse(const SparseRow* row) {
    return {.q = F32(5, 8 * 64),
            .num_heads = 8,
            .rows = row,
            .num_rows = 1,
            .ids = ids_.data(),
            .tables = Tables(),
            .layout = Layout(),
            .kv = Layer(),
            .out = F32(5, 8 * 64)};
  }
  ChunkAttendParams Chunk(const DenseChunk* chunk) {
    return {.q = F32(5, 8 * 64),
            .num_heads = 8,
            .chunks = chunk,
            .num_chunks = 1,
            .tables = Tables(),
            .layout = Layout(),
            .kv = Layer(),
            .out = F32(5, 8 * 64)};
  }

  NullOps ops_;

 private:
  std::array<std::byte, 64> memory_ = {};
  std::array<int32_t, 8> pages_ = {};
  std::array<int32_t, 16> ids_ = {};
};

TEST_F(OpsCheckTest, LinearChecksShapesAndTypes) {
  EXPECT_DEATH(ops_.Linear({.x = F32(2, 7), .weight = Bf16(3, 8), .out = F32(2, 3)}),
               "Linear: x is \\[2, 7\\], expected \\[2, 8\\]");
  EXPECT_DEATH(ops_.Linear({.x = F32(2, 8), .weight = Bf16(3, 8), .out = F32(2, 4)}),
               "Linear: out is \\[2, 4\\], expected \\[2, 3\\]");
  EXPECT_DEATH(ops_.Linear({.x = F32(2, 8), .weight = F32(3, 8), .out = F32(2, 3)}),
               "Linear: weight is f32, expected bf16");
}

TEST_F(OpsCheckTest, LinearsChecksWhatBelongsTogether) {
  std::vector<float> other(64);
  const Matrix x = {other.data(), DType::kF32, 2, 8};
  const LinearParams one[] = {{.x = x, .weight = Bf16(3, 8), .out = F32(2, 3)}};
  const LinearParams two[] = {one[0], {.x = x, .weight = Bf16(4, 8), .out = F32(2, 4)}};
  EXPECT_DEATH(ops_.Linears({}), "Linears: 0 products");
  EXPECT_DEATH(
      ops_.Linears({.products = one, .norm = {.x = x, .weight = other.data(), .out = F32(2, 8)}}),
      "Linears: x is not what the norm makes");
  EXPECT_DEATH(
      ops_.Linears({.products = one, .norm = {.x = F32(2, 8), .weight = other.data(), .out = x}}),
      "Linears: out may not be norm.x");
  EXPECT_DEATH(ops_.Linears({.products = one, .gated = true}), "not two of a size");
  EXPECT_DEATH(ops_.Linears({.products = two, .gated = true}), "not two of a size");
}

TEST_F(OpsCheckTest, EmbedChecksIds) {
  const int32_t ids[] = {0, 5};
  EXPECT_DEATH(ops_.Embed({.ids = ids, .table = Bf16(5, 4), .out = F32(2, 4)}),
               "Embed: id 5 of a vocabulary of 5");
}

TEST_F(OpsCheckTest, SelectChecksBudgetsAndTables) {
  SparseRow row = {.row = 0, .position = 63, .table = 0, .keep_blocks = 9};
  EXPECT_DEATH(ops_.Select(Select(&row)), "keep 9 of 8 blocks");
  row = {.row = 0, .position = 63, .keep_blocks = 3, .local_blocks = 2, .sink_blocks = 2};
  EXPECT_DEATH(ops_.Select(Select(&row)), "2 local and 2 sink blocks in a budget of 3");
  row = {.row = 0, .position = 64, .keep_blocks = 3};
  EXPECT_DEATH(ops_.Select(Select(&row)), "65 tokens in a page table of 4 pages");
  row = {.row = 5, .position = 3, .keep_blocks = 1};
  EXPECT_DEATH(ops_.Select(Select(&row)), "row 5");
  row = {.row = 0, .position = 63, .keep_blocks = 8, .ids_begin = 1};
  EXPECT_DEATH(ops_.Select(Select(&row)), "ids of row 0 past the end");
}

TEST_F(OpsCheckTest, LayoutsThatNoKernelHasAreRefused) {
  const DenseChunk chunk = {0, 1, 0, 0};
  ChunkAttendParams p = Chunk(&chunk);
  p.layout.head_dim = 96;
  EXPECT_DEATH(ops_.ChunkAttend(p), "head size 96, expected 64 or 128");
  p = Chunk(&chunk);
  p.layout.selector.block_tokens = 5;
  EXPECT_DEATH(ops_.ChunkAttend(p), "sketch blocks of 5 tokens, expected 4, 8 or 16");
  p = Chunk(&chunk);
  p.layout.selector = {SelectorKind::kMinMax, 8, 0, {1.0f, 1.0f}};
  EXPECT_DEATH(ops_.ChunkAttend(p), "minmax needs blocks of 16");
  p = Chunk(&chunk);
  p.layout.num_kv_heads = 3;
  EXPECT_DEATH(ops_.ChunkAttend(p), "8 query heads on 3 KV heads");
}

TEST_F(OpsCheckTest, ChunksMustLieInTheBatch) {
  DenseChunk chunk = {3, 3, 0, 0};
  EXPECT_DEATH(ops_.ChunkAttend(Chunk(&chunk)), "3 rows at 3, position 0, in a batch of 5");
  chunk = {0, 0, 0, 0};
  EXPECT_DEATH(ops_.ChunkAttend(Chunk(&chunk)), "chunk 0 of 0 rows");
}

TEST_F(OpsCheckTest, SampleChecksSettings) {
  SampleResult result;
  SampleRow row = {.top_p = 0.0f};
  const auto run = [&] {
    ops_.Sample({.logits = F32(1, 4), .rows = &row, .num_rows = 1, .out = &result});
  };
  EXPECT_DEATH(run(), "top_p 0");
  row = {.forced_token = 4};
  EXPECT_DEATH(run(), "forced token 4");
  const TokenBias bias = {-1, 0};
  row = {.bias = &bias, .num_bias = 1};
  EXPECT_DEATH(run(), "bias of token -1");
}

TEST_F(OpsCheckTest, EmptyWorkRunsNothing) {
  ops_.Linear({.x = F32(0, 8), .weight = Bf16(3, 8), .out = F32(0, 3)});
  ops_.Sample({.logits = F32(0, 4)});
  SelectParams select = Select(nullptr);
  select.num_rows = 0;
  ops_.Select(select);
  EXPECT_EQ(ops_.runs, 0);
}

TEST_F(OpsCheckTest, CountersAreExact) {
  alignas(64) std::byte x[1024];
  ops_.Linear({.x = {x, DType::kF32, 3, 8}, .weight = Bf16(5, 8), .out = F32(3, 5)});
  EXPECT_EQ(ops_.counters().linear_rows, 3);
  EXPECT_EQ(ops_.counters().linear_flops, 2 * 3 * 5 * 8);
  EXPECT_EQ(ops_.counters().weight_bytes, 5 * 8 * 2);
  const DenseChunk chunk = {1, 3, 10, 0};
  ops_.ChunkAttend(Chunk(&chunk));
  EXPECT_EQ(ops_.counters().dense_rows, 3);
  EXPECT_EQ(ops_.counters().dense_tokens_attended, (11 + 12 + 13) * 2);
  const SparseRow row = {.row = 1, .position = 50, .keep_blocks = 3};
  ops_.SparseAttend(Sparse(&row));
  EXPECT_EQ(ops_.counters().sparse_rows, 1);
  EXPECT_EQ(ops_.counters().sparse_blocks_read, 3 * 2);
}

TEST_F(OpsCheckTest, RooflinesCountBytesAndFlops) {
  const Roofline linear = RooflineOf(
      LinearParams{.x = F32(3, 8), .weight = Bf16(5, 8), .accumulate = true, .out = F32(3, 5)});
  EXPECT_EQ(linear.flops, 2 * 3 * 5 * 8);
  EXPECT_EQ(linear.bytes, 3 * 8 * 4 + 5 * 8 * 2 + 2 * 3 * 5 * 4);
  const DenseChunk chunk = {1, 3, 10, 0};
  const Roofline dense = RooflineOf(Chunk(&chunk));
  EXPECT_EQ(dense.flops, 4 * (11 + 12 + 13) * 8 * 64);
  EXPECT_EQ(dense.bytes, 13 * 2 * 2 * 64 * 2 + 3 * 8 * 64 * 4 * 2);
  const SparseRow row = {.row = 1, .position = 50, .keep_blocks = 3};
  EXPECT_EQ(RooflineOf(Sparse(&row)).bytes, 24 * 2 * 2 * 64 * 2);
  // 7 blocks of 8 tokens, 2 planes of 8 bytes and a scale each.
  EXPECT_EQ(RooflineOf(Select(&row)).bytes, 7 * 8 * 2 * (2 * 8 + 2));
  EXPECT_EQ(linear.Seconds({.read_bytes_per_s = 1e3, .flops_per_s = 1e3}), linear.bytes / 1e3);
}

}  // namespace
}  // namespace resa::kernels
