#include <algorithm>
#include <cctype>
#include <iterator>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "engine/regex.h"
#include "engine/status_macros.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"

namespace resa::engine {
namespace {

constexpr int kMaxGroups = 32;       // Nested.
constexpr int64_t kMaxRepeat = 255;  // In {n,m}.

constexpr absl::string_view kCategories[] = {
    "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N",  "Nd", "Nl", "No", "P", "Pc",
    "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp"};

// Letter pairs that some single character folds to ("ß" is "ss", "ﬁ" is "fi"): Oniguruma would
// match that character for the pair when case is ignored, PCRE2 would not.
constexpr absl::string_view kFoldingPairs[] = {"ff", "fi", "fl", "ss", "st"};

// Recursive descent over the pattern; writes the PCRE2 form as it goes.
class Translator {
 public:
  explicit Translator(absl::string_view pattern) : pattern_(pattern) {}

  absl::StatusOr<std::string> Run() {
    if (!IsValidUtf8(pattern_)) return absl::InvalidArgumentError("the pattern is not valid UTF-8");
    RESA_RETURN_IF_ERROR(Alternatives(0, /*ignore_case=*/false));
    if (!AtEnd()) return Unsupported("an unbalanced )");
    return std::move(out_);
  }

 private:
  bool AtEnd() const { return at_ == pattern_.size(); }
  absl::string_view Rest() const { return pattern_.substr(at_); }
  bool Take(absl::string_view token) {
    if (!absl::StartsWith(Rest(), token)) return false;
    at_ += token.size();
    return true;
  }
  absl::Status Unsupported(absl::string_view what) const {
    return absl::InvalidArgumentError(
        absl::StrCat("the pattern has ", what, " at byte ", at_,
                     ", which is not supported (engine/regex.h lists what is)"));
  }

  void EmitLiteral(char32_t c) {
    if (c < 0x80 && absl::ascii_isalnum(static_cast<unsigned char>(c))) {
      out_.push_back(static_cast<char>(c));
    } else {
      absl::StrAppendFormat(&out_, "\\x{%X}", static_cast<uint32_t>(c));
    }
  }

  absl::Status Alternatives(int depth, bool ignore_case) {
    if (depth > kMaxGroups) return Unsupported("groups nested too deeply");
    while (true) {
      RESA_RETURN_IF_ERROR(Sequence(depth, ignore_case));
      if (!Take("|")) return absl::OkStatus();
      out_.push_back('|');
    }
  }

  absl::Status Sequence(int depth, bool ignore_case) {
    char32_t previous_letter = 0;  // The literal before this one, lowercase, when case is ignored.
    while (!AtEnd() && Rest()[0] != '|' && Rest()[0] != ')') {
      char32_t letter = 0;
      RESA_RETURN_IF_ERROR(Atom(depth, ignore_case, &letter));
      if (ignore_case && letter != 0 && previous_letter != 0) {
        const char pair[] = {static_cast<char>(previous_letter), static_cast<char>(letter)};
        const absl::string_view view(pair, 2);
        if (std::find(std::begin(kFoldingPairs), std::end(kFoldingPairs), view) !=
            std::end(kFoldingPairs)) {
          return Unsupported(absl::StrCat("\"", view, "\" in any case"));
        }
      }
      previous_letter = letter;
      RESA_RETURN_IF_ERROR(Quantifier());
    }
    return absl::OkStatus();
  }

  // One atom. Sets *letter for an ASCII letter as a literal.
  absl::Status Atom(int depth, bool ignore_case, char32_t* letter) {
    const char first = Rest()[0];
    if (first == '(') return Group(depth, ignore_case);
    if (first == '[') {
      if (ignore_case) return Unsupported("a character class in any case");
      return Class();
    }
    if (first == '.') {
      ++at_;
      out_ += "[^\\n]";
      return absl::OkStatus();
    }
    if (absl::StrContains("*+?{}^$", first)) {
      return Unsupported(absl::StrCat("\"", std::string(1, first), "\""));
    }
    if (first == '\\') {
      bool is_class = false;
      std::string text;
      char32_t literal = 0;
      RESA_RETURN_IF_ERROR(Escape(/*in_class=*/false, &is_class, &text, &literal));
      if (is_class) {
        out_ += text;
      } else {
        if (ignore_case && literal >= 0x80) return Unsupported("a non-ASCII letter in any case");
        EmitLiteral(literal);
      }
      return absl::OkStatus();
    }
    size_t length = 0;
    const char32_t c = DecodeValid(Rest(), &length);
    if (ignore_case && c >= 0x80) return Unsupported("a non-ASCII letter in any case");
    at_ += length;
    EmitLiteral(c);
    if (c < 0x80 && absl::ascii_isalpha(static_cast<unsigned char>(c))) {
      *letter = static_cast<char32_t>(absl::ascii_tolower(static_cast<unsigned char>(c)));
    }
    return absl::OkStatus();
  }

