#include "engine/transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/recording_ops.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

using resa::testing::MakeTinyModel;
using resa::testing::RecordingOps;
using resa::testing::TinyModelOptions;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr BatchLimits kLimits = {.max_rows = 8, .max_segments = 3, .max_pages_per_sequence = 4};

// A transformer over the recording backend, and one batch for it.
class TransformerTest : public ::testing::Test {
 protected:
  void Load(const TinyModelOptions& options) {
    model_ = MakeTinyModel(options, 1);
    layout_ = LayoutFor(model_.config, kernels::SelectorSpec{}, kernels::DType::kBF16, 12);
    batch_ = std::make_unique<RaggedBatch>(kLimits, layout_);
    kv_ = KvMemory::Create(layout_, &ops_).value();
  }
  absl::Status Create() {
    auto made =
        Transformer::Create(model_.config, model_.weights, kLimits, batch_->max_block_ids(), &ops_);
    if (made.ok()) transformer_ = *std::move(made);
    return made.status();
  }
  // A dense chunk of two rows, and a sparse row when wanted.
  void Forward(bool dense, bool sparse) {
    std::vector<SegmentInput> segments;
    if (dense) segments.push_back({.tokens = two_, .position = 0, .pages = pages_});
    if (sparse) {
      segments.push_back({.tokens = absl::MakeConstSpan(two_).subspan(0, 1),
                          .position = 40,
                          .pages = pages_,
                          .sparse = SparseBudget{2, 1, 0}});
    }
    batch_->Build(segments);
    ops_.calls.clear();
    transformer_->Forward(*batch_, *kv_);
  }

  const std::vector<int32_t> two_ = {1, 2};
  const std::vector<int32_t> pages_ = {3, 1, 2};
  LoadedModel model_;
  kernels::KvLayout layout_;
  RecordingOps ops_;
  std::unique_ptr<RaggedBatch> batch_;
  std::unique_ptr<KvMemory> kv_;
  std::unique_ptr<Transformer> transformer_;
};

TEST_F(TransformerTest, RunsTheLayersOpsInOrder) {
  Load({.num_layers = 1});
  ASSERT_TRUE(Create().ok());
  Forward(/*dense=*/true, /*sparse=*/true);
  EXPECT_THAT(ops_.names(), ElementsAre("Embed", "RopeTable",                                //
                                        "RmsNorm", "Linear", "Linear", "Linear", "QkvPost",  //
                                        "Select", "SparseAttend", "ChunkAttend", "Linear",   //
                                        "RmsNorm", "Linear", "Linear", "SiluMul", "Linear"));
}

TEST_F(TransformerTest, CallsOnlyTheAttentionThatHasRows) {
  Load({.num_layers = 1});
  ASSERT_TRUE(Create().ok());
  Forward(/*dense=*/true, /*sparse=*/false);
  EXPECT_THAT(ops_.names(), ::testing::Not(::testing::Contains("Select")));
  EXPECT_THAT(ops_.names(), ::testing::Not(::testing::Contains("SparseAttend")));
  Forward(/*dense=*/false, /*sparse=*/true);
  EXPECT_THAT(ops_.names(), ::testing::Not(::testing::Contains("ChunkAttend")));
  EXPECT_THAT(ops_.names(), ::testing::Contains("Select"));
}

TEST_F(TransformerTest, FeedsEachOpFromTheOneBefore) {
  Load({.num_layers = 2, .qkv_bias = true, .o_bias = true, .mlp_bias = true, .qk_norm = true});
  ASSERT_TRUE(Create().ok());
  Forward(/*dense=*/true, /*sparse=*/false);
  // Embed, RopeTable, then 12 calls a layer: the second layer begins at 14.
  ASSERT_EQ(ops_.calls.size(), 2u + 2 * 12u);
  const RecordingOps::Call* layer = &ops_.calls[14];
  const auto& weights = model_.weights.layers[1];
  const void* hidden = ops_.calls[0].out.data;
  EXPECT_EQ(layer[0].in.data, hidden);
  EXPECT_EQ(layer[0].vector, weights.attn_norm.f32());
  const void* normed = layer[0].out.data;
  const void* projections[] = {weights.q_proj.data, weights.k_proj.data, weights.v_proj.data};
  const float* biases[] = {weights.q_bias.f32(), weights.k_bias.f32(), weights.v_bias.f32()};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(layer[1 + i].in.data, normed);
    EXPECT_EQ(layer[1 + i].weight.data, projections[i]);
    EXPECT_EQ(layer[1 + i].vector, biases[i]);
    EXPECT_NE(biases[i], nullptr);
    EXPECT_FALSE(layer[1 + i].accumulate);
  }
  EXPECT_EQ(layer[4].op, "QkvPost");
  EXPECT_EQ(layer[4].vector, weights.q_norm.f32());
  EXPECT_EQ(layer[5].op, "ChunkAttend");
  EXPECT_EQ(layer[5].in.data, layer[1].out.data);
  // Attention and MLP are added to the residual stream.
  EXPECT_EQ(layer[6].in.data, layer[5].out.data);
  EXPECT_EQ(layer[6].weight.data, weights.o_proj.data);
  EXPECT_EQ(layer[6].vector, weights.o_bias.f32());
  EXPECT_TRUE(layer[6].accumulate);
  EXPECT_EQ(layer[6].out.data, hidden);
  EXPECT_EQ(layer[7].vector, weights.mlp_norm.f32());
  EXPECT_EQ(layer[8].weight.data, weights.gate_proj.data);
  EXPECT_EQ(layer[8].vector, weights.gate_bias.f32());
  EXPECT_EQ(layer[9].weight.data, weights.up_proj.data);
  EXPECT_EQ(layer[9].vector, weights.up_bias.f32());
  EXPECT_EQ(layer[10].in.data, layer[8].out.data);
  EXPECT_EQ(layer[10].weight.data, layer[9].out.data);
  EXPECT_EQ(layer[11].in.data, layer[10].out.data);
  EXPECT_EQ(layer[11].weight.data, weights.down_proj.data);
  EXPECT_EQ(layer[11].vector, weights.down_bias.f32());
  EXPECT_TRUE(layer[11].accumulate);
  EXPECT_EQ(layer[11].out.data, hidden);
}

