#include "tests/tidy/tree_rules.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <regex>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>

#include "tests/tidy/source_tree.h"

namespace resa::testing {
namespace {

constexpr size_t kMaxColumns = 100;
constexpr size_t kMaxLines = 800;
constexpr std::string_view kMirrorList = "tests/tidy/tested_elsewhere.txt";

bool IsProduct(const SourceFile& file) {
  return file.top() == "server" || file.top() == "engine" || file.top() == "kernels";
}

class Checker {
 public:
  explicit Checker(const SourceTree& tree) : tree_(tree) {}

  std::vector<Violation> Check() {
    CheckRoot();
    for (const auto& [path, file] : tree_.files) {
      if (file.IsCpp()) {
        CheckIncludes(file);
        CheckCode(file);
        CheckColumns(file);
      }
      if (file.EndsWith(".h")) CheckGuard(file);
      CheckText(file);
      CheckDeclared(file);
    }
    CheckMirrors();
    return std::move(violations_);
  }

 private:
  void Add(std::string_view rule, std::string_view file, size_t line, std::string message) {
    violations_.push_back(
        {std::string(rule), std::string(file), static_cast<int>(line), std::move(message)});
  }

  void CheckRoot() {
    const std::set<std::string_view> known = {
        "CMakeLists.txt", "CMakePresets.json", "proto",  "server",
        "engine",         "kernels",           "deploy", "tests",
        "docker",         "README.md",         "LICENSE"};
    for (const std::string& entry : tree_.root_entries) {
      if (entry.starts_with('.') || known.contains(entry)) continue;
      Add("root", entry, 0, "does not belong at the root");
    }
  }

  void CheckIncludes(const SourceFile& file) {
    static const std::regex pattern(R"re(^\s*#\s*include\s*["<]([^">]+)[">])re");
    for (size_t i = 0; i < file.lines.size(); ++i) {
      std::smatch match;
      if (!std::regex_search(file.lines[i], match, pattern)) continue;
      const std::string why = WhyForbidden(file, match[1].str());
      if (!why.empty()) Add("include", file.path, i + 1, match[1].str() + ": " + why);
    }
  }

  static std::string WhyForbidden(const SourceFile& file, const std::string& header) {
    const auto in = [&](std::string_view folder) { return header.starts_with(folder); };
    const auto in_any = [&](std::initializer_list<std::string_view> folders) {
      return std::any_of(folders.begin(), folders.end(), in);
    };
    const bool transport =
        in_any({"grpc", "google/", "proto/", "resa/v1/"}) || header.ends_with(".pb.h");
    const bool reporting = in_any({"spdlog/", "prometheus/"});
    const bool backend = in_any({"kernels/cpu/", "kernels/cuda/"});
    if (IsProduct(file) && in("tests/")) return "the product knows nothing of its tests";
    if (file.top() == "engine") {
      static const std::set<std::string_view> allowed = {
          "kernels/ops.h",      "kernels/params.h", "kernels/tensor.h", "kernels/roofline.h",
          "kernels/ceilings.h", "kernels/check.h",  "kernels/bf16.h"};
      if (in("server/")) return "engine does not know server";
      if (transport || reporting) return "engine knows no transport, log or metrics library";
      if (in("kernels/") && !allowed.contains(header)) {
        return "of kernels, engine sees only ops, params, tensor, roofline, ceilings, check and "
               "bf16";
      }
    } else if (file.top() == "kernels") {
      if (in_any({"engine/", "server/"})) return "kernels know no requests";
      if (transport || reporting) return "kernels know no transport, log or metrics library";
      if (file.path.starts_with("kernels/cpu/")    ? in("kernels/cuda/")
          : file.path.starts_with("kernels/cuda/") ? in("kernels/cpu/")
                                                   : backend) {
        return "the backends do not know each other, and what they share knows neither";
      }
    } else if (file.top() == "server" && backend && file.path != "server/main.cc") {
      return "server/main.cc alone names a backend";
    }
    return "";
  }

  void CheckCode(const SourceFile& file) {
    if (!IsProduct(file)) return;
    static const std::regex throws(R"(\bthrow\b)");
    static const std::regex environment(R"(\b(secure_)?getenv\b)");
    const std::vector<std::string> code = CodeOf(file);
    for (size_t i = 0; i < code.size(); ++i) {
      if (std::regex_search(code[i], throws)) Add("code", file.path, i + 1, "we throw nothing");
      if (file.name() != "main.cc" && std::regex_search(code[i], environment)) {
        Add("code", file.path, i + 1, "only a main.cc reads the environment");
      }
    }
  }

  void CheckColumns(const SourceFile& file) {
    for (size_t i = 0; i < file.lines.size(); ++i) {
      const std::string& line = file.lines[i];
      const auto columns = static_cast<size_t>(std::count_if(
          line.begin(), line.end(), [](char c) { return (c & 0xc0) != 0x80; }));  // Code points.
      if (columns <= kMaxColumns || line.find("://") != std::string::npos) continue;
      Add("text", file.path, i + 1, std::to_string(columns) + " columns, at most 100 are accepted");
    }
  }

