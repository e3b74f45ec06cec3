#include "engine/model_files.h"

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/mapped_file.h"
#include "engine/safetensors.h"
#include "engine/status_macros.h"
#include "engine/strict_json.h"

namespace resa::engine {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kMaxConfigBytes = 4u << 20;
constexpr size_t kMaxIndexBytes = 32u << 20;
constexpr size_t kMaxShards = 1024;
constexpr uint64_t kMaxTokens = 4u << 20;
constexpr uint64_t kMaxMerges = 8u << 20;

// The tensors of one or more safetensors files, and the maps they point into.
struct TensorFiles {
  std::vector<StoredTensor> tensors;
  std::vector<std::shared_ptr<const MappedFile>> maps;
};

bool Exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

absl::Status AddSafetensors(const std::string& path, TensorFiles& files) {
  RESA_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> map, MappedFile::Open(path));
  RESA_ASSIGN_OR_RETURN(std::vector<StoredTensor> tensors, ParseSafetensors(map->bytes(), path));
  std::move(tensors.begin(), tensors.end(), std::back_inserter(files.tensors));
  files.maps.push_back(std::move(map));
  return absl::OkStatus();
}

// model.safetensors.index.json: {"weight_map": {tensor: shard, ...}}. A shard is a file name in the
// same directory; a path in its place could reach outside the model.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  RESA_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxIndexBytes));
  RESA_ASSIGN_OR_RETURN(const json index, ParseStrictJson(text, path));
  const auto error = [&](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", what...));
  };
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object() ||
      index["weight_map"].empty()) {
    return error("must hold an object with a non-empty object weight_map");
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string()) {
      return error("weight_map ", Quoted(tensor), " must name a file, as a string");
    }
    std::string name = shard.get<std::string>();
    if (!absl::EndsWith(name, ".safetensors") || name.find('/') != name.npos ||
        name.find('\0') != name.npos) {
      return error("weight_map ", Quoted(tensor), " names ", Quoted(name),
                   "; expected a .safetensors file in the same directory");
    }
    shard_of.emplace(tensor, std::move(name));
  }
  return shard_of;
}

