// Linear through oneDNN: against float64, and bit by bit across batches, positions and threads.
// Where the CPU has no bf16 instructions oneDNN emulates them, by other code than it would run on
// one that has.

#include "kernels/cpu/linear_onednn.h"

#include <gmock/gmock.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "hwy/targets.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/kernels/compare.h"
#include "tests/kernels/linear_fixture.h"

namespace resa::testing {
namespace {

using kernels::bf16;
using kernels::Bf16Linear;
using ::testing::HasSubstr;
using ::testing::Not;

// Of the product of rounded rows: a sum of up to 2100 exact products in f32, each addition rounded
// to 2^-24 of a partial sum that is no larger than the final one on average: sqrt(2100) 2^-24 =
// 2.7e-6 were there one chain.
constexpr double kTolerance = 4e-6;

std::vector<float> Rounded(std::vector<float> x) {
  for (float& value : x) value = ToFloat(kernels::RoundToBf16(value));
  return x;
}

int ThreadsOfProcess() {
  const auto tasks = std::filesystem::directory_iterator("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

class LinearOneDnnTest : public LinearTest {
 protected:
  void SetUp() override {
    const std::string description = MakeForced(1)->Description();
    if (description.find("no AVX-512") != std::string::npos ||
        description.find("has no oneDNN") != std::string::npos) {
      GTEST_SKIP() << description;
    }
    ASSERT_THAT(description, HasSubstr(", oneDNN bf16"));
    ASSERT_THAT(description, Not(HasSubstr("but for")));
  }

  std::unique_ptr<kernels::Ops> MakeForced(int threads) const {
    return kernels::CreateCpuOps({.threads = threads, .bf16_linear = Bf16Linear::kForce});
  }
};

// Row counts around every tile and every way to cut.
const std::vector<int64_t> kRowCounts = {1,  2,  3,  4,  5,   7,   8,   9,  15,
                                         16, 17, 33, 64, 100, 129, 257, 300};

TEST_P(LinearOneDnnTest, MatchesFloat64) {
  auto ops = MakeForced(2);
  for (const LinearCase& shape : kLinearCases) {
    std::vector<bf16> weight = NormalBf16(static_cast<size_t>(shape.out * shape.in), 0.1f);
    for (int64_t rows : kRowCounts) {
      if (rows > 17 && shape.out * shape.in > 100000) continue;
      const std::vector<float> x = Normal(static_cast<size_t>(rows * shape.in));
      const std::vector<float> bias =
          rows % 2 == 0 ? Normal(static_cast<size_t>(shape.out)) : std::vector<float>();
      const std::vector<float> out = Linear(*ops, x, weight, bias, rows, shape);
      const Doubles want = ReferenceLinear(Rounded(x), weight, bias, rows, shape.out, shape.in);
      EXPECT_EQ(Compare(out, want, static_cast<size_t>(shape.out), kTolerance), "")
          << rows << " rows, [" << shape.out << ", " << shape.in << "]";
    }
  }
  EXPECT_THAT(ops->Description(), Not(HasSubstr("but for")));
}

// Half an ulp of bf16 is at most 2^-8 of the value, so a sum errs by at most that share of the sum
// of its products' magnitudes; an error that f32 sums would not have (gemm_test.cc: 2e-6) proves
// that oneDNN ran.
TEST_P(LinearOneDnnTest, LosesNoMoreThanRoundingTheRows) {
  auto ops = MakeForced(2);
  constexpr int64_t kRows = 5, kOut = 70, kIn = 333;
  std::vector<bf16> weight = NormalBf16(kOut * kIn);
  const std::vector<float> x = Normal(kRows * kIn);
  const std::vector<float> out = Linear(*ops, x, weight, {}, kRows, {kOut, kIn});
  double worst = 0;
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t c = 0; c < kOut; ++c) {
      double want = 0, magnitude = 0;
      for (size_t k = 0; k < kIn; ++k) {
        const double product = double{x[r * kIn + k]} * ToFloat(weight[c * kIn + k]);
        want += product;
        magnitude += std::abs(product);
      }
      worst = std::max(worst, std::abs(out[r * kOut + c] - want) / magnitude);
    }
  }
  EXPECT_LT(worst, 0x1p-8 + 1e-6);
  EXPECT_GT(worst, 1e-5);
}

TEST_P(LinearOneDnnTest, RowsAreRoundedToNearestEven) {
  auto ops = MakeForced(1);
  std::vector<bf16> weight(64 * 64, bf16{0});
  for (size_t i = 0; i < 64; ++i) weight[i * 64 + i] = kernels::RoundToBf16(1.0f);
  std::vector<float> x = Normal(3 * 64);
  x[0] = 0x1.01p0f;      // Half way between 1 and the next bf16: to the even one.
  x[1] = 0x1.03p0f;      // The same, one further.
  x[2] = 0x1.010002p0f;  // Past half way.
  const std::vector<float> out = Linear(*ops, x, weight, {}, 3, {64, 64});
  EXPECT_EQ(out[0], 0x1.00p0f);
  EXPECT_EQ(out[1], 0x1.04p0f);
  EXPECT_EQ(out[2], 0x1.02p0f);
  EXPECT_EQ(CompareBits(out, Rounded(x), 64), "");
}

TEST_P(LinearOneDnnTest, IntegersAreExact) {
  auto ops = MakeForced(2);
  std::vector<bf16> weight;
  for (int i = 0; i < 70 * 1501; ++i) {
    weight.push_back(kernels::RoundToBf16(static_cast<float>(Uniform(-8, 8))));
  }
  std::vector<float> x;
  for (int i = 0; i < 70 * 1501; ++i) x.push_back(static_cast<float>(Uniform(-8, 8)));
  for (int64_t rows : {1, 20, 70}) {
    const std::vector<float> some(x.begin(), x.begin() + rows * 1501);
    const std::vector<float> out = Linear(*ops, some, weight, {}, rows, {70, 1501});
    EXPECT_EQ(Compare(out, ReferenceLinear(some, weight, {}, rows, 70, 1501), 70, 0.0), "");
  }
}

TEST_P(LinearOneDnnTest, BatchPositionAndThreadsDoNotChangeABit) {
  for (const LinearCase& shape :
       {LinearCase{130, 576}, LinearCase{37, 100}, LinearCase{65, 1501}}) {
    ExpectBatchAndThreadsDoNotChangeABit([this](int threads) { return MakeForced(threads); }, shape,
                                         300, kRowCounts);
  }
}

// 70 columns: the last panel overlaps the one before and must not add twice.
TEST_P(LinearOneDnnTest, AccumulateAddsToWhatIsThere) {
  auto ops = MakeForced(2);
  std::vector<bf16> weight = NormalBf16(70 * 100);
  const std::vector<float> bias = Normal(70);
  for (int64_t rows : {1, 3, 30}) {
    std::vector<float> x = Normal(static_cast<size_t>(rows * 100));
    const std::vector<float> before = Normal(static_cast<size_t>(rows * 70));
    const std::vector<float> product = Linear(*ops, x, weight, bias, rows, {70, 100});
    std::vector<float> out = before;
    ops->Linear({.x = AsMatrix(x, rows, 100),
                 .weight = AsMatrix(weight, 70, 100),
                 .bias = bias.data(),
                 .accumulate = true,
                 .out = AsMatrix(out, rows, 70)});
    for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], before[i] + product[i]) << i;
  }
}

