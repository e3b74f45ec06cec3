#include "tests/support/model_folder.h"

#include <vector>

#include "engine/weight_slots.h"
#include "engine/weights.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"

namespace resa::testing {
namespace {

using ::nlohmann::json;

// The character that stands for a byte in byte-level vocabularies: printable Latin-1 characters
// stand for themselves, all others for U+0100 and up in their order.
std::string ByteCharacter(int byte) {
  const auto printable = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 128) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

json SpecialToken(int id, const char* content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

json TokenizerJson() {
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[ByteCharacter(byte)] = byte;
  const std::string space = ByteCharacter(' ');
  vocab["he"] = 256;
  vocab["the"] = kTheToken;
  vocab[space + "the"] = 258;
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens",
           {SpecialToken(kEosToken, "<|endoftext|>"), SpecialToken(kImStartToken, "<|im_start|>"),
            SpecialToken(kImEndToken, "<|im_end|>")}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", {"h e", "t he", space + " the"}}}}};
}

json ConfigJson(const engine::ModelConfig& config) {
  RESA_CHECK(config.model_type == "llama" &&
             config.rope_scaling.kind == engine::RopeScaling::Kind::kNone)
      << "only plain models are written";
  return {{"architectures", {config.architecture}},
          {"model_type", config.model_type},
          {"hidden_act", "silu"},
          {"hidden_size", config.hidden_size},
          {"intermediate_size", config.intermediate_size},
          {"num_hidden_layers", config.num_layers},
          {"num_attention_heads", config.num_heads},
          {"num_key_value_heads", config.num_kv_heads},
          {"head_dim", config.head_dim},
          {"max_position_embeddings", config.max_position},
          {"rms_norm_eps", config.rms_norm_eps},
          {"rope_theta", config.rope_theta},
          {"vocab_size", config.vocab_size},
          {"tie_word_embeddings", config.tie_embeddings},
          {"attention_bias", config.qkv_bias && config.o_bias},
          {"mlp_bias", config.mlp_bias},
          {"eos_token_id", kEosToken}};
}

std::string Safetensors(engine::LoadedModel* model) {
  SafetensorsBuilder builder;
  for (const engine::WeightSlot& slot :
       engine::WeightSlots(model->config, engine::WeightNames::kHuggingFace, &model->weights)) {
    const engine::WeightTensor& tensor = *slot.destination;
    RESA_CHECK(tensor.present()) << slot.name;
    const bool matrix = tensor.dtype == kernels::DType::kBF16;
    builder.Add(slot.name, matrix ? "BF16" : "F32", tensor.shape,
                std::string(reinterpret_cast<const char*>(tensor.data), tensor.bytes()));
  }
  return builder.Build();
}

}  // namespace

const char kChatMlTemplate[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}";

ModelFolder::ModelFolder(TinyModelOptions options, uint64_t seed,
                         const std::string& chat_template) {
  options.vocab_size = kModelVocabSize;
  engine::LoadedModel model = MakeTinyModel(options, seed);
  folder_.Write("model.safetensors", Safetensors(&model));
  folder_.Write("config.json", ConfigJson(model.config).dump(2));
  folder_.Write("tokenizer.json", TokenizerJson().dump(2));
  if (!chat_template.empty()) {
    folder_.Write("tokenizer_config.json", json{{"chat_template", chat_template}}.dump(2));
  }
}

}  // namespace resa::testing
