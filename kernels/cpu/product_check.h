#ifndef RESA_KERNELS_CPU_PRODUCT_CHECK_H_
#define RESA_KERNELS_CPU_PRODUCT_CHECK_H_

// Whether a matrix product by somebody else's code gives a row the same bits wherever it stands,
// whatever stands beside it and however many rows there are. No library promises that, and which
// of its kernels a machine gets is not ours to say; so it is tried on the machine.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/bf16.h"

namespace resa::kernels::cpu {

class ProductCheck {
 public:
  static constexpr int64_t kProbes = 4;  // Rows told apart.

  // out [rows, cols] = x [rows, in] times the transpose of weights [cols, in], summed in f32.
  using Product = std::function<void(const bf16* x, const bf16* weights, float* out)>;

  // REQUIRES in, cols >= 1.
  ProductCheck(int64_t in, int64_t cols);

  // Runs `product` of `rows` rows kProbes times, so that each probe stands at every place once,
  // between other neighbours than before. Empty when all bits are those of the first product this
  // object has seen, and those of the exact value but for rounding; otherwise what is wrong.
  // The first product needs rows >= kProbes.
  std::string Run(int64_t rows, const Product& product);

 private:
  std::string CompareWithExact() const;

  const int64_t in_;
  const int64_t cols_;
  std::vector<bf16> probes_;     // [kProbes, in], in [-1, 1], the same on every machine
  std::vector<bf16> weights_;    // [cols, in], likewise
  std::vector<float> expected_;  // [kProbes, cols]; empty until the first product.
};

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_PRODUCT_CHECK_H_
