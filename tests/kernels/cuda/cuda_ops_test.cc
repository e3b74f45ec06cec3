#include "kernels/cuda/cuda_ops.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/support/test_seed.h"

namespace resa::kernels {
namespace {

using ::testing::HasSubstr;

TEST(CreateCudaOpsTest, SaysWhyADeviceCannotBeUsed) {
  std::string why_not;
  const int beyond = CudaDeviceCount() + 7;
  EXPECT_EQ(CreateCudaOps({.device = beyond}, &why_not), nullptr);
  EXPECT_THAT(why_not, HasSubstr("cuda:" + std::to_string(beyond)));
  if (CudaDeviceCount() == 0) {
    EXPECT_THAT(why_not, HasSubstr("driver"));
  } else {
    EXPECT_THAT(why_not, HasSubstr("there"));
  }
  EXPECT_EQ(CreateCudaOps({.device = -1}, &why_not), nullptr);
}

// What follows needs a GPU; tests/gpu/run.sh runs it there.
class CudaOpsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "no GPU here";
    std::string why_not;
    ops_ = CreateCudaOps({}, &why_not);
    ASSERT_NE(ops_, nullptr) << why_not;
  }

  std::unique_ptr<Ops> ops_;
};

TEST_F(CudaOpsTest, DescribesTheDevice) {
  EXPECT_THAT(ops_->Description(), HasSubstr("cuda:0"));
  EXPECT_EQ(ops_->activation_dtype(), DType::kBF16);
  EXPECT_TRUE(ops_->SupportsKvDtype(DType::kBF16));
  EXPECT_FALSE(ops_->SupportsKvDtype(DType::kF32));
}

TEST_F(CudaOpsTest, MemoryIsTakenAndGivenBack) {
  const int64_t before = ops_->DeviceMemoryFree().value();
  constexpr int64_t kBytes = int64_t{1} << 30;
  std::unique_ptr<Buffer> buffer = ops_->Allocate(kBytes);
  ASSERT_NE(buffer, nullptr);
  EXPECT_EQ(buffer->bytes(), static_cast<size_t>(kBytes));
  EXPECT_LE(ops_->DeviceMemoryFree().value(), before - kBytes);
  buffer.reset();
  EXPECT_GT(ops_->DeviceMemoryFree().value(), before - kBytes);
}

TEST_F(CudaOpsTest, WhatDoesNotFitIsRefusedAndNothingElseSuffers) {
  const auto too_much = static_cast<size_t>(ops_->DeviceMemoryFree().value()) * 2;
  EXPECT_EQ(ops_->Allocate(too_much), nullptr);
  const std::unique_ptr<Buffer> small = ops_->Allocate(1000);
  ASSERT_NE(small, nullptr);
  std::vector<std::byte> data(1000, std::byte{42});
  ops_->Upload(small->data(), data.data(), data.size());
  std::vector<std::byte> back(1000);
  ops_->Download(back.data(), small->data(), back.size());
  EXPECT_EQ(back, data);
}

// Sizes around those of the pieces that weights travel in, and of the slabs that they lie in.
TEST_F(CudaOpsTest, WeightsArriveWhole) {
  const uint64_t seed = testing::TestSeed();
  SCOPED_TRACE(::testing::Message() << "RESA_TEST_SEED=" << seed);
  std::mt19937_64 rng(seed);
  constexpr size_t kPiece = size_t{16} << 20;
  std::vector<std::vector<uint8_t>> hosts;
  std::vector<const std::byte*> theirs;
  for (const size_t bytes : {size_t{1}, size_t{7}, size_t{256}, size_t{1000003}, kPiece - 1, kPiece,
                             kPiece + 1, 5 * kPiece + 12345, 9 * kPiece, size_t{14336}}) {
    std::vector<uint8_t> host(bytes);
    for (uint8_t& byte : host) byte = static_cast<uint8_t>(rng());
    theirs.push_back(ops_->ImportWeights(reinterpret_cast<std::byte*>(host.data()), bytes));
    ASSERT_NE(theirs.back(), nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(theirs.back()) % 256, 0u);
    hosts.push_back(std::move(host));
  }
  for (size_t i = 0; i < hosts.size(); ++i) {
    std::vector<uint8_t> back(hosts[i].size());
    ops_->Download(back.data(), theirs[i], back.size());
    EXPECT_TRUE(back == hosts[i]) << hosts[i].size() << " bytes";
  }
}

}  // namespace
}  // namespace resa::kernels
