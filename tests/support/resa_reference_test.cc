// The reference is what the engine is held against, so it is tested on its own first: against
// numbers worked out by hand, and against the invariant that the method leans on.

#include "tests/support/resa_reference.h"

#include <cmath>
#include <span>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/test_random.h"

namespace resa::testing {
namespace {

DenseMatrix RandomMatrix(Random* random, int rows, int cols, double gain = 1) {
  return {rows, cols, random->Normals(static_cast<size_t>(rows) * cols, gain / std::sqrt(cols))};
}

ReferenceModel RandomModel(Random* random, int layers, int heads, int kv_heads, int d) {
  constexpr int kHidden = 32, kMlp = 48, kVocab = 64;
  ReferenceModel model;
  model.heads = heads;
  model.kv_heads = kv_heads;
  model.head_dim = d;
  for (int j = 0; j < d / 2; ++j) model.inv_freq.push_back(std::pow(1e4, -2.0 * j / d));
  model.embedding = RandomMatrix(random, kVocab, kHidden, 5);
  model.final_norm = Vector(kHidden, 1.0);
  for (int i = 0; i < layers; ++i) {
    ReferenceLayer layer;
    layer.attention_norm = layer.mlp_norm = Vector(kHidden, 1.0);
    layer.wq =
        RandomMatrix(random, heads * d, kHidden, 2);  // Logits of standard deviation about 4.
    layer.wk = RandomMatrix(random, kv_heads * d, kHidden, 2);
    layer.wv = RandomMatrix(random, kv_heads * d, kHidden);
    layer.wo = RandomMatrix(random, kHidden, heads * d);
    layer.gate = RandomMatrix(random, kMlp, kHidden);
    layer.up = RandomMatrix(random, kMlp, kHidden);
    layer.down = RandomMatrix(random, kHidden, kMlp);
    model.layers.push_back(std::move(layer));
  }
  return model;
}

ReferenceOptions SketchOptions(Random* random, int block, int planes, int d) {
  ReferenceOptions options;
  options.selector.block_tokens = block;
  options.selector.planes = planes;
  options.signs = random->Signs(d);
  return options;
}

ReferenceOptions MinMaxOptions() {
  ReferenceOptions options;
  options.selector = {kernels::SelectorKind::kMinMax, 16, 0, {1, 1}};
  return options;
}

// One layer, one head of size 2, no rotation (frequency 0), no MLP, identity everywhere: then the
// logits are the normalised sum of the token's embedding and an average of normalised embeddings.
TEST(ReferenceDecoderTest, OneLayerByHand) {
  const DenseMatrix identity = {2, 2, {1, 0, 0, 1}};
  ReferenceModel model;
  model.heads = model.kv_heads = 1;
  model.head_dim = 2;
  model.rms_eps = 0;
  model.inv_freq = {0};
  model.embedding = {3, 2, {1, 0, 0, 2, 3, 4}};
  model.final_norm = {1, 1};
  ReferenceLayer layer;
  layer.attention_norm = layer.mlp_norm = {1, 1};
  layer.wq = layer.wk = layer.wv = layer.wo = identity;
  layer.gate = layer.up = layer.down = {2, 2, {0, 0, 0, 0}};
  model.layers = {layer};
  ReferenceDecoder decoder(&model, MinMaxOptions());
  const Vector logits = decoder.Dense(std::vector<int>{0, 1}, 0);
  // Normalised embeddings: token 0: (sqrt 2, 0), token 1: (0, sqrt 2). The query of token 1 has
  // logits 0 and 2 / sqrt 2 with them.
  const double weight = 1 / (1 + std::exp(-std::sqrt(2.0)));
  const double x = (1 - weight) * std::sqrt(2.0), y = 2 + weight * std::sqrt(2.0);
  const double rms = std::sqrt((x * x + y * y) / 2);
  EXPECT_NEAR(logits[0], x / rms, 1e-14);
  EXPECT_NEAR(logits[1], 2 * y / rms, 1e-14);
  EXPECT_NEAR(logits[2], (3 * x + 4 * y) / rms, 1e-14);
}

// Rotation makes attention depend on relative positions only.
TEST(ReferenceDecoderTest, RotaryPairsAreTheHalvesOfAHead) {
  ReferenceModel model;
  model.heads = model.kv_heads = 1;
  model.head_dim = 4;
  model.inv_freq = {1.0, 0.25};
  model.embedding = {1, 4, {1, 2, 3, 4}};
  model.final_norm = Vector(4, 1.0);
  ReferenceLayer layer;
  const DenseMatrix zero = {4, 4, Vector(16, 0.0)};
  layer.attention_norm = layer.mlp_norm = Vector(4, 1.0);
  layer.wq = layer.wv = layer.wo = layer.gate = layer.up = layer.down = zero;
  layer.wk = zero;
  layer.bk = {1, 2, 3, 4};
  model.layers = {layer};
  ReferenceDecoder decoder(&model, MinMaxOptions());
  decoder.Dense(std::vector<int>{0, 0, 0}, 0);
  const Vector& key = decoder.key(0, 0, 2);
  EXPECT_NEAR(key[0], 1 * std::cos(2.0) - 3 * std::sin(2.0), 1e-14);
  EXPECT_NEAR(key[2], 3 * std::cos(2.0) + 1 * std::sin(2.0), 1e-14);
  EXPECT_NEAR(key[1], 2 * std::cos(0.5) - 4 * std::sin(0.5), 1e-14);
  EXPECT_NEAR(key[3], 4 * std::cos(0.5) + 2 * std::sin(0.5), 1e-14);
}

std::vector<int> RandomTokens(Random* random, int n) {
  std::vector<int> tokens(n);
  for (int& token : tokens) token = random->Below(64);
  return tokens;
}

TEST(ReferenceDecoderTest, KeepingEveryBlockIsDense) {
  Random random(10);
  const ReferenceModel model = RandomModel(&random, 2, 6, 2, 16);
  const std::vector<int> prompt = RandomTokens(&random, 50);
  for (const ReferenceOptions& options : {MinMaxOptions(), SketchOptions(&random, 4, 2, 16)}) {
    ReferenceDecoder dense(&model, options), sparse(&model, options);
    int token = ArgMax(dense.Dense(prompt, 0));
    sparse.Dense(prompt, 0);
    for (int i = 0; i < 10; ++i) {
      const int blocks =
          (51 + i + options.selector.block_tokens - 1) / options.selector.block_tokens;
      const Vector a = dense.Dense(std::vector<int>{token}, 50 + i);
      EXPECT_EQ(a, sparse.Sparse(token, {blocks, 1, 0}));
      token = ArgMax(a);
    }
  }
}

// The invariant that everything leans on, and that it is not vacuous: sparse steps do drift.
TEST(ReferenceDecoderTest, RectifiedWindowEqualsDensePrefillExactly) {
  Random random(11);
  const ReferenceModel model = RandomModel(&random, 3, 6, 2, 16);
  std::vector<int> tokens = RandomTokens(&random, 90);
  for (const ReferenceOptions& options : {MinMaxOptions(), SketchOptions(&random, 8, 2, 16)}) {
    ReferenceDecoder decoder(&model, options), prefill(&model, options);
    const std::span<const int> all(tokens);
    decoder.Dense(all.first(64), 0);
    for (int p = 64; p < 80; ++p) decoder.Sparse(tokens[p], {2, 1, 0});
    prefill.Dense(all.first(80), 0);
    EXPECT_EQ(decoder.key(0, 0, 79), prefill.key(0, 0, 79));  // Below the first attention.
    EXPECT_NE(decoder.key(2, 0, 70), prefill.key(2, 0, 70));
    const Vector logits = decoder.Dense(all.subspan(64, 16), 64);
    for (int layer = 0; layer < 3; ++layer) {
      for (int p = 0; p < 80; ++p) {
        ASSERT_EQ(decoder.key(layer, 1, p), prefill.key(layer, 1, p));
        ASSERT_EQ(decoder.value(layer, 1, p), prefill.value(layer, 1, p));
      }
    }
    ReferenceDecoder fresh(&model, options);
    EXPECT_EQ(logits, fresh.Dense(all.first(80), 0));
  }
}

TEST(ReferenceDecoderTest, StoredKeysAreRoundedWhenAskedTo) {
  Random random(12);
  const ReferenceModel model = RandomModel(&random, 2, 2, 1, 16);
  ReferenceOptions options = SketchOptions(&random, 8, 2, 16);
  options.kv_in_bf16 = true;
  ReferenceDecoder decoder(&model, options);
  decoder.Dense(RandomTokens(&random, 5), 0);
  for (double x : decoder.key(1, 0, 3)) EXPECT_EQ(x, RoundToBf16(x));
  for (double x : decoder.value(1, 0, 3)) EXPECT_EQ(x, RoundToBf16(x));
}

}  // namespace
}  // namespace resa::testing
