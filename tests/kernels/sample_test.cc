// Sampling against a float64 reference: greedy, filters, penalties, forced tokens, logprobs.

#include <cmath>

#include "kernels/philox.h"
#include "tests/kernels/ops_fixture.h"

namespace resa::testing {
namespace {

using kernels::SampleResult;
using kernels::SampleRow;
using kernels::TokenBias;
using kernels::TokenCount;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class SampleTest : public OpsTest {
 protected:
  std::vector<SampleResult> Sample(kernels::Ops& ops, std::vector<float> logits, int64_t vocabulary,
                                   const std::vector<SampleRow>& rows) {
    std::vector<SampleResult> out(rows.size());
    ops.Sample(
        {.logits = AsMatrix(logits, static_cast<int64_t>(logits.size()) / vocabulary, vocabulary),
         .rows = rows.data(),
         .num_rows = static_cast<int64_t>(rows.size()),
         .out = out.data()});
    return out;
  }

  // The draws of many seeds are those of the reference, except next to a boundary.
  void ExpectReference(kernels::Ops& ops, const std::vector<float>& logits, SampleRow row,
                       const std::string& what, int draws = 60) {
    const ReferenceSample reference = SampleReference(logits, row);
    int skipped = 0;
    for (int i = 0; i < draws; ++i) {
      row.seed = rng()();
      row.draw_index = static_cast<uint64_t>(Uniform(0, 1 << 20));
      const double u = kernels::PhiloxUniform(row.seed, row.draw_index);
      const SampleResult got = Sample(ops, logits, static_cast<int64_t>(logits.size()), {row})[0];
      ASSERT_NO_FATAL_FAILURE(ExpectDraw(reference, got, u, what, &skipped));
    }
    EXPECT_LE(skipped, draws / 2) << what;
  }
  static void ExpectDraw(const ReferenceSample& reference, const SampleResult& got, double u,
                         const std::string& what, int* skipped) {
    ASSERT_TRUE(got.finite) << what;
    ASSERT_NEAR(got.logprob, reference.logprobs[static_cast<size_t>(got.token)],
                2e-6 * (1 + std::abs(got.logprob)))
        << what;
    // Weights are good to 2e-7 each and sums to as much.
    if (reference.DistanceToBoundary(u) < 2e-6) {
      ++*skipped;
    } else {
      ASSERT_EQ(got.token, reference.Pick(u)) << what << ", u " << u;
    }
  }
};

TEST_P(SampleTest, FiltersAndTemperatureMatchTheReference) {
  auto ops = MakeOps(1);
  for (int vocabulary : {1, 5, 16, 1000, 5003}) {
    for (float spread : {0.3f, 3.0f}) {
      const std::vector<float> logits = Normal(static_cast<size_t>(vocabulary), spread);
      for (const SampleRow& row : std::vector<SampleRow>{
               {.temperature = 1.0f},
               {.temperature = 0.3f},
               {.temperature = 2.5f},
               {.temperature = 0.8f, .min_p = 0.05f},
               {.temperature = 1.0f, .top_k = 1},
               {.temperature = 1.0f, .top_k = 50},
               {.temperature = 1.0f, .top_k = 900},
               {.temperature = 1.0f, .top_p = 0.9f},
               {.temperature = 1.0f, .top_p = 0.999f},
               {.temperature = 1.0f, .top_p = 1e-6f},
               {.temperature = 0.7f, .top_k = 40, .top_p = 0.8f, .min_p = 0.01f}}) {
        ExpectReference(*ops, logits, row,
                        "V " + std::to_string(vocabulary) + ", temperature " +
                            std::to_string(row.temperature) + ", top_k " +
                            std::to_string(row.top_k) + ", top_p " + std::to_string(row.top_p) +
                            ", min_p " + std::to_string(row.min_p),
                        20);
      }
    }
  }
}

TEST_P(SampleTest, BiasAndPenaltiesMatchTheReference) {
  auto ops = MakeOps(1);
  const std::vector<float> logits = Normal(300, 2.0f);
  std::vector<TokenCount> counts;
  for (int id = 0; id < 300; id += 3) {
    counts.push_back({.id = id, .output_count = id % 5, .in_prompt = id % 2 == 0});
  }
  const std::vector<TokenBias> bias = {{7, 5.0f}, {8, -kInfinity}, {9, 3.5f}, {9, 1.0f}};
  SampleRow row = {.temperature = 0.9f,
                   .repetition_penalty = 1.3f,
                   .presence_penalty = 0.4f,
                   .frequency_penalty = 0.2f,
                   .counts = counts.data(),
                   .num_counts = static_cast<int64_t>(counts.size()),
                   .bias = bias.data(),
                   .num_bias = 4};
  ExpectReference(*ops, logits, row, "penalties");
  row.top_p = 0.7f;
  ExpectReference(*ops, logits, row, "penalties and top_p");
  row.temperature = 0;
  ExpectReference(*ops, logits, row, "penalties, greedy", 1);
}

// In one call, which is what a sanitizer has time for.
TEST_P(SampleTest, EachRowHasItsOwnFilters) {
  auto ops = MakeOps(2);
  constexpr int kVocabulary = 1000;
  const std::vector<TokenCount> counts = {{.id = 5, .output_count = 2, .in_prompt = true}};
  const std::vector<TokenBias> bias = {{7, 5.0f}, {8, -kInfinity}};
  std::vector<SampleRow> rows = {
      {.top_k = 20},
      {.top_p = 0.9f},
      {.min_p = 0.05f},
      {.temperature = 0.7f, .top_k = 300, .top_p = 0.95f, .min_p = 0.01f},
      {.frequency_penalty = 0.5f,
       .counts = counts.data(),
       .num_counts = 1,
       .bias = bias.data(),
       .num_bias = 2},
      {.temperature = 0}};
  const std::vector<float> logits = Normal(rows.size() * kVocabulary, 2.0f);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].row = static_cast<int32_t>(i);
    rows[i].seed = rng()();
    rows[i].draw_index = i;
  }
  const std::vector<SampleResult> got = Sample(*ops, logits, kVocabulary, rows);
  int skipped = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto begin = logits.begin() + static_cast<int64_t>(i) * kVocabulary;
    const ReferenceSample reference = SampleReference({begin, begin + kVocabulary}, rows[i]);
    const double u = kernels::PhiloxUniform(rows[i].seed, rows[i].draw_index);
    ASSERT_NO_FATAL_FAILURE(ExpectDraw(reference, got[i], u, "row " + std::to_string(i), &skipped));
  }
  EXPECT_LE(skipped, 2);
}

