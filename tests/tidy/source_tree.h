#ifndef RESA_TESTS_TIDY_SOURCE_TREE_H_
#define RESA_TESTS_TIDY_SOURCE_TREE_H_

// The checkout as the rules see it: text files by lines, in memory.

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace resa::testing {

struct SourceFile {
  std::string path;                // Relative to the root, with '/'.
  std::vector<std::string> lines;  // Without line ends.

  // "engine" of engine/tokenizer.cc; the file's own name at the root.
  std::string_view top() const;
  std::string_view name() const;
  bool EndsWith(std::string_view suffix) const { return path.ends_with(suffix); }
  bool IsCpp() const;
};

struct SourceTree {
  std::vector<std::string> root_entries;  // Names, without what .gitignore leaves out.
  std::map<std::string, SourceFile, std::less<>> files;

  const SourceFile* Find(std::string_view path) const;
};

// Reads every text file (by suffix or name) that .gitignore does not leave out. Of .gitignore only
// the plain forms are known: "name", "*.suffix", "/anchored/path", each with or without a final
// '/'.
SourceTree ReadTree(const std::filesystem::path& root);

// C++ code with comments and the contents of literals blanked out, line for line.
std::vector<std::string> CodeOf(const SourceFile& file);

}  // namespace resa::testing

#endif  // RESA_TESTS_TIDY_SOURCE_TREE_H_
