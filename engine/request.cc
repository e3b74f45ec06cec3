#include "engine/request.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "engine/invalid.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

// Comparisons with NaN are false, so NaN is never within a range.
absl::Status CheckRange(absl::string_view field, double value, double low, double high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Invalid(field, ": ", value, " is not from ", low, " to ", high);
}

// (0, high]
absl::Status CheckAboveZero(absl::string_view field, double value, double high) {
  if (value > 0 && value <= high) return absl::OkStatus();
  return Invalid(field, ": ", value, " is not above 0 and at most ", high);
}

absl::Status CheckTokens(absl::string_view field, absl::Span<const int32_t> ids, int32_t vocab) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab) continue;
    return Invalid(field, "[", i, "]: token id ", ids[i], " is not from 0 to ", vocab - 1);
  }
  return absl::OkStatus();
}

absl::Status CheckLogitBias(const SamplingParams& sampling, int32_t vocab) {
  if (sampling.logit_bias.size() > kMaxLogitBias) {
    return Invalid("sampling.logit_bias: ", sampling.logit_bias.size(), " entries; at most ",
                   kMaxLogitBias, " are taken");
  }
  absl::flat_hash_set<int32_t> seen;
  for (const auto& [id, bias] : sampling.logit_bias) {
    if (id < 0 || id >= vocab) {
      return Invalid("sampling.logit_bias: token id ", id, " is not from 0 to ", vocab - 1);
    }
    if (!seen.insert(id).second) {
      return Invalid("sampling.logit_bias: token id ", id, " is given twice");
    }
    if (std::isnan(bias) || bias == std::numeric_limits<float>::infinity()) {
      return Invalid("sampling.logit_bias: ", bias, " for token id ", id,
                     " is neither finite nor -infinity (a ban)");
    }
  }
  return absl::OkStatus();
}

// A request that bans every token could not be told from a model gone wrong later.
absl::Status CheckSomethingIsLeft(const Request& request, int32_t vocab,
                                  absl::Span<const int32_t> eos_ids) {
  absl::flat_hash_set<int32_t> banned;
  for (const auto& [id, bias] : request.sampling.logit_bias) {
    if (std::isinf(bias)) banned.insert(id);
  }
  if (request.stop.min_tokens > 0) {
    banned.insert(request.stop.token_ids.begin(), request.stop.token_ids.end());
    if (!request.stop.ignore_eos) banned.insert(eos_ids.begin(), eos_ids.end());
  }
  if (banned.size() < static_cast<size_t>(vocab)) return absl::OkStatus();
  return Invalid("sampling.logit_bias: every token of the vocabulary is banned");
}

