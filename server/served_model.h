#ifndef RESA_SERVER_SERVED_MODEL_H_
#define RESA_SERVER_SERVED_MODEL_H_

#include <optional>
#include <string>

#include "engine/attention_policy.h"
#include "engine/chat_template.h"
#include "engine/request.h"
#include "engine/tokenizer.h"
#include "resa/v1/inference.pb.h"

namespace resa::server {

// What the front end must know of the model to take a request. Immutable while it serves.
struct ServedModel {
  const engine::Tokenizer* tokenizer = nullptr;
  // Unset: chat prompts are refused, for the reason in chat_refusal.
  std::optional<engine::ChatFormat> chat_format;
  std::string chat_refusal;
  engine::ModelLimits limits;
  engine::AttentionPolicy default_attention;
  resa::v1::GetModelResponse description;
};

}  // namespace resa::server

#endif  // RESA_SERVER_SERVED_MODEL_H_
