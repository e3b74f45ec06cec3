// The sketch's rotation (kernels/sketch.h) in registers: sign flips, the fast Hadamard transform,
// d^-1/2. Compiled once per instruction set.

#if defined(RESA_KERNELS_CPU_SKETCH_ROTATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SKETCH_ROTATE_INL_H_
#undef RESA_KERNELS_CPU_SKETCH_ROTATE_INL_H_
#else
#define RESA_KERNELS_CPU_SKETCH_ROTATE_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/params.h"
#include "kernels/sketch.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// SketchSign(j) d^-1/2, and +1 / -1 by a bit of the lane's index.
template <size_t kDim>
struct RotationTables {
  alignas(64) float sign[kDim];
  alignas(64) float butterfly[4][16];
};
template <size_t kDim>
constexpr RotationTables<kDim> MakeRotationTables() {
  RotationTables<kDim> tables = {};
  constexpr float kInverseRoot = kDim == 64 ? 0.125f : 0.088388347648318440550f;
  for (size_t j = 0; j < kDim; ++j) tables.sign[j] = SketchSign(static_cast<int>(j)) * kInverseRoot;
  for (size_t bit = 0; bit < 4; ++bit) {
    for (size_t lane = 0; lane < 16; ++lane) {
      tables.butterfly[bit][lane] = ((lane >> bit) & 1) != 0 ? -1.0f : 1.0f;
    }
  }
  return tables;
}
template <size_t kDim>
inline constexpr RotationTables<kDim> kRotation = MakeRotationTables<kDim>();

// a + b in the lanes of a pair's first member, a - b in the second's; `swapped` has them exchanged.
HWY_INLINE VF Butterfly(VF x, VF swapped, const float* signs) {
  return hn::MulAdd(x, hn::Load(DF(), signs), swapped);
}

// x = H S from / sqrt(kDim).
template <size_t kDim, class T>
HWY_INLINE void Rotate(const T* from, VF (&x)[kDim / kLanes]) {
  constexpr size_t kVectors = kDim / kLanes;
  const DF d;
  const RotationTables<kDim>& tables = kRotation<kDim>;
  for (size_t i = 0; i < kVectors; ++i) {
    VF v = hn::Mul(LoadWide(from + i * kLanes), hn::Load(d, tables.sign + i * kLanes));
    v = Butterfly(v, hn::Shuffle2301(v), tables.butterfly[0]);
    v = Butterfly(v, hn::Shuffle1032(v), tables.butterfly[1]);
#if HWY_MAX_BYTES >= 32
    v = Butterfly(v, hn::SwapAdjacentBlocks(v), tables.butterfly[2]);
#endif
#if HWY_MAX_BYTES == 64
    v = Butterfly(v, hn::ConcatLowerUpper(d, v, v), tables.butterfly[3]);
#endif
    x[i] = v;
  }
  for (size_t stride = 1; stride < kVectors; stride *= 2) {
    for (size_t i = 0; i < kVectors; i += 2 * stride) {
      for (size_t j = i; j < i + stride; ++j) {
        const VF a = x[j], b = x[j + stride];
        x[j] = hn::Add(a, b);
        x[j + stride] = hn::Sub(a, b);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SKETCH_ROTATE_INL_H_