TEST_F(TransformerTest, ComputesLogitsOfTheWantedRowsOnly) {
  Load({.num_layers = 1});
  ASSERT_TRUE(Create().ok());
  Forward(/*dense=*/true, /*sparse=*/true);
  const void* hidden = ops_.calls[0].out.data;
  ops_.calls.clear();
  const kernels::Matrix logits = transformer_->Logits({2, 1});
  EXPECT_THAT(ops_.names(), ElementsAre("GatherRows", "RmsNorm", "Linear"));
  EXPECT_EQ(ops_.calls[0].in.data, hidden);
  EXPECT_THAT(ops_.gathered_rows, ElementsAre(2, 1));
  EXPECT_EQ(ops_.calls[1].vector, model_.weights.final_norm.f32());
  EXPECT_EQ(ops_.calls[2].weight.data, model_.weights.lm_head.data);
  EXPECT_EQ(logits.rows, 2);
  EXPECT_EQ(logits.cols, model_.config.vocab_size);
  EXPECT_EQ(logits.dtype, kernels::DType::kF32);
}

TEST_F(TransformerTest, ImportsATiedEmbeddingOnce) {
  Load({.num_layers = 1, .tie_embeddings = true});
  ASSERT_TRUE(Create().ok());
  EXPECT_EQ(std::count(ops_.imported.begin(), ops_.imported.end(), model_.weights.embed.data), 1);
  Forward(/*dense=*/true, /*sparse=*/false);
  transformer_->Logits({0});
  EXPECT_EQ(ops_.calls.back().weight.data, model_.weights.embed.data);
}

TEST_F(TransformerTest, AllocatesNothingAfterCreate) {
  Load({.num_layers = 2});
  ASSERT_TRUE(Create().ok());
  const int allocations = ops_.allocations;
  Forward(/*dense=*/true, /*sparse=*/true);
  transformer_->Logits({0, 1, 2});
  EXPECT_EQ(ops_.allocations, allocations);
}

TEST_F(TransformerTest, CountsItsWorkspaceExactly) {
  Load({.num_layers = 1});
  const size_t before = ops_.allocated_bytes;
  ASSERT_TRUE(Create().ok());
  const size_t inv_freq_bytes = model_.config.head_dim / 2 * sizeof(float);
  EXPECT_EQ(ops_.allocated_bytes - before - inv_freq_bytes,
            ActivationMemory::BytesNeeded(model_.config, kLimits, batch_->max_block_ids(),
                                          kernels::DType::kF32));
}

TEST_F(TransformerTest, SaysWhenMemoryRunsOutWhereverThatIs) {
  Load({.num_layers = 2, .qkv_bias = true});
  ASSERT_TRUE(Create().ok());
  const int allocations = ops_.allocations - 3 * model_.config.num_layers;  // Without the pool's.
  const int imports = static_cast<int>(ops_.imported.size());
  ASSERT_GT(imports, 20);
  for (int i = 0; i < allocations; ++i) {
    ops_.allocations_left = i;
    EXPECT_EQ(Create().code(), absl::StatusCode::kResourceExhausted) << i;
  }
  ops_.allocations_left = 1 << 30;
  for (int i = 0; i < imports; ++i) {
    ops_.imports_left = i;
    const absl::Status status = Create();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << i;
    EXPECT_THAT(std::string(status.message()), HasSubstr("no room for the weights"));
  }
  ops_.imports_left = 1 << 30;
  EXPECT_TRUE(Create().ok());
}

}  // namespace
}  // namespace resa::engine
