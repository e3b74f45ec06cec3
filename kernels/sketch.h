#ifndef RESA_KERNELS_SKETCH_H_
#define RESA_KERNELS_SKETCH_H_

// The few-bit code of a key that the sketch selector scores: constants and scalar functions shared
// by every backend and by the reference of the tests. The layout in the pool is in params.h.
//
// A key k of d components (d a power of two) is rotated to x = H S k / sqrt(d), where S flips the
// signs of SketchSign() and H is the Hadamard matrix in natural order, H[i][j] = (-1)^popcount(i &
// j). The rotation is orthonormal, so dot products are unchanged, and the components of x are close
// to Gaussian whatever the key was. Each component becomes a code of three bits,
//   code = clamp(floor(x / (0.6 rms(x))) + 4, 0, 7),
// stored as bit planes, the upper bit first. Read with p planes a component stands for the level
//   2 (code >> (3 - p)) - (2^p - 1), one of  -1 1;  -3 -1 1 3;  -7 -5 .. 5 7,
// and the key for  level * <x, x> / <x, level>, unbiased along x (the estimator known from RaBitQ).
// The factor is stored once per token, for the finest level kept; the coarser ones follow by
// constants that hold for Gaussian components.
//
// What an estimated logit e weighs is its attention mass, exp(e) with straight lines between the
// powers of two:
//   mass(e) = 2^floor(x) (1 + x - floor(x)), x = e / ln 2.
// It is at most 6.2 % above exp(e), which is little next to the noise of estimates, and for a float
// no more than an integer added to its bits. Dividing by a power of two only shifts x.

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/check.h"

namespace resa::kernels {

inline constexpr int kSketchMaxPlanes = 3;
// Width of a code's interval in units of the key's rms.
inline constexpr float kSketchStep = 0.6f;
// E[x^2] / E[x level_p(x)] of a standard Gaussian x: the scale in units of the rms at p planes.
//   1 / (2 (phi(0) + 2 sum of phi at the level changes above 0)), phi the Gaussian density.
inline constexpr float kSketchGaussianScale[kSketchMaxPlanes + 1] = {0.0f, 1.25331414f, 0.63507032f,
                                                                     0.31023838f};

// The random signs, fixed for ever since pools may outlive a build: two outputs of SplitMix64.
inline constexpr uint64_t kSketchSignBits[2] = {0x8fe0ecc204d5699full, 0xf3267be5972f4f0cull};

// +1 or -1 for component j in [0, 128).
constexpr float SketchSign(int j) {
  return ((kSketchSignBits[j / 64] >> (j % 64)) & 1u) != 0 ? -1.0f : 1.0f;
}

// The three-bit code of a rotated component; inv_step = 1 / (0.6 rms). NaN gives code 0.
inline int SketchCode(float x, float inv_step) {
  const float cell = std::floor(x * inv_step) + 4.0f;
  return cell >= 7.0f ? 7 : cell >= 0.0f ? static_cast<int>(cell) : 0;
}

// The level that `planes` (1 to 3) upper bits of a three-bit code stand for.
constexpr int SketchLevel(int code, int planes) {
  return 2 * (code >> (kSketchMaxPlanes - planes)) - ((1 << planes) - 1);
}

// The scale of a key from <x, x> and <x, level>; 0 for a zero key.
inline float SketchScale(float x_dot_x, float x_dot_level) {
  return x_dot_x == 0.0f ? 0.0f : x_dot_x / x_dot_level;
}

// What turns the stored scale (of `stored_planes`) into the one to read `planes` with.
constexpr float SketchScaleRatio(int stored_planes, int planes) {
  return kSketchGaussianScale[planes] / kSketchGaussianScale[stored_planes];
}

// The number of blocks, of `num_blocks`, that a progressive pass scores again: the share, rounded
// up, and never fewer than the row's budget.
inline int64_t SketchRefineCount(float share, int64_t num_blocks, int64_t keep_blocks) {
  const auto wanted =
      static_cast<int64_t>(std::ceil(static_cast<double>(share) * static_cast<double>(num_blocks)));
  const int64_t least = wanted > keep_blocks ? wanted : keep_blocks;
  return least < num_blocks ? least : num_blocks;
}

// The rotated query as s8: q8 = round(q / scale), ties to even, with the largest sum of magnitudes
// of eight consecutive components (those of a byte of a plane) for the scale:
//   scale = max over i of (sum of |q_j|, 8 i <= j < 8 i + 8) / 123.
// Rounding adds at most a half to each, so that eight components always sum to 127 at the most, in
// whatever signs: a partial sum fits 8 bits, and a whole dot product with levels up to 7 fits 16.
// For Gaussian components the step is 0.07 rms, as fine as that of 127 levels up to max |q|.
inline constexpr float kSketchQueryRange = 123.0f;

}  // namespace resa::kernels

#endif  // RESA_KERNELS_SKETCH_H_
