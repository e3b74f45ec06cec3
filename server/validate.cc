#include "server/validate.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/invalid.h"
#include "engine/status_macros.h"

namespace resa::server {
namespace {

using engine::Invalid;

using ::resa::v1::GenerateRequest;

// `status` with its message put behind a field's path.
absl::Status InField(absl::string_view field, const absl::Status& status) {
  return Invalid(field, ": ", status.message());
}

template <typename Ids>
absl::Status CheckTokenIds(absl::string_view field, const Ids& ids, const ServedModel& model) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < model.limits.vocab_size) continue;
    return Invalid(field, "[", i, "]: token id ", ids[i], " is not from 0 to ",
                   model.limits.vocab_size - 1);
  }
  return absl::OkStatus();
}

// Refuses a text that no context can hold before any work is done on it.
absl::Status CheckTextBytes(absl::string_view field, size_t bytes, const ServedModel& model) {
  const size_t token_bytes = model.tokenizer->max_token_bytes();
  const size_t most = static_cast<size_t>(model.limits.max_context) * token_bytes;
  if (bytes <= most) return absl::OkStatus();
  return Invalid(field, ": ", bytes, " bytes; at most ", most, " are taken, which are ",
                 model.limits.max_context, " tokens of ", token_bytes, " bytes, the longest");
}

// The fields that GenerateRequest and TokenizeRequest share.
template <typename Request>
absl::StatusOr<std::vector<int32_t>> EncodeText(const Request& request, const ServedModel& model) {
  if (request.text().empty()) return Invalid("text: must not be empty");
  RESA_RETURN_IF_ERROR(CheckTextBytes("text", request.text().size(), model));
  engine::Tokenizer::EncodeOptions options;
  if (request.has_add_special_tokens()) options.add_special_tokens = request.add_special_tokens();
  if (request.has_parse_special_tokens()) options.parse_special = request.parse_special_tokens();
  auto ids = model.tokenizer->Encode(request.text(), options);
  if (!ids.ok()) return InField("text", ids.status());
  return ids;
}