// A file mapping aligns weights to nothing.
TEST_P(LinearOneDnnTest, WeightsNeedNoAlignment) {
  auto ops = MakeForced(1);
  const std::vector<bf16> weight = NormalBf16(5 * 45);
  std::vector<float> x = Normal(2 * 45);
  for (size_t shift : {0, 1, 3}) {
    std::vector<bf16> shifted(shift, bf16{0x7fc0});
    shifted.insert(shifted.end(), weight.begin(), weight.end());
    std::vector<float> out = Poison(2 * 5);
    ops->Linear({.x = AsMatrix(x, 2, 45),
                 .weight = {shifted.data() + shift, kernels::DType::kBF16, 5, 45},
                 .out = AsMatrix(out, 2, 5)});
    EXPECT_EQ(Compare(out, ReferenceLinear(Rounded(x), weight, {}, 2, 5, 45), 5, kTolerance), "");
  }
}

TEST_P(LinearOneDnnTest, ARowOfNaNsStaysAlone) { ExpectARowOfNansStaysAlone(*MakeForced(2)); }

// Many wide panels, so that every thread of the pool takes some.
TEST_P(LinearOneDnnTest, StartsNoThreadsAndKeepsNoMemory) {
  const int before = ThreadsOfProcess();
  auto ops = MakeForced(3);
  std::vector<bf16> weight = NormalBf16(640 * 640);
  const std::vector<float> x = Normal(100 * 640);
  const auto run = [&] { Linear(*ops, x, weight, {}, 100, {640, 640}); };
  for (int i = 0; i < 20; ++i) run();  // Until every thread has had its scratch memory.
  EXPECT_EQ(ThreadsOfProcess(), before + 2);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  const size_t used = mallinfo2().uordblks;
  for (int i = 0; i < 50; ++i) run();
  EXPECT_LE(mallinfo2().uordblks, used + 4096);
#endif
  EXPECT_EQ(ThreadsOfProcess(), before + 2);
}

RESA_INSTANTIATE_CPU_OPS_TEST(LinearOneDnnTest);

#if defined(__x86_64__)
TEST(Bf16LinearTest, IsOffByDefaultAndAutoMeansTheInstructions) {
  EXPECT_THAT(kernels::CreateCpuOps({.threads = 1})->Description(), Not(HasSubstr("oneDNN")));
  const bool native = __builtin_cpu_supports("avx512bf16");
  const std::string description =
      kernels::CreateCpuOps({.threads = 1, .bf16_linear = Bf16Linear::kAuto})->Description();
  EXPECT_EQ(description.find("oneDNN bf16") != std::string::npos, native) << description;
}
#endif

}  // namespace
}  // namespace resa::testing
