#include "tests/tidy/source_tree.h"

#include <algorithm>
#include <array>
#include <fstream>

namespace resa::testing {
namespace {

namespace fs = std::filesystem;

constexpr std::array kTextSuffixes = {".h",     ".cc",   ".cu",   ".cuh", ".inc",
                                      ".py",    ".sh",   ".md",   ".txt", ".proto",
                                      ".cmake", ".json", ".yaml", ".yml", ".textproto"};

bool IsText(std::string_view path) {
  const std::string_view name = path.substr(path.rfind('/') + 1);
  return name == "Dockerfile" || path == ".ci/run" ||
         std::any_of(kTextSuffixes.begin(), kTextSuffixes.end(),
                     [&](std::string_view suffix) { return name.ends_with(suffix); });
}

std::vector<std::string> ReadLines(const fs::path& path) {
  std::ifstream in(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(std::move(line));
  return lines;
}

class Ignored {
 public:
  explicit Ignored(const fs::path& gitignore) {
    for (std::string pattern : ReadLines(gitignore)) {
      if (pattern.empty() || pattern.starts_with('#')) continue;
      if (pattern.ends_with('/')) pattern.pop_back();
      patterns_.push_back(pattern);
    }
  }
  bool Matches(std::string_view path) const {
    const std::string_view name = path.substr(path.rfind('/') + 1);
    if (name == ".git") return true;
    return std::any_of(patterns_.begin(), patterns_.end(), [&](std::string_view pattern) {
      if (pattern.starts_with('*')) return name.ends_with(pattern.substr(1));
      if (pattern.starts_with('/')) return path == pattern.substr(1);
      return pattern.find('/') == std::string_view::npos ? name == pattern : path == pattern;
    });
  }

 private:
  std::vector<std::string> patterns_;
};

void Read(const fs::path& root, const fs::path& folder, const Ignored& ignored, SourceTree* tree) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string path = entry.path().lexically_relative(root).generic_string();
    if (ignored.Matches(path)) continue;
    if (path.find('/') == std::string::npos) tree->root_entries.push_back(path);
    if (entry.is_symlink()) continue;
    if (entry.is_directory()) {
      Read(root, entry.path(), ignored, tree);
    } else if (IsText(path)) {
      tree->files[path] = {path, ReadLines(entry.path())};
    }
  }
}

// Blanks out comments and literals; knows where it is from character to character.
class Blanker {
 public:
  std::string Blank(const std::string& line) {
    std::string out;
    for (size_t i = 0; i < line.size(); ++i) {
      const bool pair = i + 1 < line.size();
      if (in_comment_) {
        if (pair && line[i] == '*' && line[i + 1] == '/') in_comment_ = false, ++i;
      } else if (!raw_end_.empty()) {
        if (line.compare(i, raw_end_.size(), raw_end_) == 0) {
          i += raw_end_.size() - 1;
          raw_end_.clear();
        }
      } else if (pair && line[i] == '/' && line[i + 1] == '/') {
        break;
      } else if (pair && line[i] == '/' && line[i + 1] == '*') {
        in_comment_ = true;
        ++i;
      } else if (pair && line[i] == 'R' && line[i + 1] == '"') {
        const size_t open = line.find('(', i);
        if (open == std::string::npos) break;
        raw_end_ = ")" + line.substr(i + 2, open - i - 2) + "\"";
        i = open;
      } else if (line[i] == '"' || (line[i] == '\'' && !IsDigitSeparator(line, i))) {
        i = EndOfLiteral(line, i);
        out += line[std::min(i, line.size() - 1)];
      } else {
        out += line[i];
      }
    }
    return out;
  }

 private:
  static bool IsDigitSeparator(const std::string& line, size_t i) {
    return i > 0 && std::isxdigit(static_cast<unsigned char>(line[i - 1])) != 0 &&
           i + 1 < line.size() && std::isxdigit(static_cast<unsigned char>(line[i + 1])) != 0;
  }
  static size_t EndOfLiteral(const std::string& line, size_t begin) {
    size_t i = begin + 1;
    while (i < line.size() && line[i] != line[begin]) i += line[i] == '\\' ? 2 : 1;
    return i;
  }

  bool in_comment_ = false;
  std::string raw_end_;
};

}  // namespace

std::string_view SourceFile::top() const {
  return std::string_view(path).substr(0, path.find('/'));
}

std::string_view SourceFile::name() const {
  return std::string_view(path).substr(path.rfind('/') + 1);
}

bool SourceFile::IsCpp() const {
  return EndsWith(".h") || EndsWith(".cc") || EndsWith(".cu") || EndsWith(".cuh");
}

const SourceFile* SourceTree::Find(std::string_view path) const {
  const auto it = files.find(path);
  return it == files.end() ? nullptr : &it->second;
}

SourceTree ReadTree(const fs::path& root) {
  SourceTree tree;
  Read(root, root, Ignored(root / ".gitignore"), &tree);
  std::sort(tree.root_entries.begin(), tree.root_entries.end());
  return tree;
}

std::vector<std::string> CodeOf(const SourceFile& file) {
  Blanker blanker;
  std::vector<std::string> code;
  for (const std::string& line : file.lines) code.push_back(blanker.Blank(line));
  return code;
}

}  // namespace resa::testing
