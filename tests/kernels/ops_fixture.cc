#include "tests/kernels/ops_fixture.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "hwy/targets.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/kernels/staged_ops.h"
#include "tests/support/test_seed.h"

#if RESA_HAVE_CUDA
#include "kernels/cuda/cuda_ops.h"
#endif

namespace resa::testing {

using kernels::bf16;
using kernels::DType;
using kernels::kPageTokens;
using kernels::Matrix;

namespace {

bool HasCuda() {
#if RESA_HAVE_CUDA
  static const bool has = [] {
    std::string why_not;
    return kernels::CreateCudaOps({}, &why_not) != nullptr;
  }();
  return has;
#else
  return false;
#endif
}

std::unique_ptr<kernels::Ops> MakeCudaOps([[maybe_unused]] const TestOpsOptions& options) {
#if RESA_HAVE_CUDA
  std::string why_not;
  auto ops = kernels::CreateCudaOps({.deterministic = options.deterministic}, &why_not);
  RESA_CHECK(ops != nullptr) << why_not;
  return ops;
#else
  return nullptr;
#endif
}

}  // namespace

std::vector<TestTarget> CpuTargets() {
#if defined(__x86_64__)
  std::vector<TestTarget> targets;
  for (int64_t bit : {int64_t{HWY_AVX2}, int64_t{HWY_AVX3}}) {
    if ((hwy::SupportedTargets() & bit) != 0) targets.push_back({.instructions = bit});
  }
  return targets;
#else
  return {TestTarget{}};  // The only one.
#endif
}

std::vector<TestTarget> TestTargets() {
  std::vector<TestTarget> targets = CpuTargets();
  targets.push_back({.backend = TestTarget::Backend::kStaged});
  if (HasCuda()) targets.push_back({.backend = TestTarget::Backend::kCuda});
  return targets;
}

std::string NameOf(const TestTarget& target) {
  if (target.backend == TestTarget::Backend::kStaged) return "staged";
  if (target.backend == TestTarget::Backend::kCuda) return "cuda";
  return target.instructions == 0 ? "default" : hwy::TargetName(target.instructions);
}

std::string TargetTestName(const ::testing::TestParamInfo<TestTarget>& info) {
  return NameOf(info.param);
}

bool OpsTest::RunsLongTests() const {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return IsCuda();
#else
  return IsCuda() || IsStaged();
#endif
}

OpsTest::OpsTest()
    : seed_(TestSeed()),
      trace_(__FILE__, __LINE__, ::testing::Message() << "RESA_TEST_SEED=" << seed_),
      rng_(seed_) {
  hwy::SetSupportedTargetsForTest(GetParam().instructions);
}

OpsTest::~OpsTest() { hwy::SetSupportedTargetsForTest(0); }

std::unique_ptr<kernels::Ops> OpsTest::MakeOps(const TestOpsOptions& options) const {
  if (GetParam().backend == TestTarget::Backend::kCpu) {
    return kernels::CreateCpuOps({.threads = options.threads});
  }
  auto staged = std::make_unique<StagedOps>(
      IsCuda() ? MakeCudaOps(options) : kernels::CreateCpuOps({.threads = options.threads}));
  staged->set_linear_writes_f32(options.linear_writes_f32);
  return staged;
}

HeadCase OpsTest::Supported(HeadCase heads) const {
  if (IsCuda()) heads.kv = DType::kBF16;
  return heads;
}

std::vector<HeadCase> OpsTest::HeadCases() const {
  std::vector<HeadCase> cases;
  for (const HeadCase& heads : kHeadCases) cases.push_back(Supported(heads));
  return cases;
}

std::vector<float> OpsTest::Normal(size_t n, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(n);
  for (float& x : out) x = normal(rng_);
  return out;
}

std::vector<float> OpsTest::Activations(size_t n, float scale) {
  std::vector<float> out = Normal(n, scale);
  if (activation_dtype() == DType::kBF16) {
    for (float& x : out) x = kernels::ToFloat(kernels::RoundToBf16(x));
  }
  return out;
}

std::vector<bf16> OpsTest::NormalBf16(size_t n, float scale) {
  std::vector<bf16> out;
  for (float x : Normal(n, scale)) out.push_back(kernels::RoundToBf16(x));
  return out;
}

int OpsTest::Uniform(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng_);
}

Matrix AsMatrix(std::vector<float>& data, int64_t rows, int64_t cols) {
  RESA_CHECK_EQ(static_cast<int64_t>(data.size()), rows * cols);
  return Matrix{data.data(), DType::kF32, rows, cols};
}
Matrix AsMatrix(std::vector<bf16>& data, int64_t rows, int64_t cols) {
  RESA_CHECK_EQ(static_cast<int64_t>(data.size()), rows * cols);
  return Matrix{data.data(), DType::kBF16, rows, cols};
}

std::vector<float> Poison(size_t n) {
  return std::vector<float>(n, std::numeric_limits<float>::quiet_NaN());
}

