#include "engine/gguf_dequant.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/check.h"

namespace resa::engine {
namespace {

// Elements decoded at a time on the way to bf16: whole blocks of every type, and small enough to
// stay in the first-level cache.
constexpr size_t kChunk = 1024;
constexpr int kBlock = 32;

uint16_t LoadHalf(const std::byte* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  return half;
}

// The loops below have no branches and no calls, so that the compiler can vectorise them.

void DecodeF16(const std::byte* source, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = HalfToFloat(LoadHalf(source + 2 * i));
}

void DecodeBf16(const std::byte* source, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = kernels::ToFloat({LoadHalf(source + 2 * i)});
}

void DecodeQ8(const std::byte* source, size_t count, float* out) {
  for (size_t b = 0; b < count / kBlock; ++b, source += 34, out += kBlock) {
    const float d = HalfToFloat(LoadHalf(source));
    for (int i = 0; i < kBlock; ++i) out[i] = d * static_cast<int8_t>(source[2 + i]);
  }
}

// Q4_0 and Q4_1 differ in what the block begins with.
void DecodeNibbles(const std::byte* nibbles, float d, float offset, int zero, float* out) {
  for (int i = 0; i < kBlock / 2; ++i) {
    const int byte = std::to_integer<int>(nibbles[i]);
    out[i] = d * static_cast<float>((byte & 15) - zero) + offset;
    out[i + kBlock / 2] = d * static_cast<float>((byte >> 4) - zero) + offset;
  }
}

void DecodeQ4_0(const std::byte* source, size_t count, float* out) {
  for (size_t b = 0; b < count / kBlock; ++b, source += 18, out += kBlock) {
    DecodeNibbles(source + 2, HalfToFloat(LoadHalf(source)), 0.0f, 8, out);
  }
}

void DecodeQ4_1(const std::byte* source, size_t count, float* out) {
  for (size_t b = 0; b < count / kBlock; ++b, source += 20, out += kBlock) {
    DecodeNibbles(source + 4, HalfToFloat(LoadHalf(source)), HalfToFloat(LoadHalf(source + 2)), 0,
                  out);
  }
}

void Decode(StoredType type, const std::byte* source, size_t count, float* out) {
  switch (type) {
    case StoredType::kF32:
      std::memcpy(out, source, count * sizeof(float));
      return;
    case StoredType::kF16:
      return DecodeF16(source, count, out);
    case StoredType::kBF16:
      return DecodeBf16(source, count, out);
    case StoredType::kQ8_0:
      return DecodeQ8(source, count, out);
    case StoredType::kQ4_0:
      return DecodeQ4_0(source, count, out);
    case StoredType::kQ4_1:
      return DecodeQ4_1(source, count, out);
  }
}

size_t SourceBytes(StoredType type, size_t count) {
  return count / static_cast<size_t>(BlockElements(type)) * static_cast<size_t>(BlockBytes(type));
}

void CheckSizes(StoredType type, std::span<const std::byte> source, size_t count) {
  RESA_CHECK(count % static_cast<size_t>(BlockElements(type)) == 0);
  RESA_CHECK_EQ(source.size(), SourceBytes(type, count));
}

}  // namespace

float HalfToFloat(uint16_t half) {
  // Exponent and mantissa move to their places in binary32; multiplying by 2^(127 - 15) corrects
  // the exponent's bias and normalises subnormals. Infinity and NaN need the full exponent.
  const uint32_t magnitude = uint32_t{half & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : 0u;
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  return std::bit_cast<float>((special != 0 ? special : std::bit_cast<uint32_t>(scaled)) | sign);
}

void DecodeToFloat(StoredType type, std::span<const std::byte> source, std::span<float> out) {
  CheckSizes(type, source, out.size());
  if (!out.empty()) Decode(type, source.data(), out.size(), out.data());
}

void DecodeToBf16(StoredType type, std::span<const std::byte> source,
                  std::span<kernels::bf16> out) {
  CheckSizes(type, source, out.size());
  if (type == StoredType::kBF16) {
    if (!out.empty()) std::memcpy(out.data(), source.data(), source.size());
    return;
  }
  alignas(64) float chunk[kChunk];
  for (size_t begin = 0; begin < out.size(); begin += kChunk) {
    const size_t count = std::min(kChunk, out.size() - begin);
    Decode(type, source.data() + SourceBytes(type, begin), count, chunk);
    kernels::bf16* to = out.data() + begin;
    for (size_t i = 0; i < count; ++i) to[i] = kernels::RoundToBf16(chunk[i]);
  }
}

}  // namespace resa::engine
