#ifndef RESA_TESTS_KERNELS_OPS_FIXTURE_H_
#define RESA_TESTS_KERNELS_OPS_FIXTURE_H_

// What the tests of kernels share: a backend for each instruction set this machine has, random
// data from a printed seed, and a pool with shuffled page tables and poisoned pages.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/reference.h"

namespace resa::testing {

// Compiled and supported instruction sets, as Highway's target bits.
std::vector<int64_t> TestTargets();
std::string TargetTestName(const ::testing::TestParamInfo<int64_t>& info);

// A test that runs once per instruction set. Random data comes from rng(), whose seed is printed
// with every failure and can be given as RESA_TEST_SEED.
class OpsTest : public ::testing::TestWithParam<int64_t> {
 protected:
  OpsTest();
  ~OpsTest() override;

  std::unique_ptr<kernels::Ops> MakeOps(int threads) const;
  std::mt19937_64& rng() { return rng_; }
  std::vector<float> Normal(size_t n, float scale = 1.0f);
  std::vector<kernels::bf16> NormalBf16(size_t n, float scale = 1.0f);
  int Uniform(int low, int high);  // Inclusive.

 private:
  const uint64_t seed_;
  ::testing::ScopedTrace trace_;
  std::mt19937_64 rng_;
};

#define RESA_INSTANTIATE_OPS_TEST(fixture)                                                       \
  INSTANTIATE_TEST_SUITE_P(Target, fixture, ::testing::ValuesIn(::resa::testing::TestTargets()), \
                           ::resa::testing::TargetTestName)

// A matrix over a vector, which must outlive it.
kernels::Matrix AsMatrix(std::vector<float>& data, int64_t rows, int64_t cols);
kernels::Matrix AsMatrix(std::vector<kernels::bf16>& data, int64_t rows, int64_t cols);
// `n` NaNs: what an output holds before a kernel runs.
std::vector<float> Poison(size_t n);

// One layer of a KV pool with sequences on randomly chosen pages. Whatever no token was written to
// is NaN.
class TestPool {
 public:
  // One sequence per entry of `lengths`, that many tokens long at most.
  TestPool(const HeadCase& heads, const kernels::SelectorSpec& selector,
           std::span<const int> lengths, std::mt19937_64& rng);

  const kernels::KvLayout& layout() const { return layout_; }
  kernels::KvLayer layer();
  kernels::PageTables tables() const;

  // Writes K and V of a token, [kv_heads * head_dim] each, rounded to the pool's type.
  void Write(int sequence, int position, std::span<const float> k, std::span<const float> v);
  // As stored, for one KV head.
  Doubles Key(int sequence, int position, int kv_head) const;
  Doubles Value(int sequence, int position, int kv_head) const;
  std::span<const std::byte> Descriptor(int sequence, int page_index, int kv_head) const;

 private:
  size_t SlotBytes(int sequence, int position, int kv_head) const;
  Doubles Read(const std::vector<std::byte>& array, size_t offset) const;

  kernels::KvLayout layout_;
  std::vector<int32_t> table_;
  int64_t stride_ = 0;
  std::vector<std::byte> k_, v_, descriptors_;
};

// Writes random tokens through QkvPost without rotation (angle 0): K, V and descriptors of
// positions [0, length) of each sequence. `k` and `v` are [tokens of all sequences, kv width].
void FillPool(kernels::Ops& ops, TestPool& pool, const HeadCase& heads,
              std::span<const int> lengths, std::vector<float> k, std::vector<float> v);

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_OPS_FIXTURE_H_
