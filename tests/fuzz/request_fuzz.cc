// Any bytes as a GenerateRequest from the wire: it is refused with a field's name in front, or it
// is a request that the engine can run.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "engine/request.h"
#include "kernels/check.h"
#include "resa/v1/inference.pb.h"
#include "server/validate.h"
#include "tests/support/model_folder.h"

namespace resa {
namespace {

struct Server {
  Server() {
    const testing::ModelFolder folder({.num_layers = 1}, 1, testing::kChatMlTemplate);
    auto loaded = engine::Tokenizer::FromDirectory(folder.path());
    RESA_CHECK(loaded.ok()) << loaded.status();
    tokenizer = *std::move(loaded);
    model.tokenizer = tokenizer.get();
    model.chat_format = engine::ChatFormat::kChatMl;
    model.limits.vocab_size = testing::kModelVocabSize;
    model.limits.max_context = 4096;
    model.limits.pool_tokens = 2048;
  }

  std::unique_ptr<const engine::Tokenizer> tokenizer;
  server::ServedModel model;
};

// "field: what is wrong"
bool NamesAField(absl::string_view message) {
  const size_t colon = message.find(": ");
  return colon != message.npos && colon > 0 && message.find(' ') > colon;
}

}  // namespace
}  // namespace resa

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const resa::Server* const server = new resa::Server;
  resa::v1::GenerateRequest wire;
  if (!wire.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto request = resa::server::ToEngineRequest(wire, server->model, /*random_seed=*/1);
  if (!request.ok()) {
    RESA_CHECK(resa::NamesAField(request.status().message())) << request.status();
    return 0;
  }
  const resa::engine::ModelLimits& limits = server->model.limits;
  const absl::Status valid = resa::engine::ValidateRequest(**request, limits, /*eos_ids=*/{});
  if (!valid.ok()) {
    RESA_CHECK(resa::NamesAField(valid.message())) << valid;
    return 0;
  }
  const int32_t output = resa::engine::MaxOutputTokens(**request, limits);
  RESA_CHECK_GE(output, 1);
  RESA_CHECK_LE(static_cast<int64_t>((*request)->prompt.size()) + output, limits.pool_tokens);
  return 0;
}
