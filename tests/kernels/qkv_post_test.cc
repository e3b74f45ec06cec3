// QkvPost: norm, rotation, K and V in their pages, and the descriptors of both selectors.

#include <cmath>
#include <cstring>

#include "kernels/sketch.h"
#include "tests/kernels/compare.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using kernels::bf16;
using kernels::kPageTokens;
using kernels::KvRun;
using kernels::SelectorKind;
using kernels::SelectorSpec;

constexpr SelectorSpec kMinMax = {SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}};

class QkvPostTest : public OpsTest {
 protected:
  struct Batch {
    std::vector<float> q, k, v, cos, sin, q_norm, k_norm;
    int64_t rows;
  };

  Batch MakeBatch(const HeadCase& heads, int64_t rows, bool with_norm) {
    const auto n = static_cast<size_t>(rows);
    const auto d = static_cast<size_t>(heads.head_dim);
    Batch batch{.q = Activations(n * heads.heads() * d, 2.0f),
                .k = Activations(n * heads.kv_heads * d, 2.0f),
                .v = Activations(n * heads.kv_heads * d),
                .cos = {},
                .sin = {},
                .q_norm = with_norm ? Normal(d) : std::vector<float>(),
                .k_norm = with_norm ? Normal(d) : std::vector<float>(),
                .rows = rows};
    for (size_t i = 0; i < n * d / 2; ++i) {
      const double angle = Uniform(0, 100000) * 1e-3;
      batch.cos.push_back(static_cast<float>(std::cos(angle)));
      batch.sin.push_back(static_cast<float>(std::sin(angle)));
    }
    return batch;
  }

  void Run(kernels::Ops& ops, TestPool& pool, const HeadCase& heads, Batch& batch,
           const std::vector<KvRun>& runs) {
    const int64_t d = heads.head_dim;
    ops.QkvPost({.q = AsMatrix(batch.q, batch.rows, heads.heads() * d),
                 .k = AsMatrix(batch.k, batch.rows, heads.kv_heads * d),
                 .v = AsMatrix(batch.v, batch.rows, heads.kv_heads * d),
                 .q_norm = batch.q_norm.empty() ? nullptr : batch.q_norm.data(),
                 .k_norm = batch.k_norm.empty() ? nullptr : batch.k_norm.data(),
                 .eps = 1e-6f,
                 .cos = batch.cos.data(),
                 .sin = batch.sin.data(),
                 .runs = runs.data(),
                 .num_runs = static_cast<int64_t>(runs.size()),
                 .tables = pool.tables(),
                 .layout = pool.layout(),
                 .kv = pool.layer()});
  }

  static Doubles NormAndRope(const Batch& batch, std::span<const float> head,
                             const std::vector<float>& norm, int64_t row, size_t d) {
    const auto angles = static_cast<size_t>(row) * d / 2;
    return ReferenceNormAndRope(head, norm, 1e-6f, std::span(batch.cos).subspan(angles, d / 2),
                                std::span(batch.sin).subspan(angles, d / 2));
  }
};

TEST_P(QkvPostTest, NormsRotatesAndStores) {
  for (const HeadCase& heads : HeadCases()) {
    for (bool with_norm : {false, true}) {
      auto ops = MakeOps(2);
      const auto d = static_cast<size_t>(heads.head_dim);
      const std::vector<int> lengths = {40, 21};
      TestPool pool(heads, kMinMax, lengths, rng());
      Batch batch = MakeBatch(heads, 50, with_norm);
      const Batch before = batch;
      // Positions 3 .. 36 of the first, 20 of the second; row 0 and rows 35 .. 48 in no run.
      const std::vector<KvRun> runs = {{1, 34, 3, 0}, {49, 1, 20, 1}};
      Run(*ops, pool, heads, batch, runs);
      for (const KvRun& run : runs) {
        for (int i = 0; i < run.rows; ++i) {
          const int64_t row = run.row_begin + i;
          const auto r = static_cast<size_t>(row);
          const size_t q_width = heads.heads() * d, kv_width = heads.kv_heads * d;
          Doubles want_q;
          for (int h = 0; h < heads.heads(); ++h) {
            const auto head = std::span(before.q).subspan(r * q_width + h * d, d);
            for (double x : NormAndRope(before, head, before.q_norm, row, d)) want_q.push_back(x);
          }
          // A norm and a rotation: a handful of roundings of 2^-24.
          ASSERT_EQ(CompareStored(std::span(batch.q).subspan(r * q_width, q_width), want_q, d,
                                  activation_dtype(), 1e-6),
                    "")
              << heads.Name() << ", row " << row;
          for (int h = 0; h < heads.kv_heads; ++h) {
            const auto key = std::span(before.k).subspan(r * kv_width + h * d, d);
            const auto value = std::span(before.v).subspan(r * kv_width + h * d, d);
            const Doubles want_k = NormAndRope(before, key, before.k_norm, row, d);
            const Doubles got_k = pool.Key(run.table, run.position + i, h);
            const Doubles got_v = pool.Value(run.table, run.position + i, h);
            ASSERT_EQ(CompareStored(std::vector<float>(got_k.begin(), got_k.end()), want_k, d,
                                    heads.kv, 1e-6),
                      "")
                << heads.Name();
            for (size_t j = 0; j < d; ++j) {
              ASSERT_EQ(got_v[j], heads.kv == kernels::DType::kBF16
                                      ? ToFloat(kernels::RoundToBf16(value[j]))
                                      : value[j]);
            }
          }
        }
      }
      // Rows of no run keep their queries, and slots of no run what they held.
      EXPECT_EQ(batch.q[0], before.q[0]);
      EXPECT_EQ(batch.q[40 * heads.heads() * d], before.q[40 * heads.heads() * d]);
      EXPECT_TRUE(std::isnan(pool.Key(0, 2, 0)[0]));
      EXPECT_TRUE(std::isnan(pool.Key(0, 37, 0)[0]));
      EXPECT_TRUE(std::isnan(pool.Value(1, 19, 0)[0]));
    }
  }
}

