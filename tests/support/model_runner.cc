#include "tests/support/model_runner.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "engine/request.h"
#include "kernels/check.h"
#include "tests/support/sequence_driver.h"

namespace resa::testing {
namespace {

int PagesFor(int tokens) { return (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens; }

engine::BatchLimits LimitsFor(const RunnerOptions& options) {
  return {.max_rows = options.max_rows,
          .max_segments = options.max_rows,  // The logits of all rows are wanted.
          .max_pages_per_sequence = PagesFor(options.max_tokens)};
}

template <typename T>
std::unique_ptr<T> Must(absl::StatusOr<std::unique_ptr<T>> made) {
  RESA_CHECK(made.ok()) << made.status().message();
  return *std::move(made);
}

}  // namespace

ModelRunner::ModelRunner(const engine::LoadedModel& model, kernels::Ops* ops,
                         const RunnerOptions& options)
    : ops_(ops),
      options_(options),
      vocab_size_(model.config.vocab_size),
      batch_(LimitsFor(options), engine::LayoutFor(model.config, options.selector, options.kv_dtype,
                                                   PagesFor(options.max_tokens))),
      kv_(Must(engine::KvMemory::Create(batch_.layout(), ops))),
      transformer_(Must(engine::Transformer::Create(model.config, model.weights, LimitsFor(options),
                                                    batch_.max_block_ids(), ops))),
      pages_(PagesFor(options.max_tokens)) {
  std::iota(pages_.begin(), pages_.end(), 0);
  std::shuffle(pages_.begin(), pages_.end(), std::mt19937(1));
}

std::vector<float> ModelRunner::Feed(absl::Span<const int32_t> tokens,
                                     std::optional<engine::SparseBudget> sparse) {
  engine::SegmentInput segment;
  segment.tokens = tokens;
  segment.position = length_;
  segment.pages = pages_;
  segment.sparse = sparse;
  batch_.Build({segment});
  transformer_->Forward(batch_, *kv_);
  length_ += static_cast<int>(tokens.size());

  std::vector<int32_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  const kernels::Matrix device = transformer_->Logits(rows);
  std::vector<float> logits(tokens.size() * vocab_size_);
  ops_->Download(logits.data(), static_cast<const std::byte*>(device.data), device.bytes());
  return logits;
}

std::vector<float> ModelRunner::Prefill(absl::Span<const int32_t> tokens, int chunk) {
  std::vector<float> logits;
  while (!tokens.empty()) {
    const std::vector<float> part = Feed(tokens.subspan(0, chunk));
    logits.insert(logits.end(), part.begin(), part.end());
    tokens.remove_prefix(std::min<size_t>(chunk, tokens.size()));
  }
  return logits;
}

void ModelRunner::Rewind(int length) {
  RESA_CHECK(length >= 0 && length <= length_) << length;
  length_ = length;
}

std::vector<int32_t> ModelRunner::Generate(absl::Span<const int32_t> prompt, int count,
                                           const engine::AttentionPolicy& policy) {
  engine::Request request;
  request.prompt.assign(prompt.begin(), prompt.end());
  request.sampling.temperature = 0;
  request.stop.max_tokens = count;
  request.attention = policy;
  SequenceDriver driver(request, pages_, options_.selector);
  while (!driver.done()) {
    const engine::SegmentInput segment = driver.Next(options_.max_rows);
    length_ = segment.position;
    const std::vector<float> logits = Feed(segment.tokens, segment.sparse);
    if (!segment.sample.has_value()) {
      driver.Finish(nullptr);
      continue;
    }
    const auto last = logits.end() - vocab_size_;
    kernels::SampleResult sample;
    sample.token = static_cast<int32_t>(std::max_element(last, logits.end()) - last);
    driver.Finish(&sample);
  }
  return {driver.output().begin(), driver.output().end()};
}

}  // namespace resa::testing