  void CheckText(const SourceFile& file) {
    // Spelled in two halves, since this file is checked too.
    static const std::regex notes(
        "\\b(TO"
        "DO|FIX"
        "ME|XX"
        "X|HA"
        "CK)\\b");
    for (size_t i = 0; i < file.lines.size(); ++i) {
      if (std::regex_search(file.lines[i], notes)) {
        Add("text", file.path, i + 1, "a note to self: do it, or open an issue");
      }
    }
    const bool written_by_hand = !file.EndsWith(".inc") && !file.EndsWith(".json") &&
                                 !file.EndsWith(".txt") && !file.EndsWith(".md");
    if (written_by_hand && file.lines.size() > kMaxLines) {
      Add("text", file.path, 0,
          std::to_string(file.lines.size()) + " lines, at most 800 are accepted: split it");
    }
  }

  void CheckGuard(const SourceFile& file) {
    std::string guard = "RESA_";
    for (char c : file.path) {
      guard += std::isalnum(static_cast<unsigned char>(c)) != 0
                   ? static_cast<char>(std::toupper(static_cast<unsigned char>(c)))
                   : '_';
    }
    guard += '_';
    const auto has = [&](const std::string& text) {
      return std::any_of(file.lines.begin(), file.lines.end(),
                         [&](const std::string& line) { return line.starts_with(text); });
    };
    // Headers that Highway includes once per target toggle theirs.
    const bool toggled = file.EndsWith("-inl.h") && has("#if defined(" + guard + ") ==");
    if (!toggled && !(has("#ifndef " + guard) && has("#define " + guard))) {
      Add("guard", file.path, 0, "the include guard is not " + guard);
    }
  }

  void CheckDeclared(const SourceFile& file) {
    if (file.top() != "tests" || !file.EndsWith("_test.cc")) return;
    const size_t slash = file.path.rfind('/');
    const SourceFile* lists = tree_.Find(file.path.substr(0, slash) + "/CMakeLists.txt");
    if (lists != nullptr && Declares(*lists, file.path.substr(slash + 1))) return;
    Add("declared", file.path, 0, "its folder's CMakeLists.txt does not name it: it never runs");
  }

  // By its full name, or by its stem in a loop over "${name}_test.cc".
  static bool Declares(const SourceFile& lists, const std::string& name) {
    const std::string stem = name.substr(0, name.size() - std::string_view("_test.cc").size());
    bool loops = false, has_name = false, has_stem = false;
    for (const std::string& line : lists.lines) {
      if (line.find("}_test.cc") != std::string::npos) loops = true;
      std::string words = line;
      std::replace_if(
          words.begin(), words.end(), [](char c) { return c == '(' || c == ')'; }, ' ');
      std::istringstream in(words);
      for (std::string word; in >> word && !word.starts_with('#');) {
        has_name = has_name || word == name;
        has_stem = has_stem || word == stem;
      }
    }
    return has_name || (loops && has_stem);
  }

  // Lines of "source test reason ...".
  void CheckMirrors() {
    std::set<std::string> listed;
    if (const SourceFile* list = tree_.Find(kMirrorList)) {
      for (size_t i = 0; i < list->lines.size(); ++i) {
        std::istringstream line(list->lines[i]);
        std::string source, test, reason;
        line >> source >> test;
        std::getline(line >> std::ws, reason);
        if (source.empty() || source.starts_with('#')) continue;
        listed.insert(source);
        CheckListed(i + 1, source, test, reason);
      }
    }
    for (const auto& [path, file] : tree_.files) {
      if (!IsProduct(file) || !(file.EndsWith(".cc") || file.EndsWith(".cu"))) continue;
      if (listed.contains(path) || FindMirror(path) != nullptr) continue;
      Add("mirror", path, 0,
          "neither " + MirrorOf(path) + " nor a line in " + std::string(kMirrorList) + " tests it");
    }
  }

  void CheckListed(size_t line, const std::string& source, const std::string& test,
                   const std::string& reason) {
    if (tree_.Find(source) == nullptr) Add("mirror", kMirrorList, line, source + " is not there");
    if (tree_.Find(test) == nullptr) Add("mirror", kMirrorList, line, test + " is not there");
    if (reason.empty()) Add("mirror", kMirrorList, line, "the reason is missing");
    if (const SourceFile* mirror = FindMirror(source)) {
      Add("mirror", kMirrorList, line, mirror->path + " is there: take the line out");
    }
  }

  // What both backends must do is tested in one place, so kernels/cpu/x.cc and kernels/cuda/x.cu
  // may also be mirrored by tests/kernels/x_test.cc.
  const SourceFile* FindMirror(const std::string& path) const {
    if (const SourceFile* mirror = tree_.Find(MirrorOf(path))) return mirror;
    if (!path.starts_with("kernels/c")) return nullptr;
    return tree_.Find(MirrorOf("kernels" + path.substr(path.rfind('/'))));
  }
  static std::string MirrorOf(const std::string& path) {
    return "tests/" + path.substr(0, path.rfind('.')) + "_test.cc";
  }

  const SourceTree& tree_;
  std::vector<Violation> violations_;
};

}  // namespace

std::string Violation::ToString() const {
  return file + (line > 0 ? ":" + std::to_string(line) : "") + ": [" + rule + "] " + message;
}

std::vector<Violation> CheckTree(const std::filesystem::path& root) {
  std::vector<Violation> violations = Checker(ReadTree(root)).Check();
  std::stable_sort(violations.begin(), violations.end(),
                   [](const Violation& a, const Violation& b) {
                     return std::pair(a.file, a.line) < std::pair(b.file, b.line);
                   });
  return violations;
}

}  // namespace resa::testing
