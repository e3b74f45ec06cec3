#include "engine/chat_template.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "engine/jinja_fingerprint.h"
#include "engine/status_macros.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

struct KnownTemplate {
  uint64_t fingerprint;
  ChatFormat format;
};

// Fingerprints of the templates that the models named were published with.
constexpr KnownTemplate kKnownTemplates[] = {
    {0x03988B3637947D6D, ChatFormat::kChatMl},           // OpenHermes 2.5 and many others
    {0xCA20F5A260E271CF, ChatFormat::kChatMlQwen15},     // Qwen1.5
    {0xEB8D88F27D080FAE, ChatFormat::kChatMlQwen2},      // Qwen2
    {0x3F67DD6E83E7466D, ChatFormat::kChatMlQwen25},     // Qwen2.5
    {0x2EC9AA439BE56429, ChatFormat::kChatMlSmolLm2},    // SmolLM2
    {0x104952F5712E73E5, ChatFormat::kQwen3},            // Qwen3
    {0x679DC630E6FE577A, ChatFormat::kQwen3},            // The same, later
    {0xE8797BACC04B1F9E, ChatFormat::kLlama3},           // Llama 3
    {0x4DD1C89907D7A744, ChatFormat::kLlama31},          // Llama 3.1 and 3.3
    {0x658CFD62C3A03E34, ChatFormat::kLlama31},          // Llama 3.2
    {0x2E5E35F5E1A9BB87, ChatFormat::kMistralV1},        // Mistral 7B Instruct v0.1
    {0x55D61096B7DF5CF0, ChatFormat::kMistralV2},        // Mistral 7B Instruct v0.2, Mixtral 8x7B
    {0x06611AB8A7A56DDE, ChatFormat::kMistralV1System},  // The same, later
    {0xFAA226DF1F329F2F, ChatFormat::kMistralV3},        // Mistral Large 2407
    {0x49CFF8B01AC00F5A, ChatFormat::kMistralNemo},      // Mistral Nemo 2407
};

struct FormatName {
  ChatFormat format;
  absl::string_view name;
};
constexpr FormatName kNames[] = {
    {ChatFormat::kChatMl, "chatml"},
    {ChatFormat::kChatMlQwen15, "chatml-qwen1.5"},
    {ChatFormat::kChatMlQwen2, "chatml-qwen2"},
    {ChatFormat::kChatMlQwen25, "chatml-qwen2.5"},
    {ChatFormat::kChatMlSmolLm2, "chatml-smollm2"},
    {ChatFormat::kQwen3, "qwen3"},
    {ChatFormat::kLlama3, "llama3"},
    {ChatFormat::kLlama31, "llama3.1"},
    {ChatFormat::kMistralV1, "mistral-v1"},
    {ChatFormat::kMistralV2, "mistral-v2"},
    {ChatFormat::kMistralV1System, "mistral-v1-system"},
    {ChatFormat::kMistralV3, "mistral-v3"},
    {ChatFormat::kMistralNemo, "mistral-nemo"},
};

// How the releases of Mistral's format differ.
struct MistralStyle {
  absl::string_view before_user;  // Around "[INST]" and "[/INST]".
  absl::string_view after_inst;
  absl::string_view before_end;
  absl::string_view before_answer;
  absl::string_view after_answer;  // After EOS.
  enum class System { kNone, kFirst, kLast } system;
  bool trims_answer;
};

MistralStyle StyleOf(ChatFormat format) {
  using System = MistralStyle::System;
  switch (format) {
    case ChatFormat::kMistralV1:
      return {"", " ", " ", "", " ", System::kNone, false};
    case ChatFormat::kMistralV2:
      return {"", " ", " ", "", "", System::kNone, false};
    case ChatFormat::kMistralV1System:
      return {" ", " ", " ", " ", "", System::kFirst, false};
    case ChatFormat::kMistralV3:
      return {"", " ", "", " ", "", System::kLast, true};
    case ChatFormat::kMistralNemo:
      return {"", "", "", "", "", System::kLast, false};
    default:
      break;
  }
  RESA_CHECK(false) << "not a format of Mistral's";
  return {};
}

absl::string_view DefaultSystemOf(ChatFormat format) {
  switch (format) {
    case ChatFormat::kChatMlQwen15:
      return "You are a helpful assistant";
    case ChatFormat::kChatMlQwen2:
      return "You are a helpful assistant.";
    case ChatFormat::kChatMlQwen25:
      return "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
    case ChatFormat::kChatMlSmolLm2:
      return "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    default:
      return "";
  }
}

