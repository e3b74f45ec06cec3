// Loading a model from disk: what LoadModel accepts and refuses, and where every weight ends up.

#include "engine/model_files.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/gguf_dequant.h"
#include "engine/weight_slots.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using ::resa::testing::BytesOfValue;
using ::resa::testing::GgufBuilder;
using ::resa::testing::SafetensorsBuilder;
using ::resa::testing::TempFolder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A Llama of 2 layers with biases everywhere, 2 heads over 1, head size 64.
constexpr char kConfig[] = R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",
  "vocab_size":10,"hidden_size":128,"intermediate_size":32,"num_hidden_layers":2,
  "num_attention_heads":2,"num_key_value_heads":1,"max_position_embeddings":64,
  "rms_norm_eps":1e-5,"attention_bias":true,"mlp_bias":true)";
const std::string kUntied = absl::StrCat(kConfig, "}");
const std::string kTied = absl::StrCat(kConfig, ",\"tie_word_embeddings\":true}");

// A value that says where an element belongs, exact in bf16 and f16 alike: integers below 256.
float ElementValue(size_t slot, int64_t i) {
  return static_cast<float>((slot * 37 + static_cast<size_t>(i) * 11) % 251);
}

struct Tensor {
  std::string name;
  std::string dtype = "BF16";
  std::vector<int64_t> shape;
  std::string data;
};

std::string Encode(const std::string& dtype, const std::vector<float>& values) {
  std::string bytes;
  for (float value : values) {
    if (dtype == "F32") {
      bytes += BytesOfValue(value);
    } else if (dtype == "BF16") {
      bytes += BytesOfValue(kernels::RoundToBf16(value));
    } else {
      // Integers below 2048 in binary16, by the definition: exponent and mantissa of value.
      uint16_t half = 0;
      if (value != 0) {
        const int exponent = std::ilogb(value);
        half = static_cast<uint16_t>((exponent + 15) << 10 |
                                     static_cast<int>(std::ldexp(value, 10 - exponent)) % 1024);
      }
      bytes += BytesOfValue(half);
    }
  }
  return bytes;
}

std::vector<float> SlotValues(size_t slot, const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = ElementValue(slot, i);
  return values;
}

ModelConfig ParsedConfig(const std::string& text) {
  auto config = ModelConfigFromJson(text, "config.json", "", "");
  EXPECT_TRUE(config.ok()) << config.status();
  return *std::move(config);
}

// Every tensor of the model, in one dtype.
std::vector<Tensor> AllTensors(const std::string& config_text, const std::string& dtype) {
  ModelWeights unused;
  std::vector<Tensor> tensors;
  for (const WeightSlot& slot :
       WeightSlots(ParsedConfig(config_text), WeightNames::kHuggingFace, &unused)) {
    tensors.push_back(
        {slot.name, dtype, slot.shape, Encode(dtype, SlotValues(tensors.size(), slot.shape))});
  }
  return tensors;
}

std::string Safetensors(const std::vector<Tensor>& tensors) {
  SafetensorsBuilder builder;
  for (const Tensor& t : tensors) builder.Add(t.name, t.dtype, t.shape, t.data);
  return builder.Build();
}

Tensor& Find(std::vector<Tensor>& tensors, const std::string& name) {
  const auto it = std::find_if(tensors.begin(), tensors.end(),
                               [&](const Tensor& tensor) { return tensor.name == name; });
  EXPECT_NE(it, tensors.end()) << name;
  return *it;
}

void WriteModel(const TempFolder& folder, const std::string& config,
                const std::vector<Tensor>& tensors) {
  folder.Write("config.json", config);
  folder.Write("model.safetensors", Safetensors(tensors));
}

std::string ErrorOf(const TempFolder& folder) {
  const auto model = LoadModel(folder.path());
  return model.ok() ? "accepted" : std::string(model.status().message());
}

// Every weight of the loaded model against the values that its slot was written with.
void ExpectAllValues(const LoadedModel& model, const std::string& config_text) {
  // Slots of a copy point at the loaded weights.
  ModelWeights weights = model.weights;
  const std::vector<WeightSlot> slots =
      WeightSlots(ParsedConfig(config_text), WeightNames::kHuggingFace, &weights);
  for (size_t i = 0; i < slots.size(); ++i) {
    SCOPED_TRACE(slots[i].name);
    const WeightTensor* tensor = slots[i].destination;
    ASSERT_TRUE(tensor->present());
    EXPECT_EQ(tensor->shape, slots[i].shape);
    const bool matrix = slots[i].shape.size() == 2;
    ASSERT_EQ(tensor->dtype, matrix ? kernels::DType::kBF16 : kernels::DType::kF32);
    for (int64_t e = 0; e < tensor->elements(); ++e) {
      const float value = matrix ? kernels::ToFloat(tensor->b16()[e]) : tensor->f32()[e];
      ASSERT_EQ(value, ElementValue(i, e)) << "element " << e;
    }
  }
}

