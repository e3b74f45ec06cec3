#include "engine/tokenizer_json.h"

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace resa::engine {
namespace {

using ::testing::HasSubstr;

// A small byte-level tokenizer; tests change one thing each.
nlohmann::json Valid() {
  return nlohmann::json::parse(R"({
    "version": "1.0", "truncation": {"max_length": 4}, "padding": null,
    "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false, "special": true}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                 {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3},
              "merges": ["a b"]}})");
}

absl::Status StatusOf(const nlohmann::json& json, const std::string& config = "") {
  return Tokenizer::FromJson(json.dump(), config).status();
}

TEST(TokenizerJsonTest, TruncationAndPaddingDoNotApply) {
  const auto tokenizer = Tokenizer::FromJson(Valid().dump(), "");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(*(*tokenizer)->Encode("abababab"), ::testing::ElementsAre(0, 3, 3, 3, 3));
}

TEST(TokenizerJsonTest, MergesInBothSpellings) {
  nlohmann::json json = Valid();
  json["model"]["merges"] = nlohmann::json::parse(R"([["a", "b"]])");
  const auto tokenizer = Tokenizer::FromJson(json.dump(), "");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(*(*tokenizer)->Encode("ab"), ::testing::ElementsAre(0, 3));
}

// Where a value is replaced (a JSON pointer), by what, and what the error must name.
struct Refusal {
  const char* pointer;
  const char* value;
  const char* named;
};

TEST(TokenizerJsonTest, WhatIsWrongOrNotSupportedIsRefusedByName) {
  const Refusal refusals[] = {
      {"/version", "\"2.0\"", "version is \"2.0\""},
      {"/extra", "1", "the member \"extra\" is not known"},
      {"/model", "null", "model: must be an object"},
      {"/model/type", "\"Unigram\"", "model: the type \"Unigram\" is not supported"},
      {"/model/type", "7", "model: type must be a string"},
      {"/model/extra", "1", "model: the member \"extra\" is not known"},
      {"/model/dropout", "0.1", "model: dropout"},
      {"/model/continuing_subword_prefix", "\"##\"", "continuing_subword_prefix is not supported"},
      {"/model/end_of_word_suffix", "\"</w>\"", "end_of_word_suffix is not supported"},
      {"/model/byte_fallback", "true", "byte_fallback with a ByteLevel"},
      {"/model/fuse_unk", "1", "fuse_unk must be true or false"},
      {"/model/unk_token", "\"<unk>\"", "the unknown token \"<unk>\""},
      {"/model/vocab", "[]", "vocab must be an object"},
      {"/model/vocab/a", "-1", "the id of \"a\" must be a token id"},
      {"/model/vocab/a", "1.5", "the id of \"a\" must be a token id"},
      {"/model/vocab/a", "4294967297", "the id of \"a\" must be a token id"},
      {"/model/vocab/a", "2", "share the id 2"},
      {"/model/merges", "{}", "merges must be an array"},
      {"/model/merges/0", "\"ab\"", "model.merges[0] must be two tokens"},
      {"/model/merges/0", "\"a b c\"", "model.merges[0] must be two tokens"},
      {"/model/merges/0", "[\"a\"]", "model.merges[0] must be two tokens"},
      {"/model/merges/0", "\"a x\"", "needs the token \"x\""},
      {"/added_tokens", "{}", "added_tokens: must be an array"},
      {"/added_tokens/0", "3", "added_tokens[0]: must be an object"},
      {"/added_tokens/0/id", "9999999", "added_tokens[0]: id"},
      {"/added_tokens/0/id", "1", "but the vocabulary has it as 0"},
      {"/added_tokens/0/content", "\"<x>\"", "this id is that of \"<s>\""},
      {"/added_tokens/0/special", "\"yes\"", "special must be true or false"},
      {"/normalizer", "[]", "normalizer: must be an object"},
      {"/normalizer/type", "\"Precompiled\"", "normalizer: the type \"Precompiled\""},
      {"/normalizer/type", "null", "normalizer: type is missing"},
      {"/normalizer/extra", "1", "the member \"extra\""},
      {"/normalizer", R"({"type": "Replace", "pattern": {"String": ""}, "content": ""})",
       "pattern is empty"},
      {"/normalizer", R"({"type": "Replace", "pattern": {"Regex": "^a"}, "content": ""})",
       "pattern the pattern has \"^\""},
      {"/normalizer", R"({"type": "Replace", "pattern": "a", "content": ""})",
       "normalizer.pattern: must be an object"},
      {"/normalizer", R"({"type": "Replace", "pattern": {}, "content": ""})",
       "either String or Regex"},
      {"/normalizer", R"({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]})",
       "normalizer.normalizers[1]: the type \"Nmt\""},
      {"/pre_tokenizer/type", "\"Whitespace\"", "pre_tokenizer: the type \"Whitespace\""},
      {"/pre_tokenizer",
       R"({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]})",
       "ByteLevel must be last"},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"String": " "}, "behavior": "Weird"})",
       "behavior is \"Weird\""},
      {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "__"})",
       "replacement must be one character"},
      {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"})",
       "prepend_scheme is \"last\""},
      {"/pre_tokenizer",
       R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "first",
           "add_prefix_space": false})",
       "contradicts add_prefix_space"},
      {"/post_processor/type", "\"Weird\"", "post_processor: the type \"Weird\""},
      {"/post_processor/single", "[]", "single has no Sequence A"},
      {"/post_processor/single/1/Sequence/id", "\"B\"", "the sequence must be A"},
      {"/post_processor/single/0/SpecialToken/id", "\"<x>\"", "\"<x>\" is not among"},
      {"/post_processor/special_tokens/<s>/ids/0", "77", "id 77 is not in the vocabulary"},
      {"/post_processor/special_tokens/<s>/ids/0", "-7", "must be a token id"},
      {"/decoder/type", "\"WordPiece\"", "decoder: the type \"WordPiece\""},
      {"/decoder",
       R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})",
       "decoder.decoders[1]: ByteFallback is not supported at this place"},
      {"/decoder", R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]})",
       "decoder.decoders[1]: ByteLevel is not supported at this place"},
      {"/decoder",
       R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
           {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})",
       "Strip is not supported at this place"},
      {"/decoder", R"({"type": "Strip", "content": " ", "start": -1, "stop": 0})", "start"},
  };
  for (const Refusal& refusal : refusals) {
    nlohmann::json json = Valid();
    json[nlohmann::json::json_pointer(refusal.pointer)] = nlohmann::json::parse(refusal.value);
    const absl::Status status = StatusOf(json);
    ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument)
        << refusal.pointer << " " << refusal.value;
    EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.json"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(refusal.named)) << refusal.pointer;
  }
}