// What Python's str.strip() takes for white space.
bool IsStripped(char32_t c) { return IsWhitespace(c) || (c >= 0x1C && c <= 0x1F); }

// Python's str.strip(), the template language's "trim".
absl::string_view Trim(absl::string_view text) {
  while (!text.empty()) {
    const Utf8Unit unit = ReadUtf8(text);
    if (unit.kind != Utf8Unit::Kind::kCharacter || !IsStripped(unit.code_point)) break;
    text.remove_prefix(unit.length);
  }
  while (!text.empty()) {
    const size_t length = LastCharacterBytes(text);
    const Utf8Unit unit = ReadUtf8(text.substr(text.size() - length));
    if (unit.kind != Utf8Unit::Kind::kCharacter || unit.length != length ||
        !IsStripped(unit.code_point)) {
      break;
    }
    text.remove_suffix(length);
  }
  return text;
}

absl::string_view WithoutNewlinesInFront(absl::string_view text) {
  while (absl::ConsumePrefix(&text, "\n")) {
  }
  return text;
}

absl::string_view WithoutNewlinesAtEnd(absl::string_view text) {
  while (absl::ConsumeSuffix(&text, "\n")) {
  }
  return text;
}

// Collects a prompt's tokens and texts; neighbouring texts become one, as the whole is encoded as
// one text between control tokens.
class Prompt {
 public:
  explicit Prompt(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // A control token. The first one that the tokenizer lacks is the prompt's error.
  void Control(absl::string_view token) {
    const std::optional<int32_t> id = tokenizer_.TokenToId(token);
    if (id.has_value()) {
      Id(*id);
    } else if (error_.ok()) {
      error_ = absl::InvalidArgumentError(
          absl::StrCat("the model's tokenizer has no token ", token, ", which its template uses"));
    }
  }
  void Id(int32_t id) { parts_.push_back({.token = id, .text = {}}); }
  void Special(const std::optional<int32_t>& id, absl::string_view name) {
    if (id.has_value()) {
      Id(*id);
    } else if (error_.ok()) {
      error_ = absl::InvalidArgumentError(
          absl::StrCat("the model's tokenizer has no ", name, " token, which its template uses"));
    }
  }
  void Text(absl::string_view text) {
    if (text.empty()) return;
    if (parts_.empty() || parts_.back().token.has_value()) {
      texts_.emplace_back();
      parts_.push_back({});
    }
    absl::StrAppend(&texts_.back(), text);
    parts_.back().text = texts_.back();
  }

  absl::StatusOr<std::vector<int32_t>> Encode() const {
    RESA_RETURN_IF_ERROR(error_);
    return tokenizer_.EncodeParts(parts_);
  }

 private:
  const Tokenizer& tokenizer_;
  std::list<std::string> texts_;  // Their places do not move.
  std::vector<Tokenizer::Part> parts_;
  absl::Status error_;
};

absl::Status InMessage(size_t index, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("message ", index, ": ", what));
}

absl::Status CheckRoles(absl::Span<const ChatMessage> messages) {
  if (messages.empty()) return absl::InvalidArgumentError("there are no messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role == "system" || role == "user" || role == "assistant") continue;
    return InMessage(i, absl::StrCat("the role \"", role,
                                     "\" is not system, user or assistant; tools and other roles "
                                     "need a gateway that renders templates"));
  }
  return absl::OkStatus();
}

void AddChatMlMessage(absl::string_view role, absl::string_view content, Prompt* prompt) {
  prompt->Control("<|im_start|>");
  prompt->Text(role);
  prompt->Text("\n");
  prompt->Text(content);
  prompt->Control("<|im_end|>");
  prompt->Text("\n");
}

void RenderChatMl(ChatFormat format, absl::Span<const ChatMessage> messages,
                  bool add_generation_prompt, Prompt* prompt) {
  const absl::string_view default_system = DefaultSystemOf(format);
  if (!default_system.empty() && messages[0].role != "system") {
    AddChatMlMessage("system", default_system, prompt);
  }
  for (const ChatMessage& message : messages) {
    AddChatMlMessage(message.role, message.content, prompt);
  }
  if (!add_generation_prompt) return;
  prompt->Control("<|im_start|>");
  prompt->Text("assistant\n");
}