TEST(LoadModelTest, EveryWeightOfADirectoryIsInItsPlaceWhateverItsDtype) {
  for (const char* dtype : {"BF16", "F16", "F32"}) {
    SCOPED_TRACE(dtype);
    TempFolder folder;
    WriteModel(folder, kUntied, AllTensors(kUntied, dtype));
    const auto model = LoadModel(folder.path());
    ASSERT_TRUE(model.ok()) << model.status();
    ExpectAllValues(*model, kUntied);
    EXPECT_FALSE(model->gguf_vocab.has_value());
    EXPECT_EQ(model->weights.mapped_bytes > 0, std::string(dtype) == "BF16");
    EXPECT_GT(model->weights.converted_bytes, 0u);  // The vectors.
  }
}

TEST(LoadModelTest, Bf16MatricesStayInTheMapAndOutliveTheFile) {
  auto folder = std::make_unique<TempFolder>();
  const std::vector<Tensor> tensors = AllTensors(kTied, "BF16");
  WriteModel(*folder, kTied, tensors);
  const auto model = LoadModel(folder->path());
  ASSERT_TRUE(model.ok()) << model.status();
  size_t matrix_bytes = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.shape.size() == 2) matrix_bytes += tensor.data.size();
  }
  EXPECT_EQ(model->weights.mapped_bytes, matrix_bytes);
  EXPECT_EQ(model->weights.lm_head.data, model->weights.embed.data);
  folder.reset();
  ExpectAllValues(*model, kTied);
}

TEST(LoadModelTest, ShardsAreReadThroughTheIndex) {
  TempFolder folder;
  folder.Write("config.json", kUntied);
  const std::vector<Tensor> tensors = AllTensors(kUntied, "BF16");
  std::map<std::string, std::vector<Tensor>> shards;
  nlohmann::json index;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string shard = absl::StrCat("model-", i % 3, ".safetensors");
    shards[shard].push_back(tensors[i]);
    index["weight_map"][tensors[i].name] = shard;
  }
  for (const auto& [name, content] : shards) folder.Write(name, Safetensors(content));
  const std::string good_index = index.dump();
  folder.Write("model.safetensors.index.json", good_index);
  const auto model = LoadModel(folder.path());
  ASSERT_TRUE(model.ok()) << model.status();
  ExpectAllValues(*model, kUntied);

  const auto error_with = [&](const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json edited = nlohmann::json::parse(good_index);
    edit(edited);
    folder.Write("model.safetensors.index.json", edited.dump());
    return ErrorOf(folder);
  };
  const std::string first = tensors[0].name;
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"][first] = "../evil.safetensors"; }),
              HasSubstr("expected a .safetensors file in the same directory"));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"][first] = "config.json"; }),
              HasSubstr("expected a .safetensors file in the same directory"));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"][first] = 3; }), HasSubstr("as a string"));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"][first] = "model-9.safetensors"; }),
              HasSubstr("is not listed there"));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"][first] = "model-1.safetensors"; }),
              AllOf(HasSubstr("model-0.safetensors: tensor 'model.embed_tokens.weight'"),
                    HasSubstr("is not listed there")));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"].erase(first); }),
              HasSubstr("is not listed there"));
  EXPECT_THAT(error_with([&](auto& j) { j["weight_map"]["phantom"] = "model-1.safetensors"; }),
              AllOf(HasSubstr("model-1.safetensors: tensor 'phantom' is missing"),
                    HasSubstr("index.json lists it there")));
  EXPECT_THAT(error_with([&](auto& j) { j = nlohmann::json::object(); }),
              HasSubstr("non-empty object weight_map"));

  // A missing tensor is the whole model's affair, not one shard's.
  shards["model-0.safetensors"].erase(shards["model-0.safetensors"].begin());
  folder.Write("model-0.safetensors", Safetensors(shards["model-0.safetensors"]));
  EXPECT_THAT(
      error_with([&](auto& j) { j["weight_map"].erase(first); }),
      HasSubstr(absl::StrCat(folder.path(), ": tensor '", first, "' (expected [10, 128])")));
}