TEST_P(SampleTest, GreedyTakesTheLowestOfEqualTokens) {
  auto ops = MakeOps(1);
  std::vector<float> logits(1000, -1.0f);
  logits[400] = logits[401] = logits[999] = 2.0f;
  const SampleResult got = Sample(*ops, logits, 1000, {{.temperature = 0}})[0];
  EXPECT_EQ(got.token, 400);
  EXPECT_TRUE(got.finite);
}

TEST_P(SampleTest, EqualTokensCompeteForTopKByTheirIds) {
  auto ops = MakeOps(1);
  const std::vector<float> logits(100, 0.5f);
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const SampleResult got = Sample(*ops, logits, 100, {{.top_k = 3, .seed = seed}})[0];
    ASSERT_LT(got.token, 3);
  }
}

TEST_P(SampleTest, FrequenciesFollowTheDistribution) {
  auto ops = MakeOps(2);
  const std::vector<float> logits = {0.0f, std::log(2.0f), std::log(3.0f), -kInfinity,
                                     std::log(4.0f)};
  constexpr int kDraws = 20000;
  std::vector<SampleRow> rows(kDraws);
  for (int i = 0; i < kDraws; ++i) {
    rows[static_cast<size_t>(i)] = {.seed = 42, .draw_index = static_cast<uint64_t>(i)};
  }
  std::vector<int> seen(5, 0);
  for (const SampleResult& r : Sample(*ops, logits, 5, rows)) ++seen[static_cast<size_t>(r.token)];
  const double want[5] = {0.1, 0.2, 0.3, 0.0, 0.4};
  for (size_t i = 0; i < 5; ++i) {
    // Five standard deviations of a binomial frequency; the seed is fixed.
    EXPECT_NEAR(seen[i] / double{kDraws}, want[i], 5 * std::sqrt(0.25 / kDraws));
  }
}

TEST_P(SampleTest, ForcedTokenReportsItsOwnLogprob) {
  auto ops = MakeOps(1);
  const std::vector<float> logits = Normal(500, 3.0f);
  const SampleRow row = {.forced_token = 123, .temperature = 0};
  const ReferenceSample reference = SampleReference(logits, row);
  const SampleResult got = Sample(*ops, logits, 500, {row})[0];
  EXPECT_EQ(got.token, 123);
  EXPECT_NEAR(got.logprob, reference.logprobs[123], 1e-5);
}

