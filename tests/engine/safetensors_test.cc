#include "engine/safetensors.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using ::resa::testing::AsBytes;
using ::resa::testing::BytesOfValue;
using ::resa::testing::BytesOfValues;
using ::resa::testing::SafetensorsBuilder;
using ::resa::testing::SafetensorsBytes;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(SafetensorsTest, ReadsNamesTypesShapesAndData) {
  SafetensorsBuilder builder;
  builder.Add("a", "F32", {2, 3}, BytesOfValues<float>({1, 2, 3, 4, 5, 6}));
  builder.Add("b.c", "BF16", {4}, "abcdefgh");
  builder.Add("half", "F16", {1, 2}, "wxyz");
  builder.Add("empty", "F32", {0, 7}, "");
  builder.Add("scalar", "F32", {}, BytesOfValue(2.5f));
  const std::string file = builder.Build();

  const auto tensors = ParseSafetensors(AsBytes(file), "m.safetensors");

  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 5u);
  EXPECT_EQ((*tensors)[0].name, "a");
  EXPECT_EQ((*tensors)[0].type, StoredType::kF32);
  EXPECT_THAT((*tensors)[0].shape, ElementsAre(2, 3));
  EXPECT_EQ((*tensors)[0].file, "m.safetensors");
  EXPECT_EQ((*tensors)[1].type, StoredType::kBF16);
  const auto& data = (*tensors)[1].data;
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(data.data()), data.size()), "abcdefgh");
  EXPECT_EQ((*tensors)[2].type, StoredType::kF16);
  EXPECT_TRUE((*tensors)[3].data.empty());
  EXPECT_EQ((*tensors)[4].data.size(), 4u);
}

TEST(SafetensorsTest, AcceptsMetadataPaddingAndAnyOrderOfEntries) {
  const std::string file =
      SafetensorsBytes(R"({"__metadata__":{"format":"pt","x":"y"},)"
                       R"("b":{"shape":[1],"data_offsets":[4,8],"dtype":"F32"},)"
                       R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}    )",
                       "01234567");
  const auto tensors = ParseSafetensors(AsBytes(file), "f");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ((*tensors)[0].name, "b");
  EXPECT_EQ(std::to_integer<char>((*tensors)[0].data[0]), '4');
}

TEST(SafetensorsTest, AcceptsAFileWithoutTensors) {
  const std::string file = SafetensorsBytes("{}", "");
  EXPECT_TRUE(ParseSafetensors(AsBytes(file), "f").ok());
}

struct BadCase {
  std::string label;
  std::string file;
  std::string message;  // Contained in the error.
};

std::string Entry(const std::string& fields) { return absl::StrCat("{\"t\":{", fields, "}}"); }

