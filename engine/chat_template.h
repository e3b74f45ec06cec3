#ifndef RESA_ENGINE_CHAT_TEMPLATE_H_
#define RESA_ENGINE_CHAT_TEMPLATE_H_

// Chat prompts without Jinja: the templates of the models that we serve are known, recognised, and
// rendered by our own code, into the same tokens as transformers' apply_chat_template.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/tokenizer.h"

namespace resa::engine {

enum class ChatFormat : uint8_t {
  // <|im_start|>role \n content <|im_end|> \n
  kChatMl,        // No system message unless the client sends one.
  kChatMlQwen15,  // As the four that follow, with a default system message of the model's own.
  kChatMlQwen2,
  kChatMlQwen25,
  kChatMlSmolLm2,
  kQwen3,  // ChatML without default; removes the reasoning of earlier answers.
  // <|start_header_id|>role<|end_header_id|> \n\n content <|eot_id|>
  kLlama3,
  kLlama31,  // Llama 3.1 to 3.3: always a system message, with dates.
  // [INST] question [/INST] answer </s>; the releases differ in spaces and in the place of the
  // system message.
  kMistralV1,        // 7B-Instruct v0.1: no system message.
  kMistralV2,        // 7B-Instruct v0.2 and Mixtral 8x7B: no system message.
  kMistralV1System,  // The later template of these, with a system message.
  kMistralV3,        // Large 2407
  kMistralNemo,      // Nemo 2407 (tekken vocabulary)
};

// For logs and GetModel: "chatml", "llama3.1", ...
absl::string_view NameOf(ChatFormat format);

struct ChatMessage {
  std::string role;     // "system", "user" or "assistant"
  std::string content;  // Plain text.
};

// Which format a model's template is.
//
// A template is recognised when its canonical form (jinja_fingerprint.h: white space between
// tokens, quotes and the like aside) is that of a template we know, by fingerprint. A template with
// anything else changed is another one: INVALID_ARGUMENT, saying that a gateway must render it.
// INVALID_ARGUMENT for an empty one, too.
absl::StatusOr<ChatFormat> RecogniseChatTemplate(absl::string_view jinja);

// The prompt's tokens, BOS included where the template has it; nothing is to be added.
//
// What a message contains is always text: control tokens in it are not recognised, and where the
// format's markers are text themselves ("[INST]" in Mistral's first vocabularies) a message with a
// marker is refused. So no message can end its own turn or speak for another role.
// With `add_generation_prompt` the assistant's turn is opened, in formats that have an opening.
// Llama 3.1 to 3.3 state a date: always 26 July 2024, as their templates do when no clock is given.
//
// INVALID_ARGUMENT, naming the message: no messages, another role, an order of roles that the
// format does not have, a marker in the content, or a tokenizer without the format's control
// tokens. Roles and features beyond plain chat (tools, images) are a gateway's.
absl::StatusOr<std::vector<int32_t>> RenderChat(const Tokenizer& tokenizer, ChatFormat format,
                                                absl::Span<const ChatMessage> messages,
                                                bool add_generation_prompt);

}  // namespace resa::engine

#endif  // RESA_ENGINE_CHAT_TEMPLATE_H_
