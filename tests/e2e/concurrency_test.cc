// Many clients at once: each gets the tokens it would get alone, whatever else runs, even when its
// memory is taken away meanwhile.

#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/server_fixture.h"

namespace resa::testing {
namespace {

using ::resa::v1::GenerateRequest;

constexpr int kClients = 32;

// A mix of lengths, policies, sampling and outputs, from one seed.
GenerateRequest RandomRequest(std::mt19937* random) {
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(*random);
  };
  std::string prompt;
  for (int i = pick(1, 400); i > 0; --i) prompt += static_cast<char>(pick('a', 'z'));
  GenerateRequest request = RequestFor(prompt, pick(1, 250));
  request.mutable_sampling()->set_seed(pick(0, 1 << 30));
  request.mutable_sampling()->set_temperature(pick(0, 2) * 0.6f);
  if (pick(0, 3) == 0) request.mutable_sampling()->set_top_k(20);
  if (pick(0, 3) == 0) request.mutable_sampling()->set_repetition_penalty(1.2f);
  if (pick(0, 3) == 0) request.mutable_output()->set_logprobs(true);
  if (pick(0, 3) == 0) request.set_n(pick(2, 3));
  request.set_priority(pick(-1, 1));
  request.mutable_attention()->set_mode(static_cast<resa::v1::AttentionMode>(pick(0, 3)));
  if (pick(0, 1) == 0) {
    request.mutable_attention()->set_rectify_interval(8 * pick(1, 8));
    request.mutable_attention()->set_keep_ratio(0.05 * pick(1, 8));
    request.mutable_attention()->set_min_tokens(pick(1, 128));
  }
  return request;
}

// Where two outputs part, for a message that can be read; "" when they are the same.
std::string FirstDifference(const Generation::Output& a, const Generation::Output& b) {
  if (a.token_ids.size() != b.token_ids.size()) return "another number of tokens";
  for (size_t i = 0; i < a.token_ids.size(); ++i) {
    if (a.token_ids[i] != b.token_ids[i]) return absl::StrCat("token ", i);
  }
  if (a.text != b.text) return "text";
  if (a.logprobs.size() != b.logprobs.size()) return "number of logprobs";
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    if (a.logprobs[i].logprob() != b.logprobs[i].logprob()) return absl::StrCat("logprob ", i);
  }
  if (a.finished->attention().rectifications() != b.finished->attention().rectifications()) {
    return "rectifications";
  }
  return "";
}

// Mode SPARSE is the one that preemption changes: its approximate keys and values are recomputed
// densely, since replaying every step would cost as much again.
bool MayDiffer(const GenerateRequest& request, const Generation::Output& output) {
  return request.attention().mode() == resa::v1::ATTENTION_MODE_SPARSE &&
         output.finished->usage().preemptions() > 0;
}

void ExpectSame(const GenerateRequest& request, const Generation& together,
                const Generation& alone) {
  SCOPED_TRACE(request.attention().ShortDebugString());
  ASSERT_TRUE(together.ok()) << together.Describe();
  ASSERT_EQ(together.outputs.size(), alone.outputs.size());
  for (size_t i = 0; i < alone.outputs.size(); ++i) {
    if (MayDiffer(request, together.outputs[i])) continue;
    EXPECT_EQ(FirstDifference(together.outputs[i], alone.outputs[i]), "")
        << "output " << i << ", preempted " << together.outputs[i].finished->usage().preemptions()
        << " times";
  }
}

class ConcurrencyTest : public ::testing::TestWithParam<std::vector<std::string>> {};

TEST_P(ConcurrencyTest, EachStreamIsWhatItIsAlone) {
  constexpr uint32_t kSeed = 20240607;
  RecordProperty("seed", kSeed);
  SCOPED_TRACE(::testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < kClients; ++i) requests.push_back(RandomRequest(&random));

  TestServer server({.flags = GetParam()});
  std::vector<Generation> alone;
  for (const GenerateRequest& request : requests) alone.push_back(Generate(server.stub(), request));
  for (int i = 0; i < kClients; ++i) ASSERT_TRUE(alone[i].ok()) << i << alone[i].Describe();
  const int64_t preempted_alone = server.Load().preemptions();

  std::vector<Generation> together(kClients);
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&, i] { together[i] = Generate(server.stub(), requests[i]); });
  }
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kClients; ++i) {
    SCOPED_TRACE(::testing::Message() << "client " << i);
    ExpectSame(requests[i], together[i], alone[i]);
  }

  // The pool was too small for all of them: memory was really taken away and given back.
  EXPECT_GT(server.Load().preemptions(), preempted_alone);
  EXPECT_TRUE(server.WaitForLoad(
      [](const auto& load) { return load.pages_used() == 0 && load.running() == 0; }));
}

// A page costs 2 layers x 2 KV heads x (2 x 16 x 64 x 2 bytes and 288 of descriptors), 17.1 KiB, so
// 4 MiB hold 239 pages or 3,824 tokens (f32: about half): a few of the requests at a time.
INSTANTIATE_TEST_SUITE_P(
    Pools, ConcurrencyTest,
    ::testing::Values(std::vector<std::string>{"--pool-memory=4MiB", "--max-context=2000"},
                      std::vector<std::string>{"--pool-memory=4MiB", "--max-context=2000",
                                               "--preset=paper", "--kv-dtype=f32",
                                               "--max-step-tokens=400", "--threads=2"}));

// Clients that come, go away in the middle, time out and come again, for a while: afterwards
// nothing is left behind and a fresh request runs as ever.
TEST(ChurnTest, LeavesNothingBehind) {
  constexpr uint32_t kSeed = 7;
  SCOPED_TRACE(::testing::Message() << "seed " << kSeed);
  TestServer server({.flags = {"--pool-memory=4MiB", "--max-context=2000", "--max-waiting=8"}});
  GenerateRequest probe = RequestFor("probe", 100);
  probe.mutable_sampling()->set_seed(1);
  const Generation before = Generate(server.stub(), probe);
  ASSERT_TRUE(before.ok()) << before.Describe();

  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&, i] {
      std::mt19937 random(kSeed + i);
      for (int round = 0; round < 12; ++round) {
        GenerateRequest request = RandomRequest(&random);
        grpc::ClientContext context;
        const int fate = static_cast<int>(random() % 3);
        if (fate == 0) {
          context.set_deadline(std::chrono::system_clock::now() +
                               std::chrono::milliseconds(random() % 200));
        }
        const auto stream = server.stub().Generate(&context, request);
        resa::v1::GenerateResponse response;
        int reads = static_cast<int>(random() % 50);
        while (stream->Read(&response)) {
          if (fate == 1 && reads-- == 0) context.TryCancel();
        }
        const grpc::StatusCode code = stream->Finish().error_code();
        EXPECT_TRUE(code == grpc::OK || code == grpc::CANCELLED ||
                    code == grpc::DEADLINE_EXCEEDED || code == grpc::RESOURCE_EXHAUSTED)
            << code;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_TRUE(server.WaitForLoad([](const auto& load) {
    return load.pages_used() == 0 && load.running() == 0 && load.waiting() == 0;
  }));
  const Generation after = Generate(server.stub(), probe);
  ASSERT_TRUE(after.ok()) << after.Describe();
  EXPECT_EQ(after.outputs[0].token_ids, before.outputs[0].token_ids);
}

}  // namespace
}  // namespace resa::testing
