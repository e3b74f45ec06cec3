#ifndef RESA_ENGINE_JINJA_FINGERPRINT_H_
#define RESA_ENGINE_JINJA_FINGERPRINT_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace resa::engine {

// A Jinja template brought into one spelling, so that texts that differ only in how they are
// written compare equal and texts that mean something else do not. As chat templates are run
// (trim_blocks and lstrip_blocks on), these do not matter:
//   white space inside tags, comments, the white space control of tags and what it removes,
//   '...' or "..." and how characters are escaped in them, x.name or x['name'],
//   {{ 'text' }} or text.
// All else does. The form is for comparison only: one token per item, strings with their length.
// nullopt for what is not lexically a template, or uses line statements, raw blocks or "{%+".
std::optional<std::string> CanonicalJinja(absl::string_view source);

// 64 bits of FNV-1a over the canonical form: enough to tell the few dozen templates of public
// models apart; nothing secret hangs on it. nullopt as above.
std::optional<uint64_t> JinjaFingerprint(absl::string_view source);

}  // namespace resa::engine

#endif  // RESA_ENGINE_JINJA_FINGERPRINT_H_
