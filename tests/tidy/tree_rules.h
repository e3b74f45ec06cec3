#ifndef RESA_TESTS_TIDY_TREE_RULES_H_
#define RESA_TESTS_TIDY_TREE_RULES_H_

// The rules that keep the tree the architecture: who may include whom, what files are called, what
// they may not contain, and that everything is tested. Checked on the text of the sources, so that
// a violation fails the suite on every machine, with file, line and reason.
//
//   root       only the known entries stand at the root
//   include    server -> engine -> kernels, server -> proto; the backends do not know each other,
//              and server/main.cc alone names one; the product knows nothing of the tests
//   guard      a header's include guard is its path: RESA_ENGINE_TOKENIZER_H_
//   text       no notes to self (to-do and the like), no line of C++ past 100 columns, no file past
//              800 lines
//   code       the product throws nothing, and only a main.cc reads the environment
//   mirror     engine/x.cc has tests/engine/x_test.cc (kernels and server likewise; a backend's
//              folder may be left out), or tests/tidy/tested_elsewhere.txt names the test that
//              covers it and the reason
//   declared   every *_test.cc stands in its folder's CMakeLists.txt, else it would never run

#include <filesystem>
#include <string>
#include <vector>

namespace resa::testing {

struct Violation {
  std::string rule;
  std::string file;  // Relative to the root.
  int line = 0;      // 1-based; 0: the file as a whole.
  std::string message;

  std::string ToString() const;
};

// Every violation in the tree at `root`, by file and line. Files that its .gitignore names are left
// out, and so are .git and the folders of build products.
std::vector<Violation> CheckTree(const std::filesystem::path& root);

}  // namespace resa::testing

#endif  // RESA_TESTS_TIDY_TREE_RULES_H_
