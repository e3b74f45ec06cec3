#include "engine/model_config.h"

#include <cmath>
#include <map>
#include <numbers>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using nlohmann::json;
using ::resa::testing::AsBytes;
using ::resa::testing::GgufBuilder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

json BaseConfig(const std::string& architecture, const std::string& model_type) {
  json config = json::parse(R"({
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "hidden_act": "silu"})");
  config["architectures"] = json::array({architecture});
  config["model_type"] = model_type;
  return config;
}
json Llama() { return BaseConfig("LlamaForCausalLM", "llama"); }
json Qwen2() { return BaseConfig("Qwen2ForCausalLM", "qwen2"); }
json Mistral() {
  json config = BaseConfig("MistralForCausalLM", "mistral");
  config["sliding_window"] = nullptr;
  return config;
}

absl::StatusOr<ModelConfig> Parse(const json& config, const std::string& generation = "") {
  return ModelConfigFromJson(config.dump(), "config.json", generation, "generation_config.json");
}
std::string ErrorOf(const json& config, const std::string& generation = "") {
  const auto parsed = Parse(config, generation);
  return parsed.ok() ? "accepted" : std::string(parsed.status().message());
}

TEST(ModelConfigJsonTest, ReadsTheShape) {
  const auto config = Parse(Llama());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->model_type, "llama");
  EXPECT_EQ(config->vocab_size, 320);
  EXPECT_EQ(config->hidden_size, 256);
  EXPECT_EQ(config->intermediate_size, 512);
  EXPECT_EQ(config->num_layers, 3);
  EXPECT_EQ(config->num_heads, 4);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->GroupSize(), 2);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->max_position, 2048);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_THAT(config->eos_ids, IsEmpty());
}

TEST(ModelConfigJsonTest, EachArchitectureHasItsBiasesAndNorms) {
  const auto flags = [](const json& config) {
    const auto c = Parse(config);
    EXPECT_TRUE(c.ok()) << c.status();
    return std::vector<bool>{c->qkv_bias, c->o_bias, c->mlp_bias, c->qk_norm, c->tie_embeddings};
  };
  EXPECT_THAT(flags(Llama()), ElementsAre(false, false, false, false, false));
  EXPECT_THAT(flags(Qwen2()), ElementsAre(true, false, false, false, false));
  EXPECT_THAT(flags(Mistral()), ElementsAre(false, false, false, false, false));
  json qwen3 = BaseConfig("Qwen3ForCausalLM", "qwen3");
  EXPECT_THAT(flags(qwen3), ElementsAre(false, false, false, true, false));
  EXPECT_EQ(Parse(qwen3)->head_dim, 128);  // Its default, not hidden_size / num_attention_heads.
  qwen3["attention_bias"] = true;
  qwen3["tie_word_embeddings"] = true;
  EXPECT_THAT(flags(qwen3), ElementsAre(true, true, false, true, true));
  json llama = Llama();
  llama["attention_bias"] = true;
  llama["mlp_bias"] = true;
  EXPECT_THAT(flags(llama), ElementsAre(true, true, true, false, false));
}

TEST(ModelConfigJsonTest, ArchitectureFollowsFromModelTypeWhenNotGiven) {
  json config = Llama();
  config.erase("architectures");
  EXPECT_EQ(Parse(config)->architecture, "LlamaForCausalLM");
}

TEST(ModelConfigJsonTest, BothSpellingsOfRopeMeanTheSame) {
  json old_spelling = Llama();
  old_spelling["rope_scaling"] = {{"type", "llama3"},
                                  {"factor", 8.0},
                                  {"low_freq_factor", 1.0},
                                  {"high_freq_factor", 4.0},
                                  {"original_max_position_embeddings", 256}};
  old_spelling["torch_dtype"] = "bfloat16";
  json new_spelling = Llama();
  new_spelling.erase("rope_theta");
  new_spelling["dtype"] = "bfloat16";
  new_spelling["rope_parameters"] = old_spelling["rope_scaling"];
  new_spelling["rope_parameters"].erase("type");
  new_spelling["rope_parameters"]["rope_type"] = "llama3";
  new_spelling["rope_parameters"]["rope_theta"] = 500000.0;
  for (const json& spelling : {old_spelling, new_spelling}) {
    const auto config = Parse(spelling);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->rope_theta, 500000.0);
    EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kLlama3);
    EXPECT_EQ(config->rope_scaling.factor, 8.0);
    EXPECT_EQ(config->rope_scaling.low_freq_factor, 1.0);
    EXPECT_EQ(config->rope_scaling.high_freq_factor, 4.0);
    EXPECT_EQ(config->rope_scaling.original_max_position, 256);
  }
  EXPECT_EQ(RopeInverseFrequencies(*Parse(old_spelling)),
            RopeInverseFrequencies(*Parse(new_spelling)));
}

