#include "engine/gguf.h"

#include <limits>
#include <string>
#include <utility>
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
using ::resa::testing::GgufBuilder;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint32_t kF32 = 0, kQ4_0 = 2, kQ8_0 = 8, kQ4_K = 12;
constexpr uint32_t kString = 8, kArray = 9;

template <typename T>
std::string ArrayBytes(uint32_t element, const std::vector<T>& values) {
  return BytesOfValue(element) + BytesOfValue<uint64_t>(values.size()) + BytesOfValues(values);
}

TEST(GgufTest, ReadsEveryKindOfMetadata) {
  GgufBuilder builder;
  builder.AddRaw("u8", 0, BytesOfValue<uint8_t>(200));
  builder.AddRaw("i8", 1, BytesOfValue<int8_t>(-100));
  builder.AddRaw("u16", 2, BytesOfValue<uint16_t>(60000));
  builder.AddRaw("i16", 3, BytesOfValue<int16_t>(-30000));
  builder.AddUint32("u32", 4000000000u);
  builder.AddRaw("i32", 5, BytesOfValue<int32_t>(-2000000000));
  builder.AddFloat("f32", 0.5f);
  builder.AddRaw("bool", 7, BytesOfValue<uint8_t>(1));
  builder.AddString("string", "text");
  builder.AddRaw("u64", 10, BytesOfValue<uint64_t>(1ull << 60));
  builder.AddRaw("i64", 11, BytesOfValue<int64_t>(-(1ll << 60)));
  builder.AddRaw("f64", 12, BytesOfValue<double>(0.25));
  builder.AddStrings("strings", {"a", "", "ccc"});
  builder.AddRaw("floats", kArray, ArrayBytes<float>(6, {1.5f, 2.5f}));
  builder.AddRaw("ints", kArray, ArrayBytes<int32_t>(5, {-1, 7}));
  builder.AddRaw("uints", kArray, ArrayBytes<uint32_t>(4, {1, 7}));
  builder.AddRaw("nested", kArray,
                 BytesOfValue<uint32_t>(9) + BytesOfValue<uint64_t>(2) +
                     ArrayBytes<int32_t>(5, {1, 2}) + ArrayBytes<int32_t>(5, {}));
  const std::string bytes = builder.Build();

  const auto file = GgufFile::Parse(AsBytes(bytes), "m.gguf");

  ASSERT_TRUE(file.ok()) << file.status();
  const int64_t least = INT64_MIN, most = INT64_MAX;
  EXPECT_EQ(**file->Int("u8", least, most), 200);
  EXPECT_EQ(**file->Int("i8", least, most), -100);
  EXPECT_EQ(**file->Int("u16", least, most), 60000);
  EXPECT_EQ(**file->Int("i16", least, most), -30000);
  EXPECT_EQ(**file->Int("u32", least, most), 4000000000);
  EXPECT_EQ(**file->Int("i32", least, most), -2000000000);
  EXPECT_EQ(**file->Number("f32", 0, 1), 0.5);
  EXPECT_EQ(**file->Bool("bool"), true);
  EXPECT_EQ(**file->String("string"), "text");
  EXPECT_EQ(**file->Int("u64", least, most), 1ll << 60);
  EXPECT_EQ(**file->Int("i64", least, most), -(1ll << 60));
  EXPECT_EQ(**file->Number("f64", 0, 1), 0.25);
  EXPECT_THAT(*file->Strings("strings", 3), ElementsAre("a", "", "ccc"));
  EXPECT_THAT(*file->Floats("floats", 2), ElementsAre(1.5f, 2.5f));
  EXPECT_THAT(*file->Ints("ints", 2), ElementsAre(-1, 7));
  EXPECT_THAT(*file->Ints("uints", 2), ElementsAre(1, 7));
  EXPECT_TRUE(file->Has("nested"));

  EXPECT_FALSE(file->Int("absent", 0, 1)->has_value());
  EXPECT_THAT(*file->Strings("absent", 1), IsEmpty());
}

