// Linears: the norm before products and the gate behind them, against float64 and against the ops
// one by one.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using kernels::bf16;

constexpr float kEps = 1e-5f;

// Of f32: norm, product of up to 2100 terms and gate, a few 2^-24 each.
constexpr double kTolerance = 4e-6;

// x normed, or times the norm's weight, is stored as bf16: 1.5e-3 in the root mean square, of a row
// of at least 64 columns. So may gate and up be; together they double it, and a product that
// happens to be small does so again.
constexpr double kBf16Tolerance = 1e-2;

struct Case {
  int64_t in;
  std::vector<int64_t> widths;
  bool normed, gated;
};

class LinearsTest : public OpsTest {
 protected:
  // What is given to Linears, and to the ops one by one.
  struct Data {
    std::vector<float> x, norm;
    std::vector<std::vector<bf16>> weights;
    std::vector<std::vector<float>> biases, before;
  };

  double tolerance() const {
    return activation_dtype() == kernels::DType::kF32 ? kTolerance : kBf16Tolerance;
  }

  Data Make(const Case& c, int64_t rows) {
    Data data;
    data.x = Activations(static_cast<size_t>(rows * c.in), 3.0f);
    if (c.normed) data.norm = Normal(static_cast<size_t>(c.in));
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.in));
    for (int64_t width : c.widths) {
      data.weights.push_back(NormalBf16(static_cast<size_t>(width * c.in), scale));
      data.biases.push_back(Normal(static_cast<size_t>(width)));
      data.before.push_back(Activations(static_cast<size_t>(rows * width)));
    }
    return data;
  }

  // Product i has a bias unless it is the second, and accumulates if it is the third.
  std::vector<std::vector<float>> Run(kernels::Ops& ops, const Case& c, Data data, int64_t rows,
                                      bool one_by_one) {
    std::vector<float> normed = Poison(data.x.size());
    std::vector<float>& x = c.normed ? normed : data.x;
    std::vector<kernels::LinearParams> products;
    for (size_t i = 0; i < c.widths.size(); ++i) {
      products.push_back({.x = AsMatrix(x, rows, c.in),
                          .weight = AsMatrix(data.weights[i], c.widths[i], c.in),
                          .bias = i == 1 ? nullptr : data.biases[i].data(),
                          .accumulate = i == 2,
                          .out = AsMatrix(data.before[i], rows, c.widths[i])});
    }
    kernels::LinearsParams params = {.products = products, .gated = c.gated};
    if (c.normed) {
      params.norm = {.x = AsMatrix(data.x, rows, c.in),
                     .weight = data.norm.data(),
                     .eps = kEps,
                     .out = AsMatrix(normed, rows, c.in)};
    }
    if (!one_by_one) {
      ops.Linears(params);
    } else {
      if (c.normed) ops.RmsNorm(params.norm);
      for (const kernels::LinearParams& p : products) ops.Linear(p);
      if (c.gated) {
        ops.SiluMul({.gate = products[0].out, .up = products[1].out, .out = products[0].out});
      }
    }
    if (c.gated) data.before.resize(1);
    return data.before;
  }

  // In float64.
  std::vector<Doubles> Reference(const Case& c, const Data& data, int64_t rows) {
    Doubles x(data.x.begin(), data.x.end());
    if (c.normed) x = ReferenceRmsNorm(data.x, data.norm, kEps, rows);
    std::vector<Doubles> out;
    for (size_t i = 0; i < c.widths.size(); ++i) {
      Doubles& to = out.emplace_back();
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t j = 0; j < c.widths[i]; ++j) {
          double sum = i == 1 ? 0.0 : data.biases[i][static_cast<size_t>(j)];
          if (i == 2) sum += data.before[i][static_cast<size_t>(t * c.widths[i] + j)];
          for (int64_t k = 0; k < c.in; ++k) {
            sum += x[static_cast<size_t>(t * c.in + k)] *
                   ToFloat(data.weights[i][static_cast<size_t>(j * c.in + k)]);
          }
          to.push_back(sum);
        }
      }
    }
    if (!c.gated) return out;
    for (size_t i = 0; i < out[0].size(); ++i) {
      out[0][i] *= out[1][i] / (1.0 + std::exp(-out[0][i]));
    }
    out.resize(1);
    return out;
  }

  static std::string Describe(const Case& c, int64_t rows) {
    return std::to_string(rows) + " rows of " + std::to_string(c.in) + ", " +
           std::to_string(c.widths.size()) + " products, the first of " +
           std::to_string(c.widths[0]) + (c.normed ? ", normed" : "") + (c.gated ? ", gated" : "");
  }
};

