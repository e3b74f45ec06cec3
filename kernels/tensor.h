#ifndef RESA_KERNELS_TENSOR_H_
#define RESA_KERNELS_TENSOR_H_

// Non-owning views of dense row-major matrices in a backend's memory.

#include <cstddef>
#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/check.h"

namespace resa::kernels {

enum class DType : uint8_t { kF32, kBF16 };

constexpr size_t BytesOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* NameOf(DType dtype) { return dtype == DType::kF32 ? "f32" : "bf16"; }

// [rows, cols], row-major and contiguous. Whoever made the memory owns it. A vector has rows == 1.
// The data is device memory for a device backend: only kernels::Ops may read it.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;

  size_t bytes() const { return static_cast<size_t>(rows * cols) * BytesOf(dtype); }
  // The first `count` rows; REQUIRES 0 <= count <= rows.
  Matrix First(int64_t count) const {
    RESA_CHECK(count >= 0 && count <= rows) << count << " of " << rows << " rows";
    return Matrix{data, dtype, count, cols};
  }
  float* f32() const {
    RESA_CHECK(dtype == DType::kF32);
    return static_cast<float*>(data);
  }
  bf16* b16() const {
    RESA_CHECK(dtype == DType::kBF16);
    return static_cast<bf16*>(data);
  }
};

}  // namespace resa::kernels

#endif  // RESA_KERNELS_TENSOR_H_