template <typename Request>
absl::Status CheckTextOptionsUnset(const Request& request) {
  if (request.has_add_special_tokens()) {
    return Invalid("add_special_tokens: acts on a text prompt only");
  }
  if (request.has_parse_special_tokens()) {
    return Invalid("parse_special_tokens: acts on a text prompt only");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const resa::v1::ChatPrompt& chat,
                                                const ServedModel& model) {
  if (!model.chat_format.has_value()) return Invalid("chat: ", model.chat_refusal);
  if (chat.messages().empty()) return Invalid("chat.messages: must hold at least one message");
  size_t bytes = 0;
  for (const resa::v1::ChatMessage& message : chat.messages()) bytes += message.content().size();
  RESA_RETURN_IF_ERROR(CheckTextBytes("chat.messages", bytes, model));
  std::vector<engine::ChatMessage> messages;
  messages.reserve(chat.messages_size());
  for (const resa::v1::ChatMessage& message : chat.messages()) {
    messages.push_back({message.role(), message.content()});
  }
  const bool add_generation_prompt =
      !chat.has_add_generation_prompt() || chat.add_generation_prompt();
  auto ids =
      engine::RenderChat(*model.tokenizer, *model.chat_format, messages, add_generation_prompt);
  if (!ids.ok()) return InField("chat.messages", ids.status());
  return ids;
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const GenerateRequest& request,
                                                  const ServedModel& model) {
  switch (request.prompt_case()) {
    case GenerateRequest::kText:
      return EncodeText(request, model);
    case GenerateRequest::kTokenIds: {
      RESA_RETURN_IF_ERROR(CheckTextOptionsUnset(request));
      const auto& ids = request.token_ids().ids();
      if (ids.empty()) return Invalid("token_ids.ids: must hold at least one token");
      RESA_RETURN_IF_ERROR(CheckTokenIds("token_ids.ids", ids, model));
      return std::vector<int32_t>(ids.begin(), ids.end());
    }
    case GenerateRequest::kChat:
      RESA_RETURN_IF_ERROR(CheckTextOptionsUnset(request));
      return EncodeChat(request.chat(), model);
    case GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  return Invalid("prompt: required; one of text, token_ids and chat");
}

engine::SamplingParams ToSampling(const resa::v1::SamplingParams& wire, uint64_t random_seed) {
  engine::SamplingParams sampling;
  if (wire.has_temperature()) sampling.temperature = wire.temperature();
  sampling.top_k = wire.top_k();
  if (wire.has_top_p()) sampling.top_p = wire.top_p();
  sampling.min_p = wire.min_p();
  if (wire.has_repetition_penalty()) sampling.repetition_penalty = wire.repetition_penalty();
  sampling.presence_penalty = wire.presence_penalty();
  sampling.frequency_penalty = wire.frequency_penalty();
  sampling.seed = wire.has_seed() ? wire.seed() : random_seed;
  sampling.logit_bias.assign(wire.logit_bias().begin(), wire.logit_bias().end());
  return sampling;
}

engine::StopCriteria ToStop(const resa::v1::StopCriteria& wire) {
  engine::StopCriteria stop;
  if (wire.has_max_tokens()) stop.max_tokens = wire.max_tokens();
  stop.min_tokens = wire.min_tokens();
  stop.strings.assign(wire.strings().begin(), wire.strings().end());
  stop.token_ids.assign(wire.token_ids().begin(), wire.token_ids().end());
  stop.ignore_eos = wire.ignore_eos();
  stop.include_stop = wire.include_stop();
  return stop;
}

engine::OutputOptions ToOutput(const resa::v1::OutputOptions& wire) {
  engine::OutputOptions output;
  output.token_ids = wire.token_ids();
  output.logprobs = wire.logprobs();
  output.top_logprobs = wire.top_logprobs();
  output.echo = wire.echo();
  output.keep_special_tokens = wire.keep_special_tokens();
  return output;
}

absl::StatusOr<engine::AttentionPolicy> ToPolicy(const resa::v1::AttentionPolicy& wire,
                                                 const ServedModel& model) {
  engine::AttentionOverrides overrides;
  switch (wire.mode()) {
    case resa::v1::ATTENTION_MODE_UNSPECIFIED:
      break;
    case resa::v1::ATTENTION_MODE_DENSE:
      overrides.mode = engine::AttentionMode::kDense;
      break;
    case resa::v1::ATTENTION_MODE_SPARSE:
      overrides.mode = engine::AttentionMode::kSparse;
      break;
    case resa::v1::ATTENTION_MODE_RECTIFIED:
      overrides.mode = engine::AttentionMode::kRectified;
      break;
    default:
      return Invalid("attention.mode: ", static_cast<int>(wire.mode()),
                     " is not an AttentionMode (0 to 3)");
  }
  if (wire.has_keep_ratio()) overrides.keep_ratio = wire.keep_ratio();
  if (wire.has_min_tokens()) overrides.min_tokens = wire.min_tokens();
  if (wire.has_local_tokens()) overrides.local_tokens = wire.local_tokens();
  if (wire.has_sink_tokens()) overrides.sink_tokens = wire.sink_tokens();
  if (wire.has_rectify_interval()) overrides.rectify_interval = wire.rectify_interval();
  auto policy = engine::ResolvePolicy(model.default_attention, overrides);
  if (!policy.ok()) return Invalid("attention.", policy.status().message());
  return policy;
}

}  // namespace

absl::StatusOr<std::unique_ptr<engine::Request>> ToEngineRequest(const GenerateRequest& request,
                                                                 const ServedModel& model,
                                                                 uint64_t random_seed) {
  if (request.request_id().size() > kMaxRequestIdBytes) {
    return Invalid("request_id: ", request.request_id().size(), " bytes; at most ",
                   kMaxRequestIdBytes, " are taken");
  }
  auto out = std::make_unique<engine::Request>();
  out->sampling = ToSampling(request.sampling(), random_seed);
  out->stop = ToStop(request.stop());
  out->output = ToOutput(request.output());
  RESA_ASSIGN_OR_RETURN(out->attention, ToPolicy(request.attention(), model));
  out->forced_tokens.assign(request.forced_token_ids().begin(), request.forced_token_ids().end());
  if (request.has_n()) out->n = request.n();
  out->priority = request.priority();
  RESA_ASSIGN_OR_RETURN(out->prompt, EncodePrompt(request, model));
  return out;
}

absl::StatusOr<std::vector<int32_t>> Tokenize(const resa::v1::TokenizeRequest& request,
                                              const ServedModel& model) {
  switch (request.input_case()) {
    case resa::v1::TokenizeRequest::kText:
      return EncodeText(request, model);
    case resa::v1::TokenizeRequest::kChat:
      RESA_RETURN_IF_ERROR(CheckTextOptionsUnset(request));
      return EncodeChat(request.chat(), model);
    case resa::v1::TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return Invalid("input: required; one of text and chat");
}

absl::StatusOr<std::string> Detokenize(const resa::v1::DetokenizeRequest& request,
                                       const ServedModel& model) {
  if (request.token_ids_size() > model.limits.max_context) {
    return Invalid("token_ids: ", request.token_ids_size(), " ids; at most ",
                   model.limits.max_context, " are taken, a whole context");
  }
  RESA_RETURN_IF_ERROR(CheckTokenIds("token_ids", request.token_ids(), model));
  const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
  return model.tokenizer->Decode(ids, /*skip_special_tokens=*/!request.keep_special_tokens());
}

resa::v1::AttentionPolicy ToProto(const engine::AttentionPolicy& policy) {
  resa::v1::AttentionPolicy proto;
  switch (policy.mode) {
    case engine::AttentionMode::kDense:
      proto.set_mode(resa::v1::ATTENTION_MODE_DENSE);
      break;
    case engine::AttentionMode::kSparse:
      proto.set_mode(resa::v1::ATTENTION_MODE_SPARSE);
      break;
    case engine::AttentionMode::kRectified:
      proto.set_mode(resa::v1::ATTENTION_MODE_RECTIFIED);
      break;
  }
  proto.set_keep_ratio(policy.keep_ratio);
  proto.set_min_tokens(policy.min_tokens);
  proto.set_local_tokens(policy.local_tokens);
  proto.set_sink_tokens(policy.sink_tokens);
  proto.set_rectify_interval(policy.rectify_interval);
  return proto;
}

}  // namespace resa::server