TEST_P(SampleTest, TopLogprobsAreTheHighestOfTheRawLogits) {
  auto ops = MakeOps(1);
  for (int vocabulary : {3, 20, 1000}) {
    std::vector<float> logits = Normal(static_cast<size_t>(vocabulary), 2.0f);
    if (vocabulary == 1000) logits[700] = logits[10] = 9.0f;  // A tie at the top.
    const std::vector<TokenBias> bias = {{1, 50.0f}};
    const SampleRow row = {.top_logprobs = 20, .bias = bias.data(), .num_bias = 1};
    const ReferenceSample reference = SampleReference(logits, row);
    const SampleResult got = Sample(*ops, logits, vocabulary, {row})[0];
    EXPECT_EQ(got.token, 1);
    ASSERT_EQ(got.num_top, std::min(20, vocabulary));
    std::vector<int32_t> order(static_cast<size_t>(vocabulary));
    for (int i = 0; i < vocabulary; ++i) order[static_cast<size_t>(i)] = i;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    for (size_t i = 0; i < static_cast<size_t>(got.num_top); ++i) {
      EXPECT_EQ(got.top_ids[i], order[i]);
      EXPECT_NEAR(got.top_logprobs[i], reference.logprobs[static_cast<size_t>(order[i])], 1e-5);
    }
  }
}

TEST_P(SampleTest, ReportsLogitsThatAreNotFinite) {
  auto ops = MakeOps(1);
  for (int at : {0, 15, 16, 36}) {
    for (float bad : {kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> logits = Normal(37);
      logits[static_cast<size_t>(at)] = bad;
      EXPECT_FALSE(Sample(*ops, logits, 37, {SampleRow{}})[0].finite) << at << " " << bad;
    }
    std::vector<float> logits = Normal(37);
    logits[static_cast<size_t>(at)] = -kInfinity;
    EXPECT_TRUE(Sample(*ops, logits, 37, {SampleRow{}})[0].finite);
  }
  EXPECT_FALSE(Sample(*ops, std::vector<float>(37, -kInfinity), 37, {SampleRow{}})[0].finite);
  std::vector<TokenBias> ban;
  for (int id = 0; id < 37; ++id) ban.push_back({id, -kInfinity});
  const SampleRow row = {.bias = ban.data(), .num_bias = 37};
  EXPECT_FALSE(Sample(*ops, Normal(37), 37, {row})[0].finite);
}

TEST_P(SampleTest, OtherRowsAndThreadsDoNotChangeTheToken) {
  const std::vector<float> logits = Normal(40 * 3001, 2.0f);
  std::vector<SampleRow> rows;
  for (int i = 0; i < 40; ++i) {
    rows.push_back({.row = i,
                    .top_k = i % 3 == 0 ? 20 : 0,
                    .top_p = i % 2 == 0 ? 0.9f : 1.0f,
                    .seed = rng()(),
                    .top_logprobs = 2});
  }
  auto one = MakeOps(1);
  const std::vector<SampleResult> want = Sample(*one, logits, 3001, rows);
  for (int threads : {2, 5}) {
    auto ops = MakeOps(threads);
    const std::vector<SampleResult> got = Sample(*ops, logits, 3001, rows);
    for (size_t i = 0; i < 40; ++i) {
      const SampleResult alone = Sample(*ops, logits, 3001, {rows[i]})[0];
      for (const SampleResult* r : {&got[i], &alone}) {
        EXPECT_EQ(r->token, want[i].token);
        EXPECT_EQ(r->logprob, want[i].logprob);
        EXPECT_EQ(r->top_logprobs, want[i].top_logprobs);
      }
    }
  }
}

// Known answers of the generator's published test vectors.
TEST(PhiloxTest, MatchesPublishedVectors) {
  const kernels::PhiloxWords zero = kernels::Philox4x32({{0, 0, 0, 0}}, 0, 0);
  EXPECT_EQ(zero.word[0], 0x6627e8d5u);
  EXPECT_EQ(zero.word[1], 0xe169c58du);
  EXPECT_EQ(zero.word[2], 0xbc57ac4cu);
  EXPECT_EQ(zero.word[3], 0x9b00dbd8u);
  const uint32_t ones = 0xffffffffu;
  const kernels::PhiloxWords full = kernels::Philox4x32({{ones, ones, ones, ones}}, ones, ones);
  EXPECT_EQ(full.word[0], 0x408f276du);
  EXPECT_EQ(full.word[1], 0x41c83b0eu);
  EXPECT_EQ(full.word[2], 0xa20bc7c6u);
  EXPECT_EQ(full.word[3], 0x6d5451fdu);
}

RESA_INSTANTIATE_OPS_TEST(SampleTest);

}  // namespace
}  // namespace resa::testing