TEST(GgufTest, WrongKindsAndRangesAreErrorsThatNameTheKey) {
  GgufBuilder builder;
  builder.AddUint32("u32", 7);
  builder.AddString("string", "text");
  builder.AddRaw("nan", 6, BytesOfValue(std::numeric_limits<float>::quiet_NaN()));
  builder.AddRaw("huge", 10, BytesOfValue<uint64_t>(~0ull));
  builder.AddStrings("strings", {"a", "b"});
  builder.AddRaw("uints", kArray, ArrayBytes<uint32_t>(4, {4000000000u}));
  const std::string bytes = builder.Build();
  const auto file = GgufFile::Parse(AsBytes(bytes), "m.gguf");
  ASSERT_TRUE(file.ok()) << file.status();

  const auto message = [](const auto& result) { return std::string(result.status().message()); };
  EXPECT_THAT(message(file->Int("u32", 8, 9)), HasSubstr("'u32' must be an integer from 8 to 9"));
  EXPECT_THAT(message(file->Int("string", 0, 9)), HasSubstr("'string' must be an integer"));
  EXPECT_THAT(message(file->Int("huge", 0, INT64_MAX)), HasSubstr("18446744073709551615"));
  EXPECT_THAT(message(file->Number("u32", 0, 9)), HasSubstr("must be a number"));
  EXPECT_THAT(message(file->Number("nan", 0, 9)), HasSubstr("must be a number from 0 to 9"));
  EXPECT_THAT(message(file->Bool("u32")), HasSubstr("must be a bool"));
  EXPECT_THAT(message(file->String("u32")), HasSubstr("must be a string"));
  EXPECT_THAT(message(file->Strings("u32", 1)), HasSubstr("must be an array"));
  EXPECT_THAT(message(file->Strings("uints", 1)), HasSubstr("array of strings"));
  EXPECT_THAT(message(file->Strings("strings", 1)), HasSubstr("has 2 elements; at most 1"));
  EXPECT_THAT(message(file->Floats("uints", 1)), HasSubstr("array of float32"));
  EXPECT_THAT(message(file->Ints("strings", 2)), HasSubstr("array of int32"));
  EXPECT_THAT(message(file->Ints("uints", 2)), HasSubstr("beyond 2147483647"));
}

TEST(GgufTest, ReadsTensorsWithRowMajorShapes) {
  GgufBuilder builder;
  builder.AddTensor("plain", {3, 2}, kF32, BytesOfValues<float>({1, 2, 3, 4, 5, 6}));
  builder.AddTensor("blocks", {64, 2}, kQ8_0, std::string(4 * 34, 'q'));
  for (uint32_t version : {2u, 3u}) {
    builder.version = version;
    const std::string bytes = builder.Build();
    const auto file = GgufFile::Parse(AsBytes(bytes), "m.gguf");
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_EQ(file->tensors().size(), 2u);
    EXPECT_THAT(file->tensors()[0].shape, ElementsAre(2, 3));
    EXPECT_EQ(file->tensors()[0].data.size(), 24u);
    EXPECT_EQ(file->FindTensor("blocks")->type, StoredType::kQ8_0);
    EXPECT_EQ(std::to_integer<char>(file->FindTensor("blocks")->data[0]), 'q');
    EXPECT_EQ(file->FindTensor("nothing"), nullptr);
  }
}