TEST(LoadModelTest, WrongTensorsAreRefusedByName) {
  const auto error_with = [](const std::function<void(std::vector<Tensor>&)>& edit,
                             const std::string& config) {
    TempFolder folder;
    std::vector<Tensor> tensors = AllTensors(config, "BF16");
    edit(tensors);
    WriteModel(folder, config, tensors);
    return ErrorOf(folder);
  };
  using T = std::vector<Tensor>&;
  const std::string up = "model.layers.1.mlp.up_proj.weight";
  EXPECT_THAT(error_with([&](T t) { Find(t, up).name = "lost"; }, kUntied),
              AllOf(HasSubstr("model.safetensors: tensor '" + up + "' (expected [32, 128])"),
                    HasSubstr("is missing")));
  EXPECT_THAT(error_with(
                  [&](T t) {
                    Find(t, up).shape = {128, 32};
                  },
                  kUntied),
              HasSubstr("tensor '" + up +
                        "' has shape [128, 32]; the model's configuration calls "
                        "for [32, 128]"));
  EXPECT_THAT(error_with([&](T t) { Find(t, up).shape = {32 * 128}; }, kUntied),
              HasSubstr("has shape [4096]"));
  EXPECT_THAT(error_with(
                  [](T t) {
                    t.push_back({"model.layers.2.mlp.up_proj.weight", "BF16", {1}, "ab"});
                  },
                  kUntied),
              AllOf(HasSubstr("1 tensors are not part of LlamaForCausalLM with 2 layers"),
                    HasSubstr("'model.layers.2.mlp.up_proj.weight'")));
  EXPECT_THAT(error_with(
                  [](T t) {
                    for (int i = 0; i < 9; ++i)
                      t.push_back({absl::StrCat("x", i), "BF16", {1}, "ab"});
                  },
                  kUntied),
              HasSubstr("9 tensors are not part of"));
  // Frequencies that follow from the configuration are in some old files.
  EXPECT_EQ(error_with(
                [](T t) {
                  t.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, "abcd"});
                },
                kUntied),
            "accepted");
  EXPECT_THAT(error_with([](T t) { t.pop_back(); }, kUntied),
              HasSubstr("tensor 'lm_head.weight' (expected [10, 128]) is missing"));
}

TEST(LoadModelTest, ATiedOutputMayBeStoredAgainIfItIsTheSame) {
  TempFolder folder;
  std::vector<Tensor> tensors = AllTensors(kTied, "BF16");
  Tensor output = Find(tensors, "model.embed_tokens.weight");
  output.name = "lm_head.weight";
  tensors.push_back(output);
  WriteModel(folder, kTied, tensors);
  EXPECT_EQ(ErrorOf(folder), "accepted");
  tensors.back().data[7] ^= 1;
  WriteModel(folder, kTied, tensors);
  EXPECT_THAT(ErrorOf(folder),
              AllOf(HasSubstr("'lm_head.weight' differs from"), HasSubstr("tie_word_embeddings")));
}

TEST(LoadModelTest, OddlyPlacedBf16MatricesAreCopied) {
  TempFolder folder;
  // A header of odd length puts all data at odd addresses.
  std::string file = Safetensors(AllTensors(kUntied, "BF16"));
  uint64_t header;
  std::memcpy(&header, file.data(), 8);
  file.insert(8 + header, " ");
  file.replace(0, 8, BytesOfValue<uint64_t>(header + 1));
  folder.Write("config.json", kUntied);
  folder.Write("model.safetensors", file);
  const auto model = LoadModel(folder.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->weights.mapped_bytes, 0u);
  ExpectAllValues(*model, kUntied);
}

TEST(LoadModelTest, PathsThatAreNoModelSayWhatWasExpected) {
  TempFolder folder;
  const auto missing = LoadModel(folder.Path("nothing")).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("expected a model directory"));
  EXPECT_THAT(ErrorOf(folder), AllOf(HasSubstr("cannot open"), HasSubstr("config.json")));
  folder.Write("config.json", kUntied);
  EXPECT_THAT(ErrorOf(folder), HasSubstr("neither model.safetensors nor"));
  folder.Write("pytorch_model.bin", "x");
  EXPECT_THAT(ErrorOf(folder), HasSubstr("convert them to safetensors"));
  EXPECT_THAT(std::string(LoadModel(folder.Path("config.json")).status().message()),
              HasSubstr("not a GGUF file"));
}

// ---- GGUF
// ----------------------------------------------------------------------------------------

