#include "tests/support/test_tokenizers.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::testing {
namespace {

constexpr char kSuffix[] = ".tokenizer.json";

std::filesystem::path Folder() {
  const char* root = std::getenv("RESA_SOURCE_DIR");
  return std::filesystem::path(root == nullptr ? "." : root) / "tests/golden/tokenizers";
}

}  // namespace

std::vector<std::string> TestTokenizerNames() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(Folder())) {
    const std::string name = entry.path().filename().string();
    if (absl::EndsWith(name, kSuffix)) {
      names.push_back(name.substr(0, name.size() - (sizeof(kSuffix) - 1)));
    }
  }
  RESA_CHECK(!names.empty()) << "no tokenizers in " << Folder();
  std::sort(names.begin(), names.end());
  return names;
}

std::string ReadTokenizerFile(const std::string& file_name) {
  std::ifstream file(Folder() / file_name, std::ios::binary);
  RESA_CHECK(file.good()) << "cannot read " << Folder() / file_name;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::unique_ptr<const engine::Tokenizer> LoadTestTokenizer(const std::string& name) {
  auto tokenizer = engine::Tokenizer::FromJson(ReadTokenizerFile(name + kSuffix), "");
  RESA_CHECK(tokenizer.ok()) << name << ": " << tokenizer.status();
  return *std::move(tokenizer);
}

std::string RandomText(std::mt19937_64& rng, size_t characters) {
  // Each range is as likely as any other, so that small scripts are met, too.
  static constexpr struct {
    char32_t begin, end;
  } kRanges[] = {{0x20, 0x7E},       {0x61, 0x7A},       {0x20, 0x20},       {0x30, 0x39},
                 {0x0, 0x1F},        {0x80, 0x24F},      {0x300, 0x36F},     {0x370, 0x58F},
                 {0x590, 0x7FF},     {0x900, 0xDFF},     {0xE00, 0x109F},    {0x1100, 0x11FF},
                 {0x1E00, 0x206F},   {0x2190, 0x2BFF},   {0x3000, 0x30FF},   {0x4E00, 0x9FFF},
                 {0xAC00, 0xD7FF},   {0xE000, 0xFFFF},   {0x10000, 0x11FFF}, {0x1D400, 0x1D7FF},
                 {0x1F300, 0x1FAFF}, {0x20000, 0x323AF}, {0xE0000, 0x10FFFF}};
  std::string text;
  for (size_t i = 0; i < characters; ++i) {
    const auto& range = kRanges[rng() % std::size(kRanges)];
    engine::AppendUtf8(range.begin + rng() % (range.end - range.begin + 1), &text);
  }
  return text;
}

}  // namespace resa::testing
