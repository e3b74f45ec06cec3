#ifndef RESA_ENGINE_UNICODE_NORMALIZATION_H_
#define RESA_ENGINE_UNICODE_NORMALIZATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace resa::engine {

enum class UnicodeForm : uint8_t { kNfc, kNfd, kNfkc, kNfkd };

// Replaces *out by `text` in the given form, as the `tokenizers` library normalises it
// (unicode_data.h: characters newer than its tables are left alone). Returns false, without
// touching *out, when `text` is in that form already. Only the neighbourhoods of characters that
// can change are looked at closely; text of everyday scripts in NFC costs one pass. O(n log n)
// whatever the text. REQUIRES valid UTF-8. `code_points` is scratch.
bool NormalizeUnicode(UnicodeForm form, absl::string_view text, std::string* out,
                      std::vector<int32_t>* code_points);

}  // namespace resa::engine

#endif  // RESA_ENGINE_UNICODE_NORMALIZATION_H_