bf16 Bf16At(std::span<const std::byte> bytes, size_t index) {
  bf16 value;
  std::memcpy(&value, bytes.data() + 2 * index, 2);
  return value;
}

TEST_P(QkvPostTest, MinMaxBoundsAreThoseOfTheKeysInThePool) {
  for (const HeadCase& heads : HeadCases()) {
    auto ops = MakeOps(2);
    const auto d = static_cast<size_t>(heads.head_dim);
    const std::vector<int> lengths = {40};
    TestPool pool(heads, kMinMax, lengths, rng());
    const auto expect_bounds = [&](int length) {
      for (int page = 0; page * kPageTokens < length; ++page) {
        for (int h = 0; h < heads.kv_heads; ++h) {
          const auto descriptor = pool.Descriptor(0, page, h);
          for (size_t j = 0; j < d; ++j) {
            double least = INFINITY, most = -INFINITY;
            for (int t = page * kPageTokens; t < std::min(length, (page + 1) * kPageTokens); ++t) {
              least = std::min(least, pool.Key(0, t, h)[j]);
              most = std::max(most, pool.Key(0, t, h)[j]);
            }
            ASSERT_EQ(Bf16At(descriptor, j), kernels::FloorToBf16(static_cast<float>(least)))
                << heads.Name() << ", page " << page << ", component " << j << ", length "
                << length;
            ASSERT_EQ(Bf16At(descriptor, d + j), kernels::CeilToBf16(static_cast<float>(most)));
          }
        }
      }
    };
    Batch prefill = MakeBatch(heads, 34, false);
    Run(*ops, pool, heads, prefill, {{0, 34, 0, 0}});
    expect_bounds(34);
    for (int t = 34; t < 37; ++t) {  // Appended one by one.
      Batch token = MakeBatch(heads, 1, false);
      Run(*ops, pool, heads, token, {{0, 1, t, 0}});
      expect_bounds(t + 1);
    }
    // A window written again: bounds shrink where the old keys were the extreme ones.
    Batch window = MakeBatch(heads, 9, false);
    for (float& x : window.k) x *= 0x1p-7f;
    Run(*ops, pool, heads, window, {{0, 9, 28, 0}});
    expect_bounds(37);
  }
}

