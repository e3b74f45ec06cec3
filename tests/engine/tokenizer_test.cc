#include "engine/tokenizer.h"

#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/bpe.h"
#include "engine/utf8.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_tokenizers.h"

namespace resa::engine {
namespace {

using Ids = std::vector<int32_t>;
constexpr Tokenizer::EncodeOptions kPlain = {.add_special_tokens = false, .parse_special = false};

Ids Encode(const Tokenizer& tokenizer, absl::string_view text,
           Tokenizer::EncodeOptions options = kPlain) {
  const auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : Ids();
}

TEST(TokenizerTest, ByteLevelGivesEveryTextBack) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  // Those without a normalizer or a pre-tokenizer that changes the text.
  for (const char* name : {"gpt2", "smollm", "llama3", "tekken", "llama2"}) {
    SCOPED_TRACE(name);
    const auto tokenizer = testing::LoadTestTokenizer(name);
    for (int round = 0; round < 200; ++round) {
      std::string text = testing::RandomText(rng, 1 + rng() % 50);
      // SentencePiece's stand-in for a space comes back as one.
      for (size_t at; (at = text.find("\xE2\x96\x81")) != std::string::npos;) text.erase(at, 3);
      const Ids ids = Encode(*tokenizer, text);
      // "<mask>" and the like don't occur in random text, so nothing is swallowed.
      EXPECT_EQ(tokenizer->Decode(ids, false), text) << absl::CHexEscape(text);
    }
  }
}

TEST(TokenizerTest, AGiantTextLeavesNoMemoryBehind) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  const auto bytes_in_use = [] {
    const struct mallinfo2 info = mallinfo2();
    return static_cast<int64_t>(info.uordblks + info.hblkhd);
  };
  Encode(*tokenizer, "warm");
  const int64_t before = bytes_in_use();
  Encode(*tokenizer, std::string(2 << 20, 'x'));
  EXPECT_LT(bytes_in_use() - before, 1 << 20);
  // That of an ordinary one is kept for the next, and is what the header says.
  std::string text;
  while (text.size() < Tokenizer::kPooledTextBytes) text += "an ordinary text ";
  text.resize(Tokenizer::kPooledTextBytes);
  Encode(*tokenizer, text);
  EXPECT_LT(bytes_in_use() - before, 2 << 20);
}

TEST(TokenizerTest, NoTokenStandsForMoreThanTheLongest) {
  std::mt19937_64 rng(1);
  for (const std::string& name : testing::TestTokenizerNames()) {
    SCOPED_TRACE(name);
    const auto tokenizer = testing::LoadTestTokenizer(name);
    size_t longest = 0;
    for (int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
      longest = std::max(longest, tokenizer->IdToToken(id).value_or("").size());
    }
    EXPECT_EQ(tokenizer->max_token_bytes(), longest);
  }
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  for (int round = 0; round < 100; ++round) {
    const std::string text = testing::RandomText(rng, 1 + rng() % 50);
    EXPECT_LE(text.size(), Encode(*tokenizer, text).size() * tokenizer->max_token_bytes());
  }
}

TEST(TokenizerTest, IllFormedTextIsReplacedFirst) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  EXPECT_EQ(Encode(*tokenizer, "a\xFF\xC3z\xE4\xBD"),
            Encode(*tokenizer, "a\xEF\xBF\xBD\xEF\xBF\xBDz\xEF\xBF\xBD"));
}

TEST(TokenizerTest, SpecialTokensInTextAreTextUnlessParsed) {
  const auto tokenizer = testing::LoadTestTokenizer("qwen2");
  const int32_t end = *tokenizer->TokenToId("<|im_end|>");
  EXPECT_TRUE(tokenizer->IsSpecial(end));
  const Ids parsed = Encode(*tokenizer, "a<|im_end|>b", {false, true});
  EXPECT_EQ(parsed, (Ids{Encode(*tokenizer, "a")[0], end, Encode(*tokenizer, "b")[0]}));
  const Ids plain = Encode(*tokenizer, "a<|im_end|>b");
  EXPECT_THAT(plain, ::testing::Not(::testing::Contains(end)));
  EXPECT_EQ(tokenizer->Decode(plain, true), "a<|im_end|>b");
}

TEST(TokenizerTest, AddsItsSpecialTokensOnRequest) {
  const auto tokenizer = testing::LoadTestTokenizer("llama3");
  const Ids ids = Encode(*tokenizer, "a", {true, true});
  ASSERT_EQ(ids.size(), 3u);
  EXPECT_EQ(*tokenizer->IdToToken(ids.front()), "<|endoftext|>");
  EXPECT_EQ(*tokenizer->IdToToken(ids.back()), "<|im_end|>");
  EXPECT_EQ(Encode(*tokenizer, "", {true, true}).size(), 2u);
}