const std::vector<Case>& Cases() {
  static const std::vector<Case> cases = {
      {64, {70}, true, false},           {45, {67, 67}, true, true},
      {192, {448, 64, 72}, true, false}, {192, {500, 500}, true, true},
      {1024, {97, 97}, false, true},     {96, {900, 900}, true, true},
      {2080, {130}, true, false},        {576, {300, 300}, true, true}};
  return cases;
}

TEST_P(LinearsTest, MatchesFloat64) {
  auto ops = MakeOps(2);
  for (const Case& c : Cases()) {
    for (int64_t rows : {1, 2, 3, 5, 8, 9, 40}) {
      const Data data = Make(c, rows);
      const auto out = Run(*ops, c, data, rows, false);
      const std::vector<Doubles> want = Reference(c, data, rows);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_EQ(CompareStored(out[i], want[i], static_cast<size_t>(c.widths[i]),
                                activation_dtype(), tolerance()),
                  "")
            << Describe(c, rows) << ", product " << i;
      }
    }
  }
}

// A few rows take one launch on a GPU, unless x has a rest of columns.
TEST_P(LinearsTest, FewRowsAreFusedOnAGpu) {
  auto ops = MakeOps(2);
  int64_t fused = 0;
  for (const Case& c : Cases()) {
    for (int64_t rows : {1, 3, 8, 9, 40}) {
      Run(*ops, c, Make(c, rows), rows, false);
      fused += IsCuda() && rows <= 8 && c.in % 32 == 0 ? 1 : 0;
      EXPECT_EQ(ops->counters().linears_fused, fused) << Describe(c, rows);
    }
  }
}

// Where activations are f32, and on a GPU in the mode whose rows depend on nothing else.
TEST_P(LinearsTest, HasTheBitsOfTheOpsOneByOne) {
  auto ops = MakeOps({.threads = 2, .deterministic = true});
  for (const Case& c : Cases()) {
    for (int64_t rows : {1, 8, 40}) {
      const Data data = Make(c, rows);
      const auto together = Run(*ops, c, data, rows, false);
      const auto apart = Run(*ops, c, data, rows, true);
      for (size_t i = 0; i < together.size(); ++i) {
        EXPECT_EQ(CompareBits(together[i], apart[i], static_cast<size_t>(c.widths[i])), "")
            << Describe(c, rows) << ", product " << i;
      }
    }
  }
}

TEST_P(LinearsTest, ARowOfNaNsStaysAlone) {
  auto ops = MakeOps(2);
  for (const Case& c : Cases()) {
    for (int64_t rows : {8, 20}) {
      Data data = Make(c, rows);
      const auto want = Run(*ops, c, data, rows, false);
      std::fill_n(data.x.begin() + 5 * c.in, c.in, std::numeric_limits<float>::quiet_NaN());
      const auto out = Run(*ops, c, data, rows, false);
      for (size_t i = 0; i < out.size(); ++i) {
        for (size_t j = 0; j < out[i].size(); ++j) {
          if (j / static_cast<size_t>(c.widths[i]) == 5) {
            ASSERT_TRUE(std::isnan(out[i][j])) << Describe(c, rows);
          } else {
            ASSERT_EQ(out[i][j], want[i][j]) << Describe(c, rows);
          }
        }
      }
    }
  }
}

RESA_INSTANTIATE_OPS_TEST(LinearsTest);

}  // namespace
}  // namespace resa::testing