// An answer of Qwen 3 in its two parts; without "</think>" all of it is content.
struct Qwen3Answer {
  absl::string_view reasoning;
  absl::string_view content;
};

Qwen3Answer SplitReasoning(absl::string_view text) {
  constexpr absl::string_view kOpen = "<think>";
  constexpr absl::string_view kClose = "</think>";
  const size_t first_close = text.find(kClose);
  if (first_close == absl::string_view::npos) return {"", text};
  absl::string_view reasoning = WithoutNewlinesAtEnd(text.substr(0, first_close));
  if (const size_t open = reasoning.rfind(kOpen); open != absl::string_view::npos) {
    reasoning.remove_prefix(open + kOpen.size());
  }
  return {WithoutNewlinesInFront(reasoning),
          WithoutNewlinesInFront(text.substr(text.rfind(kClose) + kClose.size()))};
}

// Answers after the last question keep their reasoning, earlier ones lose it.
void RenderQwen3(absl::Span<const ChatMessage> messages, bool add_generation_prompt,
                 Prompt* prompt) {
  size_t last_question = messages.size() - 1;
  for (size_t i = messages.size(); i-- > 0;) {
    const absl::string_view content = messages[i].content;
    const bool is_tool_result =
        absl::StartsWith(content, "<tool_response>") && absl::EndsWith(content, "</tool_response>");
    if (messages[i].role == "user" && !is_tool_result) {
      last_question = i;
      break;
    }
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (message.role != "assistant") {
      AddChatMlMessage(message.role, message.content, prompt);
      continue;
    }
    const Qwen3Answer answer = SplitReasoning(message.content);
    const bool is_last = i + 1 == messages.size();
    if (i > last_question && (is_last || !answer.reasoning.empty())) {
      AddChatMlMessage("assistant",
                       absl::StrCat("<think>\n", WithoutNewlinesAtEnd(answer.reasoning),
                                    "\n</think>\n\n", WithoutNewlinesInFront(answer.content)),
                       prompt);
    } else {
      AddChatMlMessage("assistant", answer.content, prompt);
    }
  }
  if (!add_generation_prompt) return;
  prompt->Control("<|im_start|>");
  prompt->Text("assistant\n");
}

void OpenLlama3Message(absl::string_view role, Prompt* prompt) {
  prompt->Control("<|start_header_id|>");
  prompt->Text(role);
  prompt->Control("<|end_header_id|>");
  prompt->Text("\n\n");
}

void RenderLlama3(ChatFormat format, const Tokenizer& tokenizer,
                  absl::Span<const ChatMessage> messages, bool add_generation_prompt,
                  Prompt* prompt) {
  prompt->Special(tokenizer.bos_id(), "BOS");
  if (format == ChatFormat::kLlama31) {
    OpenLlama3Message("system", prompt);
    prompt->Text("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n");
    if (messages[0].role == "system") {
      prompt->Text(Trim(messages[0].content));
      messages.remove_prefix(1);
    }
    prompt->Control("<|eot_id|>");
  }
  for (const ChatMessage& message : messages) {
    OpenLlama3Message(message.role, prompt);
    prompt->Text(Trim(message.content));
    prompt->Control("<|eot_id|>");
  }
  if (add_generation_prompt) OpenLlama3Message("assistant", prompt);
}

// "[INST]" is a control token in the newer vocabularies, text in the older ones.
void AddMistralMarker(absl::string_view marker, const Tokenizer& tokenizer, Prompt* prompt) {
  const std::optional<int32_t> id = tokenizer.TokenToId(marker);
  if (id.has_value() && tokenizer.IsSpecial(*id)) {
    prompt->Id(*id);
  } else {
    prompt->Text(marker);
  }
}

