#include "server/generate_flags.h"

#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/invalid.h"
#include "engine/status_macros.h"
#include "server/proto_field.h"

namespace resa::server {
namespace {

using engine::Invalid;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

absl::StatusOr<std::vector<int32_t>> ParseIds(absl::string_view text) {
  std::vector<int32_t> ids;
  for (absl::string_view part : absl::StrSplit(text, absl::ByAnyChar(", "), absl::SkipEmpty())) {
    RESA_ASSIGN_OR_RETURN(const int64_t id, ParseInteger(part, 0, kMaxInt32));
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

// A setter that replaces a repeated field of token ids.
FlagSet::Setter SetIds(google::protobuf::RepeatedField<int32_t>* field) {
  return [field](absl::string_view text) -> absl::Status {
    RESA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ParseIds(text));
    field->Assign(ids.begin(), ids.end());
    return absl::OkStatus();
  };
}

absl::Status SetLogitBias(absl::string_view text, resa::v1::SamplingParams* sampling) {
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> pair = absl::StrSplit(part, ':');
    if (pair.size() != 2) return Invalid("'", part, "' is not ID:BIAS");
    RESA_ASSIGN_OR_RETURN(const int64_t id, ParseInteger(pair[0], 0, kMaxInt32));
    double bias = -std::numeric_limits<double>::infinity();
    if (pair[1] != "-inf") {
      RESA_ASSIGN_OR_RETURN(bias, ParseNumber(pair[1]));
    }
    (*sampling->mutable_logit_bias())[static_cast<int32_t>(id)] = static_cast<float>(bias);
  }
  return absl::OkStatus();
}

absl::Status SetMode(absl::string_view text, resa::v1::AttentionPolicy* attention) {
  if (text == "dense") {
    attention->set_mode(resa::v1::ATTENTION_MODE_DENSE);
  } else if (text == "sparse") {
    attention->set_mode(resa::v1::ATTENTION_MODE_SPARSE);
  } else if (text == "rectified") {
    attention->set_mode(resa::v1::ATTENTION_MODE_RECTIFIED);
  } else {
    return Invalid("'", text, "' is none of dense, sparse, rectified");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadAll(std::istream& in, absl::string_view name) {
  std::ostringstream text;
  // Inserting an empty buffer counts as a failure of `text`, not of `in`.
  if (in.peek() != std::istream::traits_type::eof()) text << in.rdbuf();
  if (in.bad()) return absl::NotFoundError(absl::StrCat("cannot read ", name));
  return text.str();
}

void AddSamplingFlags(FlagSet* flags, resa::v1::SamplingParams* sampling) {
  flags->Add("temperature", "T", "0 takes the most likely token (default 1)",
             FieldSetter(sampling, "temperature"));
  flags->Add("top-k", "K", "keep the K most likely tokens", FieldSetter(sampling, "top_k"));
  flags->Add("top-p", "P", "keep the most likely tokens up to this sum",
             FieldSetter(sampling, "top_p"));
  flags->Add("min-p", "P", "drop tokens below this share of the most likely one's probability",
             FieldSetter(sampling, "min_p"));
  flags->Add("repetition-penalty", "R", "divides the logits of tokens seen",
             FieldSetter(sampling, "repetition_penalty"));
  flags->Add("presence-penalty", "R", "subtracted once from tokens of the output",
             FieldSetter(sampling, "presence_penalty"));
  flags->Add("frequency-penalty", "R", "subtracted per occurrence in the output",
             FieldSetter(sampling, "frequency_penalty"));
  flags->Add("seed", "N", "the same seed gives the same tokens", FieldSetter(sampling, "seed"));
  flags->Add("logit-bias", "ID:BIAS[,...]", "added to the logits of these tokens; -inf bans one",
             [sampling](absl::string_view text) { return SetLogitBias(text, sampling); });
}

void AddStopFlags(FlagSet* flags, resa::v1::StopCriteria* stop) {
  flags->Add("max-tokens", "N", "output tokens at most", FieldSetter(stop, "max_tokens"));
  flags->Add("min-tokens", "N", "no end of sequence before", FieldSetter(stop, "min_tokens"));
  flags->AddRepeated("stop", "TEXT", "end where TEXT appears; may be given several times",
                     [stop](absl::string_view text) {
                       stop->add_strings(std::string(text));
                       return absl::OkStatus();
                     });
  flags->Add("stop-ids", "ID[,ID]", "end with one of these tokens",
             SetIds(stop->mutable_token_ids()));
  flags->AddSwitch("ignore-eos", "go on past the end of sequence", FieldSetter(stop, "ignore_eos"));
  flags->AddSwitch("include-stop", "keep what ended the output in its text",
                   FieldSetter(stop, "include_stop"));
}

void AddOutputFlags(FlagSet* flags, resa::v1::OutputOptions* output) {
  flags->AddSwitch("token-ids", "report token ids (with --json)", FieldSetter(output, "token_ids"));
  flags->Add("logprobs", "N", "report logprobs, with the N best alternatives (with --json)",
             [output](absl::string_view text) -> absl::Status {
               RESA_ASSIGN_OR_RETURN(const int64_t top, ParseInteger(text, 0, kMaxInt32));
               output->set_logprobs(true);
               output->set_top_logprobs(static_cast<int32_t>(top));
               return absl::OkStatus();
             });
  flags->AddSwitch("echo", "the prompt precedes the output", FieldSetter(output, "echo"));
  flags->AddSwitch("keep-special", "show special tokens",
                   FieldSetter(output, "keep_special_tokens"));
}

void AddAttentionFlags(FlagSet* flags, resa::v1::AttentionPolicy* attention) {
  flags->Add("mode", "dense|sparse|rectified", "attention of decode steps",
             [attention](absl::string_view text) { return SetMode(text, attention); });
  flags->Add("keep-ratio", "SHARE", "share of blocks a sparse step attends to",
             FieldSetter(attention, "keep_ratio"));
  flags->Add("attention-min-tokens", "N", "least budget of a sparse step",
             FieldSetter(attention, "min_tokens"));
  flags->Add("local-tokens", "N", "newest tokens always attended",
             FieldSetter(attention, "local_tokens"));
  flags->Add("sink-tokens", "N", "first tokens always attended",
             FieldSetter(attention, "sink_tokens"));
  flags->Add("rectify-interval", "N", "tokens between rectifications",
             FieldSetter(attention, "rectify_interval"));
}

}  // namespace

GenerateFlags::GenerateFlags() = default;

void GenerateFlags::AddTo(FlagSet* flags) {
  AddSamplingFlags(flags, request_.mutable_sampling());
  AddStopFlags(flags, request_.mutable_stop());
  AddOutputFlags(flags, request_.mutable_output());
  AddAttentionFlags(flags, request_.mutable_attention());
  flags->Add("forced-ids", "ID[,ID]", "tokens taken in place of sampled ones",
             SetIds(request_.mutable_forced_token_ids()));
  flags->Add("n", "N", "outputs", FieldSetter(&request_, "n"));
  flags->Add("priority", "N", "higher runs first", FieldSetter(&request_, "priority"));
  flags->Add("request-id", "NAME", "name of the request in the server's log",
             request_.mutable_request_id());
  flags->AddSwitch("add-special",
                   "add what the tokenizer adds to every text, such as BOS "
                   "(default true)",
                   FieldSetter(&request_, "add_special_tokens"));
  flags->AddSwitch("parse-special",
                   "spellings of special tokens become those tokens "
                   "(default true)",
                   FieldSetter(&request_, "parse_special_tokens"));
}

void GenerateFlags::AddPromptTo(FlagSet* flags) {
  flags->Add("file", "FILE", "read the prompt from FILE; - is standard input", &file_);
  flags->Add("prompt-ids", "ID[,ID]", "the prompt as token ids",
             [this](absl::string_view text) -> absl::Status {
               RESA_ASSIGN_OR_RETURN(prompt_ids_, ParseIds(text));
               return absl::OkStatus();
             });
  flags->AddSwitch("chat", "the prompt is a user's turn of a chat", &chat_);
  flags->Add("system", "TEXT", "system message of the chat", &system_);
}

absl::Status GenerateFlags::SetPrompt(const std::vector<std::string>& words) {
  if ((!words.empty()) + !file_.empty() + !prompt_ids_.empty() > 1) {
    return Invalid("give the prompt once: as arguments, with --file or with --prompt-ids");
  }
  if (!system_.empty() && !chat_) return Invalid("--system: needs --chat");
  if (!prompt_ids_.empty()) {
    if (chat_) return Invalid("--prompt-ids: not with --chat, which renders text");
    request_.mutable_token_ids()->mutable_ids()->Assign(prompt_ids_.begin(), prompt_ids_.end());
    return absl::OkStatus();
  }
  std::string text;
  if (!words.empty()) {
    text = absl::StrJoin(words, " ");
  } else if (file_.empty() || file_ == "-") {
    RESA_ASSIGN_OR_RETURN(text, ReadAll(std::cin, "standard input"));
  } else {
    std::ifstream file(file_);
    if (!file) return absl::NotFoundError(absl::StrCat("--file: cannot read ", file_));
    RESA_ASSIGN_OR_RETURN(text, ReadAll(file, file_));
  }
  if (text.empty()) return Invalid("the prompt is empty");
  if (!chat_) {
    request_.set_text(std::move(text));
    return absl::OkStatus();
  }
  if (!system_.empty()) {
    resa::v1::ChatMessage* message = request_.mutable_chat()->add_messages();
    message->set_role("system");
    message->set_content(system_);
  }
  resa::v1::ChatMessage* message = request_.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(std::move(text));
  return absl::OkStatus();
}

}  // namespace resa::server