absl::Status AddShards(const fs::path& directory, const std::string& index_path,
                       TensorFiles& files) {
  RESA_ASSIGN_OR_RETURN(const auto shard_of, ReadIndex(index_path));
  std::map<std::string, size_t> expected;  // Shard to how many tensors the index puts there.
  for (const auto& [tensor, shard] : shard_of) ++expected[shard];
  if (expected.size() > kMaxShards) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": names ", expected.size(), " files; at most ", kMaxShards));
  }
  for (const auto& [shard, count] : expected) {
    const size_t begin = files.tensors.size();
    RESA_RETURN_IF_ERROR(AddSafetensors((directory / shard).string(), files));
    for (size_t i = begin; i < files.tensors.size(); ++i) {
      const StoredTensor& tensor = files.tensors[i];
      const auto it = shard_of.find(tensor.name);
      if (it == shard_of.end() || it->second != shard) {
        return absl::InvalidArgumentError(absl::StrCat(
            tensor.file, ": tensor ", Quoted(tensor.name), " is not listed there by ", index_path));
      }
    }
    if (files.tensors.size() - begin == count) continue;
    // Names within a shard are distinct and all listed, so some listed one is not there.
    for (const auto& [tensor, listed_shard] : shard_of) {
      bool found = listed_shard != shard;
      for (size_t i = begin; !found && i < files.tensors.size(); ++i) {
        found = files.tensors[i].name == tensor;
      }
      if (!found) {
        return absl::InvalidArgumentError(absl::StrCat((directory / shard).string(), ": tensor ",
                                                       Quoted(tensor), " is missing, though ",
                                                       index_path, " lists it there"));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorFiles> OpenTensors(const fs::path& directory) {
  TensorFiles files;
  const std::string single = (directory / "model.safetensors").string();
  const std::string index = (directory / "model.safetensors.index.json").string();
  if (Exists(single)) {
    RESA_RETURN_IF_ERROR(AddSafetensors(single, files));
  } else if (Exists(index)) {
    RESA_RETURN_IF_ERROR(AddShards(directory, index, files));
  } else {
    return absl::NotFoundError(absl::StrCat(
        directory.string(), ": neither model.safetensors nor model.safetensors.index.json is there",
        Exists(directory / "pytorch_model.bin") ||
                Exists(directory / "pytorch_model.bin.index.json")
            ? "; PyTorch .bin weights are not read, convert them to safetensors"
            : ""));
  }
  return files;
}

absl::StatusOr<LoadedModel> LoadDirectory(const fs::path& directory) {
  const std::string config_path = (directory / "config.json").string();
  RESA_ASSIGN_OR_RETURN(const std::string config_text, ReadSmallFile(config_path, kMaxConfigBytes));
  const std::string generation_path = (directory / "generation_config.json").string();
  std::string generation_text;
  if (Exists(generation_path)) {
    RESA_ASSIGN_OR_RETURN(generation_text, ReadSmallFile(generation_path, kMaxConfigBytes));
  }
  LoadedModel model;
  RESA_ASSIGN_OR_RETURN(model.config, ModelConfigFromJson(config_text, config_path, generation_text,
                                                          generation_path));
  RESA_ASSIGN_OR_RETURN(TensorFiles files, OpenTensors(directory));
  RESA_ASSIGN_OR_RETURN(model.weights, LoadWeights(model.config, WeightNames::kHuggingFace,
                                                   files.tensors, std::move(files.maps)));
  return model;
}

absl::StatusOr<LoadedModel> LoadGguf(const std::string& path) {
  RESA_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> map, MappedFile::Open(path));
  RESA_ASSIGN_OR_RETURN(const GgufFile gguf, GgufFile::Parse(map->bytes(), path));
  LoadedModel model;
  RESA_ASSIGN_OR_RETURN(model.config, ModelConfigFromGguf(gguf));
  RESA_ASSIGN_OR_RETURN(model.gguf_vocab, ReadGgufVocab(gguf));
  if (static_cast<int64_t>(model.gguf_vocab->tokens.size()) > model.config.vocab_size) {
    return gguf.Error(
        "tokenizer.ggml.tokens",
        absl::StrCat("has ", model.gguf_vocab->tokens.size(),
                     " tokens, but token_embd.weight has only ", model.config.vocab_size, " rows"));
  }
  RESA_ASSIGN_OR_RETURN(model.weights,
                        LoadWeights(model.config, WeightNames::kGguf, gguf.tensors(), {map}));
  return model;
}

}  // namespace

absl::StatusOr<GgufVocab> ReadGgufVocab(const GgufFile& gguf) {
  constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
  GgufVocab vocab;
  RESA_ASSIGN_OR_RETURN(auto model, gguf.String("tokenizer.ggml.model"));
  if (!model) return gguf.Error("tokenizer.ggml.model", "is missing: the file has no tokenizer");
  vocab.model = *std::move(model);
  RESA_ASSIGN_OR_RETURN(auto pre, gguf.String("tokenizer.ggml.pre"));
  vocab.pre = std::move(pre).value_or("");
  RESA_ASSIGN_OR_RETURN(vocab.tokens, gguf.Strings("tokenizer.ggml.tokens", kMaxTokens));
  if (vocab.tokens.empty()) return gguf.Error("tokenizer.ggml.tokens", "is missing or empty");
  RESA_ASSIGN_OR_RETURN(vocab.scores, gguf.Floats("tokenizer.ggml.scores", kMaxTokens));
  RESA_ASSIGN_OR_RETURN(vocab.token_types, gguf.Ints("tokenizer.ggml.token_type", kMaxTokens));
  RESA_ASSIGN_OR_RETURN(vocab.merges, gguf.Strings("tokenizer.ggml.merges", kMaxMerges));
  RESA_ASSIGN_OR_RETURN(vocab.bos_id, gguf.Int("tokenizer.ggml.bos_token_id", 0, kIntMax));
  RESA_ASSIGN_OR_RETURN(vocab.eos_id, gguf.Int("tokenizer.ggml.eos_token_id", 0, kIntMax));
  RESA_ASSIGN_OR_RETURN(vocab.unk_id, gguf.Int("tokenizer.ggml.unknown_token_id", 0, kIntMax));
  RESA_ASSIGN_OR_RETURN(vocab.pad_id, gguf.Int("tokenizer.ggml.padding_token_id", 0, kIntMax));
  RESA_ASSIGN_OR_RETURN(vocab.add_bos, gguf.Bool("tokenizer.ggml.add_bos_token"));
  RESA_ASSIGN_OR_RETURN(vocab.add_eos, gguf.Bool("tokenizer.ggml.add_eos_token"));
  RESA_ASSIGN_OR_RETURN(vocab.add_space_prefix, gguf.Bool("tokenizer.ggml.add_space_prefix"));
  RESA_ASSIGN_OR_RETURN(auto chat_template, gguf.String("tokenizer.chat_template"));
  vocab.chat_template = std::move(chat_template).value_or("");
  return vocab;
}

absl::StatusOr<LoadedModel> LoadModel(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) {
    return absl::NotFoundError(absl::StrCat(
        path,
        " does not exist; expected a model directory (config.json, *.safetensors) or a GGUF "
        "file"));
  }
  return status.type() == fs::file_type::directory ? LoadDirectory(path) : LoadGguf(path);
}

}  // namespace resa::engine
