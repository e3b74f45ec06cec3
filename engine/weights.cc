#include "engine/weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/gguf_dequant.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

// File maps, and one map of converted tensors.
class WeightStorage {
 public:
  WeightStorage() = default;
  ~WeightStorage() {
    if (arena_ != nullptr) munmap(arena_, arena_bytes_);
  }
  WeightStorage(const WeightStorage&) = delete;
  WeightStorage& operator=(const WeightStorage&) = delete;

  // Makes room for the converted tensors; called once, with at least one byte. False when there is
  // no memory.
  bool Reserve(size_t bytes) {
    RESA_CHECK(arena_ == nullptr && bytes > 0);
    void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return false;
    arena_ = static_cast<std::byte*>(map);
    arena_bytes_ = bytes;
    // Weights are streamed through once per step: large pages save most of the address look-ups.
    (void)madvise(map, bytes, MADV_HUGEPAGE);
    return true;
  }
  std::byte* Take(size_t bytes) {
    RESA_CHECK_LE(bytes, arena_bytes_ - used_);
    std::byte* taken = arena_ + used_;
    used_ += bytes;
    return taken;
  }
  void Keep(std::vector<std::shared_ptr<const MappedFile>> files) { files_ = std::move(files); }

 private:
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::byte* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  size_t used_ = 0;
};

constexpr size_t kAlignment = 64;
constexpr int kMaxNamesInMessage = 5;

size_t AlignUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A slot and the tensor found for it.
struct Match {
  const WeightSlot* slot;
  const StoredTensor* tensor;

  bool is_matrix() const { return slot->shape.size() == 2; }
  int64_t elements() const {
    int64_t product = 1;
    for (int64_t dim : slot->shape) product *= dim;
    return product;
  }
  bool can_map() const {
    return is_matrix() && tensor->type == StoredType::kBF16 && slot->unpermute_head_dim == 0 &&
           reinterpret_cast<uintptr_t>(tensor->data.data()) % alignof(kernels::bf16) == 0;
  }
  size_t converted_bytes() const { return static_cast<size_t>(elements()) * (is_matrix() ? 2 : 4); }
};

using TensorIndex = absl::flat_hash_map<absl::string_view, const StoredTensor*>;

absl::StatusOr<TensorIndex> IndexTensors(std::span<const StoredTensor> tensors) {
  TensorIndex index;
  index.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) {
    const auto [it, inserted] = index.emplace(tensor.name, &tensor);
    if (!inserted) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(tensor.name), " is in ",
                                                     it->second->file, " and again in ",
                                                     tensor.file));
    }
  }
  return index;
}

absl::StatusOr<std::vector<Match>> MatchSlots(const std::vector<WeightSlot>& slots,
                                              const TensorIndex& index, absl::string_view file) {
  std::vector<Match> matches;
  matches.reserve(slots.size());
  std::string missing;
  size_t num_missing = 0;
  for (const WeightSlot& slot : slots) {
    const auto it = index.find(slot.name);
    if (it == index.end()) {
      if (num_missing++ == 0) {
        missing = absl::StrCat(Quoted(slot.name), " (expected ", ShapeString(slot.shape), ")");
      }
      continue;
    }
    const StoredTensor& tensor = *it->second;
    if (tensor.shape != slot.shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          tensor.file, ": tensor ", Quoted(slot.name), " has shape ", ShapeString(tensor.shape),
          "; the model's configuration calls for ", ShapeString(slot.shape)));
    }
    matches.push_back({&slot, &tensor});
  }
  if (num_missing > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": tensor ", missing, " is missing",
                     num_missing > 1 ? absl::StrCat(", and ", num_missing - 1, " more") : ""));
  }
  return matches;
}

// Everything in the files must be accounted for: a tensor that is not used would mean a model
// that is computed wrongly.
absl::Status RefuseUnused(const ModelConfig& config, WeightNames style,
                          std::span<const StoredTensor> tensors,
                          const std::vector<WeightSlot>& slots) {
  absl::flat_hash_set<absl::string_view> used;
  used.reserve(slots.size());
  for (const WeightSlot& slot : slots) used.insert(slot.name);
  std::string names;
  int count = 0;
  for (const StoredTensor& tensor : tensors) {
    if (used.contains(tensor.name) || IsDerivedTensor(style, tensor.name)) continue;
    if (config.tie_embeddings && tensor.name == OutputName(style)) continue;  // Compared later.
    if (count++ < kMaxNamesInMessage) {
      absl::StrAppend(&names, names.empty() ? "" : ", ", Quoted(tensor.name), " in ", tensor.file);
    }
  }
  if (count == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(count, " tensors are not part of ", config.architecture, " with ",
                   config.num_layers, " layers: ", names, count > kMaxNamesInMessage ? ", ..." : "",
                   "; the configuration does not describe these weights"));
}

