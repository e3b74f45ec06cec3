#include "engine/jinja_fingerprint.h"

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace resa::engine {
namespace {

// A tag, or the text between two.
struct Node {
  enum class Kind { kText, kOutput, kStatement, kComment };
  Kind kind = Kind::kText;
  absl::string_view inside;  // Without the delimiters and white space control.
  bool strips_before = false;
  bool strips_after = false;
};

struct Token {
  bool is_string = false;
  std::string text;
};

// The end of a tag's inside that begins at `at`: where `closing` stands outside of strings.
size_t FindClosing(absl::string_view source, size_t at, absl::string_view closing,
                   bool skip_strings) {
  for (; at < source.size(); ++at) {
    if (absl::StartsWith(source.substr(at), closing)) return at;
    const char quote = source[at];
    if (!skip_strings || (quote != '\'' && quote != '"')) continue;
    for (++at; at < source.size() && source[at] != quote; ++at) {
      if (source[at] == '\\') ++at;
    }
  }
  return absl::string_view::npos;
}

std::optional<std::vector<Node>> SplitNodes(absl::string_view source) {
  std::vector<Node> nodes;
  size_t at = 0;
  while (at < source.size()) {
    size_t open = at;
    Node node;
    for (;; ++open) {
      open = source.find('{', open);
      if (open == absl::string_view::npos || open + 1 >= source.size()) {
        open = source.size();
        break;
      }
      const char second = source[open + 1];
      if (second != '{' && second != '%' && second != '#') continue;
      node.kind = second == '{'   ? Node::Kind::kOutput
                  : second == '%' ? Node::Kind::kStatement
                                  : Node::Kind::kComment;
      break;
    }
    if (open > at) nodes.push_back({.inside = source.substr(at, open - at)});
    if (open == source.size()) break;
    const absl::string_view closing = node.kind == Node::Kind::kOutput      ? "}}"
                                      : node.kind == Node::Kind::kStatement ? "%}"
                                                                            : "#}";
    const size_t close = FindClosing(source, open + 2, closing, node.kind != Node::Kind::kComment);
    if (close == absl::string_view::npos) return std::nullopt;
    node.inside = source.substr(open + 2, close - open - 2);
    if (absl::StartsWith(node.inside, "+") || absl::EndsWith(node.inside, "+")) {
      return std::nullopt;
    }
    node.strips_before = absl::ConsumePrefix(&node.inside, "-");
    node.strips_after = absl::ConsumeSuffix(&node.inside, "-");
    if (node.kind == Node::Kind::kStatement &&
        absl::StartsWith(absl::StripLeadingAsciiWhitespace(node.inside), "raw")) {
      return std::nullopt;
    }
    nodes.push_back(node);
    at = close + 2;
  }
  return nodes;
}

// What is left of the text of nodes[i] between its neighbours' white space control.
absl::string_view RenderedText(const std::vector<Node>& nodes, size_t i) {
  const auto is_block = [](const Node& node) { return node.kind != Node::Kind::kOutput; };
  absl::string_view text = nodes[i].inside;
  // Jinja drops one newline at the end of a template.
  if (i + 1 == nodes.size()) text = absl::StripSuffix(text, "\n");
  if (i > 0) {
    if (nodes[i - 1].strips_after) {
      text = absl::StripLeadingAsciiWhitespace(text);
    } else if (is_block(nodes[i - 1])) {
      absl::ConsumePrefix(&text, "\n");  // trim_blocks
    }
  }
  if (i + 1 < nodes.size()) {
    if (nodes[i + 1].strips_before) {
      text = absl::StripTrailingAsciiWhitespace(text);
    } else if (is_block(nodes[i + 1])) {
      // lstrip_blocks: blanks between the beginning of the line and the tag.
      size_t end = text.size();
      while (end > 0 && (text[end - 1] == ' ' || text[end - 1] == '\t')) --end;
      const bool line_begins = end > 0 ? text[end - 1] == '\n' : i == 0;
      if (line_begins) text = text.substr(0, end);
    }
  }
  return text;
}

std::optional<std::string> ReadString(absl::string_view inside, size_t* at) {
  const char quote = inside[(*at)++];
  std::string text;
  for (; *at < inside.size() && inside[*at] != quote; ++*at) {
    char c = inside[*at];
    if (c == '\\') {
      if (++*at == inside.size()) return std::nullopt;
      c = inside[*at];
      if (c == 'n') {
        c = '\n';
      } else if (c == 't') {
        c = '\t';
      } else if (c == 'r') {
        c = '\r';
      } else if (c != '\\' && c != '\'' && c != '"') {
        return std::nullopt;
      }
    }
    text.push_back(c);
  }
  if (*at == inside.size()) return std::nullopt;
  ++*at;
  return text;
}

bool IsNameByte(char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_'; }

std::optional<std::vector<Token>> Tokenize(absl::string_view inside) {
  std::vector<Token> tokens;
  size_t at = 0;
  while (at < inside.size()) {
    const char c = inside[at];
    if (absl::ascii_isspace(static_cast<unsigned char>(c))) {
      ++at;
    } else if (c == '\'' || c == '"') {
      std::optional<std::string> text = ReadString(inside, &at);
      if (!text.has_value()) return std::nullopt;
      tokens.push_back({true, *std::move(text)});
    } else if (IsNameByte(c)) {
      const size_t begin = at;
      while (at < inside.size() && IsNameByte(inside[at])) ++at;
      const std::string name(inside.substr(begin, at - begin));
      const bool is_attribute = tokens.size() >= 2 && !tokens.back().is_string &&
                                tokens.back().text == "." &&
                                !absl::ascii_isdigit(static_cast<unsigned char>(c));
      if (is_attribute) {
        tokens.back().text = "[";
        tokens.push_back({true, name});
        tokens.push_back({false, "]"});
      } else {
        tokens.push_back({false, name});
      }
    } else {
      tokens.push_back({false, std::string(1, c)});
      ++at;
    }
  }
  return tokens;
}

}  // namespace

std::optional<std::string> CanonicalJinja(absl::string_view source) {
  const std::optional<std::vector<Node>> nodes = SplitNodes(source);
  if (!nodes.has_value()) return std::nullopt;
  std::string result;
  std::string text;  // Plain text since the last tag that is more than that.
  const auto flush = [&] {
    if (!text.empty()) absl::StrAppend(&result, "text ", text.size(), ":", text, "\n");
    text.clear();
  };
  for (size_t i = 0; i < nodes->size(); ++i) {
    const Node& node = (*nodes)[i];
    if (node.kind == Node::Kind::kComment) continue;
    if (node.kind == Node::Kind::kText) {
      absl::StrAppend(&text, RenderedText(*nodes, i));
      continue;
    }
    const std::optional<std::vector<Token>> tokens = Tokenize(node.inside);
    if (!tokens.has_value()) return std::nullopt;
    if (node.kind == Node::Kind::kOutput && tokens->size() == 1 && (*tokens)[0].is_string) {
      absl::StrAppend(&text, (*tokens)[0].text);
      continue;
    }
    flush();
    absl::StrAppend(&result, node.kind == Node::Kind::kOutput ? "output" : "statement");
    for (const Token& token : *tokens) {
      absl::StrAppend(&result, " ");
      if (token.is_string) absl::StrAppend(&result, "string ", token.text.size(), ":");
      absl::StrAppend(&result, token.text);
    }
    absl::StrAppend(&result, "\n");
  }
  flush();
  return result;
}

std::optional<uint64_t> JinjaFingerprint(absl::string_view source) {
  const std::optional<std::string> canonical = CanonicalJinja(source);
  if (!canonical.has_value()) return std::nullopt;
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : *canonical) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  }
  return hash;
}

}  // namespace resa::engine