TEST(GgufTest, HonoursTheAlignmentThatTheFileGives) {
  GgufBuilder builder;
  builder.alignment = 128;
  builder.AddUint32("general.alignment", 128);
  builder.AddTensor("a", {1}, kF32, "aaaa");
  builder.AddTensor("b", {1}, kF32, "bbbb");
  const std::string bytes = builder.Build();
  const auto file = GgufFile::Parse(AsBytes(bytes), "m.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(std::to_integer<char>(file->FindTensor("b")->data[0]), 'b');
}

struct BadCase {
  std::string label;
  std::string file;
  std::string message;
};

// A file with one thing wrong, made by `edit`.
template <typename Edit>
BadCase With(const std::string& label, const std::string& message, Edit edit) {
  GgufBuilder builder;
  edit(builder);
  return {label, builder.Build(), message};
}

std::vector<BadCase> BadMetadata() {
  const auto raw = [](uint32_t type, std::string value) {
    return [type, value](GgufBuilder& b) { b.AddRaw("key", type, value); };
  };
  std::string deep;
  for (int i = 0; i < 5; ++i) deep += BytesOfValue<uint32_t>(9) + BytesOfValue<uint64_t>(1);
  deep += ArrayBytes<int32_t>(5, {1});
  return {
      {"Empty", "", "does not begin with \"GGUF\""},
      {"OtherMagic", "GGML" + std::string(100, '\0'), "does not begin"},
      {"OnlyMagic", "GGUF", "cut off"},
      {"HeaderCut", "GGUF" + BytesOfValue<uint32_t>(3) + "123", "cut off"},
      With("Version1", "version 1 is not supported; expected 2 or 3",
           [](GgufBuilder& b) { b.version = 1; }),
      With("BigEndian", "is it a big-endian file", [](GgufBuilder& b) { b.version = 3u << 24; }),
      With("TooManyTensors", "tensors cannot fit",
           [](GgufBuilder& b) { b.extra_tensors = 1ll << 40; }),
      With("TensorCountAllOnes", "tensors cannot fit",
           [](GgufBuilder& b) { b.extra_tensors = -1; }),
      With("TooMuchMetadata", "metadata entries cannot fit",
           [](GgufBuilder& b) { b.extra_metadata = -1; }),
      {"KeyCutOff",
       "GGUF" + BytesOfValue<uint32_t>(3) + BytesOfValue<uint64_t>(0) + BytesOfValue<uint64_t>(1) +
           BytesOfValue<uint64_t>(1ull << 40) + std::string(32, 'k'),
       "metadata entry 0 of 1: its key is cut off or empty"},
      With("KeyEmpty", "its key is cut off or empty", [](GgufBuilder& b) { b.AddUint32("", 1); }),
      With("UnknownType", "metadata 'key': its type is unknown", raw(13, "12345678")),
      With("BoolOfTwo", "metadata 'key'", raw(7, "\x02")),
      With("StringBeyondFile", "metadata 'key'",
           raw(kString, BytesOfValue<uint64_t>(1ull << 50) + "abc")),
      With("StringLengthAllOnes", "metadata 'key'", raw(kString, BytesOfValue<uint64_t>(~0ull))),
      With("ArrayBeyondFile", "metadata 'key'",
           raw(kArray, BytesOfValue<uint32_t>(10) + BytesOfValue<uint64_t>(1ull << 61))),
      With("ArrayOfStringsBeyondFile", "metadata 'key'",
           raw(kArray, BytesOfValue<uint32_t>(8) + BytesOfValue<uint64_t>(1ull << 61))),
      With("ArrayOfUnknown", "metadata 'key'",
           raw(kArray, BytesOfValue<uint32_t>(99) + BytesOfValue<uint64_t>(0))),
      With("ArrayTooDeep", "metadata 'key'", raw(kArray, deep)),
      With("RepeatedKey", "metadata 'key' stands twice",
           [](GgufBuilder& b) {
             b.AddUint32("key", 1);
             b.AddUint32("key", 1);
           }),
      With("AlignmentZero", "'general.alignment' must be an integer from 1",
           [](GgufBuilder& b) { b.AddUint32("general.alignment", 0); }),
      With("AlignmentOdd", "must be a power of two",
           [](GgufBuilder& b) { b.AddUint32("general.alignment", 48); }),
      With("AlignmentHuge", "'general.alignment'",
           [](GgufBuilder& b) { b.AddUint32("general.alignment", 1u << 31); }),
      With("AlignmentString", "'general.alignment'",
           [](GgufBuilder& b) { b.AddString("general.alignment", "32"); }),
  };
}

std::vector<BadCase> BadTensors() {
  const auto at = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    return [=](GgufBuilder& b) {
      b.AddTensor("first", {8}, kF32, std::string(32, 'x'));
      b.AddTensorAt("t", dims, type, offset);
    };
  };
  return {
      With("NoDimensions", "tensor 't': 0 dimensions", at({}, kF32, 0)),
      With("FiveDimensions", "tensor 't': 5 dimensions; expected 1 to 4",
           at({1, 1, 1, 1, 1}, kF32, 0)),
      With("ZeroDimension", "tensor 't': dimension 1 is 0", at({4, 0}, kF32, 0)),
      With("NegativeDimension", "dimension 0 is 18446744073709551615", at({~0ull}, kF32, 0)),
      With("Overflow", "tensor 't': shape [4294967296, 4294967296] of F32 overflows",
           at({1ull << 32, 1ull << 32}, kF32, 0)),
      With("BytesOverflow", "overflows", at({1ull << 62}, kF32, 0)),
      With("PartialBlock", "rows are not whole blocks of 32", at({40, 2}, kQ4_0, 0)),
      With("KQuant", "tensor 't': type Q4_K is not supported; expected F32, F16, BF16, Q8_0, Q4_0",
           at({256}, kQ4_K, 0)),
      With("UnknownType", "type number 77 is not supported", at({256}, 77, 0)),
      With("Unaligned", "offset 4 is not a multiple of the alignment 32", at({1}, kF32, 4)),
      With("BeyondData", "4 bytes at offset 32 do not lie within the 32", at({1}, kF32, 32)),
      With("FarBeyondData", "do not lie within", at({1}, kF32, ~31ull)),
      With("TooLong", "36 bytes at offset 0 do not lie within", at({9}, kF32, 0)),
      With("Overlap", "tensors 'first' and 't' overlap", at({2}, kF32, 0)),
      With("EmptyName", "a tensor's name is cut off or empty",
           [](GgufBuilder& b) { b.AddTensor("", {8}, kF32, std::string(32, 'x')); }),
      With("RepeatedName", "tensor 'first' is listed twice",
           [](GgufBuilder& b) {
             b.AddTensor("first", {8}, kF32, std::string(32, 'x'));
             b.AddTensor("first", {8}, kF32, std::string(32, 'x'));
           }),
  };
}