absl::Status CheckSampling(const SamplingParams& sampling, int32_t vocab) {
  if (sampling.top_k < 0) {
    return Invalid("sampling.top_k: ", sampling.top_k, " is not at least 0 (0 is off)");
  }
  for (const absl::Status& status :
       {CheckRange("sampling.temperature", sampling.temperature, 0, 100),
        CheckAboveZero("sampling.top_p", sampling.top_p, 1),
        CheckRange("sampling.min_p", sampling.min_p, 0, 1),
        CheckAboveZero("sampling.repetition_penalty", sampling.repetition_penalty, 100),
        CheckRange("sampling.presence_penalty", sampling.presence_penalty, -2, 2),
        CheckRange("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2),
        CheckLogitBias(sampling, vocab)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckStop(const StopCriteria& stop, int32_t vocab) {
  if (stop.strings.size() > kMaxStopStrings) {
    return Invalid("stop.strings: ", stop.strings.size(), " strings; at most ", kMaxStopStrings,
                   " are taken");
  }
  for (size_t i = 0; i < stop.strings.size(); ++i) {
    if (stop.strings[i].empty()) return Invalid("stop.strings[", i, "]: must not be empty");
    if (stop.strings[i].size() > kMaxStopStringBytes) {
      return Invalid("stop.strings[", i, "]: ", stop.strings[i].size(), " bytes; at most ",
                     kMaxStopStringBytes, " are taken");
    }
  }
  if (stop.token_ids.size() > kMaxStopTokens) {
    return Invalid("stop.token_ids: ", stop.token_ids.size(), " ids; at most ", kMaxStopTokens,
                   " are taken");
  }
  return CheckTokens("stop.token_ids", stop.token_ids, vocab);
}

// What one sequence may hold at most, prompt and output together.
int64_t MaxSequenceTokens(const ModelLimits& limits) {
  return std::min<int64_t>(limits.max_context, limits.pool_tokens);
}

const char* NameOfTighterLimit(const ModelLimits& limits) {
  return limits.max_context <= limits.pool_tokens ? "the context" : "the KV pool";
}

// Prompt, max_tokens, min_tokens and forced tokens against each other and against what fits.
absl::Status CheckLengths(const Request& request, const ModelLimits& limits) {
  const int64_t most = MaxSequenceTokens(limits);
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0) return Invalid("prompt: must hold at least one token");
  if (prompt >= most) {
    return Invalid("prompt: ", prompt, " tokens leave no room for output; ",
                   NameOfTighterLimit(limits), " holds ", most, " tokens");
  }
  const std::optional<int32_t>& max_tokens = request.stop.max_tokens;
  if (max_tokens.has_value() && *max_tokens < 1) {
    return Invalid("stop.max_tokens: ", *max_tokens, " is not at least 1");
  }
  if (max_tokens.has_value() && prompt + *max_tokens > most) {
    return Invalid("stop.max_tokens: ", prompt, " prompt tokens and ", *max_tokens,
                   " output tokens do not fit; ", NameOfTighterLimit(limits), " holds ", most,
                   " tokens, which leaves ", most - prompt, " for output");
  }
  const int32_t max_output = MaxOutputTokens(request, limits);
  if (request.stop.min_tokens < 0 || request.stop.min_tokens > max_output) {
    return Invalid("stop.min_tokens: ", request.stop.min_tokens, " is not from 0 to ", max_output,
                   ", the output tokens this request may have");
  }
  if (request.forced_tokens.size() > static_cast<size_t>(max_output)) {
    return Invalid("forced_token_ids: ", request.forced_tokens.size(), " tokens, but only ",
                   max_output, " output tokens are allowed");
  }
  return absl::OkStatus();
}

absl::Status CheckOutput(const Request& request) {
  const OutputOptions& output = request.output;
  if (output.top_logprobs < 0 || output.top_logprobs > kernels::kMaxTopLogprobs) {
    return Invalid("output.top_logprobs: ", output.top_logprobs, " is not from 0 to ",
                   kernels::kMaxTopLogprobs);
  }
  if (output.top_logprobs > 0 && !output.logprobs) {
    return Invalid("output.top_logprobs: ", output.top_logprobs, " needs output.logprobs");
  }
  const int64_t echoed = static_cast<int64_t>(request.prompt.size()) * request.n;
  if (output.echo && request.n > 1 && echoed > kMaxEchoTokens) {
    return Invalid("output.echo: ", request.prompt.size(), " prompt tokens for each of ", request.n,
                   " outputs; at most ", kMaxEchoTokens, " are echoed in all where n is above 1");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateRequest(const Request& request, const ModelLimits& limits,
                             absl::Span<const int32_t> eos_ids) {
  const int32_t vocab = limits.vocab_size;
  for (const absl::Status& status :
       {CheckLengths(request, limits), CheckTokens("prompt", request.prompt, vocab),
        CheckSampling(request.sampling, vocab), CheckStop(request.stop, vocab),
        CheckOutput(request), CheckTokens("forced_token_ids", request.forced_tokens, vocab),
        CheckSomethingIsLeft(request, vocab, eos_ids)}) {
    if (!status.ok()) return status;
  }
  if (absl::Status status = ValidatePolicy(request.attention); !status.ok()) {
    return Invalid("attention.", status.message());
  }
  if (request.n < 1 || request.n > kMaxOutputs) {
    return Invalid("n: ", request.n, " is not from 1 to ", kMaxOutputs);
  }
  if (request.priority < kMinPriority || request.priority > kMaxPriority) {
    return Invalid("priority: ", request.priority, " is not from ", kMinPriority, " to ",
                   kMaxPriority);
  }
  return absl::OkStatus();
}

int32_t MaxOutputTokens(const Request& request, const ModelLimits& limits) {
  const int64_t room = MaxSequenceTokens(limits) - static_cast<int64_t>(request.prompt.size());
  RESA_CHECK_GT(room, 0);
  return static_cast<int32_t>(
      std::min<int64_t>(room, request.stop.max_tokens.value_or(limits.max_context)));
}

const char* NameOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
  }
  RESA_CHECK(false) << "finish reason " << static_cast<int>(reason);
  return "";
}

}  // namespace resa::engine
