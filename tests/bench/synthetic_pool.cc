#include "tests/bench/synthetic_pool.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "engine/kv_pool.h"
#include "engine/status_macros.h"
#include "kernels/bf16.h"

namespace resa::bench {
namespace {

using kernels::Buffer;
using kernels::DType;
using kernels::Matrix;

constexpr int64_t kChunkTokens = 2048;  // Written by one QkvPost.
constexpr int64_t kBankTokens = 4096;   // Of which each token is one.

// As the backend's activations are stored.
std::vector<std::byte> Encode(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * kernels::BytesOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    std::transform(values.begin(), values.end(), reinterpret_cast<kernels::bf16*>(bytes.data()),
                   kernels::RoundToBf16);
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<Buffer>> ToBackend(const std::vector<float>& values, DType dtype,
                                                  kernels::Ops* ops) {
  const std::vector<std::byte> bytes = Encode(values, dtype);
  std::unique_ptr<Buffer> buffer = ops->Allocate(bytes.size());
  if (buffer == nullptr) return absl::ResourceExhaustedError("no memory for synthetic K and V");
  ops->Upload(buffer->data(), bytes.data(), bytes.size());
  return buffer;
}

class PoolWriter {
 public:
  PoolWriter(const engine::ModelConfig& config, const engine::KvMemory& memory,
             const PageDeal& deal, uint64_t seed, kernels::Ops* ops)
      : config_(config), memory_(memory), deal_(deal), ops_(*ops), rng_(seed) {}

  absl::Status Prepare() {
    const DType dtype = ops_.activation_dtype();
    const int64_t angles = kChunkTokens * config_.head_dim / 2;
    RESA_ASSIGN_OR_RETURN(k_bank_, ToBackend(MakeBank(/*mean_scale=*/1.0f), dtype, &ops_));
    RESA_ASSIGN_OR_RETURN(v_bank_, ToBackend(MakeBank(/*mean_scale=*/0.0f), dtype, &ops_));
    RESA_ASSIGN_OR_RETURN(q_, ToBackend(Constant(kChunkTokens * config_.QDim(), 0), dtype, &ops_));
    RESA_ASSIGN_OR_RETURN(k_, ToBackend(Constant(kChunkTokens * width(), 0), dtype, &ops_));
    RESA_ASSIGN_OR_RETURN(v_, ToBackend(Constant(kChunkTokens * width(), 0), dtype, &ops_));
    // An angle of 0 everywhere: the bank's keys count as rotated already.
    RESA_ASSIGN_OR_RETURN(cos_, ToBackend(Constant(angles, 1), DType::kF32, &ops_));
    RESA_ASSIGN_OR_RETURN(sin_, ToBackend(Constant(angles, 0), DType::kF32, &ops_));
    return absl::OkStatus();
  }

  void Write(int layer, int sequence, int64_t begin, int64_t end) {
    const DType dtype = ops_.activation_dtype();
    const int64_t rows = end - begin;
    const Matrix k = {k_->data(), dtype, rows, width()};
    const Matrix v = {v_->data(), dtype, rows, width()};
    Draw(*k_bank_, k);
    Draw(*v_bank_, v);
    const kernels::KvRun run = {.row_begin = 0,
                                .rows = static_cast<int32_t>(rows),
                                .position = static_cast<int32_t>(begin),
                                .table = sequence};
    ops_.QkvPost({.q = {q_->data(), dtype, rows, config_.QDim()},
                  .k = k,
                  .v = v,
                  .cos = reinterpret_cast<const float*>(cos_->data()),
                  .sin = reinterpret_cast<const float*>(sin_->data()),
                  .runs = &run,
                  .num_runs = 1,
                  .tables = deal_.tables(),
                  .layout = memory_.layout(),
                  .kv = memory_.layer(layer)});
  }

 private:
  int64_t width() const { return config_.KvDim(); }

  void Draw(Buffer& bank, const Matrix& out) {
    drawn_.resize(static_cast<size_t>(out.rows));
    for (int32_t& row : drawn_) row = static_cast<int32_t>(rng_() % kBankTokens);
    ops_.GatherRows(
        {.x = {bank.data(), out.dtype, kBankTokens, width()}, .rows = drawn_.data(), .out = out});
  }

  static std::vector<float> Constant(int64_t count, float value) {
    return std::vector<float>(static_cast<size_t>(count), value);
  }
  // [kBankTokens, width]
  std::vector<float> MakeBank(float mean_scale) {
    std::normal_distribution<float> normal;
    std::vector<float> mean(static_cast<size_t>(width()));
    for (float& x : mean) x = mean_scale * normal(rng_);
    std::vector<float> bank(static_cast<size_t>(kBankTokens * width()));
    for (size_t i = 0; i < bank.size(); ++i) bank[i] = mean[i % mean.size()] + normal(rng_);
    return bank;
  }

  const engine::ModelConfig& config_;
  const engine::KvMemory& memory_;
  const PageDeal& deal_;
  kernels::Ops& ops_;
  std::mt19937_64 rng_;
  std::unique_ptr<Buffer> k_bank_, v_bank_;        // [kBankTokens, width]
  std::unique_ptr<Buffer> q_, k_, v_, cos_, sin_;  // Of one chunk; QkvPost clobbers K.
  std::vector<int32_t> drawn_;
};

}  // namespace

PageDeal::PageDeal(int sequences, int64_t tokens, uint64_t seed)
    : per_sequence_(engine::PagesFor(static_cast<int32_t>(tokens))),
      pages_(static_cast<size_t>(sequences) * per_sequence_) {
  std::iota(pages_.begin(), pages_.end(), 0);
  std::shuffle(pages_.begin(), pages_.end(), std::mt19937_64(seed));
}

absl::Status FillPool(const engine::ModelConfig& config, const engine::KvMemory& memory,
                      const PageDeal& deal, absl::Span<const int64_t> lengths, uint64_t seed,
                      kernels::Ops* ops) {
  PoolWriter writer(config, memory, deal, seed, ops);
  RESA_RETURN_IF_ERROR(writer.Prepare());
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t begin = 0; begin < lengths[s]; begin += kChunkTokens) {
        writer.Write(layer, static_cast<int>(s), begin, std::min(begin + kChunkTokens, lengths[s]));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace resa::bench