  absl::Status Group(int depth, bool ignore_case) {
    static constexpr absl::string_view kOpenings[] = {"(?:",  "(?i:", "(?=", "(?!",
                                                      "(?<=", "(?<!", "(?>"};
    absl::string_view opening;
    for (absl::string_view candidate : kOpenings) {
      if (Take(candidate)) opening = candidate;
    }
    if (opening.empty()) {
      if (absl::StartsWith(Rest(), "(?") || absl::StartsWith(Rest(), "(*")) {
        return Unsupported(absl::StrCat("the group ", Rest().substr(0, 4)));
      }
      Take("(");
      opening = "(?:";
    }
    absl::StrAppend(&out_, opening);
    RESA_RETURN_IF_ERROR(Alternatives(depth + 1, ignore_case || opening == "(?i:"));
    if (!Take(")")) return Unsupported("a group that is not closed");
    out_.push_back(')');
    return absl::OkStatus();
  }

  absl::Status Quantifier() {
    if (AtEnd()) return absl::OkStatus();
    bool counted = false;
    const char first = Rest()[0];
    if (first == '*' || first == '+' || first == '?') {
      out_.push_back(first);
      ++at_;
    } else if (first == '{') {
      RESA_RETURN_IF_ERROR(Count());
      counted = true;
    } else {
      return absl::OkStatus();
    }
    if (Take("?")) {
      // "{n}?" is optional in Oniguruma and lazy in PCRE2.
      if (counted && out_.back() == '}' && !absl::StrContains(out_.substr(out_.rfind('{')), ',')) {
        return Unsupported("{n}?");
      }
      out_.push_back('?');
    } else if (!AtEnd() && Rest()[0] == '+') {
      if (counted) return Unsupported("{n,m}+");
      ++at_;
      out_.push_back('+');
    }
    if (!AtEnd() && absl::StrContains("*+?{", Rest()[0])) {
      return Unsupported("a quantifier of a quantifier");
    }
    return absl::OkStatus();
  }

  absl::Status Count() {
    const size_t end = Rest().find('}');
    if (end == absl::string_view::npos) return Unsupported("\"{\"");
    const absl::string_view inside = Rest().substr(1, end - 1);
    const size_t comma = inside.find(',');
    int64_t min = 0;
    int64_t max = 0;
    bool ok = absl::SimpleAtoi(inside.substr(0, comma), &min) && absl::ascii_isdigit(inside[0]);
    max = min;
    if (comma != absl::string_view::npos && comma + 1 < inside.size()) {
      ok = ok && absl::ascii_isdigit(inside[comma + 1]) &&
           absl::SimpleAtoi(inside.substr(comma + 1), &max);
    }
    if (!ok || min < 0 || min > kMaxRepeat || max < min || max > kMaxRepeat) {
      return Unsupported(absl::StrCat("the count {", inside, "}"));
    }
    absl::StrAppend(&out_, "{", inside, "}");
    at_ += end + 1;
    return absl::OkStatus();
  }

  // [...]: items are literals, ranges and class escapes.
  absl::Status Class() {
    ++at_;
    out_.push_back('[');
    if (Take("^")) out_.push_back('^');
    if (absl::StartsWith(Rest(), "]")) return Unsupported("a class that begins with ]");
    while (!AtEnd() && Rest()[0] != ']') {
      if (Rest()[0] == '[') return Unsupported("a class within a class");
      if (absl::StartsWith(Rest(), "&&")) return Unsupported("an intersection of classes");
      bool is_class = false;
      char32_t low = 0;
      RESA_RETURN_IF_ERROR(ClassItem(&is_class, &low));
      if (is_class) {
        if (absl::StartsWith(Rest(), "-") && !absl::StartsWith(Rest(), "-]")) {
          return Unsupported("a range that begins with a class");
        }
        continue;
      }
      const bool range = absl::StartsWith(Rest(), "-") && Rest().size() > 1 && Rest()[1] != ']';
      EmitLiteral(low);
      if (!range) continue;
      ++at_;
      if (Rest()[0] == '[') return Unsupported("a class within a class");
      out_.push_back('-');
      char32_t high = 0;
      RESA_RETURN_IF_ERROR(ClassItem(&is_class, &high));
      if (is_class || high < low) return Unsupported("a range out of order");
      EmitLiteral(high);
    }
    if (!Take("]")) return Unsupported("a class that is not closed");
    out_.push_back(']');
    return absl::OkStatus();
  }