// Level and code by the formulas of kernels/sketch.h in float64.
TEST_P(QkvPostTest, SketchesFollowTheirFormulas) {
  for (const HeadCase& heads : HeadCases()) {
    for (int planes : {1, 2, 3}) {
      auto ops = MakeOps(1);
      const auto d = static_cast<size_t>(heads.head_dim);
      const SelectorSpec spec = {SelectorKind::kSketch, 8, planes, {1.0f, 1.0f}};
      const std::vector<int> lengths = {20};
      TestPool pool(heads, spec, lengths, rng());
      Batch batch = MakeBatch(heads, 20, false);
      std::fill_n(batch.k.begin() + 3 * heads.kv_heads * d, heads.kv_heads * d, 0.0f);
      Run(*ops, pool, heads, batch, {{0, 20, 0, 0}});
      for (int t = 0; t < 20; ++t) {
        for (int h = 0; h < heads.kv_heads; ++h) {
          const Doubles key = pool.Key(0, t, h);
          Doubles x(d, 0.0);
          double norm = 0;
          for (size_t i = 0; i < d; ++i) {
            for (size_t j = 0; j < d; ++j) {
              const double sign = std::popcount(i & j) % 2 == 0 ? 1 : -1;
              x[i] += sign * kernels::SketchSign(static_cast<int>(j)) * key[j];
            }
            x[i] /= std::sqrt(static_cast<double>(d));
            norm += x[i] * x[i];
          }
          const double rms = std::sqrt(norm / static_cast<double>(d));
          const auto descriptor = pool.Descriptor(0, t / kPageTokens, h);
          const size_t slot = static_cast<size_t>(t % kPageTokens);
          double product = 0;
          for (size_t j = 0; j < d; ++j) {
            int code = 0;
            for (int p = 0; p < planes; ++p) {
              const size_t word = (static_cast<size_t>(p) * d / 32 + j / 32) * kPageTokens + slot;
              uint32_t bits;
              std::memcpy(&bits, descriptor.data() + word * sizeof(bits), sizeof(bits));
              code = 2 * code + static_cast<int>((bits >> (j % 32)) & 1);
            }
            const int level = 2 * code - ((1 << planes) - 1);
            product += x[j] * level;
            const double cell = x[j] / (0.6 * rms);
            if (rms == 0 || std::abs(cell - std::round(cell)) < 1e-4) continue;
            const int want = std::clamp(static_cast<int>(std::floor(cell)) + 4, 0, 7);
            ASSERT_EQ(code, want >> (3 - planes)) << heads.Name() << ", token " << t << ", " << j;
          }
          const float scale =
              ToFloat(Bf16At(descriptor.subspan(static_cast<size_t>(planes) * 16 * d / 8), slot));
          if (t == 3) {
            EXPECT_EQ(scale, 0.0f);
          } else {
            EXPECT_NEAR(scale / (norm / product), 1.0, 0x1p-8) << heads.Name();
          }
        }
      }
    }
  }
}

// For Gaussian keys the scales are 1.253, 0.635 and 0.310 times the rms, and the estimate of a dot
// product is unbiased along the key: <k, k^> = <k, k> (up to the scale's bf16).
TEST_P(QkvPostTest, ScalesAreThoseOfGaussianComponents) {
  const HeadCase heads = Supported({1, 1, 128, kernels::DType::kF32});
  for (int planes : {1, 2, 3}) {
    auto ops = MakeOps(2);
    const SelectorSpec spec = {SelectorKind::kSketch, 8, planes, {1.0f, 1.0f}};
    const std::vector<int> lengths = {2000};
    TestPool pool(heads, spec, lengths, rng());
    Batch batch = MakeBatch(heads, 2000, false);
    Run(*ops, pool, heads, batch, {{0, 2000, 0, 0}});
    double ratio = 0;
    for (int t = 0; t < 2000; ++t) {
      double norm = 0;
      for (double x : pool.Key(0, t, 0)) norm += x * x;
      const auto scales =
          pool.Descriptor(0, t / kPageTokens, 0).subspan(static_cast<size_t>(planes) * 256);
      ratio += ToFloat(Bf16At(scales, static_cast<size_t>(t % kPageTokens))) /
               std::sqrt(norm / 128) / 2000;
    }
    // The mean of 2000 keys of 128 components is good to about 0.1 %.
    EXPECT_NEAR(ratio / kernels::kSketchGaussianScale[planes], 1.0, 5e-3) << planes << " planes";
  }
}

TEST_P(QkvPostTest, RunsAndThreadsDoNotChangeABit) {
  for (const SelectorSpec& spec : kSelectors) {
    const HeadCase heads = {2, 3, 64, kernels::DType::kBF16};
    const std::vector<int> lengths = {75};
    std::vector<std::vector<std::byte>> descriptors;
    std::vector<std::vector<double>> keys;
    std::vector<std::vector<float>> queries;
    const Batch batch = MakeBatch(heads, 75, true);
    for (int threads : {1, 2, 5}) {
      auto ops = MakeOps(threads);
      TestPool pool(heads, spec, lengths, rng());
      Batch copy = batch;
      for (int begin = 0; begin < 75;) {
        const int rows = threads == 1 ? 75 : std::min(75 - begin, Uniform(1, 20));
        Run(*ops, pool, heads, copy, {{begin, rows, begin, 0}});
        begin += rows;
      }
      keys.emplace_back();
      descriptors.emplace_back();
      for (int h = 0; h < 2; ++h) {
        for (int t = 0; t < 75; ++t) {
          for (double x : pool.Key(0, t, h)) keys.back().push_back(x);
        }
        for (int page = 0; page < 4; ++page) {  // The fifth page is not full.
          const auto bytes = pool.Descriptor(0, page, h);
          descriptors.back().insert(descriptors.back().end(), bytes.begin(), bytes.end());
        }
      }
      queries.push_back(copy.q);
    }
    for (size_t i = 1; i < 3; ++i) {
      EXPECT_TRUE(keys[i] == keys[0]);
      EXPECT_TRUE(descriptors[i] == descriptors[0]);
      EXPECT_EQ(CompareBits(queries[i], queries[0], 64), "");
    }
  }
}

RESA_INSTANTIATE_OPS_TEST(QkvPostTest);

}  // namespace
}  // namespace resa::testing
