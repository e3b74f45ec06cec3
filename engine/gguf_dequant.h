#ifndef RESA_ENGINE_GGUF_DEQUANT_H_
#define RESA_ENGINE_GGUF_DEQUANT_H_

// Decodes stored elements, plain or in GGUF's blocks, to f32 or bf16.
//
// A block holds 32 elements of one row, little endian:
//   Q8_0: f16 d, s8 q[32]           x_i = d q_i                                        34 bytes
//   Q4_0: f16 d, u8 n[16]           x_i = d (nibble_i - 8)                             18 bytes
//   Q4_1: f16 d, f16 m, u8 n[16]    x_i = d nibble_i + m                               20 bytes
// where nibble_i is the low half of n[i] for i < 16 and the high half of n[i - 16] above.
// Every product is exact in f32 (11 + 8 bits), so the value does not depend on whether the compiler
// fuses multiply and add; Q4_1's sum is rounded once to f32.

#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/stored_tensor.h"
#include "kernels/bf16.h"

namespace resa::engine {

// IEEE binary16 to binary32, exactly; subnormals, infinities and NaN included.
float HalfToFloat(uint16_t half);

// Decodes `source`, whole blocks of `type` at any alignment, into `out`; to bf16 with rounding to
// nearest even. REQUIRES out.size() == elements in `source`.
void DecodeToFloat(StoredType type, std::span<const std::byte> source, std::span<float> out);
void DecodeToBf16(StoredType type, std::span<const std::byte> source, std::span<kernels::bf16> out);

}  // namespace resa::engine

#endif  // RESA_ENGINE_GGUF_DEQUANT_H_