TEST(ModelConfigJsonTest, MissingThetaIsTenThousand) {
  json config = Llama();
  config.erase("rope_theta");
  EXPECT_EQ(Parse(config)->rope_theta, 10000.0);
}

TEST(ModelConfigJsonTest, YarnAsQwenWritesItExtendsTheContext) {
  json config = Qwen2();
  config["rope_scaling"] = {
      {"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 2048}};
  const auto yarn = Parse(config);
  ASSERT_TRUE(yarn.ok()) << yarn.status();
  EXPECT_EQ(yarn->max_position, 8192);
  EXPECT_EQ(yarn->rope_scaling.beta_fast, 32.0);
  EXPECT_EQ(yarn->rope_scaling.beta_slow, 1.0);
  EXPECT_FLOAT_EQ(RopeAttentionFactor(*yarn), 0.1f * std::log(4.0f) + 1.0f);

  config["rope_scaling"]["attention_factor"] = 1.5;
  EXPECT_EQ(RopeAttentionFactor(*Parse(config)), 1.5f);
  config["rope_scaling"].erase("attention_factor");
  config["rope_scaling"]["mscale"] = 2.0;
  config["rope_scaling"]["mscale_all_dim"] = 0.5;
  EXPECT_FLOAT_EQ(RopeAttentionFactor(*Parse(config)),
                  (0.2f * std::log(4.0f) + 1.0f) / (0.05f * std::log(4.0f) + 1.0f));
}

TEST(ModelConfigJsonTest, SlidingWindowsAreRefusedUnlessTheyHoldTheContext) {
  EXPECT_TRUE(Parse(Mistral()).ok());
  json mistral = Mistral();
  mistral["sliding_window"] = 2048;
  EXPECT_TRUE(Parse(mistral).ok());
  mistral["sliding_window"] = 1024;
  EXPECT_THAT(ErrorOf(mistral),
              AllOf(HasSubstr("config.json: sliding_window is 1024, below the context of 2048"),
                    HasSubstr("set it to null")));
  // Absent is not null: transformers takes 4096.
  mistral.erase("sliding_window");
  EXPECT_TRUE(Parse(mistral).ok());
  mistral["max_position_embeddings"] = 8192;
  EXPECT_THAT(ErrorOf(mistral), HasSubstr("sliding_window is 4096"));

  json qwen = Qwen2();
  qwen["sliding_window"] = 1024;
  qwen["use_sliding_window"] = false;
  EXPECT_TRUE(Parse(qwen).ok());
  qwen["use_sliding_window"] = true;
  qwen["max_window_layers"] = 3;  // Layers from 3 on slide: none.
  EXPECT_TRUE(Parse(qwen).ok());
  qwen["max_window_layers"] = 2;
  EXPECT_THAT(ErrorOf(qwen), HasSubstr("sliding_window is 1024"));
  qwen["layer_types"] = json::array({"full_attention", "full_attention", "full_attention"});
  EXPECT_TRUE(Parse(qwen).ok());
  qwen["layer_types"][1] = "sliding_attention";
  EXPECT_THAT(ErrorOf(qwen), HasSubstr("sliding_window is 1024"));
  qwen["layer_types"] = json::array({"full_attention"});
  EXPECT_THAT(ErrorOf(qwen), HasSubstr("layer_types must be a list of 3 entries"));
}

TEST(ModelConfigJsonTest, GenerationConfigsTokenIdsWinWhereItSpeaks) {
  json config = Llama();
  config["eos_token_id"] = 5;
  config["bos_token_id"] = 6;
  const auto alone = Parse(config);
  ASSERT_TRUE(alone.ok()) << alone.status();
  EXPECT_THAT(alone->eos_ids, ElementsAre(5));
  EXPECT_EQ(alone->bos_id, 6);
  // Sampling defaults are not ours: what nobody could sample with refuses no model.
  const auto both =
      Parse(config,
            R"({"eos_token_id":[7,8],"do_sample":true,"top_k":-1,"top_p":1.5,"pad_token_id":256})");
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_THAT(both->eos_ids, ElementsAre(7, 8));
  EXPECT_EQ(both->bos_id, 6);

  config["bos_token_id"] = -1;  // How old configs write "none".
  EXPECT_EQ(Parse(config)->bos_id, std::nullopt);
  EXPECT_THAT(ErrorOf(config, R"({"eos_token_id":"x"})"),
              HasSubstr("generation_config.json: eos_token_id must be a token id"));
  EXPECT_THAT(ErrorOf(config, "[]"), HasSubstr("generation_config.json: must hold a JSON object"));
}

TEST(ModelConfigJsonTest, RefusesWhatWouldBeComputedWrongly) {
  const struct {
    const char* key;
    const char* value;  // JSON.
    const char* message;
  } cases[] = {
      {"architectures", R"(["GPT2LMHeadModel"])", "'GPT2LMHeadModel', which is not supported"},
      {"architectures", R"(["Qwen2ForSequenceClassification"])", "not supported"},
      {"architectures", "[]", "architectures must be a list of one string"},
      {"architectures", R"("LlamaForCausalLM")", "must be a list of one string"},
      {"hidden_act", R"("gelu")", "hidden_act is 'gelu'; expected 'silu'"},
      {"quantization_config", "{}", "quantised safetensors are not supported"},
      {"partial_rotary_factor", "0.5", "partial rotation is not supported"},
      {"head_dim", "96", "head_dim 96 is not supported; expected 64 or 128"},
      {"head_dim", "0", "head_dim must be an integer from 1"},
      {"num_attention_heads", "3", "hidden_size 256 is not a multiple of num_attention_heads 3"},
      {"num_key_value_heads", "3", "4 query heads over 3 key/value heads"},
      {"num_key_value_heads", "8", "4 query heads over 8 key/value heads"},
      {"vocab_size", "0", "vocab_size must be an integer from 1"},
      {"vocab_size", "-5", "not -5"},
      {"vocab_size", R"("320")", "not string"},
      {"vocab_size", "1073741824", "vocab_size is 1073741824; expected 1 to"},
      {"hidden_size", "null", "hidden_size is missing"},
      {"num_hidden_layers", "5000", "num_hidden_layers is 5000"},
      {"max_position_embeddings", "1e6", "not number"},
      {"rms_norm_eps", "0.0", "rms_norm_eps 0 must be above 0"},
      {"rms_norm_eps", "null", "rms_norm_eps is missing"},
      {"rope_theta", "0.5", "rope_theta 0.5 must be above 1"},
      {"eos_token_id", "320", "eos_token_id 320 is not a token; the vocabulary has 320"},
      {"eos_token_id", R"("x")", "eos_token_id must be a token id or a list"},
      {"eos_token_id", "[1, -1]", "eos_token_id must be a token id or a list"},
      {"bos_token_id", "1000", "bos_token_id 1000 is not a token"},
      {"tie_word_embeddings", "1", "tie_word_embeddings must be true or false"},
      {"rope_scaling", "3", "rope_scaling must be an object or null"},
      {"rope_scaling", R"({"type":"dynamic","factor":2.0})", "rope_type is 'dynamic'"},
      {"rope_scaling", R"({"type":"longrope"})", "rope_type is 'longrope'"},
      {"rope_scaling", R"({"type":"linear"})", "rope_scaling: factor is missing"},
      {"rope_scaling", R"({"type":"linear","factor":0.5})", "factor must be a number from 1"},
      {"rope_scaling", R"({"type":"llama3","factor":8.0})", "low_freq_factor is missing"},
      {"rope_scaling",
       R"({"type":"llama3","factor":8.0,"low_freq_factor":4.0,"high_freq_factor":4.0})",
       "low_freq_factor 4 must be above 0 and below high_freq_factor 4"},
      {"rope_scaling", R"({"type":"yarn","factor":4.0,"original_max_position_embeddings":0})",
       "original_max_position_embeddings must be an integer from 1"},
      {"rope_scaling", R"({"type":"yarn","factor":4.0,"beta_fast":0.5})",
       "beta_slow 1 must be above 0 and below beta_fast 0.5"},
      {"rope_scaling", R"({"type":"yarn","factor":4.0,"attention_factor":0.0})",
       "attention factor 0 must be above 0"},
      {"rope_scaling", R"({"type":"mrope","mrope_section":[16,24,24]})", "multimodal"},
      {"rope_parameters", R"({"full_attention":{"rope_theta":1e4}})", "per layer type"},
      {"rope_parameters", R"({"rope_type":"default","partial_rotary_factor":0.25})",
       "partial rotation"},
  };
  for (const auto& bad : cases) {
    json config = Llama();
    config[bad.key] = json::parse(bad.value);
    SCOPED_TRACE(absl::StrCat(bad.key, " = ", bad.value));
    EXPECT_THAT(ErrorOf(config), AllOf(HasSubstr("config.json: "), HasSubstr(bad.message)));
  }
  json wide_group = Llama();
  wide_group["num_attention_heads"] = 17;
  wide_group["num_key_value_heads"] = 1;
  wide_group["head_dim"] = 64;
  EXPECT_THAT(ErrorOf(wide_group), HasSubstr("expected a whole group of 1 to 16"));
  wide_group["num_attention_heads"] = 16;
  EXPECT_TRUE(Parse(wide_group).ok());
}

// ---- rotary frequencies ------------------------------------------------------------------------

ModelConfig RopeConfig(RopeScaling scaling) {
  ModelConfig config = *Parse(Llama());
  config.rope_theta = 10000.0;
  config.rope_scaling = scaling;
  return config;
}

TEST(RopeTest, PlainAndLinear) {
  const auto plain = RopeInverseFrequencies(RopeConfig({}));
  ASSERT_EQ(plain.size(), 32u);
  EXPECT_EQ(plain[0], 1.0f);
  EXPECT_FLOAT_EQ(plain[16], 0.01f);  // 10000^(-1/2)
  RopeScaling linear;
  linear.kind = RopeScaling::Kind::kLinear;
  linear.factor = 4.0;
  const auto divided = RopeInverseFrequencies(RopeConfig(linear));
  for (size_t j = 0; j < plain.size(); ++j) EXPECT_FLOAT_EQ(divided[j], plain[j] / 4) << j;
}

TEST(RopeTest, Llama3KeepsShortWavesAndDividesLongOnes) {
  RopeScaling llama3;
  llama3.kind = RopeScaling::Kind::kLlama3;
  llama3.factor = 8.0;
  llama3.original_max_position = 256;
  const auto plain = RopeInverseFrequencies(RopeConfig({}));
  const auto scaled = RopeInverseFrequencies(RopeConfig(llama3));
  int kept = 0, divided = 0, between = 0;
  for (size_t j = 0; j < plain.size(); ++j) {
    const double wave_length = 2 * std::numbers::pi / plain[j];
    if (wave_length < 256 / 4.0) {
      EXPECT_FLOAT_EQ(scaled[j], plain[j]) << j;
      ++kept;
    } else if (wave_length > 256) {
      EXPECT_FLOAT_EQ(scaled[j], plain[j] / 8) << j;
      ++divided;
    } else {
      EXPECT_GT(scaled[j], plain[j] / 8) << j;
      EXPECT_LT(scaled[j], plain[j]) << j;
      ++between;
    }
  }
  EXPECT_GT(kept, 0);
  EXPECT_GT(divided, 0);
  EXPECT_GT(between, 0);
}

TEST(RopeTest, YarnKeepsFastTurnsAndDividesSlowOnes) {
  RopeScaling yarn;
  yarn.kind = RopeScaling::Kind::kYarn;
  yarn.factor = 4.0;
  yarn.original_max_position = 2048;
  const auto plain = RopeInverseFrequencies(RopeConfig({}));
  const auto scaled = RopeInverseFrequencies(RopeConfig(yarn));
  int between = 0;
  for (size_t j = 0; j < plain.size(); ++j) {
    const double turns = 2048 * plain[j] / (2 * std::numbers::pi);
    // The ramp's ends are rounded outwards to whole pairs: neighbours of the ends may be on it.
    if (turns > 32 * 1.34) {
      EXPECT_FLOAT_EQ(scaled[j], plain[j]) << j;
    }
    if (turns < 1 / 1.34) {
      EXPECT_FLOAT_EQ(scaled[j], plain[j] / 4) << j;
    }
    EXPECT_GE(scaled[j], plain[j] / 4 * 0.999999f) << j;
    EXPECT_LE(scaled[j], plain[j]) << j;
    between += scaled[j] < plain[j] * 0.99f && scaled[j] > plain[j] / 4 * 1.01f;
  }
  EXPECT_GT(between, 3);
}

TEST(RopeTest, DivisorsDivide) {
  RopeScaling scaling;
  scaling.kind = RopeScaling::Kind::kDivisors;
  for (int j = 0; j < 32; ++j) scaling.divisors.push_back(1.0f + j);
  const auto plain = RopeInverseFrequencies(RopeConfig({}));
  const auto divided = RopeInverseFrequencies(RopeConfig(scaling));
  for (size_t j = 0; j < plain.size(); ++j) EXPECT_FLOAT_EQ(divided[j], plain[j] / (1 + j)) << j;
}

// ---- GGUF
// ----------------------------------------------------------------------------------------

// Metadata of a small model, one key at a time changed by the caller.
struct GgufModel {
  std::string arch = "llama";
  std::map<std::string, uint32_t> numbers = {
      {"block_count", 2},          {"context_length", 2048},    {"embedding_length", 128},
      {"feed_forward_length", 64}, {"attention.head_count", 2}, {"attention.head_count_kv", 1},
      {"rope.dimension_count", 64}};
  std::map<std::string, float> floats = {{"attention.layer_norm_rms_epsilon", 1e-5f},
                                         {"rope.freq_base", 50000.0f}};
  std::map<std::string, std::string> strings;
  std::map<std::string, std::vector<uint64_t>> tensors = {{"token_embd.weight", {128, 300}}};

  absl::StatusOr<ModelConfig> Parse() const {
    GgufBuilder builder;
    builder.AddString("general.architecture", arch);
    for (const auto& [key, value] : numbers) {
      builder.AddUint32(key.find("tokenizer") == 0 ? key : arch + "." + key, value);
    }
    for (const auto& [key, value] : floats) builder.AddFloat(arch + "." + key, value);
    for (const auto& [key, value] : strings) builder.AddString(arch + "." + key, value);
    for (const auto& [name, dims] : tensors) {
      uint64_t bytes = 4;
      for (uint64_t dim : dims) bytes *= dim;
      std::string data(bytes, '\0');
      for (size_t i = 3; i < data.size(); i += 4) data[i] = 0x40;  // Each float is 2.0.
      builder.AddTensor(name, dims, 0, data);
    }
    const std::string bytes = builder.Build();
    const auto file = GgufFile::Parse(AsBytes(bytes), "m.gguf");
    if (!file.ok()) return file.status();
    return ModelConfigFromGguf(*file);
  }
  std::string Error() const {
    const auto config = Parse();
    return config.ok() ? "accepted" : std::string(config.status().message());
  }
};

TEST(ModelConfigGgufTest, ReadsTheShape) {
  GgufModel model;
  model.numbers["tokenizer.ggml.eos_token_id"] = 7;
  model.numbers["tokenizer.ggml.eot_token_id"] = 8;
  model.numbers["tokenizer.ggml.bos_token_id"] = 1;
  const auto config = model.Parse();
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->vocab_size, 300);
  EXPECT_EQ(config->hidden_size, 128);
  EXPECT_EQ(config->intermediate_size, 64);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->num_heads, 2);
  EXPECT_EQ(config->num_kv_heads, 1);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->max_position, 2048);
  EXPECT_EQ(config->rope_theta, 50000.0);
  EXPECT_EQ(config->rms_norm_eps, 1e-5f);
  EXPECT_TRUE(config->tie_embeddings);
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_THAT(config->eos_ids, ElementsAre(7, 8));
  EXPECT_EQ(config->bos_id, 1);
}

