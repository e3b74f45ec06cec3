#ifndef RESA_TESTS_KERNELS_OPS_FIXTURE_H_
#define RESA_TESTS_KERNELS_OPS_FIXTURE_H_

// What the tests of kernels share: every backend this machine can run, random data from a printed
// seed, and a pool with shuffled page tables and poisoned pages.

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

// What a test runs over.
struct TestTarget {
  enum class Backend : uint8_t {
    kCpu,     // With the instruction set `instructions`.
    kStaged,  // The CPU through StagedOps, which shows that StagedOps copies what it must.
    kCuda,    // The first GPU through StagedOps.
  };
  Backend backend = Backend::kCpu;
  int64_t instructions = 0;  // Highway's target bit; 0: the best there is.
};
std::string NameOf(const TestTarget& target);
inline void PrintTo(const TestTarget& target, std::ostream* out) { *out << NameOf(target); }
std::string TargetTestName(const ::testing::TestParamInfo<TestTarget>& info);

// The CPU with every instruction set that is compiled in and supported, and all targets: those,
// the staged CPU, and the GPU where there is one that the CUDA backend takes.
std::vector<TestTarget> CpuTargets();
std::vector<TestTarget> TestTargets();

struct TestOpsOptions {
  int threads = 1;
  bool deterministic = false;      // CUDA: products whose bits no other row of the batch changes.
  bool linear_writes_f32 = false;  // As for logits, where activations are bf16.
};

// A test that runs once per target. Random data comes from rng(), whose seed is printed with every
// failure and can be given as RESA_TEST_SEED.
class OpsTest : public ::testing::TestWithParam<TestTarget> {
 protected:
  OpsTest();
  ~OpsTest() override;

  std::unique_ptr<kernels::Ops> MakeOps(int threads) const { return MakeOps({.threads = threads}); }
  std::unique_ptr<kernels::Ops> MakeOps(const TestOpsOptions& options) const;

  // Long tests run on the GPU, and beside it one CPU is enough, without a sanitizer.
  bool RunsLongTests() const;
  bool IsStaged() const { return GetParam().backend == TestTarget::Backend::kStaged; }
  bool IsCuda() const { return GetParam().backend == TestTarget::Backend::kCuda; }
  // How the target's kernels see activations; the tests' vectors are f32 everywhere.
  kernels::DType activation_dtype() const {
    return IsCuda() ? kernels::DType::kBF16 : kernels::DType::kF32;
  }
  // With a KV type that the target has.
  HeadCase Supported(HeadCase heads) const;
  std::vector<HeadCase> HeadCases() const;  // kHeadCases so.

  std::mt19937_64& rng() { return rng_; }
  std::vector<float> Normal(size_t n, float scale = 1.0f);
  // Numbers that survive being stored as activations, so that a reference sees what the kernel
  // sees.
  std::vector<float> Activations(size_t n, float scale = 1.0f);
  std::vector<kernels::bf16> NormalBf16(size_t n, float scale = 1.0f);
  int Uniform(int low, int high);  // Inclusive.

 private:
  const uint64_t seed_;
  ::testing::ScopedTrace trace_;
  std::mt19937_64 rng_;
};

#define RESA_INSTANTIATE_ON(fixture, targets)                             \
  INSTANTIATE_TEST_SUITE_P(Target, fixture, ::testing::ValuesIn(targets), \
                           ::resa::testing::TargetTestName)
#define RESA_INSTANTIATE_OPS_TEST(fixture) \
  RESA_INSTANTIATE_ON(fixture, ::resa::testing::TestTargets())
// What is the CPU backend's own.
#define RESA_INSTANTIATE_CPU_OPS_TEST(fixture) \
  RESA_INSTANTIATE_ON(fixture, ::resa::testing::CpuTargets())

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