absl::Status CheckMistral(const MistralStyle& style, const Tokenizer& tokenizer,
                          absl::Span<const ChatMessage> messages) {
  const std::optional<int32_t> marker = tokenizer.TokenToId("[INST]");
  const bool markers_are_text = !marker.has_value() || !tokenizer.IsSpecial(*marker);
  const bool has_system = messages[0].role == "system";
  if (has_system && style.system == MistralStyle::System::kNone) {
    return InMessage(0, "this model's chat format has no system message");
  }
  if (has_system && messages.size() == 1) {
    return absl::InvalidArgumentError("there is no message beside the system message");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    if (i > 0 || !has_system) {
      const bool is_user = (i - (has_system ? 1 : 0)) % 2 == 0;
      if (messages[i].role != (is_user ? "user" : "assistant")) {
        return InMessage(i, absl::StrCat("the role must be ", is_user ? "user" : "assistant",
                                         ": user and assistant take turns in this model's chat "
                                         "format, after an optional system message"));
      }
    }
    for (const absl::string_view text : {"[INST]", "[/INST]"}) {
      if (markers_are_text && absl::StrContains(messages[i].content, text)) {
        return InMessage(i, absl::StrCat("the content holds ", text,
                                         ", which this model cannot tell from a turn's end"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RenderMistral(ChatFormat format, const Tokenizer& tokenizer,
                           absl::Span<const ChatMessage> messages, Prompt* prompt) {
  const MistralStyle style = StyleOf(format);
  RESA_RETURN_IF_ERROR(CheckMistral(style, tokenizer, messages));
  absl::string_view system;
  bool has_system = false;
  if (messages[0].role == "system") {
    system = messages[0].content;
    has_system = true;
    messages.remove_prefix(1);
  }
  prompt->Special(tokenizer.bos_id(), "BOS");
  const size_t system_at = style.system == MistralStyle::System::kFirst ? 0 : messages.size() - 1;
  for (size_t i = 0; i < messages.size(); ++i) {
    const absl::string_view content = messages[i].content;
    if (messages[i].role == "assistant") {
      prompt->Text(style.before_answer);
      prompt->Text(style.trims_answer ? Trim(content) : content);
      prompt->Special(tokenizer.eos_id(), "EOS");
      prompt->Text(style.after_answer);
      continue;
    }
    prompt->Text(style.before_user);
    AddMistralMarker("[INST]", tokenizer, prompt);
    prompt->Text(style.after_inst);
    if (has_system && i == system_at) {
      prompt->Text(system);
      prompt->Text("\n\n");
    }
    prompt->Text(content);
    prompt->Text(style.before_end);
    AddMistralMarker("[/INST]", tokenizer, prompt);
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view NameOf(ChatFormat format) {
  for (const FormatName& entry : kNames) {
    if (entry.format == format) return entry.name;
  }
  RESA_CHECK(false) << "no such format";
  return "";
}

absl::StatusOr<ChatFormat> RecogniseChatTemplate(absl::string_view jinja) {
  if (absl::StripAsciiWhitespace(jinja).empty()) {
    return absl::InvalidArgumentError("the model has no chat template");
  }
  if (const std::optional<uint64_t> fingerprint = JinjaFingerprint(jinja)) {
    for (const KnownTemplate& known : kKnownTemplates) {
      if (known.fingerprint == *fingerprint) return known.format;
    }
  }
  return absl::InvalidArgumentError(
      "the model's chat template is none of those that are rendered here (ChatML, Llama 3, "
      "Mistral, as published); use a gateway that renders templates and send token ids");
}

absl::StatusOr<std::vector<int32_t>> RenderChat(const Tokenizer& tokenizer, ChatFormat format,
                                                absl::Span<const ChatMessage> messages,
                                                bool add_generation_prompt) {
  RESA_RETURN_IF_ERROR(CheckRoles(messages));
  Prompt prompt(tokenizer);
  switch (format) {
    case ChatFormat::kChatMl:
    case ChatFormat::kChatMlQwen15:
    case ChatFormat::kChatMlQwen2:
    case ChatFormat::kChatMlQwen25:
    case ChatFormat::kChatMlSmolLm2:
      RenderChatMl(format, messages, add_generation_prompt, &prompt);
      break;
    case ChatFormat::kQwen3:
      RenderQwen3(messages, add_generation_prompt, &prompt);
      break;
    case ChatFormat::kLlama3:
    case ChatFormat::kLlama31:
      RenderLlama3(format, tokenizer, messages, add_generation_prompt, &prompt);
      break;
    case ChatFormat::kMistralV1:
    case ChatFormat::kMistralV2:
    case ChatFormat::kMistralV1System:
    case ChatFormat::kMistralV3:
    case ChatFormat::kMistralNemo:
      RESA_RETURN_IF_ERROR(RenderMistral(format, tokenizer, messages, &prompt));
      break;
  }
  return prompt.Encode();
}

}  // namespace resa::engine