// The same model in a GGUF file. Rows of q and k are interleaved when the architecture calls for
// it.
GgufBuilder GgufModel(const std::string& arch) {
  GgufBuilder builder;
  builder.AddString("general.architecture", arch);
  builder.AddUint32(arch + ".block_count", 2);
  builder.AddUint32(arch + ".context_length", 64);
  builder.AddUint32(arch + ".embedding_length", 128);
  builder.AddUint32(arch + ".feed_forward_length", 32);
  builder.AddUint32(arch + ".attention.head_count", 2);
  builder.AddUint32(arch + ".attention.head_count_kv", 1);
  builder.AddFloat(arch + ".attention.layer_norm_rms_epsilon", 1e-5f);
  builder.AddString("tokenizer.ggml.model", "gpt2");
  builder.AddStrings("tokenizer.ggml.tokens", {"a", "b", "c"});
  builder.AddStrings("tokenizer.ggml.merges", {"a b"});
  builder.AddUint32("tokenizer.ggml.eos_token_id", 2);
  builder.AddString("tokenizer.chat_template", "{{ x }}");

  ModelWeights unused;
  const ModelConfig config = ParsedConfig(kUntied);
  size_t number = 0;
  for (const WeightSlot& slot : WeightSlots(config, WeightNames::kGguf, &unused)) {
    std::vector<float> values = SlotValues(number++, slot.shape);
    const int64_t columns = slot.shape.size() == 2 ? slot.shape[1] : 1;
    if (arch == "llama" && slot.unpermute_head_dim != 0) {
      // Row 32 h + j of a head (half h, pair j) is stored as row 2 j + h.
      const std::vector<float> plain = values;
      for (int64_t row = 0; row < slot.shape[0]; ++row) {
        const int64_t head = row / 64, half = row % 64 / 32, pair = row % 32;
        const int64_t stored = head * 64 + 2 * pair + half;
        std::copy_n(plain.begin() + row * columns, columns, values.begin() + stored * columns);
      }
    }
    const std::vector<uint64_t> dims(slot.shape.rbegin(), slot.shape.rend());
    const bool matrix = slot.shape.size() == 2;
    builder.AddTensor(slot.name, dims, matrix ? 30 : 0, Encode(matrix ? "BF16" : "F32", values));
  }
  return builder;
}

TEST(LoadModelTest, EveryWeightOfAGgufFileIsInItsPlace) {
  TempFolder folder;
  const auto model = LoadModel(folder.Write("m.gguf", GgufModel("llama").Build()));
  ASSERT_TRUE(model.ok()) << model.status();
  ExpectAllValues(*model, kUntied);
  ASSERT_TRUE(model->gguf_vocab.has_value());
  EXPECT_THAT(model->gguf_vocab->tokens, ElementsAre("a", "b", "c"));
  EXPECT_THAT(model->gguf_vocab->merges, ElementsAre("a b"));
  EXPECT_EQ(model->gguf_vocab->eos_id, 2);
  EXPECT_EQ(model->gguf_vocab->bos_id, std::nullopt);
  EXPECT_EQ(model->gguf_vocab->chat_template, "{{ x }}");
  // q and k had to be moved, the other matrices stay in the map.
  size_t mapped = 0;
  for (const Tensor& tensor : AllTensors(kUntied, "BF16")) {
    const bool moved = tensor.name.find("q_proj") != std::string::npos ||
                       tensor.name.find("k_proj") != std::string::npos;
    if (tensor.shape.size() == 2 && !moved) mapped += tensor.data.size();
  }
  EXPECT_EQ(model->weights.mapped_bytes, mapped);
}

TEST(LoadModelTest, OnlyLlamaFilesAreInterleaved) {
  TempFolder folder;
  const auto model = LoadModel(folder.Write("m.gguf", GgufModel("qwen2").Build()));
  ASSERT_TRUE(model.ok()) << model.status();
  ExpectAllValues(*model, kUntied);
}

// Otherwise the fuzzer would never get as far as the weights.
TEST(LoadModelTest, FuzzSeedsAreWholeModels) {
  for (const char* seed : {"llama_q4_0", "qwen3_q8_0"}) {
    const auto model =
        LoadModel(resa::testing::SourcePath(absl::StrCat("tests/fuzz/corpus/gguf_fuzz/", seed)));
    EXPECT_TRUE(model.ok()) << model.status();
  }
}

TEST(LoadModelTest, GgufFilesWithoutWhatTheModelNeedsAreRefused) {
  TempFolder folder;
  const auto error_with = [&](const std::function<void(GgufBuilder&)>& edit) {
    GgufBuilder builder = GgufModel("llama");
    edit(builder);
    const auto model = LoadModel(folder.Write("m.gguf", builder.Build()));
    return model.ok() ? "accepted" : std::string(model.status().message());
  };
  EXPECT_THAT(
      error_with([](GgufBuilder& b) { b.AddTensor("blk.0.ffn_gate_inp.weight", {1}, 0, "abcd"); }),
      AllOf(HasSubstr("'blk.0.ffn_gate_inp.weight' in"), HasSubstr("m.gguf")));
  EXPECT_THAT(
      error_with([](GgufBuilder& b) { b.AddTensor("blk.2.ffn_up.weight", {1}, 0, "abcd"); }),
      HasSubstr("are not part of LlamaForCausalLM with 2 layers"));
  GgufBuilder no_tokens;
  no_tokens.AddString("general.architecture", "llama");
  EXPECT_THAT(std::string(LoadModel(folder.Write("n.gguf", no_tokens.Build())).status().message()),
              HasSubstr("is missing"));
}

}  // namespace
}  // namespace resa::engine
