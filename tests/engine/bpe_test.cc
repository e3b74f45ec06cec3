#include "engine/bpe.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/utf8.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

using Ids = std::vector<int32_t>;

std::unique_ptr<const Bpe> Create(BpeConfig config) {
  auto bpe = Bpe::Create(std::move(config));
  EXPECT_TRUE(bpe.ok()) << bpe.status();
  return bpe.ok() ? *std::move(bpe) : nullptr;
}

Ids Encode(const Bpe& bpe, const std::string& word) {
  BpeScratch scratch;
  Ids ids;
  bpe.Encode(word, scratch, &ids);
  return ids;
}

// Words over "abcd" and a vocabulary of random merges of them.
BpeConfig RandomConfig(std::mt19937_64& rng, size_t merges) {
  BpeConfig config;
  std::map<std::string, int32_t> ids;
  const auto add = [&](const std::string& token) {
    if (!ids.emplace(token, static_cast<int32_t>(config.vocab.size())).second) return;
    config.vocab.emplace_back(token, ids[token]);
  };
  for (const char* letter : {"a", "b", "c", "d"}) add(letter);
  while (config.merges.size() < merges) {
    const std::string left = config.vocab[rng() % config.vocab.size()].first;
    const std::string right = config.vocab[rng() % config.vocab.size()].first;
    if (std::find(config.merges.begin(), config.merges.end(), std::pair(left, right)) !=
        config.merges.end()) {
      continue;
    }
    add(left + right);
    config.merges.emplace_back(left, right);
  }
  return config;
}

// By the definition: merge the leftmost pair of the best rank, again and again.
Ids Naive(const BpeConfig& config, const std::string& word) {
  std::vector<std::string> symbols;
  for (const char c : word) symbols.emplace_back(1, c);
  while (true) {
    size_t best_rank = config.merges.size();
    size_t best_at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto it = std::find(config.merges.begin(), config.merges.end(),
                                std::pair(symbols[i], symbols[i + 1]));
      const auto rank = static_cast<size_t>(it - config.merges.begin());
      if (rank < best_rank) {
        best_rank = rank;
        best_at = i;
      }
    }
    if (best_rank == config.merges.size()) break;
    symbols[best_at] += symbols[best_at + 1];
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best_at) + 1);
  }
  Ids ids;
  for (const std::string& symbol : symbols) {
    for (const auto& [token, id] : config.vocab) {
      if (token == symbol) ids.push_back(id);
    }
  }
  return ids;
}

// Short words (scanned), long ones (heap), cuts at places that no merge crosses, and the cache.
TEST(BpeTest, RandomVocabulariesMergeAsDefined) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  for (int round = 0; round < 40; ++round) {
    const BpeConfig config = RandomConfig(rng, 1 + rng() % 40);
    BpeConfig byte_level = config;
    byte_level.byte_level = true;
    const auto characters = Create(config);
    const auto bytes = Create(byte_level);
    BpeScratch characters_scratch;
    BpeScratch bytes_scratch;
    for (int i = 0; i < 40; ++i) {
      std::string word;
      const size_t length = 1 + rng() % (i % 8 == 0 ? 200 : 12);
      while (word.size() < length) word += static_cast<char>('a' + rng() % 4);
      const Ids expected = Naive(config, word);
      for (int again = 0; again < 2; ++again) {
        Ids ids;
        characters->Encode(word, characters_scratch, &ids);
        EXPECT_EQ(ids, expected) << word;
        ids.clear();
        bytes->Encode(word, bytes_scratch, &ids);
        EXPECT_EQ(ids, expected) << word;
      }
    }
  }
}

TEST(BpeTest, ByteLevelAlphabetIsABijection) {
  std::string all;
  for (int byte = 0; byte < 256; ++byte) {
    std::string token;
    AppendUtf8(ByteLevelCharacter(static_cast<uint8_t>(byte)), &token);
    EXPECT_EQ(ByteLevelBytes(token), std::string(1, static_cast<char>(byte)));
    all += token;
  }
  EXPECT_EQ(ByteLevelBytes(all)->size(), 256u);
  EXPECT_EQ(ByteLevelBytes("a b"), std::nullopt);
  EXPECT_EQ(ByteLevelBytes("\xC5\x84"), std::nullopt);  // U+0144, the first beyond it.
}

TEST(BpeTest, UnknownCharacters) {
  BpeConfig config;
  config.vocab = {{"?", 0}, {"a", 1}, {"<0xC3>", 2}, {"<0xA9>", 3}};
  EXPECT_EQ(Encode(*Create(config), "axxa"), (Ids{1, 1}));  // No unknown token: dropped.
  config.unk_token = "?";
  EXPECT_EQ(Encode(*Create(config), "axxa"), (Ids{1, 0, 0, 1}));
  config.fuse_unk = true;
  EXPECT_EQ(Encode(*Create(config), "axxa"), (Ids{1, 0, 1}));
  config.byte_fallback = true;
  EXPECT_EQ(Encode(*Create(config), "a\xC3\xA9xa"), (Ids{1, 2, 3, 0, 1}));
}

TEST(BpeTest, IgnoreMergesTakesWholeWords) {
  BpeConfig config;
  config.vocab = {{"a", 0}, {"b", 1}, {"ab", 2}, {"abab", 3}};
  config.merges = {{"a", "b"}};
  EXPECT_EQ(Encode(*Create(config), "abab"), (Ids{2, 2}));
  config.ignore_merges = true;
  EXPECT_EQ(Encode(*Create(config), "abab"), (Ids{3}));
  EXPECT_EQ(Encode(*Create(config), "ababa"), (Ids{2, 2, 0}));
}

TEST(BpeTest, ContradictionsAreRefused) {
  struct Case {
    const char* message;
    void (*change)(BpeConfig&);
  };
  const Case cases[] = {
      {"share the id 1", [](BpeConfig& c) { c.vocab[0].second = 1; }},
      {"is there twice", [](BpeConfig& c) { c.vocab.emplace_back("a", 9); }},
      {"has the id -1", [](BpeConfig& c) { c.vocab[0].second = -1; }},
      {"has the id 2097152", [](BpeConfig& c) { c.vocab[0].second = kMaxTokenIds; }},
      {"is empty", [](BpeConfig& c) { c.vocab[0].first = ""; }},
      {"not valid UTF-8", [](BpeConfig& c) { c.vocab[1].first = "\xFF"; }},
      {"merge 1 of \"b\" and \"a\" needs the token \"ba\"",
       [](BpeConfig& c) { c.merges.emplace_back("b", "a"); }},
      {"needs the token \"z\"", [](BpeConfig& c) { c.merges.emplace_back("z", "a"); }},
      {"the unknown token \"?\"", [](BpeConfig& c) { c.unk_token = "?"; }},
  };
  for (const Case& c : cases) {
    BpeConfig config;
    config.vocab = {{"a", 0}, {"b", 1}, {"ab", 2}};
    config.merges = {{"a", "b"}};
    c.change(config);
    const auto bpe = Bpe::Create(std::move(config));
    ASSERT_EQ(bpe.status().code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(bpe.status().message()), ::testing::HasSubstr(c.message));
  }
}

}  // namespace
}  // namespace resa::engine
