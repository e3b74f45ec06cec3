#ifndef RESA_KERNELS_BF16_H_
#define RESA_KERNELS_BF16_H_

// The 16-bit brain float: the upper half of an IEEE binary32. Storage only; arithmetic is in f32.

#include <bit>
#include <cstdint>

namespace resa::kernels {

struct bf16 {
  uint16_t bits;
  friend bool operator==(bf16, bf16) = default;  // Bitwise: -0 differs from +0, NaN equals itself.
};
static_assert(sizeof(bf16) == 2);

inline float ToFloat(bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

// Rounds to nearest, ties to even. NaN stays NaN (quiet), overflow becomes infinity.
inline bf16 RoundToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The largest bf16 <= value, and the smallest >= value: bounds of a min/max descriptor stay bounds.
inline bf16 FloorToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return RoundToBf16(value);
  const bool inexact = (bits & 0xffffu) != 0;
  const bool negative = (bits >> 31) != 0;
  return bf16{static_cast<uint16_t>((bits >> 16) + (inexact && negative ? 1 : 0))};
}
inline bf16 CeilToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return RoundToBf16(value);
  const bool inexact = (bits & 0xffffu) != 0;
  const bool negative = (bits >> 31) != 0;
  return bf16{static_cast<uint16_t>((bits >> 16) + (inexact && !negative ? 1 : 0))};
}

}  // namespace resa::kernels

#endif  // RESA_KERNELS_BF16_H_