std::vector<BadCase> BadCases() {
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const std::string data(8, 'x');
  const auto one = [&](const std::string& label, const std::string& fields,
                       const std::string& message) {
    return BadCase{label, SafetensorsBytes(Entry(fields), data), message};
  };
  std::string long_name(5000, 'n');
  std::string deep = "{\"t\":";
  for (int i = 0; i < 100000; ++i) deep += '[';
  return {
      {"Empty", "", "0 bytes are too few"},
      {"SevenBytes", "1234567", "too few"},
      {"HeaderBeyondFile", BytesOfValue<uint64_t>(100) + "{}", "header length 100 exceeds"},
      {"HeaderLengthAllOnes", BytesOfValue<uint64_t>(~0ull) + "{}", "exceeds the file's remaining"},
      {"HeaderLengthNearOverflow", BytesOfValue<uint64_t>(~0ull - 7) + "{}", "exceeds"},
      {"HeaderTooLong", BytesOfValue<uint64_t>((64u << 20) + 1) + std::string((64u << 20) + 1, ' '),
       "exceeds the limit"},
      {"HeaderEmpty", SafetensorsBytes("", ""), "not valid JSON"},
      {"HeaderNotJson", SafetensorsBytes("hello", ""), "not valid JSON"},
      {"HeaderCutOff", SafetensorsBytes(R"({"t":{"dtype":"F32")", ""), "not valid JSON"},
      {"HeaderInvalidUtf8", SafetensorsBytes("{\"\xff\":{}}", ""), "not valid JSON"},
      {"TextAfterHeader", SafetensorsBytes("{} {}", ""), "not valid JSON"},
      {"HeaderIsArray", SafetensorsBytes("[]", ""), "has an array"},
      {"HeaderIsNumber", SafetensorsBytes("1", ""), "has a number"},
      {"TensorIsNumber", SafetensorsBytes(R"({"t":1})", ""), "'t' has a number"},
      {"TensorIsString", SafetensorsBytes(R"({"t":"x"})", ""), "'t' has a string"},
      {"MetadataNested", SafetensorsBytes(R"({"__metadata__":{"a":{}}})", ""), "has an object"},
      {"MetadataNumber", SafetensorsBytes(R"({"__metadata__":{"a":1}})", ""), "has a number"},
      {"DeepNesting", SafetensorsBytes(deep, ""), "has an array"},
      {"NoDtype", SafetensorsBytes(Entry(R"("shape":[2],"data_offsets":[0,8])"), data),
       "tensor 't': dtype is missing"},
      {"NoShape", SafetensorsBytes(Entry(R"("dtype":"F32","data_offsets":[0,8])"), data),
       "tensor 't': shape is missing"},
      {"NoOffsets", SafetensorsBytes(Entry(R"("dtype":"F32","shape":[2])"), data),
       "tensor 't': data_offsets is missing"},
      one("UnknownKey", good + R"(,"extra":1)", "tensor 't': unknown key 'extra'"),
      one("RepeatedKey", good + R"(,"dtype":"F32")", "tensor 't': key 'dtype' stands twice"),
      one("UnknownDtype", R"("dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8])",
          "tensor 't': dtype 'F8_E4M3' is not supported; expected F32, F16 or BF16"),
      one("IntegerDtype", R"("dtype":"I64","shape":[1],"data_offsets":[0,8])", "'I64'"),
      one("NegativeDimension", R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])",
          "the negative number -2"),
      one("FractionalDimension", R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])",
          "the number 2.0"),
      one("HugeDimension", R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])",
          "out of range"),
      one("DimensionBeyond64Bits",
          R"("dtype":"F32","shape":[99999999999999999999],)"
          R"("data_offsets":[0,8])",
          "which is not expected"),
      one("ShapeOverflows",
          R"("dtype":"F32","shape":[4294967296,4294967296,2],)"
          R"("data_offsets":[0,8])",
          "absurd size"),
      one("ShapeTimesSizeOverflows",
          R"("dtype":"F32","shape":[4611686018427387904],)"
          R"("data_offsets":[0,8])",
          "absurd size"),
      one("OverflowHiddenByZero",
          R"("dtype":"F32","shape":[0,4294967296,4294967296],)"
          R"("data_offsets":[0,8])",
          "absurd size"),
      one("TooManyDimensions", R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])",
          "shape has more than 8"),
      one("ShapeNotList", R"("dtype":"F32","shape":2,"data_offsets":[0,8])", "has a number"),
      one("ShapeNested", R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])", "has an array"),
      one("SizeDisagrees", R"("dtype":"F32","shape":[3],"data_offsets":[0,8])",
          "shape [3] of F32 needs 12 bytes, but data_offsets span 8"),
      one("OneOffset", R"("dtype":"F32","shape":[2],"data_offsets":[8])", "must be [begin, end]"),
      one("ThreeOffsets", R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])", "more than 2"),
      one("OffsetsReversed", R"("dtype":"F32","shape":[2],"data_offsets":[8,0])",
          "do not lie within the 8 bytes"),
      one("OffsetsBeyondData", R"("dtype":"F32","shape":[2],"data_offsets":[4,12])", "truncated"),
      one("OffsetsHuge",
          R"("dtype":"F32","shape":[2],)"
          R"("data_offsets":[9223372036854775800,9223372036854775807])",
          "do not lie within"),
      one("HoleBefore", R"("dtype":"F32","shape":[1],"data_offsets":[4,8])",
          "tensor 't': data begins at 4"),
      one("BytesLeftOver", R"("dtype":"F32","shape":[1],"data_offsets":[0,4])",
          "4 bytes after the last"),
      {"RepeatedName",
       SafetensorsBytes(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                        R"("t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                        data),
       "tensor 't' is listed twice"},
      {"Overlap",
       SafetensorsBytes(R"({"t":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},)"
                        R"("u":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                        data),
       "tensor 'u': data begins at 4 but the data before it ends at 6"},
      {"Truncated", SafetensorsBytes(Entry(good), data).substr(0, 8 + Entry(good).size() + 7),
       "truncated"},
      {"NameIsEscapedAndCut", SafetensorsBytes(absl::StrCat("{\"\\u001b", long_name, "\":1}"), ""),
       "'\\x1bnnn"},
  };
}

TEST(SafetensorsTest, RefusesEveryMalformedFileAndSaysWhy) {
  for (const BadCase& bad : BadCases()) {
    SCOPED_TRACE(bad.label);
    const auto tensors = ParseSafetensors(AsBytes(bad.file), "model.safetensors");
    ASSERT_FALSE(tensors.ok());
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
    const std::string message(tensors.status().message());
    EXPECT_THAT(message, AllOf(HasSubstr("model.safetensors: "), HasSubstr(bad.message)));
    EXPECT_LT(message.size(), 500u);
  }
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  SafetensorsBuilder builder;
  builder.Add("a", "F32", {2, 3}, std::string(24, 'a'));
  builder.Add("b", "BF16", {4}, std::string(8, 'b'));
  const std::string file = builder.Build();
  for (size_t size = 0; size < file.size(); ++size) {
    // A copy of exactly this size, so that a sanitizer sees any read beyond it.
    const std::vector<std::byte> cut(AsBytes(file).begin(), AsBytes(file).begin() + size);
    EXPECT_FALSE(ParseSafetensors(cut, "f").ok()) << size << " of " << file.size() << " bytes";
  }
}

}  // namespace
}  // namespace resa::engine
