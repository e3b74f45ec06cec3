// Embedding, RMS norm, SiLU times up, the rotary table.

#include <cmath>

#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using kernels::bf16;

class PointwiseTest : public OpsTest {};

TEST_P(PointwiseTest, EmbedWidensRows) {
  auto ops = MakeOps(2);
  for (int64_t cols : {1, 15, 64, 576, 1001}) {
    std::vector<bf16> table = NormalBf16(static_cast<size_t>(20 * cols));
    std::vector<int32_t> ids;
    for (int i = 0; i < 77; ++i) ids.push_back(Uniform(0, 19));
    std::vector<float> out = Poison(static_cast<size_t>(77 * cols));
    ops->Embed(
        {.ids = ids.data(), .table = AsMatrix(table, 20, cols), .out = AsMatrix(out, 77, cols)});
    for (int64_t i = 0; i < 77 * cols; ++i) {
      const auto from = static_cast<size_t>(ids[static_cast<size_t>(i / cols)] * cols + i % cols);
      ASSERT_EQ(out[static_cast<size_t>(i)], ToFloat(table[from]));
    }
  }
}

TEST_P(PointwiseTest, RmsNormMatchesFloat64AndMayBeInPlace) {
  auto ops = MakeOps(2);
  for (int64_t cols : {1, 7, 16, 63, 64, 100, 576, 4096}) {
    std::vector<float> x = Activations(static_cast<size_t>(9 * cols), 3.0f);
    const std::vector<float> weight = Normal(static_cast<size_t>(cols));
    const Doubles want = ReferenceRmsNorm(x, weight, 1e-5f, 9);
    std::vector<float> out = Poison(x.size());
    ops->RmsNorm({.x = AsMatrix(x, 9, cols),
                  .weight = weight.data(),
                  .eps = 1e-5f,
                  .out = AsMatrix(out, 9, cols)});
    // A sum of squares of one sign, a root and two products: a few times 2^-24.
    EXPECT_EQ(CompareStored(out, want, static_cast<size_t>(cols), activation_dtype(), 5e-7), "")
        << cols << " columns";
    // One row alone gives the same bits, in place too.
    std::vector<float> row(x.begin() + 4 * cols, x.begin() + 5 * cols);
    ops->RmsNorm({.x = AsMatrix(row, 1, cols),
                  .weight = weight.data(),
                  .eps = 1e-5f,
                  .out = AsMatrix(row, 1, cols)});
    EXPECT_EQ(
        CompareBits(
            row, std::span(out).subspan(static_cast<size_t>(4 * cols), static_cast<size_t>(cols)),
            static_cast<size_t>(cols)),
        "");
  }
}

TEST_P(PointwiseTest, SiluMulMatchesFloat64OverTheWholeRange) {
  auto ops = MakeOps(2);
  std::vector<float> gate = Activations(50000, 4.0f);
  for (int i = -200; i <= 200; ++i) gate.push_back(static_cast<float>(i) * 0.5f);
  gate.push_back(std::numeric_limits<float>::quiet_NaN());
  gate.push_back(std::numeric_limits<float>::infinity());
  const auto n = static_cast<int64_t>(gate.size());
  std::vector<float> up = Activations(gate.size());
  up.back() = 1.0f;
  Doubles want;
  for (size_t i = 0; i < gate.size(); ++i) {
    want.push_back(gate[i] / (1 + std::exp(-double{gate[i]})) * up[i]);
  }
  std::vector<float> out = gate;  // In place.
  ops->SiluMul({.gate = AsMatrix(out, 1, n), .up = AsMatrix(up, 1, n), .out = AsMatrix(out, 1, n)});
  // exp() is good to 2e-7, two more operations.
  EXPECT_EQ(CompareStored(out, want, static_cast<size_t>(n), activation_dtype(), 4e-7), "");
  for (size_t i = 0; i < out.size(); ++i) {
    if (!std::isfinite(gate[i]) || gate[i] < -60.0f) continue;
    // A GPU's fast exp() errs by 2^-22 for each unit of its argument. That is far below what is
    // then lost by rounding to bf16, but shows next to a rounding boundary.
    const double tolerance = IsCuda() ? 5e-7 * (1 + std::abs(gate[i])) : 5e-7;
    ASSERT_EQ(CompareStored(std::span(out).subspan(i, 1), std::span(want).subspan(i, 1), 1,
                            activation_dtype(), tolerance),
              "")
        << "silu of " << gate[i];
  }
}

// The angle is the f32 product of position and frequency; its sine and cosine must be those of that
// number even at a million tokens.
TEST_P(PointwiseTest, RopeTableIsExactAtLargePositions) {
  auto ops = MakeOps(2);
  for (int d : {64, 128}) {
    std::vector<float> inv_freq;
    for (int j = 0; j < d / 2; ++j) {
      inv_freq.push_back(static_cast<float>(std::pow(500000.0, -2.0 * j / d)));
    }
    std::vector<int32_t> positions = {0, 1, 2, 3, 1000, 32767, 131071, 262143, 1048575, 16000000};
    for (int i = 0; i < 50; ++i) positions.push_back(Uniform(0, 1 << 20));
    const auto rows = static_cast<int64_t>(positions.size());
    std::vector<float> cos = Poison(positions.size() * static_cast<size_t>(d / 2));
    std::vector<float> sin = cos;
    ops->RopeTable({.positions = positions.data(),
                    .rows = rows,
                    .inv_freq = inv_freq.data(),
                    .head_dim = d,
                    .factor = 1.25f,
                    .cos = cos.data(),
                    .sin = sin.data()});
    for (size_t i = 0; i < cos.size(); ++i) {
      const float angle = static_cast<float>(positions[i / static_cast<size_t>(d / 2)]) *
                          inv_freq[i % static_cast<size_t>(d / 2)];
      ASSERT_NEAR(cos[i], 1.25 * std::cos(double{angle}), 2e-7) << angle;
      ASSERT_NEAR(sin[i], 1.25 * std::sin(double{angle}), 2e-7) << angle;
    }
  }
}

RESA_INSTANTIATE_OPS_TEST(PointwiseTest);

}  // namespace
}  // namespace resa::testing
