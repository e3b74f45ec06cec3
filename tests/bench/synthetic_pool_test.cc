// A pool filled in bulk must be one that ordinary steps could have left: selection reads nothing
// else.

#include "tests/bench/synthetic_pool.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/bench/bench_fixture.h"
#include "tests/support/kv_snapshot.h"

namespace resa::bench {
namespace {

using kernels::bf16;
using kernels::DType;
using kernels::kPageTokens;
using testing::KvSnapshot;
using testing::SnapshotKv;

constexpr kernels::SelectorSpec kSketch = {kernels::SelectorKind::kSketch, 8, 3, {1.0f, 1.0f}};
constexpr kernels::SelectorSpec kMinMax = {kernels::SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}};

class SyntheticPoolTest : public ::testing::Test {
 protected:
  // Every byte of it is a NaN's, in K, V and descriptors.
  std::unique_ptr<engine::KvMemory> MakePoisoned(const kernels::SelectorSpec& selector) {
    auto memory = engine::KvMemory::Create(
        engine::LayoutFor(config_, selector, DType::kBF16, deal_.num_pages()), ops_.get());
    RESA_CHECK(memory.ok()) << memory.status();
    const kernels::KvLayout& layout = (*memory)->layout();
    for (const kernels::KvLayer& layer : (*memory)->layers()) {
      std::memset(layer.k, 0xff, layout.LayerKvBytes());
      std::memset(layer.v, 0xff, layout.LayerKvBytes());
      std::memset(layer.descriptors, 0xff, layout.LayerDescriptorBytes());
    }
    return *std::move(memory);
  }
  std::unique_ptr<engine::KvMemory> MakeFilled(const kernels::SelectorSpec& selector) {
    auto memory = MakePoisoned(selector);
    const absl::Status filled = FillPool(config_, *memory, deal_, lengths_, 3, ops_.get());
    RESA_CHECK(filled.ok()) << filled;
    return memory;
  }
  KvSnapshot Snapshot(const engine::KvMemory& memory, int sequence) {
    return SnapshotKv(memory, ops_.get(), deal_.pages(sequence),
                      static_cast<int>(lengths_[static_cast<size_t>(sequence)]));
  }

  // One token of `from`, in f32: [layer][kv_head][token][d] bf16.
  std::vector<float> TokenOf(const std::vector<std::byte>& from, int layer, int length, int token) {
    const auto* const values = reinterpret_cast<const bf16*>(from.data());
    std::vector<float> out;
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      const int64_t run = int64_t{layer} * config_.num_kv_heads + head;
      for (int j = 0; j < config_.head_dim; ++j) {
        out.push_back(kernels::ToFloat(values[(run * length + token) * config_.head_dim + j]));
      }
    }
    return out;
  }

  const engine::ModelConfig config_ = SmallConfig();
  const std::unique_ptr<kernels::Ops> ops_ = kernels::CreateCpuOps({.threads = 2});
  // Across a chunk of the filler, inside a page, and empty.
  const std::vector<int64_t> lengths_ = {603, 40, 0};
  const PageDeal deal_{3, 603, 5};
};

TEST_F(SyntheticPoolTest, PagesAreDealtOnceAndOutOfOrder) {
  std::vector<int32_t> all;
  for (int s = 0; s < 3; ++s) {
    all.insert(all.end(), deal_.pages(s).begin(), deal_.pages(s).end());
  }
  EXPECT_FALSE(std::is_sorted(all.begin(), all.end()));
  std::sort(all.begin(), all.end());
  ASSERT_EQ(static_cast<int64_t>(all.size()), deal_.num_pages());
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], static_cast<int32_t>(i));
}

TEST_F(SyntheticPoolTest, EveryTokenIsWrittenAndNoOther) {
  const auto memory = MakeFilled(kSketch);
  for (int s = 0; s < 2; ++s) {
    const KvSnapshot snapshot = Snapshot(*memory, s);
    for (const std::vector<std::byte>* side : {&snapshot.keys, &snapshot.values}) {
      const auto* const values = reinterpret_cast<const bf16*>(side->data());
      const size_t count = side->size() / sizeof(bf16);
      ASSERT_GT(count, 0u);
      EXPECT_TRUE(std::all_of(values, values + count,
                              [](bf16 x) { return std::isfinite(kernels::ToFloat(x)); }));
    }
  }
  const KvSnapshot untouched = SnapshotKv(*memory, ops_.get(), deal_.pages(2), 603);
  EXPECT_TRUE(std::all_of(untouched.keys.begin(), untouched.keys.end(),
                          [](std::byte b) { return b == std::byte{0xff}; }));
}

// The same keys and values, one token a step as decoding writes them, leave the same bytes.
TEST_F(SyntheticPoolTest, DescriptorsAreThoseOfDecodingTheSameKeys) {
  for (const kernels::SelectorSpec& selector : {kSketch, kMinMax}) {
    const auto filled = MakeFilled(selector);
    const auto decoded = MakePoisoned(selector);
    for (int s = 0; s < 2; ++s) {
      const KvSnapshot expected = Snapshot(*filled, s);
      std::vector<float> q(static_cast<size_t>(config_.QDim()), 0.0f);
      const std::vector<float> cos(static_cast<size_t>(config_.head_dim / 2), 1.0f);
      const std::vector<float> sin(cos.size(), 0.0f);
      for (int layer = 0; layer < config_.num_layers; ++layer) {
        for (int token = 0; token < expected.length; ++token) {
          std::vector<float> k = TokenOf(expected.keys, layer, expected.length, token);
          std::vector<float> v = TokenOf(expected.values, layer, expected.length, token);
          const kernels::KvRun run = {.row_begin = 0, .rows = 1, .position = token, .table = s};
          ops_->QkvPost({.q = {q.data(), DType::kF32, 1, config_.QDim()},
                         .k = {k.data(), DType::kF32, 1, config_.KvDim()},
                         .v = {v.data(), DType::kF32, 1, config_.KvDim()},
                         .cos = cos.data(),
                         .sin = sin.data(),
                         .runs = &run,
                         .num_runs = 1,
                         .tables = deal_.tables(),
                         .layout = decoded->layout(),
                         .kv = decoded->layer(layer)});
        }
      }
      EXPECT_EQ(testing::DescribeDifference(expected, Snapshot(*decoded, s)), "");
    }
  }
}

// And for min/max they are what anyone would write down.
TEST_F(SyntheticPoolTest, BoundsAreThoseOfTheKeysInThePool) {
  const auto memory = MakeFilled(kMinMax);
  const KvSnapshot snapshot = Snapshot(*memory, 0);
  const size_t run_bytes = memory->layout().DescriptorRunBytes();
  size_t run = 0;  // By layer, KV head and page.
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      for (int begin = 0; begin < snapshot.length; begin += kPageTokens, ++run) {
        const auto* const bounds =
            reinterpret_cast<const bf16*>(snapshot.descriptors.data() + run * run_bytes);
        for (int j = 0; j < config_.head_dim; ++j) {
          float low = INFINITY, high = -INFINITY;
          for (int t = begin; t < std::min(begin + kPageTokens, snapshot.length); ++t) {
            const float key = TokenOf(snapshot.keys, layer, snapshot.length,
                                      t)[static_cast<size_t>(head * config_.head_dim + j)];
            low = std::min(low, key);
            high = std::max(high, key);
          }
          ASSERT_EQ(kernels::ToFloat(bounds[j]), low);
          ASSERT_EQ(kernels::ToFloat(bounds[config_.head_dim + j]), high);
        }
      }
    }
  }
}

}  // namespace
}  // namespace resa::bench
