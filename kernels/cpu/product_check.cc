#include "kernels/cpu/product_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/check.h"

namespace resa::kernels::cpu {
namespace {

std::vector<bf16> Draw(int64_t count, std::mt19937* random) {
  std::vector<bf16> out(static_cast<size_t>(count));
  for (bf16& value : out) {
    value = RoundToBf16(static_cast<float>((*random)() >> 8) * 0x1p-23f - 1.0f);
  }
  return out;
}

}  // namespace

ProductCheck::ProductCheck(int64_t in, int64_t cols) : in_(in), cols_(cols) {
  RESA_CHECK(in >= 1 && cols >= 1) << in << " x " << cols;
  std::mt19937 random(static_cast<uint32_t>(in));
  probes_ = Draw(kProbes * in, &random);
  weights_ = Draw(cols * in, &random);
}

std::string ProductCheck::Run(int64_t rows, const Product& product) {
  std::vector<bf16> x(static_cast<size_t>(rows * in_));
  std::vector<float> out(static_cast<size_t>(rows * cols_));
  for (int64_t shift = 0; shift < kProbes; ++shift) {
    const auto probe_at = [shift](int64_t row) { return (row + shift) % kProbes; };
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(probes_.begin() + probe_at(r) * in_, in_, x.begin() + r * in_);
    }
    product(x.data(), weights_.data(), out.data());
    if (expected_.empty()) {
      RESA_CHECK(shift == 0 && rows >= kProbes) << rows << " rows in the first product";
      expected_.assign(out.begin(), out.begin() + kProbes * cols_);
      std::string wrong = CompareWithExact();
      if (!wrong.empty()) return wrong;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (std::memcmp(out.data() + r * cols_, expected_.data() + probe_at(r) * cols_,
                      static_cast<size_t>(cols_) * sizeof(float)) != 0) {
        return "row " + std::to_string(r) + " of " + std::to_string(rows) +
               " has other bits than the same row elsewhere";
      }
    }
  }
  return "";
}

// Products of two bf16 are exact in f32. Each of the `in` additions errs, at random, by up to 2^-24
// of a partial sum, which is no larger than the sum of magnitudes.
std::string ProductCheck::CompareWithExact() const {
  for (int64_t r = 0; r < kProbes; ++r) {
    for (int64_t c = 0; c < cols_; ++c) {
      const bf16* const x = probes_.data() + r * in_;
      const bf16* const weights = weights_.data() + c * in_;
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < in_; ++k) {
        const double term = double{ToFloat(x[k])} * ToFloat(weights[k]);
        sum += term;
        magnitude += std::abs(term);
      }
      const double got = expected_[static_cast<size_t>(r * cols_ + c)];
      const double bound = std::sqrt(static_cast<double>(in_)) * 0x1p-24 * magnitude;
      if (!(std::abs(got - sum) <= bound)) {
        return "the product of row " + std::to_string(r) + " and column " + std::to_string(c) +
               " is " + std::to_string(got) + ", not " + std::to_string(sum);
      }
    }
  }
  return "";
}

}  // namespace resa::kernels::cpu