TEST(ModelConfigGgufTest, TensorsTellOfOutputAndBiases) {
  GgufModel model;
  model.tensors["output.weight"] = {128, 300};
  model.tensors["blk.0.attn_q.bias"] = {128};
  const auto config = model.Parse();
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->tie_embeddings);
  EXPECT_TRUE(config->qkv_bias);
  EXPECT_FALSE(config->o_bias);
  model.arch = "qwen3";
  EXPECT_TRUE(model.Parse()->qk_norm);
  model.arch = "qwen2";
  model.tensors.erase("blk.0.attn_q.bias");
  EXPECT_TRUE(model.Parse()->qkv_bias);
}

TEST(ModelConfigGgufTest, ReadsRopeScaling) {
  GgufModel model;
  model.strings["rope.scaling.type"] = "yarn";
  model.floats["rope.scaling.factor"] = 4.0f;
  model.numbers["rope.scaling.original_context_length"] = 1024;
  auto config = model.Parse();
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_scaling.kind, RopeScaling::Kind::kYarn);
  EXPECT_EQ(config->max_position, 4096);
  EXPECT_FLOAT_EQ(RopeAttentionFactor(*config), 0.1f * std::log(4.0f) + 1.0f);
  model.strings["rope.scaling.type"] = "linear";
  EXPECT_EQ(model.Parse()->rope_scaling.kind, RopeScaling::Kind::kLinear);
  model.strings["rope.scaling.type"] = "none";
  EXPECT_EQ(model.Parse()->rope_scaling.kind, RopeScaling::Kind::kNone);
  model.tensors["rope_freqs.weight"] = {32};
  EXPECT_EQ(model.Parse()->rope_scaling.kind, RopeScaling::Kind::kDivisors);
  EXPECT_FLOAT_EQ(RopeInverseFrequencies(*model.Parse())[0], 0.5f);
}

