#include "engine/kv_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "kernels/cpu/cpu_ops.h"
#include "tests/support/kv_snapshot.h"
#include "tests/support/recording_ops.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

using resa::testing::KvSnapshot;
using resa::testing::RecordingOps;
using ::testing::HasSubstr;

constexpr kernels::SelectorSpec kSketch = {kernels::SelectorKind::kSketch, 8, 2, {1, 1}};
constexpr kernels::SelectorSpec kMinMax = {kernels::SelectorKind::kMinMax, 16, 0, {1, 1}};

ModelConfig Config() { return resa::testing::MakeTinyModel({.num_layers = 3}, 1).config; }

TEST(KvMemoryTest, AllocatesWhatTheLayoutSays) {
  for (const kernels::SelectorSpec& selector : {kSketch, kMinMax}) {
    const kernels::KvLayout layout = LayoutFor(Config(), selector, kernels::DType::kBF16, 7);
    RecordingOps ops;
    const auto memory = KvMemory::Create(layout, &ops).value();
    EXPECT_EQ(ops.allocations, 9);  // K, V and descriptors of 3 layers.
    EXPECT_EQ(ops.allocated_bytes, 7 * layout.PageBytes());
    EXPECT_EQ(memory->layers().size(), 3u);
    for (const kernels::KvLayer& layer : memory->layers()) {
      EXPECT_NE(layer.k, nullptr);
      EXPECT_NE(layer.v, nullptr);
      EXPECT_NE(layer.descriptors, nullptr);
    }
  }
}

TEST(KvMemoryTest, SaysWhatDidNotFitWhereverMemoryRanOut) {
  const kernels::KvLayout layout = LayoutFor(Config(), kSketch, kernels::DType::kBF16, 7);
  for (int i = 0; i < 9; ++i) {
    RecordingOps ops;
    ops.allocations_left = i;
    const absl::Status status = KvMemory::Create(layout, &ops).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(std::to_string(7 * layout.PageBytes()) + " bytes"));
  }
}

TEST(KvMemoryTest, RefusesATypeThatTheBackendLacks) {
  RecordingOps ops;  // Takes bf16 alone.
  const absl::Status status =
      KvMemory::Create(LayoutFor(Config(), kSketch, kernels::DType::kF32, 7), &ops).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("f32"));
}

// Writes random bytes to every place of the pool.
void WriteNoise(const KvMemory& memory, kernels::Ops* ops) {
  const kernels::KvLayout& layout = memory.layout();
  std::mt19937 random(1);
  const auto write = [&](std::byte* to, size_t bytes) {
    std::vector<std::byte> data(bytes);
    for (std::byte& x : data) x = static_cast<std::byte>(random());
    ops->Upload(to, data.data(), bytes);
  };
  for (const kernels::KvLayer& layer : memory.layers()) {
    write(layer.k, layout.LayerKvBytes());
    write(layer.v, layout.LayerKvBytes());
    write(layer.descriptors, layout.LayerDescriptorBytes());
  }
}

TEST(KvMemoryTest, CopiesWholePagesOfAllLayersAndNothingElse) {
  const auto ops = kernels::CreateCpuOps({.threads = 1});
  for (const kernels::SelectorSpec& selector : {kSketch, kMinMax}) {
    for (const kernels::DType dtype : {kernels::DType::kF32, kernels::DType::kBF16}) {
      const auto memory =
          KvMemory::Create(LayoutFor(Config(), selector, dtype, 7), ops.get()).value();
      WriteNoise(*memory, ops.get());
      const auto page = [&](int32_t id) {
        return resa::testing::SnapshotKv(*memory, ops.get(), {id}, kernels::kPageTokens);
      };
      std::vector<KvSnapshot> before;
      for (int32_t id = 0; id < 7; ++id) before.push_back(page(id));
      ASSERT_NE(before[2], before[6]);

      memory->Copy({});
      memory->Copy({{2, 6}, {0, 3}});
      const int32_t expected[] = {0, 1, 2, 0, 4, 5, 2};
      for (int32_t id = 0; id < 7; ++id) {
        EXPECT_EQ(DescribeDifference(page(id), before[expected[id]]), "") << "page " << id;
      }
    }
  }
}

}  // namespace
}  // namespace resa::engine
