#include "engine/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

// Bounds on one match. A subject has at most a few megabytes; the patterns in use need one
// comparison per character and no stack, so reaching a limit means a hostile pattern.
constexpr uint32_t kMatchLimit = 50'000'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;
constexpr size_t kJitStackBytesMin = 32 * 1024;
constexpr size_t kJitStackBytesMax = 8 * 1024 * 1024;

std::string PcreMessage(int error) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(error, buffer, sizeof(buffer)) < 0) {
    return absl::StrCat("PCRE2 error ", error);
  }
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct RegexScratch::State {
  // No pattern has captures, so one pair of offsets is enough.
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* jit_stack =
      pcre2_jit_stack_create(kJitStackBytesMin, kJitStackBytesMax, nullptr);

  State() {
    RESA_CHECK(data != nullptr && context != nullptr) << "out of memory";
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    // Null (no executable memory) leaves PCRE2's own small stack.
    if (jit_stack != nullptr) pcre2_jit_stack_assign(context, nullptr, jit_stack);
  }
  ~State() {
    if (jit_stack != nullptr) pcre2_jit_stack_free(jit_stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
};

RegexScratch::RegexScratch() : state_(std::make_unique<State>()) {}
RegexScratch::~RegexScratch() = default;

struct Regex::Code {
  explicit Code(pcre2_code* code) : code(code) {}
  ~Code() { pcre2_code_free(code); }
  pcre2_code* const code;
};

Regex::Regex(std::string translated, std::unique_ptr<Code> code)
    : translated_(std::move(translated)), code_(std::move(code)) {}
Regex::~Regex() = default;

absl::StatusOr<std::unique_ptr<const Regex>> Regex::Compile(absl::string_view pattern) {
  RESA_ASSIGN_OR_RETURN(std::string translated, TranslateRegex(pattern));
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* const code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("the pattern does not compile: ", PcreMessage(error)));
  }
  auto owned = std::make_unique<Code>(code);
  uint32_t match_empty = 0;
  RESA_CHECK(pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &match_empty) == 0);
  if (match_empty != 0) {
    return absl::InvalidArgumentError(
        "the pattern can match the empty string, which is not supported");
  }
  // Without JIT (a hardened kernel may forbid executable memory) matching is slower but the same.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return std::unique_ptr<const Regex>(new Regex(std::move(translated), std::move(owned)));
}

absl::StatusOr<Regex::Match> Regex::Find(absl::string_view subject, size_t start,
                                         RegexScratch& scratch) const {
  RESA_CHECK_LE(start, subject.size());
  RegexScratch::State& state = *scratch.state_;
  const auto text = reinterpret_cast<PCRE2_SPTR>(subject.data());
  // The subject's validity is the caller's promise: checking it here again would read the whole
  // subject for every match and make a pass over the text quadratic.
  int rc = pcre2_match(code_->code, text, subject.size(), start, PCRE2_NO_UTF_CHECK, state.data,
                       state.context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
    rc = pcre2_match(code_->code, text, subject.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                     state.data, state.context);
  }
  if (rc == PCRE2_ERROR_NOMATCH) return Match{};
  if (rc < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the tokenizer's pattern needs too much work on this text at byte ", start,
                     " (", PcreMessage(rc), ")"));
  }
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(state.data);
  RESA_CHECK(offsets[0] >= start && offsets[0] < offsets[1]);
  return Match{offsets[0], offsets[1], true};
}

}  // namespace resa::engine
