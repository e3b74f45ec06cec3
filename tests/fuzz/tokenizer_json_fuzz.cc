// tokenizer.json from anywhere: refused or usable, never a crash. The input is the file up to the
// first zero byte; a text to encode and decode with it follows.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/detokenizer.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

void Use(const Tokenizer& tokenizer, absl::string_view text) {
  for (const bool parse_special : {false, true}) {
    const auto ids =
        tokenizer.Encode(text, {.add_special_tokens = true, .parse_special = parse_special});
    if (!ids.ok()) continue;
    for (const int32_t id : *ids) {
      RESA_CHECK(id >= 0 && id < tokenizer.vocab_size());
      RESA_CHECK(tokenizer.IdToToken(id).has_value());
    }
    const std::string whole = tokenizer.Decode(*ids, /*skip_special_tokens=*/false);
    RESA_CHECK(IsValidUtf8(whole));
    Detokenizer detokenizer(
        &tokenizer, {.stop_strings = {}, .skip_special_tokens = false, .include_stop = false});
    std::string pieces;
    for (const int32_t id : *ids) {
      const std::string piece = detokenizer.Push(id).text;
      RESA_CHECK(IsValidUtf8(piece));
      pieces += piece;
    }
    pieces += detokenizer.Finish();
    // Runs of byte tokens beyond the detokenizer's patience may differ (token_decoder.h).
    RESA_CHECK(pieces == whole || ids->size() > DecodeStream::kMaxHeldBytes);
  }
}

}  // namespace
}  // namespace resa::engine

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using resa::engine::Tokenizer;
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(input.find('\0'), size);
  const auto tokenizer = Tokenizer::FromJson(input.substr(0, end), "");
  if (!tokenizer.ok()) {
    RESA_CHECK(!tokenizer.status().message().empty());
    return 0;
  }
  resa::engine::Use(**tokenizer, input.substr(end));
  resa::engine::Use(**tokenizer, "Hello  wor1d, it's \xE4\xBD\xA0 e\xCC\x81 <s><|im_end|>\r\n\xFF");
  return 0;
}