TestPool::TestPool(const HeadCase& heads, const kernels::SelectorSpec& selector,
                   std::span<const int> lengths, std::mt19937_64& rng) {
  int64_t pages = 0;
  for (int length : lengths) {
    const int64_t needed = (length + kPageTokens - 1) / kPageTokens;
    stride_ = std::max(stride_, needed);
    pages += needed;
  }
  layout_ = {.num_layers = 1,
             .num_pages = pages + 5,
             .num_kv_heads = heads.kv_heads,
             .head_dim = heads.head_dim,
             .kv_dtype = heads.kv,
             .selector = selector};
  std::vector<int32_t> shuffled(static_cast<size_t>(layout_.num_pages));
  std::iota(shuffled.begin(), shuffled.end(), 0);
  std::shuffle(shuffled.begin(), shuffled.end(), rng);
  table_.assign(lengths.size() * static_cast<size_t>(stride_), -1);  // -1 is never to be looked up.
  size_t next = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int i = 0; i < (lengths[s] + kPageTokens - 1) / kPageTokens; ++i) {
      table_[s * static_cast<size_t>(stride_) + static_cast<size_t>(i)] = shuffled[next++];
    }
  }
  // 0xff is a NaN in f32 and in bf16.
  k_.assign(layout_.LayerKvBytes(), std::byte{0xff});
  v_.assign(layout_.LayerKvBytes(), std::byte{0xff});
  descriptors_.assign(layout_.LayerDescriptorBytes(), std::byte{0xff});
}

kernels::KvLayer TestPool::layer() { return {k_.data(), v_.data(), descriptors_.data()}; }
kernels::PageTables TestPool::tables() const { return {table_.data(), stride_}; }

size_t TestPool::SlotBytes(int sequence, int position, int kv_head) const {
  const auto page =
      static_cast<size_t>(table_[static_cast<size_t>(sequence * stride_ + position / kPageTokens)]);
  const size_t run =
      page * static_cast<size_t>(layout_.num_kv_heads) + static_cast<size_t>(kv_head);
  return run * layout_.RunBytes() + static_cast<size_t>(position % kPageTokens) *
                                        static_cast<size_t>(layout_.head_dim) *
                                        BytesOf(layout_.kv_dtype);
}

void TestPool::Write(int sequence, int position, std::span<const float> k,
                     std::span<const float> v) {
  const auto d = static_cast<size_t>(layout_.head_dim);
  const auto store = [&](std::vector<std::byte>& array, std::span<const float> from) {
    for (int h = 0; h < layout_.num_kv_heads; ++h) {
      std::byte* const to = array.data() + SlotBytes(sequence, position, h);
      for (size_t j = 0; j < d; ++j) {
        const float value = from[static_cast<size_t>(h) * d + j];
        const bf16 rounded = kernels::RoundToBf16(value);
        if (layout_.kv_dtype == DType::kF32) {
          std::memcpy(to + 4 * j, &value, 4);
        } else {
          std::memcpy(to + 2 * j, &rounded, 2);
        }
      }
    }
  };
  store(k_, k);
  store(v_, v);
}

Doubles TestPool::Read(const std::vector<std::byte>& array, size_t offset) const {
  Doubles out;
  for (int j = 0; j < layout_.head_dim; ++j) {
    if (layout_.kv_dtype == DType::kF32) {
      float value;
      std::memcpy(&value, array.data() + offset + 4 * static_cast<size_t>(j), 4);
      out.push_back(value);
    } else {
      bf16 value;
      std::memcpy(&value, array.data() + offset + 2 * static_cast<size_t>(j), 2);
      out.push_back(kernels::ToFloat(value));
    }
  }
  return out;
}

Doubles TestPool::Key(int sequence, int position, int kv_head) const {
  return Read(k_, SlotBytes(sequence, position, kv_head));
}
Doubles TestPool::Value(int sequence, int position, int kv_head) const {
  return Read(v_, SlotBytes(sequence, position, kv_head));
}

std::span<const std::byte> TestPool::Descriptor(int sequence, int page_index, int kv_head) const {
  const auto page =
      static_cast<size_t>(table_[static_cast<size_t>(sequence * stride_ + page_index)]);
  const size_t run =
      page * static_cast<size_t>(layout_.num_kv_heads) + static_cast<size_t>(kv_head);
  return std::span(descriptors_)
      .subspan(run * layout_.DescriptorRunBytes(), layout_.DescriptorRunBytes());
}

void FillPool(kernels::Ops& ops, TestPool& pool, const HeadCase& heads,
              std::span<const int> lengths, std::vector<float> k, std::vector<float> v) {
  const int tokens = std::accumulate(lengths.begin(), lengths.end(), 0);
  const int64_t width = int64_t{heads.kv_heads} * heads.head_dim;
  std::vector<float> q(static_cast<size_t>(tokens) * heads.heads() * heads.head_dim, 0.0f);
  const size_t angles = static_cast<size_t>(tokens) * heads.head_dim / 2;
  const std::vector<float> cos(angles, 1.0f), sin(angles, 0.0f);
  std::vector<kernels::KvRun> runs;
  int row = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    runs.push_back(
        {.row_begin = row, .rows = lengths[s], .position = 0, .table = static_cast<int32_t>(s)});
    row += lengths[s];
  }
  ops.QkvPost({.q = AsMatrix(q, tokens, int64_t{heads.heads()} * heads.head_dim),
               .k = AsMatrix(k, tokens, width),
               .v = AsMatrix(v, tokens, width),
               .cos = cos.data(),
               .sin = sin.data(),
               .runs = runs.data(),
               .num_runs = static_cast<int64_t>(runs.size()),
               .tables = pool.tables(),
               .layout = pool.layout(),
               .kv = pool.layer()});
}

}  // namespace resa::testing
