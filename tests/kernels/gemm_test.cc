// Linear: against float64, and bit by bit across batches and threads.

#include "tests/kernels/compare.h"
#include "tests/kernels/linear_fixture.h"

namespace resa::testing {
namespace {

using kernels::bf16;

// A sum of up to 2100 products in chains of at most 1024 / 8 * 2 multiply-adds, each rounded to
// 2^-24 of a partial sum that is no larger than the final one on average: sqrt(256) 2^-24 = 1e-6.
constexpr double kTolerance = 2e-6;

// Storing as bf16, in the root mean square over all mantissas: half a unit of the last of 8 bits is
// uniform, of variance 2^-16 / 3, and the mantissas' mean square is 7 / 3.
constexpr double kBf16Rounding = 1.5e-3;

class GemmTest : public LinearTest {};

TEST_P(GemmTest, MatchesFloat64) {
  auto ops = MakeOps(2);
  auto to_logits = MakeOps({.threads = 2, .linear_writes_f32 = true});
  for (const LinearCase& shape : kLinearCases) {
    std::vector<bf16> weight = NormalBf16(static_cast<size_t>(shape.out * shape.in), 0.1f);
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 31, 64, 530}) {
      if (rows == 530 && shape.out > 64) continue;
      const std::vector<float> x = Activations(static_cast<size_t>(rows * shape.in));
      const std::vector<float> bias =
          rows % 2 == 0 ? Normal(static_cast<size_t>(shape.out)) : std::vector<float>();
      const auto columns = static_cast<size_t>(shape.out);
      // A library's product is stored before the bias is added to it: rounded once more.
      const bool twice = !bias.empty() && activation_dtype() == kernels::DType::kBF16;
      const Doubles want = ReferenceLinear(x, weight, bias, rows, shape.out, shape.in);
      EXPECT_EQ(CompareStored(Linear(*ops, x, weight, bias, rows, shape), want, columns,
                              activation_dtype(), twice ? kBf16Rounding : kTolerance),
                "")
          << rows << " rows, [" << shape.out << ", " << shape.in << "]";
      EXPECT_EQ(
          Compare(Linear(*to_logits, x, weight, bias, rows, shape), want, columns, kTolerance), "")
          << rows << " rows, [" << shape.out << ", " << shape.in << "], to f32";
    }
  }
}

TEST_P(GemmTest, IntegersAreExact) {
  auto ops = MakeOps({.threads = 2, .linear_writes_f32 = true});
  std::vector<bf16> weight;
  for (int i = 0; i < 70 * 1500; ++i) {
    weight.push_back(kernels::RoundToBf16(static_cast<float>(Uniform(-8, 8))));
  }
  std::vector<float> x;
  for (int i = 0; i < 20 * 1500; ++i) x.push_back(static_cast<float>(Uniform(-8, 8)));
  for (int64_t rows : {1, 20}) {
    const std::vector<float> some(x.begin(), x.begin() + rows * 1500);
    const std::vector<float> out = Linear(*ops, some, weight, {}, rows, {70, 1500});
    EXPECT_EQ(Compare(out, ReferenceLinear(some, weight, {}, rows, 70, 1500), 70, 0.0), "");
  }
}

TEST_P(GemmTest, BatchAndThreadsDoNotChangeABit) {
  for (const LinearCase& shape : kLinearCases) {
    ExpectBatchAndThreadsDoNotChangeABit(
        [this](int threads) { return MakeOps({.threads = threads, .deterministic = true}); }, shape,
        40, {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 33, 40});
  }
}