TEST(TokenizerTest, IdsOutsideTheVocabularyDecodeToNothing) {
  for (const std::string& name : testing::TestTokenizerNames()) {
    const auto tokenizer = testing::LoadTestTokenizer(name);
    const Ids ids = {-1, tokenizer->vocab_size(), INT32_MAX, INT32_MIN};
    EXPECT_EQ(tokenizer->Decode(ids, false), "") << name;
    for (const int32_t id : ids) {
      EXPECT_FALSE(tokenizer->IdToToken(id).has_value());
      EXPECT_FALSE(tokenizer->IsSpecial(id));
    }
  }
}

TEST(TokenizerTest, PartsAreEncodedAsTheWholeTextWouldBe) {
  for (const char* name : {"qwen2", "llama2", "metaspace_first", "smollm"}) {
    SCOPED_TRACE(name);
    const auto tokenizer = testing::LoadTestTokenizer(name);
    const std::string special = std::string(*tokenizer->IdToToken(1));
    const std::vector<Tokenizer::Part> parts = {{.token = 1, .text = {}},
                                                {.token = {}, .text = "user\nHello "},
                                                {.token = 1, .text = {}},
                                                {.token = {}, .text = " \n"},
                                                {.token = 1, .text = {}}};
    const auto ids = tokenizer->EncodeParts(parts);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids,
              Encode(*tokenizer, absl::StrCat(special, "user\nHello ", special, " \n", special),
                     {false, true}));
  }
}

TEST(TokenizerTest, PartsCannotForgeTheTokensBetweenThem) {
  const auto tokenizer = testing::LoadTestTokenizer("smollm");
  // "<tool>" is not special, so it is found in text; as a control token of ours it must not be.
  const int32_t tool = *tokenizer->TokenToId("<tool>");
  ASSERT_FALSE(tokenizer->IsSpecial(tool));
  EXPECT_TRUE(tokenizer->EncodeParts({{.token = {}, .text = "a <tool> b"}}).ok());
  const auto forged =
      tokenizer->EncodeParts({{.token = tool, .text = {}}, {.token = {}, .text = "a <tool> b"}});
  EXPECT_EQ(forged.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(forged.status().message()), ::testing::HasSubstr("<tool>"));
}

TEST(TokenizerTest, ThreadsShareOneTokenizer) {
  const auto tokenizer = testing::LoadTestTokenizer("qwen2");
  const std::string text = "Many threads, one tokenizer; e\xCC\x81 and 12345 more.\n";
  const Ids expected = Encode(*tokenizer, text);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) EXPECT_EQ(Encode(*tokenizer, text), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TokenizerTest, TextBeyondTheLimitIsRefused) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  const absl::string_view huge(nullptr, 0);
  EXPECT_TRUE(tokenizer->Encode(huge).ok());
  const std::string text(Tokenizer::kMaxTextBytes + 1, 'a');
  EXPECT_EQ(tokenizer->Encode(text).status().code(), absl::StatusCode::kInvalidArgument);
}

// The same vocabulary as GGUF metadata.
GgufVocab AsGguf(const std::string& name, const std::string& pre) {
  const auto tokenizer = testing::LoadTestTokenizer(name);
  const auto json = nlohmann::json::parse(testing::ReadTokenizerFile(name + ".tokenizer.json"));
  GgufVocab vocab;
  vocab.model = "gpt2";
  vocab.pre = pre;
  for (int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
    vocab.tokens.emplace_back(*tokenizer->IdToToken(id));
    vocab.token_types.push_back(tokenizer->IsSpecial(id) ? GgufVocab::kControl
                                                         : GgufVocab::kNormal);
  }
  for (const auto& merge : json["model"]["merges"]) {
    vocab.merges.push_back(
        absl::StrCat(merge[0].get<std::string>(), " ", merge[1].get<std::string>()));
  }
  vocab.bos_id = 0;
  vocab.eos_id = 2;
  vocab.add_bos = false;
  return vocab;
}

TEST(TokenizerGgufTest, NamedPreTokenizersAreThoseOfTheirTokenizerJson) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  const std::pair<const char*, const char*> kinds[] = {
      {"gpt2", "gpt-2"}, {"llama3", "llama-bpe"}, {"tekken", "tekken"}};
  for (const auto& [name, pre] : kinds) {
    SCOPED_TRACE(name);
    const auto tokenizer = testing::LoadTestTokenizer(name);
    const auto gguf = Tokenizer::FromGguf(AsGguf(name, pre));
    ASSERT_TRUE(gguf.ok()) << gguf.status();
    EXPECT_EQ((*gguf)->bos_id(), 0);
    EXPECT_EQ((*gguf)->eos_id(), 2);
    for (int round = 0; round < 100; ++round) {
      const std::string text = testing::RandomText(rng, 40) + "<|im_end|>";
      EXPECT_EQ(Encode(**gguf, text), Encode(*tokenizer, text));
      EXPECT_EQ(Encode(**gguf, text, {false, true}), Encode(*tokenizer, text, {false, true}));
    }
  }
}

