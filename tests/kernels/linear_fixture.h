#ifndef RESA_TESTS_KERNELS_LINEAR_FIXTURE_H_
#define RESA_TESTS_KERNELS_LINEAR_FIXTURE_H_

// What every implementation of Linear is asked, whatever its arithmetic.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {

class LinearTest : public OpsTest {
 protected:
  std::vector<float> Linear(kernels::Ops& ops, std::vector<float> x,
                            std::vector<kernels::bf16>& weight, const std::vector<float>& bias,
                            int64_t rows, const LinearCase& shape) {
    std::vector<float> out = Poison(static_cast<size_t>(rows * shape.out));
    ops.Linear({.x = AsMatrix(x, rows, shape.in),
                .weight = AsMatrix(weight, shape.out, shape.in),
                .bias = bias.empty() ? nullptr : bias.data(),
                .out = AsMatrix(out, rows, shape.out)});
    return out;
  }

  // `row_counts` rows from anywhere among all_rows have the bits they have among all of them on one
  // thread. `make`: ops of so many threads.
  void ExpectBatchAndThreadsDoNotChangeABit(
      const std::function<std::unique_ptr<kernels::Ops>(int threads)>& make,
      const LinearCase& shape, int64_t all_rows, const std::vector<int64_t>& row_counts) {
    std::vector<kernels::bf16> weight = NormalBf16(static_cast<size_t>(shape.out * shape.in), 0.1f);
    const std::vector<float> x = Activations(static_cast<size_t>(all_rows * shape.in));
    const std::vector<float> bias = Normal(static_cast<size_t>(shape.out));
    const std::vector<float> all = Linear(*make(1), x, weight, bias, all_rows, shape);
    for (int threads : {1, 2, 5}) {
      auto ops = make(threads);
      for (int64_t rows : row_counts) {
        const int64_t first = Uniform(0, static_cast<int>(all_rows - rows));
        const std::vector<float> some(x.begin() + first * shape.in,
                                      x.begin() + (first + rows) * shape.in);
        const std::vector<float> out = Linear(*ops, some, weight, bias, rows, shape);
        ASSERT_EQ(CompareBits(out,
                              std::span(all).subspan(static_cast<size_t>(first * shape.out),
                                                     static_cast<size_t>(rows * shape.out)),
                              static_cast<size_t>(shape.out)),
                  "")
            << rows << " rows from " << first << ", [" << shape.out << ", " << shape.in << "], "
            << threads << " threads";
      }
    }
  }

  void ExpectARowOfNansStaysAlone(kernels::Ops& ops) {
    std::vector<kernels::bf16> weight = NormalBf16(64 * 96);
    std::vector<float> x = Activations(20 * 96);
    const std::vector<float> want = Linear(ops, x, weight, {}, 20, {64, 96});
    std::fill_n(x.begin() + 7 * 96, 96, std::numeric_limits<float>::quiet_NaN());
    const std::vector<float> out = Linear(ops, x, weight, {}, 20, {64, 96});
    for (size_t i = 0; i < out.size(); ++i) {
      if (i / 64 == 7) {
        ASSERT_TRUE(std::isnan(out[i])) << i;
      } else {
        ASSERT_EQ(out[i], want[i]) << i;
      }
    }
  }
};

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_LINEAR_FIXTURE_H_
