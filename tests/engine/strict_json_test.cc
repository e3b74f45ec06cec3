#include "engine/strict_json.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

using ::testing::HasSubstr;

std::string ErrorOf(const std::string& text) {
  return std::string(ParseStrictJson(text, "c.json").status().message());
}

TEST(StrictJsonTest, BuildsTheSameDocumentAsTheLibrary) {
  const std::string text =
      R"({"a":[1,-2,2.5,[true,null,{"b":"\u00e9"}]],"c":{"d":{},"e":[]},"f":18446744073709551615})";
  const auto parsed = ParseStrictJson(text, "c.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, nlohmann::json::parse(text));
}

TEST(StrictJsonTest, RefusesWithFileAndPosition) {
  EXPECT_THAT(ErrorOf(""), HasSubstr("c.json: not valid JSON at byte"));
  EXPECT_THAT(ErrorOf("{\"a\": }"), HasSubstr("c.json: not valid JSON at byte 7"));
  EXPECT_THAT(ErrorOf("{} x"), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{\"a\": NaN}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{\"a\": 1e999}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("\"\xff\""), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf(R"({"a":1,"b":2,"a":3})"), HasSubstr("key 'a' stands twice"));
  EXPECT_THAT(ErrorOf(R"([{"x":{"a":1,"a":1}}])"), HasSubstr("key 'a' stands twice"));
  EXPECT_TRUE(ParseStrictJson(R"([{"a":1},{"a":1}])", "c.json").ok());
}

TEST(StrictJsonTest, DepthIsBounded) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(ParseStrictJson(nested(64), "c.json").ok());
  EXPECT_THAT(ErrorOf(nested(65)), HasSubstr("nested deeper than 64 levels"));
  EXPECT_THAT(ErrorOf(std::string(1000000, '[')), HasSubstr("nested deeper"));
}

TEST(StrictJsonTest, FieldsCheckTypeAndRange) {
  const nlohmann::json object = nlohmann::json::parse(
      R"({"i":7,"n":-7,"f":2.5,"b":true,"s":"x","null":null,"big":18446744073709551615})");
  const JsonFields fields(object, "c.json");
  EXPECT_EQ(**fields.Int("i", 0, 7), 7);
  EXPECT_EQ(**fields.Int("n", -7, 0), -7);
  EXPECT_EQ(**fields.Number("i", 0, 10), 7.0);
  EXPECT_EQ(**fields.Number("f", 0, 10), 2.5);
  EXPECT_EQ(**fields.Bool("b"), true);
  EXPECT_EQ(**fields.String("s"), "x");
  EXPECT_FALSE(fields.Int("null", 0, 1)->has_value());
  EXPECT_FALSE(fields.Int("absent", 0, 1)->has_value());
  EXPECT_TRUE(fields.Contains("null"));
  EXPECT_FALSE(fields.Has("null"));

  const auto message = [](const auto& result) { return std::string(result.status().message()); };
  EXPECT_EQ(message(fields.Int("i", 0, 6)), "c.json: i must be an integer from 0 to 6, not 7");
  EXPECT_THAT(message(fields.Int("f", 0, 6)), HasSubstr("not number"));
  EXPECT_THAT(message(fields.Int("big", 0, 6)), HasSubstr("not 18446744073709551615"));
  EXPECT_THAT(message(fields.Number("s", 0, 6)), HasSubstr("must be a number from 0 to 6"));
  EXPECT_THAT(message(fields.Number("n", 0, 6)), HasSubstr("not -7"));
  EXPECT_THAT(message(fields.Bool("i")), HasSubstr("must be true or false, not number"));
  EXPECT_THAT(message(fields.String("i")), HasSubstr("must be a string, not number"));
  EXPECT_THAT(message(fields.RequiredInt("absent", 0, 1)), HasSubstr("absent is missing"));
  EXPECT_THAT(message(fields.RequiredNumber("null", 0, 1)), HasSubstr("null is missing"));
}

}  // namespace
}  // namespace resa::engine