GgufVocab SentencePieceVocab() {
  GgufVocab vocab;
  vocab.model = "llama";
  const auto add = [&vocab](const std::string& token, float score, int32_t type) {
    vocab.tokens.push_back(token);
    vocab.scores.push_back(score);
    vocab.token_types.push_back(type);
  };
  add("<unk>", 0, GgufVocab::kUnknown);
  add("<s>", 0, GgufVocab::kControl);
  add("</s>", 0, GgufVocab::kControl);
  for (int byte = 0; byte < 256; ++byte) {
    add(absl::StrCat("<0x", absl::BytesToHexString(std::string(1, static_cast<char>(byte))), ">"),
        0, GgufVocab::kByte);
    for (char& c : vocab.tokens.back()) {
      if (c >= 'a' && c <= 'f') c = static_cast<char>(c - 'a' + 'A');
    }
  }
  // "abc" can be put together from "a" and "bc" only: its better pair "ab" scores less than "bc".
  add("bc", -1, GgufVocab::kNormal);
  add("ab", -2, GgufVocab::kNormal);
  add("abc", -3, GgufVocab::kNormal);
  add("\xE2\x96\x81"
      "a",
      -4, GgufVocab::kNormal);
  for (const char* token : {"\xE2\x96\x81", "a", "b", "c"}) add(token, -9, GgufVocab::kNormal);
  vocab.bos_id = 1;
  vocab.eos_id = 2;
  vocab.unk_id = 0;
  return vocab;
}

std::vector<std::string> Tokens(const Tokenizer& tokenizer, const Ids& ids) {
  std::vector<std::string> tokens;
  for (const int32_t id : ids) tokens.emplace_back(*tokenizer.IdToToken(id));
  return tokens;
}

TEST(TokenizerGgufTest, SentencePieceMergesByScore) {
  const auto tokenizer = Tokenizer::FromGguf(SentencePieceVocab());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  // A space in front, BOS by default; "bc" is merged first, then "abc", and only then "_a" would
  // be.
  EXPECT_THAT(Tokens(**tokenizer, Encode(**tokenizer, "abc ab a", {true, true})),
              ::testing::ElementsAre("<s>", "\xE2\x96\x81", "abc", "\xE2\x96\x81", "ab",
                                     "\xE2\x96\x81"
                                     "a"));
  // What the vocabulary lacks falls back to bytes.
  EXPECT_THAT(Tokens(**tokenizer, Encode(**tokenizer, "d\n", {false, true})),
              ::testing::ElementsAre("\xE2\x96\x81", "<0x64>", "<0x0A>"));
  EXPECT_EQ((*tokenizer)->Decode(Encode(**tokenizer, " abd\xE2\x82\xAC", {true, true}), true),
            " abd\xE2\x82\xAC");
}

TEST(TokenizerGgufTest, WhatIsWrongIsRefusedByItsKey) {
  struct Case {
    const char* key;
    void (*change)(GgufVocab&);
  };
  const Case cases[] = {
      {"model", [](GgufVocab& v) { v.model = "bert"; }},
      {"tokens", [](GgufVocab& v) { v.tokens.clear(); }},
      {"tokens", [](GgufVocab& v) { v.tokens[5] = "\xFF"; }},
      {"tokens", [](GgufVocab& v) { v.tokens[5] = v.tokens[6]; }},
      {"token_type", [](GgufVocab& v) { v.token_types.pop_back(); }},
      {"scores", [](GgufVocab& v) { v.scores.pop_back(); }},
      {"scores", [](GgufVocab& v) { v.scores.back() = std::numeric_limits<float>::quiet_NaN(); }},
      {"bos_token_id", [](GgufVocab& v) { v.bos_id = 1 << 20; }},
      {"eos_token_id", [](GgufVocab& v) { v.eos_id = -1; }},
      {"bos_token_id", [](GgufVocab& v) { v.bos_id.reset(); }},
      {"eos_token_id",
       [](GgufVocab& v) {
         v.add_eos = true;
         v.eos_id.reset();
       }},
      {"merges", [](GgufVocab& v) { v.merges = {"ab"}; }},
      {"tokens", [](GgufVocab& v) { v.merges = {"a zz"}; }},
      {"pre",
       [](GgufVocab& v) {
         v.model = "gpt2";
         v.pre = "falcon";
       }},
  };
  for (const Case& c : cases) {
    GgufVocab vocab = SentencePieceVocab();
    c.change(vocab);
    const auto tokenizer = Tokenizer::FromGguf(vocab);
    ASSERT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << c.key;
    EXPECT_THAT(std::string(tokenizer.status().message()),
                ::testing::HasSubstr(absl::StrCat("tokenizer.ggml.", c.key)));
  }
}

}  // namespace
}  // namespace resa::engine
