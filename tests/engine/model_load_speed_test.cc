// How long loading takes from the page cache, on a synthetic Llama of 105M parameters. The promise
// is 5 s for a bf16 model of 1 GB; the test asks for the same rate of whatever it loads, in
// processor time (loading is one thread), so that a busy machine does not fail it.

#include <time.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/model_files.h"
#include "engine/weight_slots.h"
#include "gtest/gtest.h"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using ::resa::testing::GgufBuilder;
using ::resa::testing::SafetensorsBuilder;
using ::resa::testing::TempFolder;

constexpr char kConfig[] = R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",
  "vocab_size":16384,"hidden_size":1024,"intermediate_size":4096,"num_hidden_layers":6,
  "num_attention_heads":16,"num_key_value_heads":4,"max_position_embeddings":2048,
  "rms_norm_eps":1e-5,"tie_word_embeddings":true})";
constexpr double kSecondsPerByte = 5.0 / 1e9;

int64_t Elements(const WeightSlot& slot) {
  int64_t count = 1;
  for (int64_t dim : slot.shape) count *= dim;
  return count;
}

std::string DirectoryModel(const TempFolder& folder, const std::string& dtype, int element_bytes) {
  folder.Write("config.json", kConfig);
  ModelWeights unused;
  SafetensorsBuilder builder;
  for (const WeightSlot& slot : WeightSlots(*ModelConfigFromJson(kConfig, "config.json", "", ""),
                                            WeightNames::kHuggingFace, &unused)) {
    builder.Add(slot.name, dtype, slot.shape, std::string(Elements(slot) * element_bytes, '\x3c'));
  }
  folder.Write("model.safetensors", builder.Build());
  return folder.path();
}

std::string GgufQ8Model(const TempFolder& folder) {
  GgufBuilder builder;
  builder.AddString("general.architecture", "llama");
  builder.AddUint32("llama.block_count", 6);
  builder.AddUint32("llama.context_length", 2048);
  builder.AddUint32("llama.embedding_length", 1024);
  builder.AddUint32("llama.feed_forward_length", 4096);
  builder.AddUint32("llama.attention.head_count", 16);
  builder.AddUint32("llama.attention.head_count_kv", 4);
  builder.AddFloat("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  builder.AddString("tokenizer.ggml.model", "gpt2");
  builder.AddStrings("tokenizer.ggml.tokens", {"a"});
  ModelWeights unused;
  for (const WeightSlot& slot : WeightSlots(*ModelConfigFromJson(kConfig, "config.json", "", ""),
                                            WeightNames::kGguf, &unused)) {
    const bool matrix = slot.shape.size() == 2;
    const int64_t bytes = matrix ? Elements(slot) / 32 * 34 : Elements(slot) * 4;
    builder.AddTensor(slot.name, {slot.shape.rbegin(), slot.shape.rend()}, matrix ? 8 : 0,
                      std::string(bytes, '\x3c'));
  }
  return folder.Write("model.gguf", builder.Build());
}

double ProcessorSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Loads and reads every weight once, so that the time holds whatever a map puts off.
void ExpectFast(const char* what, const std::string& path) {
  const absl::Time start = absl::Now();
  const double processor_start = ProcessorSeconds();
  const auto model = LoadModel(path);
  ASSERT_TRUE(model.ok()) << model.status();
  uint64_t sum = 0;
  const auto read = [&sum](const WeightTensor& tensor) {
    for (size_t at = 0; at < tensor.bytes(); at += 4096)
      sum += std::to_integer<int>(tensor.data[at]);
  };
  read(model->weights.embed);
  for (const LayerWeights& layer : model->weights.layers) {
    for (const WeightTensor* tensor : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                       &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      read(*tensor);
    }
  }
  EXPECT_GT(sum, 0u);
  const double processor = ProcessorSeconds() - processor_start;
  const size_t bytes = model->weights.mapped_bytes + model->weights.converted_bytes;
  std::printf("%s: %.0f MB of weights, %.0f MB of them mapped: %.3f s of processor, %.3f s\n", what,
              bytes * 1e-6, model->weights.mapped_bytes * 1e-6, processor,
              absl::ToDoubleSeconds(absl::Now() - start));
  EXPECT_LE(processor, static_cast<double>(bytes) * kSecondsPerByte);
}

TEST(ModelLoadSpeedTest, Bf16IsMapped) {
  TempFolder folder;
  ExpectFast("bf16", DirectoryModel(folder, "BF16", 2));
}

TEST(ModelLoadSpeedTest, F16IsConverted) {
  TempFolder folder;
  ExpectFast("f16", DirectoryModel(folder, "F16", 2));
}

TEST(ModelLoadSpeedTest, F32IsConverted) {
  TempFolder folder;
  ExpectFast("f32", DirectoryModel(folder, "F32", 4));
}

TEST(ModelLoadSpeedTest, Q8GgufIsConverted) {
  TempFolder folder;
  ExpectFast("Q8_0", GgufQ8Model(folder));
}

}  // namespace
}  // namespace resa::engine