TEST(ModelConfigGgufTest, RefusesWhatWouldBeComputedWrongly) {
  const auto error = [](auto edit) {
    GgufModel model;
    edit(model);
    return model.Error();
  };
  using M = GgufModel&;
  EXPECT_THAT(error([](M m) { m.arch = "phi3"; }), HasSubstr("'phi3', which is not supported"));
  EXPECT_THAT(error([](M m) { m.numbers.erase("block_count"); }),
              HasSubstr("metadata 'llama.block_count' is missing"));
  EXPECT_THAT(error([](M m) { m.floats.erase("attention.layer_norm_rms_epsilon"); }),
              HasSubstr("'llama.attention.layer_norm_rms_epsilon' is missing"));
  EXPECT_THAT(error([](M m) { m.numbers["attention.key_length"] = 96; }),
              HasSubstr("rope.dimension_count' is 64; expected the head size 96"));
  EXPECT_THAT(error([](M m) {
                m.numbers["attention.head_count"] = 4;
                m.numbers["rope.dimension_count"] = 32;
              }),
              HasSubstr("head_dim 32 is not supported; expected 64 or 128"));
  EXPECT_THAT(error([](M m) { m.numbers["attention.value_length"] = 32; }),
              HasSubstr("value_length' is 32"));
  EXPECT_THAT(error([](M m) { m.numbers["rope.dimension_count"] = 32; }),
              HasSubstr("rope.dimension_count' is 32"));
  EXPECT_THAT(error([](M m) { m.numbers["expert_count"] = 8; }), HasSubstr("mixtures of experts"));
  EXPECT_THAT(error([](M m) { m.numbers["attention.sliding_window"] = 512; }),
              HasSubstr("'llama.attention.sliding_window' is 512"));
  EXPECT_THAT(error([](M m) { m.strings["rope.scaling.type"] = "longrope"; }),
              HasSubstr("is 'longrope'; supported are none, linear, yarn"));
  EXPECT_THAT(error([](M m) { m.strings["rope.scaling.type"] = "linear"; }),
              HasSubstr("'llama.rope.scaling.factor' is missing"));
  EXPECT_THAT(error([](M m) { m.floats["rope.scaling.yarn_log_multiplier"] = 0.1f; }),
              HasSubstr("is a rope scaling that is not supported"));
  EXPECT_THAT(error([](M m) { m.floats["rope.scale_linear"] = 4.0f; }),
              HasSubstr("is a rope scaling that is not supported"));
  EXPECT_THAT(error([](M m) { m.tensors["rope_freqs.weight"] = {64}; }),
              HasSubstr("'rope_freqs.weight' is F32 [64]; expected F32 [32]"));
  EXPECT_THAT(error([](M m) { m.tensors.clear(); }), HasSubstr("'token_embd.weight' is missing"));
  EXPECT_THAT(error([](M m) { m.numbers["tokenizer.ggml.eos_token_id"] = 300; }),
              HasSubstr("eos_token_id 300 is not a token"));
}

}  // namespace
}  // namespace resa::engine