TEST(GgufTest, RefusesEveryMalformedFileAndSaysWhy) {
  std::vector<BadCase> cases = BadMetadata();
  for (BadCase& bad : BadTensors()) cases.push_back(std::move(bad));
  for (const BadCase& bad : cases) {
    SCOPED_TRACE(bad.label);
    const auto file = GgufFile::Parse(AsBytes(bad.file), "m.gguf");
    ASSERT_FALSE(file.ok());
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(file.status().message()),
                AllOf(HasSubstr("m.gguf: "), HasSubstr(bad.message)));
  }
}

TEST(GgufTest, EveryTruncationIsRefused) {
  GgufBuilder builder;
  builder.AddStrings("strings", {"one", "two"});
  builder.AddFloat("f", 1.0f);
  builder.AddTensor("a", {8}, kF32, std::string(32, 'a'));
  builder.AddTensor("b", {32}, kQ8_0, std::string(34, 'b'));
  const std::string file = builder.Build();
  ASSERT_TRUE(GgufFile::Parse(AsBytes(file), "f").ok());
  for (size_t size = 0; size < file.size(); ++size) {
    const std::vector<std::byte> cut(AsBytes(file).begin(), AsBytes(file).begin() + size);
    EXPECT_FALSE(GgufFile::Parse(cut, "f").ok()) << size << " of " << file.size() << " bytes";
  }
}

}  // namespace
}  // namespace resa::engine
