// How fast text is encoded, on one core. The bounds are a tenth of what the code does on a machine
// of 2020 (the figures are printed), so that a loaded machine passes and a quadratic step does not.
// Not measured in builds with sanitizers.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/tokenizer.h"
#include "gtest/gtest.h"
#include "tests/support/test_tokenizers.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define RESA_SPEED_TEST() GTEST_SKIP() << "built with a sanitizer"
#else
#define RESA_SPEED_TEST() static_cast<void>(0)
#endif

namespace resa::engine {
namespace {

// Megabytes per second, the best of so many rounds.
double Speed(const Tokenizer& tokenizer, const std::string& text, int rounds) {
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    const absl::Time begin = absl::Now();
    const auto ids = tokenizer.Encode(text);
    const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
    EXPECT_TRUE(ids.ok()) << ids.status();
    best = std::max(best, static_cast<double>(text.size()) / 1e6 / seconds);
  }
  return best;
}

std::string Repeated(const std::string& unit, size_t bytes) {
  std::string text;
  while (text.size() < bytes) text += unit;
  return text;
}

// Words of Zipf-like frequency over a few thousand, with punctuation, as prose has them.
std::string Prose(size_t bytes) {
  std::mt19937_64 rng(1);
  std::vector<std::string> words;
  for (int i = 0; i < 4000; ++i) {
    std::string word;
    for (size_t length = 1 + rng() % 9; word.size() < length;) {
      word += "etaoinshrdlucmfwypvbgkjqxz"[rng() % (1 + rng() % 26)];
    }
    words.push_back(word);
  }
  std::string text;
  while (text.size() < bytes) {
    const double u = static_cast<double>(rng() % 1'000'000 + 1) / 1e6;
    text += words[static_cast<size_t>(std::pow(4000.0, u)) - 1];
    text += rng() % 12 == 0 ? (rng() % 4 == 0 ? ".\n" : ", ") : " ";
  }
  return text;
}

TEST(TokenizerSpeedTest, OrdinaryText) {
  RESA_SPEED_TEST();
  const std::string text = Prose(2 << 20);
  for (const char* name :
       {"gpt2", "smollm", "qwen2", "llama3", "tekken", "llama2", "metaspace_first"}) {
    const auto tokenizer = testing::LoadTestTokenizer(name);
    const double speed = Speed(*tokenizer, text, 3);
    std::printf("%-16s prose %6.1f MB/s\n", name, speed);
    EXPECT_GT(speed, 2.0) << name;
  }
}

TEST(TokenizerSpeedTest, TextsWithoutAPlaceToSplit) {
  RESA_SPEED_TEST();
  std::mt19937_64 rng(2);
  std::string base64;
  while (base64.size() < (1 << 20)) {
    base64 += "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[rng() % 64];
  }
  const std::pair<const char*, std::string> texts[] = {
      {"one letter", Repeated("a", 1 << 20)},
      {"two letters", Repeated("th", 1 << 20)},
      {"base64", base64},
      {"spaces", Repeated(" ", 1 << 20)},
      {"newlines", Repeated("\n", 1 << 20)},
      {"punctuation", Repeated("=-", 1 << 20)},
      {"digits", Repeated("7", 1 << 20)},
      {"one ideograph", Repeated("\xE4\xB8\x96", 1 << 20)},
      {"unknown emoji", Repeated("\xF0\x9F\xA6\x96", 1 << 20)},
      {"combining marks", "a" + Repeated("\xCC\x81\xCC\x96", 1 << 20)},
      {"control tokens", Repeated("<|im_start|", 1 << 20)},
      {"zero bytes", std::string(1 << 20, '\0')},
  };
  for (const std::string& name : testing::TestTokenizerNames()) {
    const auto tokenizer = testing::LoadTestTokenizer(name);
    for (const auto& [what, text] : texts) {
      const double speed = Speed(*tokenizer, text, 1);
      std::printf("%-16s %-16s %6.1f MB/s\n", name.c_str(), what, speed);
      EXPECT_GT(speed, 0.1) << name << ", " << what;
    }
  }
}

}  // namespace
}  // namespace resa::engine