  // A literal (*is_class false, nothing written) or a class escape (written).
  absl::Status ClassItem(bool* is_class, char32_t* literal) {
    *is_class = false;
    if (Rest()[0] != '\\') {
      size_t length = 0;
      *literal = DecodeValid(Rest(), &length);
      at_ += length;
      return absl::OkStatus();
    }
    std::string text;
    RESA_RETURN_IF_ERROR(Escape(/*in_class=*/true, is_class, &text, literal));
    out_ += text;
    return absl::OkStatus();
  }

  // What follows a backslash: a literal, or a class in *text (its inside when `in_class`).
  absl::Status Escape(bool in_class, bool* is_class, std::string* text, char32_t* literal) {
    if (Rest().size() < 2) return Unsupported("a backslash at its end");
    const char c = Rest()[1];
    const auto whole = [&](absl::string_view inside, bool negated) {
      *is_class = true;
      *text = in_class ? std::string(inside) : absl::StrCat(negated ? "[^" : "[", inside, "]");
    };
    switch (c) {
      case 's':
        whole(kWhitespaceClass, false);
        break;
      case 'S':
        whole(kNotWhitespaceClass, false);
        break;
      case 'd':
      case 'D':
        if (in_class && c == 'D') return Unsupported("\\D within a class");
        whole(absl::StrCat("\\p{Nd}", NewCharactersClass("Nd")), c == 'D');
        break;
      case 'p':
      case 'P':
        return Property(in_class, is_class, text);
      case 'x':
      case 'u':
        return Hexadecimal(literal);
      default: {
        static constexpr absl::string_view kNames = "nrtfvae";
        static constexpr absl::string_view kValues = "\n\r\t\f\v\a\x1B";
        const size_t name = kNames.find(c);
        if (name != absl::string_view::npos) {
          *literal = static_cast<char32_t>(kValues[name]);
        } else if (absl::ascii_ispunct(static_cast<unsigned char>(c)) || c == ' ') {
          *literal = static_cast<char32_t>(c);
        } else {
          return Unsupported(absl::StrCat("\\", std::string(1, c)));
        }
      }
    }
    at_ += 2;
    return absl::OkStatus();
  }

  absl::Status Property(bool in_class, bool* is_class, std::string* text) {
    const bool negated = Rest()[1] == 'P';
    const size_t close = Rest().find('}');
    if (Rest().size() < 3 || Rest()[2] != '{' || close == absl::string_view::npos) {
      return Unsupported("a property without braces");
    }
    const absl::string_view name = Rest().substr(3, close - 3);
    if (std::find(std::begin(kCategories), std::end(kCategories), name) == std::end(kCategories)) {
      return Unsupported(absl::StrCat("the property ", name));
    }
    if (negated && in_class) return Unsupported("\\P within a class");
    const std::string inside = absl::StrCat("\\p{", name, "}", NewCharactersClass(name));
    *is_class = true;
    *text = in_class ? inside : absl::StrCat(negated ? "[^" : "[", inside, "]");
    at_ += close + 1;
    return absl::OkStatus();
  }

  // \xHH, \x{H...} or \uHHHH.
  absl::Status Hexadecimal(char32_t* literal) {
    absl::string_view digits;
    size_t used = 0;
    if (Rest()[1] == 'x' && Rest().size() > 2 && Rest()[2] == '{') {
      const size_t close = Rest().find('}');
      if (close == absl::string_view::npos) return Unsupported("\\x{");
      digits = Rest().substr(3, close - 3);
      used = close + 1;
    } else {
      digits = Rest().substr(2, Rest()[1] == 'x' ? 2 : 4);
      used = 2 + digits.size();
      if (digits.size() != (Rest()[1] == 'x' ? 2u : 4u)) return Unsupported("a short \\x or \\u");
    }
    uint32_t value = 0;
    const bool is_hex = !digits.empty() && digits.size() <= 6 &&
                        std::all_of(digits.begin(), digits.end(),
                                    [](unsigned char d) { return absl::ascii_isxdigit(d); }) &&
                        absl::SimpleHexAtoi(digits, &value);
    // \x80 to \xFF are bytes in Oniguruma, not characters.
    const bool is_byte = used == 4 && value >= 0x80;
    if (!is_hex || is_byte || value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
      return Unsupported(absl::StrCat("the character ", Rest().substr(0, used)));
    }
    *literal = value;
    at_ += used;
    return absl::OkStatus();
  }

  const absl::string_view pattern_;
  size_t at_ = 0;
  std::string out_;
};

}  // namespace

absl::StatusOr<std::string> TranslateRegex(absl::string_view pattern) {
  return Translator(pattern).Run();
}

}  // namespace resa::engine
