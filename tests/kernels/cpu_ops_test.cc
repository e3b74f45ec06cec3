#include "kernels/cpu/cpu_ops.h"

#include <gmock/gmock.h>

#include <cstring>

#include "hwy/targets.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using ::testing::HasSubstr;

class CpuOpsTest : public OpsTest {};

TEST_P(CpuOpsTest, DescriptionNamesInstructionSetAndThreads) {
  EXPECT_THAT(MakeOps(3)->Description(), HasSubstr("3 threads"));
  EXPECT_THAT(MakeOps(1)->Description(), HasSubstr("1 thread"));
  if (GetParam().instructions != 0) {
    EXPECT_THAT(MakeOps(1)->Description(), HasSubstr(hwy::TargetName(GetParam().instructions)));
  }
}

TEST_P(CpuOpsTest, MemoryIsAlignedAndCopiesBothWays) {
  auto ops = MakeOps(1);
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{100}, size_t{1} << 20}) {
    const auto buffer = ops->Allocate(bytes);
    ASSERT_NE(buffer, nullptr);
    EXPECT_EQ(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    std::vector<char> in(bytes, 'x'), out(bytes, 'y');
    ops->Upload(buffer->data(), in.data(), bytes);
    ops->Download(out.data(), buffer->data(), bytes);
    EXPECT_EQ(in, out);
  }
  const auto* const weights = reinterpret_cast<const std::byte*>("weights");
  EXPECT_EQ(ops->ImportWeights(weights, 7), weights);
}

TEST_P(CpuOpsTest, MemoryThatCannotBeHadIsNull) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's allocator ends the process instead";
#endif
  EXPECT_EQ(MakeOps(1)->Allocate(size_t{1} << 60), nullptr);
}

TEST_P(CpuOpsTest, ActivationsAreF32AndBothKvTypesWork) {
  auto ops = MakeOps(1);
  EXPECT_EQ(ops->activation_dtype(), kernels::DType::kF32);
  EXPECT_TRUE(ops->SupportsKvDtype(kernels::DType::kF32));
  EXPECT_TRUE(ops->SupportsKvDtype(kernels::DType::kBF16));
}

TEST_P(CpuOpsTest, ZeroThreadsMeansAllCores) {
  EXPECT_THAT(MakeOps(0)->Description(),
              HasSubstr(std::to_string(kernels::AvailableCores()) + " thread"));
}

RESA_INSTANTIATE_CPU_OPS_TEST(CpuOpsTest);

}  // namespace
}  // namespace resa::testing