TEST(TokenizerJsonTest, HostileTextIsRefused) {
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += "[";
  for (const std::string& text : {std::string(), std::string("{"), std::string("[1]"), deep,
                                  std::string("{\"model\":{\"vocab\":{\"\xFF\":1}}}"),
                                  std::string("{\"version\":\"1.0\",\"version\":\"1.0\"}")}) {
    const absl::Status status = Tokenizer::FromJson(text, "").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.json"));
  }
}

TEST(TokenizerJsonTest, ConfigNamesBosEosAndTemplate) {
  const auto tokenizer =
      Tokenizer::FromJson(Valid().dump(),
                          R"({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "ab",
          "chat_template": [{"name": "tool_use", "template": "x"},
                            {"name": "default", "template": "y"}], "model_max_length": 1e30})");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos_id(), 0);
  EXPECT_EQ((*tokenizer)->eos_id(), 3);
  EXPECT_EQ((*tokenizer)->chat_template(), "y");
  EXPECT_EQ((*tokenizer)->TokenToId("ab"), 3);
  EXPECT_FALSE((*tokenizer)->TokenToId("zz").has_value());
}

TEST(TokenizerJsonTest, WrongConfigIsRefusedByName) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"bos_token": "<x>"})", "bos_token is \"<x>\", which is not in the vocabulary"},
      {R"({"eos_token": 3})", "eos_token must be a string"},
      {R"({"chat_template": 3})", "chat_template must be a string"},
      {R"({"chat_template": [3]})", "chat_template must hold objects"},
      {"[]", "must be an object"},
      {"{", "not valid JSON"}};
  for (const auto& [config, message] : cases) {
    const absl::Status status = StatusOf(Valid(), config);
    ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << config;
    EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer_config.json"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

TEST(TokenizerJsonTest, DirectoryIsReadAndNamedInErrors) {
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / "tokenizer_json_test";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  const auto write = [&folder](const char* name, const std::string& text) {
    std::ofstream(folder / name, std::ios::binary) << text;
  };
  EXPECT_EQ(Tokenizer::FromDirectory(folder.string()).status().code(), absl::StatusCode::kNotFound);
  write("tokenizer.json", Valid().dump());
  write("tokenizer_config.json", R"({"bos_token": "<s>", "chat_template": "old"})");
  auto tokenizer = Tokenizer::FromDirectory(folder.string());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->chat_template(), "old");
  write("chat_template.jinja", "new");
  tokenizer = Tokenizer::FromDirectory(folder.string());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->chat_template(), "new");
  write("tokenizer.json", "{}");
  const absl::Status status = Tokenizer::FromDirectory(folder.string()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(folder.string()));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace resa::engine
