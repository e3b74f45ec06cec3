#include "tests/bench/random_model.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/weight_slots.h"
#include "kernels/bf16.h"

namespace resa::bench {
namespace {

using engine::ModelConfig;
using engine::WeightSlot;
using kernels::bf16;

struct Shape {
  const char* name;
  const char* architecture;
  const char* model_type;
  int vocab, hidden, intermediate, layers, heads, kv_heads, head_dim;
  bool tied, qkv_bias, qk_norm;
};

// From the models' published configurations.
constexpr std::array kShapes = {
    Shape{"smollm2-135m", "LlamaForCausalLM", "llama", 49152, 576, 1536, 30, 9, 3, 64, true, false,
          false},
    Shape{"0.5b", "Qwen2ForCausalLM", "qwen2", 151936, 896, 4864, 24, 14, 2, 64, true, true, false},
    Shape{"llama-3.2-1b", "LlamaForCausalLM", "llama", 128256, 2048, 8192, 16, 32, 8, 64, true,
          false, false},
    Shape{"qwen2.5-1.5b", "Qwen2ForCausalLM", "qwen2", 151936, 1536, 8960, 28, 12, 2, 128, true,
          true, false},
    Shape{"qwen2.5-7b", "Qwen2ForCausalLM", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, false,
          true, false},
    Shape{"qwen3-8b", "Qwen3ForCausalLM", "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, false,
          false, true},
    Shape{"llama-3.1-8b", "LlamaForCausalLM", "llama", 128256, 4096, 14336, 32, 32, 8, 128, false,
          false, false},
};

// Splits "qwen2.5-7b-4l" into name and layers; layers 0 where there is no such ending.
absl::string_view SplitLayers(absl::string_view name, int* layers) {
  *layers = 0;
  const size_t dash = name.rfind('-');
  absl::string_view digits = name.substr(dash == absl::string_view::npos ? name.size() : dash + 1);
  if (!absl::ConsumeSuffix(&digits, "l") || !absl::SimpleAtoi(digits, layers)) return name;
  return name.substr(0, dash);
}

ModelConfig ConfigOf(const Shape& shape) {
  ModelConfig config;
  config.architecture = shape.architecture;
  config.model_type = shape.model_type;
  config.vocab_size = shape.vocab;
  config.hidden_size = shape.hidden;
  config.intermediate_size = shape.intermediate;
  config.num_layers = shape.layers;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.max_position = 1 << 21;  // A bench may go beyond what the model was trained for.
  config.rms_norm_eps = 1e-6f;
  config.rope_theta = 1e6;
  config.tie_embeddings = shape.tied;
  config.qkv_bias = shape.qkv_bias;
  config.qk_norm = shape.qk_norm;
  return config;
}

// Anonymous memory on large pages, as converted weights have it (engine/weights.h).
class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(bytes) {
    void* const map =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return;
    data_ = static_cast<std::byte*>(map);
    (void)madvise(map, bytes, MADV_HUGEPAGE);
  }
  ~Arena() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }

 private:
  const size_t bytes_;
  std::byte* data_ = nullptr;
};

int64_t ElementsOf(const WeightSlot& slot) {
  int64_t product = 1;
  for (const int64_t dim : slot.shape) product *= dim;
  return product;
}
size_t BytesOf(const WeightSlot& slot) {
  const size_t bytes = static_cast<size_t>(ElementsOf(slot)) * (slot.shape.size() == 2 ? 2 : 4);
  return (bytes + 63) / 64 * 64;
}

// A number that looks random, from the counter alone (the finaliser of SplitMix64).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Normal numbers of which any stretch can be taken.
class Bank {
 public:
  // Of a matrix, as many elements as one thread fills in one go.
  static constexpr int64_t kPiece = int64_t{1} << 13;

