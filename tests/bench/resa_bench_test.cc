// The program as a child process: what it measures, and how it fails.

#include <gmock/gmock.h>

#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/support/child_process.h"

namespace resa::bench {
namespace {

using testing::ChildProcess;
using ::testing::HasSubstr;

const absl::Duration kTimeout = absl::Seconds(100);

TEST(ResaBenchTest, MeasuresEveryModeAndShowsWhatRan) {
  // One layer, 3 KV heads, f 32: a rectified round of 32 steps.
  ChildProcess bench({RESA_BENCH_PATH, "--shape=smollm2-135m-1l", "--context=1024", "--batch=1,2",
                      "--prefill=48@100", "--seconds=0.01", "--threads=2", "--json=-"});
  ASSERT_EQ(bench.Wait(kTimeout), 0) << bench.Stderr();
  const auto json = nlohmann::json::parse(bench.Stdout(), nullptr, /*allow_exceptions=*/false);
  ASSERT_FALSE(json.is_discarded()) << bench.Stdout();
  EXPECT_GT(json["ceilings"]["read_bytes_per_s"], 0);
  ASSERT_EQ(json["runs"].size(), 7u);

  const auto& dense = json["runs"][0];
  EXPECT_EQ(dense["mode"], "dense");
  EXPECT_EQ(dense["counters"]["steps"], 32);
  EXPECT_EQ(dense["counters"]["sparse_rows"], 0);
  const auto& sparse = json["runs"][1];
  EXPECT_EQ(sparse["counters"]["sparse_rows"], 32);
  // 13 of 128 blocks, one more where a step has begun a 131st.
  const int64_t blocks = sparse["counters"]["sparse_blocks_read"];
  EXPECT_GE(blocks, 32 * 3 * 13);
  EXPECT_LE(blocks, 32 * 3 * 14);
  EXPECT_GT(sparse["counters"]["descriptor_bytes"], 0);
  const auto& rectified = json["runs"][2];
  EXPECT_EQ(rectified["counters"]["rectifications"], 1);
  EXPECT_EQ(rectified["counters"]["rectified_rows"], 32);
  EXPECT_EQ(rectified["steps_with_window"]["units"], 1);
  EXPECT_EQ(rectified["steps_without_window"]["units"], 31);
  const auto& two = json["runs"][3];
  EXPECT_EQ(two["batch"], 2);
  EXPECT_EQ(two["counters"]["rows"], 64);
  const auto& prefill = json["runs"][6];
  EXPECT_EQ(prefill["kind"], "prefill");
  EXPECT_EQ(prefill["counters"]["tokens"], 48 * prefill["counters"]["steps"].get<int>());
  EXPECT_EQ(json["ratios"].size(), 11u);

  for (const auto& run : json["runs"]) {
    const auto& whole = run["whole"];
    EXPECT_LE(whole["seconds"]["p10"], whole["seconds"]["median"]);
    EXPECT_LE(whole["seconds"]["median"], whole["seconds"]["p90"]);
    // Every weight has its stage, and every step its logits.
    int logits = 0;
    for (const auto& stage : whole["stages"]) {
      EXPECT_NE(stage["stage"], "linear");
      logits += stage["stage"] == "logits" ? 1 : 0;
    }
    EXPECT_EQ(logits, 1);
  }
}

TEST(ResaBenchTest, RefusesWhatItCannotDo) {
  struct Case {
    std::vector<std::string> arguments;
    int exit;
    std::string message;
  };
  for (const Case& c : {
           Case{{"--speed=9"}, 2, "--speed"},
           Case{{"--device=abacus"}, 1, "--device abacus: it is neither cpu nor cuda:N"},
           Case{{"--target=MMX"}, 1, "--target: \"MMX\""},
           Case{{"--shape=0.7b"}, 1, "smollm2-135m"},
           Case{{"--model=/nowhere"}, 1, "/nowhere"},
           Case{{"--shape=smollm2-135m-1l", "--context=1000000", "--batch=256"}, 1, "--context"},
       }) {
    std::vector<std::string> command = {RESA_BENCH_PATH};
    command.insert(command.end(), c.arguments.begin(), c.arguments.end());
    ChildProcess bench(command);
    EXPECT_EQ(bench.Wait(kTimeout), c.exit) << ::testing::PrintToString(c.arguments);
    EXPECT_THAT(bench.Stderr(), HasSubstr(c.message));
    EXPECT_EQ(bench.Stdout(), "");
  }
}

TEST(ResaBenchTest, AFileThatCannotBeWrittenIsAnError) {
  ChildProcess bench({RESA_BENCH_PATH, "--shape=smollm2-135m-1l", "--context=16", "--mode=dense",
                      "--seconds=0.01", "--json=/nowhere/figures.json"});
  EXPECT_EQ(bench.Wait(kTimeout), 1);
  EXPECT_THAT(bench.Stderr(), HasSubstr("/nowhere/figures.json"));
}

}  // namespace
}  // namespace resa::bench
