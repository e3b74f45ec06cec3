// The tokenizer as a filter, for comparisons with other implementations (compare_tokenizer.py).
//
//   tokenizer_tool MODEL_DIRECTORY_OR_GGUF
//
// Reads requests from standard input and answers each on standard output; integers are 32 bits,
// little endian.
//   'e' flags length bytes     encode; flag 1: add special tokens, 2: parse special tokens
//                              -> count ids
//   'd' flags count ids        decode; flag 1: skip special tokens -> length bytes
//   's' flags count ids        the same through the incremental detokenizer -> length bytes
//   'c' flags length json      {"template": text, "messages": [{"role", "content"}]};
//                              flag 1: add the generation prompt -> count ids
//   'j' 0 length bytes         a template's format and fingerprint -> length bytes
// An error is answered by the count or length 0xFFFFFFFF and then length bytes, its message.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/chat_template.h"
#include "engine/detokenizer.h"
#include "engine/gguf.h"
#include "engine/jinja_fingerprint.h"
#include "engine/mapped_file.h"
#include "engine/model_files.h"
#include "engine/status_macros.h"
#include "engine/tokenizer.h"
#include "nlohmann/json.hpp"

namespace resa::engine {
namespace {

using Ids = std::vector<int32_t>;

bool ReadExactly(void* data, size_t bytes) { return std::fread(data, 1, bytes, stdin) == bytes; }

void WriteInt(uint32_t value) { std::fwrite(&value, sizeof(value), 1, stdout); }

void WriteBytes(const std::string& bytes) {
  WriteInt(static_cast<uint32_t>(bytes.size()));
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
}

void WriteError(const absl::Status& status) {
  WriteInt(UINT32_MAX);
  WriteBytes(status.ToString());
}

void WriteIds(const absl::StatusOr<Ids>& ids) {
  if (!ids.ok()) return WriteError(ids.status());
  WriteInt(static_cast<uint32_t>(ids->size()));
  std::fwrite(ids->data(), sizeof(int32_t), ids->size(), stdout);
}

absl::StatusOr<std::unique_ptr<const Tokenizer>> Load(const std::string& path) {
  if (std::filesystem::is_directory(path)) return Tokenizer::FromDirectory(path);
  RESA_ASSIGN_OR_RETURN(const auto file, MappedFile::Open(path));
  RESA_ASSIGN_OR_RETURN(const GgufFile gguf, GgufFile::Parse(file->bytes(), path));
  RESA_ASSIGN_OR_RETURN(const GgufVocab vocab, ReadGgufVocab(gguf));
  return Tokenizer::FromGguf(vocab);
}

absl::StatusOr<Ids> Chat(const Tokenizer& tokenizer, uint32_t flags, const std::string& text) {
  const nlohmann::json request = nlohmann::json::parse(text, nullptr, false);
  if (!request.is_object()) return absl::InvalidArgumentError("the request is not a JSON object");
  RESA_ASSIGN_OR_RETURN(const ChatFormat format,
                        RecogniseChatTemplate(request.value("template", "")));
  std::vector<ChatMessage> messages;
  for (const auto& message : request["messages"]) {
    messages.push_back({message.value("role", ""), message.value("content", "")});
  }
  return RenderChat(tokenizer, format, messages, (flags & 1) != 0);
}

std::string Stream(const Tokenizer& tokenizer, uint32_t flags, const Ids& ids) {
  Detokenizer detokenizer(
      &tokenizer,
      {.stop_strings = {}, .skip_special_tokens = (flags & 1) != 0, .include_stop = false});
  std::string text;
  for (const int32_t id : ids) text += detokenizer.Push(id).text;
  return text + detokenizer.Finish();
}

std::string Describe(const std::string& jinja) {
  const absl::StatusOr<ChatFormat> format = RecogniseChatTemplate(jinja);
  return absl::StrFormat("%s 0x%016X", format.ok() ? NameOf(*format) : "-",
                         JinjaFingerprint(jinja).value_or(0));
}

// False at the end of the input.
bool Answer(const Tokenizer& tokenizer) {
  char operation = 0;
  uint32_t flags = 0;
  uint32_t count = 0;
  if (!ReadExactly(&operation, 1) || !ReadExactly(&flags, 4) || !ReadExactly(&count, 4)) {
    return false;
  }
  if (operation == 'd' || operation == 's') {
    Ids ids(count);
    if (!ReadExactly(ids.data(), count * sizeof(int32_t))) return false;
    WriteBytes(operation == 'd' ? tokenizer.Decode(ids, (flags & 1) != 0)
                                : Stream(tokenizer, flags, ids));
    return true;
  }
  std::string text(count, '\0');
  if (!ReadExactly(text.data(), count)) return false;
  if (operation == 'e') {
    WriteIds(tokenizer.Encode(
        text, {.add_special_tokens = (flags & 1) != 0, .parse_special = (flags & 2) != 0}));
  } else if (operation == 'c') {
    WriteIds(Chat(tokenizer, flags, text));
  } else {
    WriteBytes(Describe(text));
  }
  return true;
}

int Run(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODEL_DIRECTORY_OR_GGUF\n", argv[0]);
    return 2;
  }
  const auto tokenizer = Load(argv[1]);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
    return 1;
  }
  while (Answer(**tokenizer)) std::fflush(stdout);
  return 0;
}

}  // namespace
}  // namespace resa::engine

int main(int argc, char** argv) { return resa::engine::Run(argc, argv); }