// A file may store the tied matrix a second time, as long as it is the same.
absl::Status CheckTiedOutput(const ModelConfig& config, WeightNames style, const TensorIndex& index,
                             const StoredTensor& embedding) {
  const auto it = index.find(OutputName(style));
  if (!config.tie_embeddings || it == index.end()) return absl::OkStatus();
  const StoredTensor& output = *it->second;
  const bool same = output.type == embedding.type && output.shape == embedding.shape &&
                    std::equal(output.data.begin(), output.data.end(), embedding.data.begin());
  if (same) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      output.file, ": tensor ", Quoted(output.name), " differs from ", Quoted(embedding.name),
      ", but tie_word_embeddings says that they are one; set it to false if the output matrix is "
      "to be used"));
}

void ConvertRow(const Match& match, std::span<const std::byte> source, size_t count,
                std::byte* to) {
  if (match.is_matrix()) {
    DecodeToBf16(match.tensor->type, source, {reinterpret_cast<kernels::bf16*>(to), count});
  } else {
    DecodeToFloat(match.tensor->type, source, {reinterpret_cast<float*>(to), count});
  }
}

// Writes the tensor to `to` in the slot's type, rows back in order where they were permuted.
void Convert(const Match& match, std::byte* to) {
  const std::span<const std::byte> source = match.tensor->data;
  const int64_t head_dim = match.slot->unpermute_head_dim;
  if (head_dim == 0) return ConvertRow(match, source, match.elements(), to);
  const int64_t rows = match.slot->shape[0];
  const size_t columns = static_cast<size_t>(match.elements() / rows);
  const size_t source_row = source.size() / rows;
  const size_t to_row = match.converted_bytes() / rows;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = row / head_dim, within = row % head_dim;
    const int64_t stored = 2 * (within % (head_dim / 2)) + within / (head_dim / 2);
    ConvertRow(match, source.subspan((head * head_dim + stored) * source_row, source_row), columns,
               to + row * to_row);
  }
}

}  // namespace

int64_t WeightTensor::elements() const {
  if (!present()) return 0;
  int64_t product = 1;
  for (int64_t dim : shape) product *= dim;
  return product;
}

size_t WeightTensor::bytes() const {
  return static_cast<size_t>(elements()) * kernels::BytesOf(dtype);
}

const float* WeightTensor::f32() const {
  RESA_CHECK(dtype == kernels::DType::kF32);
  return reinterpret_cast<const float*>(data);
}

const kernels::bf16* WeightTensor::b16() const {
  RESA_CHECK(dtype == kernels::DType::kBF16);
  return reinterpret_cast<const kernels::bf16*>(data);
}

absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, WeightNames style,
                                         std::span<const StoredTensor> tensors,
                                         std::vector<std::shared_ptr<const MappedFile>> files) {
  if (tensors.empty()) return absl::InvalidArgumentError("the model has no tensors");
  const std::string& first_file = tensors.front().file;
  const std::string where =
      files.size() > 1 ? std::filesystem::path(first_file).parent_path().string() : first_file;
  ModelWeights weights;
  const std::vector<WeightSlot> slots = WeightSlots(config, style, &weights);
  RESA_ASSIGN_OR_RETURN(const TensorIndex index, IndexTensors(tensors));
  RESA_ASSIGN_OR_RETURN(const std::vector<Match> matches, MatchSlots(slots, index, where));
  RESA_RETURN_IF_ERROR(RefuseUnused(config, style, tensors, slots));
  RESA_RETURN_IF_ERROR(CheckTiedOutput(config, style, index, *matches.front().tensor));

  auto storage = std::make_shared<WeightStorage>();
  for (const Match& match : matches) {
    if (!match.can_map()) weights.converted_bytes += AlignUp(match.converted_bytes());
  }
  if (weights.converted_bytes > 0 && !storage->Reserve(weights.converted_bytes)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        where, ": no memory for ", weights.converted_bytes, " bytes of converted weights"));
  }
  for (const Match& match : matches) {
    WeightTensor& tensor = *match.slot->destination;
    tensor.dtype = match.is_matrix() ? kernels::DType::kBF16 : kernels::DType::kF32;
    tensor.shape = match.slot->shape;
    if (match.can_map()) {
      tensor.data = match.tensor->data.data();
      weights.mapped_bytes += match.tensor->data.size();
    } else {
      std::byte* to = storage->Take(AlignUp(match.converted_bytes()));
      Convert(match, to);
      tensor.data = to;
    }
  }
  if (weights.mapped_bytes > 0) storage->Keep(std::move(files));
  if (config.tie_embeddings) weights.lm_head = weights.embed;
  weights.storage = std::move(storage);
  return weights;
}

}  // namespace resa::engine
