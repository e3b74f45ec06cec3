// What the machine can do at best, against what is physically possible and against a kernel.

#include "kernels/ceilings.h"

#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

double ProcessorSeconds() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

class CeilingsTest : public OpsTest {};

// Loops that the compiler left out would be faster than any machine.
TEST_P(CeilingsTest, ArePhysicallyPossible) {
  for (const int threads : {1, 2}) {
    const kernels::Ceilings ceilings = MakeOps(threads)->MeasureCeilings();
    // Two AVX-512 ports at 7 GHz: 64 operations a cycle and core. The lower bounds are those of a
    // busy machine under a sanitizer.
    EXPECT_LT(ceilings.flops_per_s, threads * 64 * 7e9);
    EXPECT_GT(ceilings.flops_per_s, 1e7);
    // Above what one socket's memory gives by now, and 2 cores alone draw a fraction of that.
    EXPECT_LT(ceilings.read_bytes_per_s, 1e12);
    EXPECT_GT(ceilings.read_bytes_per_s, 1e7);
  }
}

// A ceiling too low would flatter every figure. On one thread both are measured in processor time,
// which other load on the machine hardly disturbs.
TEST_P(CeilingsTest, NoKernelIsFaster) {
  auto ops = MakeOps(1);
  const kernels::Ceilings ceilings = ops->MeasureCeilings();
  const int64_t rows = 256, size = 256;
  std::vector<float> x = Normal(rows * size), out(rows * size);
  std::vector<kernels::bf16> weight = NormalBf16(size * size);
  double best = 1e30;
  for (int i = 0; i < 20; ++i) {
    const double start = ProcessorSeconds();
    ops->Linear({.x = AsMatrix(x, rows, size),
                 .weight = AsMatrix(weight, size, size),
                 .out = AsMatrix(out, rows, size)});
    best = std::min(best, ProcessorSeconds() - start);
  }
  // Frequency and the neighbours on a core's other thread vary from one moment to the next. Half
  // the peak, as vectors of half the width would give, would still be noticed: the kernel reaches
  // seven tenths and more.
  EXPECT_LT(2.0 * rows * size * size / best, 1.3 * ceilings.flops_per_s);
}

RESA_INSTANTIATE_CPU_OPS_TEST(CeilingsTest);

}  // namespace
}  // namespace resa::testing
