#include "engine/gguf_dequant.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using ::resa::testing::AsBytes;
using ::resa::testing::BytesOfValue;

// binary16 by its definition: (-1)^s 2^(e - 15) (1 + m / 1024), subnormals 2^-14 (m / 1024).
float HalfByDefinition(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa == 0 ? static_cast<float>(sign * std::numeric_limits<double>::infinity())
                         : std::numeric_limits<float>::quiet_NaN();
  }
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(mantissa, -24));
  return static_cast<float>(sign * std::ldexp(1024 + mantissa, exponent - 25));
}

TEST(GgufDequantTest, EveryHalfConvertsExactly) {
  for (uint32_t half = 0; half <= 0xffff; ++half) {
    const float got = HalfToFloat(static_cast<uint16_t>(half));
    const float expected = HalfByDefinition(static_cast<uint16_t>(half));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << half;
    } else {
      EXPECT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(expected)) << half;
    }
  }
}

// A block with scale 0.5 (f16 0x3800), whose element i has the code i (Q4) or 4 i - 64 (Q8).
TEST(GgufDequantTest, BlocksDecodeAsTheFormatSays) {
  const std::string half = BytesOfValue<uint16_t>(0x3800),
                    minus_three = BytesOfValue<uint16_t>(0xc200);
  std::string q8 = half, q4_0 = half, q4_1 = half + minus_three;
  for (int i = 0; i < 32; ++i) q8 += static_cast<char>(4 * i - 64);
  for (int i = 0; i < 16; ++i) {
    const char nibbles = static_cast<char>(i | (15 - i) << 4);  // Elements i and i + 16.
    q4_0 += nibbles;
    q4_1 += nibbles;
  }
  std::vector<float> values(32);
  DecodeToFloat(StoredType::kQ8_0, AsBytes(q8), values);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(values[i], 0.5f * (4 * i - 64)) << i;
  DecodeToFloat(StoredType::kQ4_0, AsBytes(q4_0), values);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(values[i], 0.5f * ((i < 16 ? i : 31 - i) - 8)) << i;
  DecodeToFloat(StoredType::kQ4_1, AsBytes(q4_1), values);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(values[i], 0.5f * (i < 16 ? i : 31 - i) - 3.0f) << i;
}

TEST(GgufDequantTest, Bf16IsTheFloatRoundedToNearestEven) {
  constexpr uint64_t kSeed = 20250607;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (StoredType type : {StoredType::kF32, StoredType::kF16, StoredType::kBF16, StoredType::kQ8_0,
                          StoredType::kQ4_0, StoredType::kQ4_1}) {
    SCOPED_TRACE(NameOf(type));
    // Several chunks of the decoder and a ragged end; random bytes give every kind of number.
    for (size_t count : {size_t{0}, size_t{32}, size_t{1024}, size_t{3 * 1024 + 96}}) {
      std::string bytes(count / BlockElements(type) * BlockBytes(type), '\0');
      for (char& byte : bytes) byte = static_cast<char>(random());
      std::vector<float> floats(count);
      std::vector<kernels::bf16> rounded(count);
      DecodeToFloat(type, AsBytes(bytes), floats);
      DecodeToBf16(type, AsBytes(bytes), rounded);
      for (size_t i = 0; i < count; ++i) {
        if (std::isnan(floats[i])) {
          ASSERT_TRUE(std::isnan(kernels::ToFloat(rounded[i]))) << i;
        } else {
          ASSERT_EQ(rounded[i], kernels::RoundToBf16(floats[i])) << i;
        }
      }
    }
  }
}

TEST(GgufDequantTest, SourceNeedsNoAlignment) {
  const std::string plain = BytesOfValue(1.5f) + BytesOfValue(-2.0f);
  const std::string shifted = "x" + plain;
  std::vector<float> values(2);
  DecodeToFloat(StoredType::kF32, AsBytes(shifted).subspan(1), values);
  EXPECT_EQ(values[0], 1.5f);
  EXPECT_EQ(values[1], -2.0f);
}

}  // namespace
}  // namespace resa::engine
