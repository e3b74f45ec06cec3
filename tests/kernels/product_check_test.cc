#include "kernels/cpu/product_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace resa::testing {
namespace {

using kernels::bf16;
using kernels::cpu::ProductCheck;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kIn = 37;
constexpr int64_t kCols = 5;

// One after the other in f32; `backwards` gives other bits of the same sum.
float Dot(const bf16* a, const bf16* b, bool backwards = false) {
  float sum = 0;
  for (int64_t i = 0; i < kIn; ++i) {
    const int64_t k = backwards ? kIn - 1 - i : i;
    sum += ToFloat(a[k]) * ToFloat(b[k]);
  }
  return sum;
}

// The product of `rows` rows, with dot(x, row, weights of a column) for one value.
template <class DotOfRow>
ProductCheck::Product ProductOf(int64_t rows, DotOfRow dot) {
  return [rows, dot](const bf16* x, const bf16* weights, float* out) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < kCols; ++c) out[r * kCols + c] = dot(x, r, weights + c * kIn);
    }
  };
}
ProductCheck::Product Honest(int64_t rows) {
  return ProductOf(rows,
                   [](const bf16* x, int64_t r, const bf16* w) { return Dot(x + r * kIn, w); });
}

TEST(ProductCheckTest, AProductRowByRowPassesInEverySize) {
  ProductCheck check(kIn, kCols);
  for (int64_t rows : {16, 1, 4, 3, 64}) EXPECT_THAT(check.Run(rows, Honest(rows)), IsEmpty());
}

TEST(ProductCheckTest, TellsAPlaceThatSumsInAnotherOrder) {
  for (int64_t place : {0, 1, 15}) {
    ProductCheck check(kIn, kCols);
    const auto product = ProductOf(16, [place](const bf16* x, int64_t r, const bf16* w) {
      return Dot(x + r * kIn, w, r == place);
    });
    EXPECT_THAT(check.Run(16, product), HasSubstr("of 16 has other bits")) << place;
  }
}

TEST(ProductCheckTest, TellsASizeThatSumsInAnotherOrder) {
  ProductCheck check(kIn, kCols);
  ASSERT_THAT(check.Run(16, Honest(16)), IsEmpty());
  const auto product = ProductOf(
      1, [](const bf16* x, int64_t r, const bf16* w) { return Dot(x + r * kIn, w, true); });
  EXPECT_THAT(check.Run(1, product), HasSubstr("row 0 of 1 has other bits"));
}

// Every row at once changes with what stands above it.
TEST(ProductCheckTest, TellsARowThatItsNeighbourDisturbs) {
  ProductCheck check(kIn, kCols);
  const auto product = ProductOf(16, [](const bf16* x, int64_t r, const bf16* w) {
    return Dot(x + r * kIn, w, r > 0 && ToFloat(x[(r - 1) * kIn]) > ToFloat(x[r * kIn]));
  });
  EXPECT_THAT(check.Run(16, product), HasSubstr("has other bits"));
}

TEST(ProductCheckTest, TellsAWrongValue) {
  const auto forgets_the_last = [](const bf16* x, int64_t r, const bf16* w) {
    const float last = ToFloat(x[r * kIn + kIn - 1]) * ToFloat(w[kIn - 1]);
    return Dot(x + r * kIn, w) - last;
  };
  EXPECT_THAT(ProductCheck(kIn, kCols).Run(4, ProductOf(4, forgets_the_last)), HasSubstr(", not "));
  const auto nan = [](const bf16*, int64_t, const bf16*) {
    return std::numeric_limits<float>::quiet_NaN();
  };
  EXPECT_THAT(ProductCheck(kIn, kCols).Run(4, ProductOf(4, nan)), HasSubstr("is nan, not"));
}

TEST(ProductCheckDeathTest, TheFirstProductShowsEveryProbe) {
  EXPECT_DEATH(ProductCheck(kIn, kCols).Run(3, Honest(3)), "3 rows in the first product");
}

}  // namespace
}  // namespace resa::testing
