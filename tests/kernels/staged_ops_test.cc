// What the CPU behind StagedOps cannot show, since its activations are f32: how they travel to a
// backend whose activations are bf16.

#include "tests/kernels/staged_ops.h"

#include <gmock/gmock.h>

#include <cmath>

#include "tests/kernels/ops_fixture.h"
#include "tests/support/recording_ops.h"

namespace resa::testing {
namespace {

using kernels::bf16;
using kernels::DType;

// Notes what it was given, and writes the first half of what it may write.
class Bf16Ops : public RecordingOps {
 public:
  DType activation_dtype() const override { return DType::kBF16; }

  std::vector<bf16> x, weight;
  bool in_place = false;
  DType out_dtype = DType::kBF16;

 private:
  void DoSiluMul(const kernels::SiluMulParams& p) override {
    in_place = p.out.data == p.gate.data;
    for (int64_t i = 0; i < p.out.cols / 2; ++i) p.out.b16()[i] = p.up.b16()[i];
  }
  void DoLinear(const kernels::LinearParams& p) override {
    x.assign(p.x.b16(), p.x.b16() + p.x.rows * p.x.cols);
    weight.assign(p.weight.b16(), p.weight.b16() + p.weight.rows * p.weight.cols);
    out_dtype = p.out.dtype;
    for (int64_t i = 0; i < p.out.rows * p.out.cols / 2; ++i) {
      if (p.out.dtype == DType::kF32) {
        p.out.f32()[i] = p.bias[0];
      } else {
        p.out.b16()[i] = kernels::RoundToBf16(p.bias[0]);
      }
    }
  }
};

class StagedOpsTest : public ::testing::Test {
 protected:
  StagedOps staged_{std::make_unique<Bf16Ops>()};
  Bf16Ops& inner_ = static_cast<Bf16Ops&>(staged_.inner());
};

constexpr float kFine = 1.0f + 0x1p-20f;  // No bf16.

TEST_F(StagedOpsTest, ActivationsAreRoundedAndPoisonComesBack) {
  std::vector<float> gate = {1, 2, 3, 4}, up = {kFine, -3.5f, 7, 8}, out = Poison(4);
  staged_.SiluMul(
      {.gate = AsMatrix(gate, 1, 4), .up = AsMatrix(up, 1, 4), .out = AsMatrix(out, 1, 4)});
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -3.5f);
  EXPECT_TRUE(std::isnan(out[2]) && std::isnan(out[3]));
  EXPECT_EQ(up[0], kFine);  // What is only read does not come back.
  EXPECT_FALSE(inner_.in_place);
}

TEST_F(StagedOpsTest, AnOpInPlaceStaysOne) {
  std::vector<float> gate = {1, 2, 3, 4}, up = {5, 6, 7, 8};
  staged_.SiluMul(
      {.gate = AsMatrix(gate, 1, 4), .up = AsMatrix(up, 1, 4), .out = AsMatrix(gate, 1, 4)});
  EXPECT_TRUE(inner_.in_place);
  EXPECT_EQ(gate, (std::vector<float>{5, 6, 3, 4}));
}

TEST_F(StagedOpsTest, WeightsTravelAsTheyAreAndLogitsStayF32) {
  std::vector<float> x = {kFine, 2};
  std::vector<bf16> weight = {bf16{0x3f81}, bf16{0xc000}, bf16{0x7fc1}, bf16{1}};
  const std::vector<float> bias = {kFine, 0};
  for (const bool logits : {false, true}) {
    staged_.set_linear_writes_f32(logits);
    std::vector<float> out = Poison(2);
    staged_.Linear({.x = AsMatrix(x, 1, 2),
                    .weight = AsMatrix(weight, 2, 2),
                    .bias = bias.data(),
                    .out = AsMatrix(out, 1, 2)});
    EXPECT_EQ(inner_.x, (std::vector<bf16>{bf16{0x3f80}, bf16{0x4000}}));
    EXPECT_EQ(inner_.weight, weight);
    EXPECT_EQ(inner_.out_dtype, logits ? DType::kF32 : DType::kBF16);
    EXPECT_EQ(out[0], logits ? kFine : 1.0f);
    EXPECT_TRUE(std::isnan(out[1]));
  }
}

}  // namespace
}  // namespace resa::testing