  explicit Bank(uint64_t seed) : seed_(seed), normals_(kSize) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    for (float& x : normals_) x = normal(rng);
  }

  // Has to be called for every number of columns before any thread fills.
  void Prepare(int64_t columns) {
    std::vector<bf16>& scaled = scaled_[columns];
    const float scale = 1.0f / std::sqrt(static_cast<float>(columns));
    scaled.resize(kSize);
    std::transform(normals_.begin(), normals_.end(), scaled.begin(),
                   [&](float x) { return kernels::RoundToBf16(x * scale); });
  }
  // Elements [begin, end) of matrix `index`; REQUIRES begin % kPiece == 0.
  void FillMatrix(uint64_t index, int64_t columns, int64_t begin, int64_t end, bf16* to) const {
    const std::vector<bf16>& scaled = scaled_.at(columns);
    for (int64_t i = begin; i < end; i += kPiece) {
      const uint64_t at = Mix(Mix(seed_ ^ Mix(index)) + static_cast<uint64_t>(i));
      std::memcpy(to + i, &scaled[at % (kSize - kPiece)],
                  static_cast<size_t>(std::min(kPiece, end - i)) * sizeof(bf16));
    }
  }
  void FillVector(uint64_t index, const WeightSlot& slot, float* to) const {
    const bool norm = slot.name.find("norm") != std::string::npos;
    for (int64_t i = 0; i < ElementsOf(slot); ++i) {
      const uint64_t at = Mix(Mix(seed_ ^ Mix(index)) + static_cast<uint64_t>(i));
      to[i] = norm ? 1.0f : 0.02f * normals_[at % kSize];
    }
  }

 private:
  static constexpr size_t kSize = size_t{1} << 16;
  const uint64_t seed_;
  std::vector<float> normals_;
  std::map<int64_t, std::vector<bf16>> scaled_;  // By number of columns.
};

// A stretch of a matrix: what one thread takes at a time.
struct Task {
  size_t slot = 0;
  int64_t begin = 0, end = 0;
};

void FillOnAllCores(const std::vector<WeightSlot>& slots, const std::vector<std::byte*>& places,
                    Bank* bank) {
  constexpr int64_t kTaskElements = 512 * Bank::kPiece;
  std::vector<Task> tasks;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].shape.size() != 2) {
      bank->FillVector(i, slots[i], reinterpret_cast<float*>(places[i]));
      continue;
    }
    bank->Prepare(slots[i].shape[1]);
    const int64_t elements = ElementsOf(slots[i]);
    for (int64_t begin = 0; begin < elements; begin += kTaskElements) {
      tasks.push_back({i, begin, std::min(begin + kTaskElements, elements)});
    }
  }
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t t = next++; t < tasks.size(); t = next++) {
      const Task& task = tasks[t];
      bank->FillMatrix(task.slot, slots[task.slot].shape[1], task.begin, task.end,
                       reinterpret_cast<bf16*>(places[task.slot]));
    }
  };
  std::vector<std::jthread> threads;
  for (unsigned i = 1; i < std::thread::hardware_concurrency(); ++i) threads.emplace_back(work);
  work();
}

}  // namespace

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.push_back(shape.name);
  return names;
}

absl::StatusOr<ModelConfig> ConfigOfShape(absl::string_view name) {
  int layers = 0;
  const absl::string_view base = SplitLayers(name, &layers);
  for (const Shape& shape : kShapes) {
    if (name == shape.name) return ConfigOf(shape);
    if (base != shape.name) continue;
    if (layers < 1 || layers > shape.layers) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": ", shape.name, " has ", shape.layers,
                                                     " layers and can be cut to 1 to as many"));
    }
    ModelConfig config = ConfigOf(shape);
    config.num_layers = layers;
    return config;
  }
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is not a known shape; there are ", absl::StrJoin(ShapeNames(), ", "),
                   ", each also cut to its first layers (qwen2.5-7b-4l)"));
}

absl::StatusOr<engine::LoadedModel> MakeRandomModel(const ModelConfig& config, uint64_t seed) {
  engine::LoadedModel model;
  model.config = config;
  const std::vector<WeightSlot> slots =
      engine::WeightSlots(config, engine::WeightNames::kHuggingFace, &model.weights);
  size_t bytes = 0;
  for (const WeightSlot& slot : slots) bytes += BytesOf(slot);
  auto arena = std::make_shared<Arena>(bytes);
  if (arena->data() == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes of weights"));
  }
  std::vector<std::byte*> places;
  std::byte* next = arena->data();
  for (const WeightSlot& slot : slots) {
    const bool is_matrix = slot.shape.size() == 2;
    slot.destination->dtype = is_matrix ? kernels::DType::kBF16 : kernels::DType::kF32;
    slot.destination->shape = slot.shape;
    slot.destination->data = next;
    places.push_back(next);
    next += BytesOf(slot);
  }
  Bank bank(seed);
  FillOnAllCores(slots, places, &bank);
  if (config.tie_embeddings) model.weights.lm_head = model.weights.embed;
  model.weights.converted_bytes = bytes;
  model.weights.storage = std::move(arena);
  return model;
}

}  // namespace resa::bench
