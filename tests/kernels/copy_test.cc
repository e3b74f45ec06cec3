// Gathering rows and copying pages.

#include <cstring>

#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

class CopyTest : public OpsTest {};

TEST_P(CopyTest, GatherRowsTakesTheListedRowsInOrder) {
  auto ops = MakeOps(2);
  std::vector<float> x = Activations(50 * 33);
  std::vector<int32_t> rows;
  for (int i = 0; i < 70; ++i) rows.push_back(Uniform(0, 49));
  std::vector<float> out = Poison(70 * 33);
  ops->GatherRows({.x = AsMatrix(x, 50, 33), .rows = rows.data(), .out = AsMatrix(out, 70, 33)});
  for (size_t i = 0; i < 70; ++i) {
    const auto from = static_cast<size_t>(rows[i]) * 33;
    ASSERT_EQ(CompareBits(std::span(out).subspan(i * 33, 33), std::span(x).subspan(from, 33), 33),
              "");
  }
}

TEST_P(CopyTest, CopyPagesCopiesAllLayersAndNothingElse) {
  for (const kernels::SelectorSpec& selector : {kSelectors[0], kSelectors[2]}) {
    auto ops = MakeOps(2);
    const kernels::KvLayout layout = {.num_layers = 3,
                                      .num_pages = 9,
                                      .num_kv_heads = 2,
                                      .head_dim = 64,
                                      .kv_dtype = kernels::DType::kBF16,
                                      .selector = selector};
    std::vector<std::vector<std::byte>> arrays;
    for (int i = 0; i < 9; ++i) {
      arrays.emplace_back(i % 3 == 2 ? layout.LayerDescriptorBytes() : layout.LayerKvBytes());
      for (std::byte& b : arrays.back()) b = static_cast<std::byte>(Uniform(0, 255));
    }
    auto want = arrays;
    std::vector<kernels::KvLayer> layers;
    for (size_t i = 0; i < 9; i += 3) {
      layers.push_back({arrays[i].data(), arrays[i + 1].data(), arrays[i + 2].data()});
    }
    const std::vector<int32_t> from = {1, 8, 1}, to = {0, 4, 7};
    for (size_t a = 0; a < 9; ++a) {
      const size_t page = want[a].size() / 9;
      for (size_t i = 0; i < 3; ++i) {
        std::memcpy(want[a].data() + static_cast<size_t>(to[i]) * page,
                    arrays[a].data() + static_cast<size_t>(from[i]) * page, page);
      }
    }
    ops->CopyPages({.layout = layout,
                    .layers = layers.data(),
                    .from = from.data(),
                    .to = to.data(),
                    .count = 3});
    EXPECT_TRUE(arrays == want);
  }
}

RESA_INSTANTIATE_OPS_TEST(CopyTest);

}  // namespace
}  // namespace resa::testing