TEST_P(GemmTest, AccumulateAddsToWhatIsThere) {
  auto ops = MakeOps(2);
  std::vector<bf16> weight = NormalBf16(37 * 100);
  for (int64_t rows : {1, 3, 30}) {
    std::vector<float> x = Activations(static_cast<size_t>(rows * 100));
    const std::vector<float> before = Activations(static_cast<size_t>(rows * 37));
    const std::vector<float> product = Linear(*ops, x, weight, {}, rows, {37, 100});
    std::vector<float> out = before;
    ops->Linear({.x = AsMatrix(x, rows, 100),
                 .weight = AsMatrix(weight, 37, 100),
                 .accumulate = true,
                 .out = AsMatrix(out, rows, 37)});
    Doubles want = ReferenceLinear(x, weight, {}, rows, 37, 100);
    for (size_t i = 0; i < want.size(); ++i) want[i] += before[i];
    EXPECT_EQ(CompareStored(out, want, 37, activation_dtype(), kTolerance), "");
    if (activation_dtype() != kernels::DType::kF32) continue;
    for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], before[i] + product[i]) << i;
  }
}

// A file mapping aligns weights to nothing, and what follows them may be another page.
TEST_P(GemmTest, WeightsNeedNoAlignmentAndNothingPastThemIsRead) {
  auto ops = MakeOps(1);
  const std::vector<bf16> weight = NormalBf16(5 * 45);
  std::vector<float> x = Activations(2 * 45);
  // The allocation ends with the weights: a read past them is an AddressSanitizer error.
  for (size_t shift : {0, 1, 3}) {
    std::vector<bf16> shifted(shift, bf16{0x7fc0});
    shifted.insert(shifted.end(), weight.begin(), weight.end());
    shifted.shrink_to_fit();
    std::vector<float> out = Poison(2 * 5);
    ops->Linear({.x = AsMatrix(x, 2, 45),
                 .weight = {shifted.data() + shift, kernels::DType::kBF16, 5, 45},
                 .out = AsMatrix(out, 2, 5)});
    EXPECT_EQ(CompareStored(out, ReferenceLinear(x, weight, {}, 2, 5, 45), 5, activation_dtype(),
                            kTolerance),
              "");
  }
}

// As a model asks for Q, K and V: other widths, some with a bias, accumulating or not.
TEST_P(GemmTest, ProductsOfTheSameRowsAreThoseOfEachAlone) {
  auto ops = MakeOps({.threads = 2, .deterministic = true});
  constexpr int64_t kIn = 192;
  const std::vector<int64_t> widths = {448, 64, 72};
  std::vector<std::vector<bf16>> weights;
  std::vector<std::vector<float>> biases;
  for (int64_t width : widths) {
    weights.push_back(NormalBf16(static_cast<size_t>(width * kIn), 0.1f));
    biases.push_back(Normal(static_cast<size_t>(width)));
  }
  for (int64_t rows : {1, 2, 8, 9, 40}) {
    for (size_t count : {1, 2, 3}) {
      std::vector<float> x = Activations(static_cast<size_t>(rows * kIn));
      std::vector<std::vector<float>> together, alone;
      for (size_t i = 0; i < count; ++i) {
        together.push_back(Activations(static_cast<size_t>(rows * widths[i])));
      }
      alone = together;
      const auto params = [&](std::vector<std::vector<float>>& out, size_t i) {
        return kernels::LinearParams{.x = AsMatrix(x, rows, kIn),
                                     .weight = AsMatrix(weights[i], widths[i], kIn),
                                     .bias = i == 1 ? nullptr : biases[i].data(),
                                     .accumulate = i == 2,
                                     .out = AsMatrix(out[i], rows, widths[i])};
      };
      std::vector<kernels::LinearParams> products;
      for (size_t i = 0; i < count; ++i) products.push_back(params(together, i));
      ops->Linears({.products = products});
      for (size_t i = 0; i < count; ++i) {
        ops->Linear(params(alone, i));
        EXPECT_EQ(CompareBits(together[i], alone[i], static_cast<size_t>(widths[i])), "")
            << rows << " rows, product " << i << " of " << count;
      }
    }
  }
}

TEST_P(GemmTest, ARowOfNaNsStaysAlone) { ExpectARowOfNansStaysAlone(*MakeOps(2)); }

RESA_INSTANTIATE_OPS_TEST(GemmTest);

}  // namespace
}  // namespace resa::testing
