// The programs themselves, resad and resactl, as an operator runs them.

#include <signal.h>

#include <filesystem>
#include <memory>
#include <sstream>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/child_process.h"
#include "tests/support/http_client.h"
#include "tests/support/model_folder.h"

namespace resa::testing {
namespace {

using ::nlohmann::json;
using ::testing::AnyOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// A daemon on free ports.
class Resad {
 public:
  explicit Resad(const std::string& model, std::vector<std::string> flags = {}) {
    std::vector<std::string> arguments = {RESAD_PATH,
                                          "--model=" + model,
                                          "--listen=127.0.0.1:0",
                                          "--http-listen=127.0.0.1:0",
                                          "--port-file=" + folder_.Path("ports"),
                                          "--threads=1",
                                          "--attention-mode=rectified",
                                          "--sparse-from=0",
                                          "--pool-memory=200MiB"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    process_ = std::make_unique<ChildProcess>(arguments);
    const absl::Time give_up = absl::Now() + absl::Seconds(20);
    while (!std::filesystem::exists(folder_.Path("ports")) && absl::Now() < give_up) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    std::istringstream ports(ReadFile(folder_.Path("ports")));
    ports >> grpc_port_ >> http_port_;
    EXPECT_GT(grpc_port_, 0);
    EXPECT_GT(http_port_, 0);
  }

  // Runs resactl to its end.
  std::unique_ptr<ChildProcess> Ctl(std::vector<std::string> arguments,
                                    const std::string& input = "") {
    auto child = Start(std::move(arguments), input);
    EXPECT_TRUE(child->Wait().has_value()) << child->Stderr();
    return child;
  }
  std::unique_ptr<ChildProcess> Start(std::vector<std::string> arguments,
                                      const std::string& input = "") {
    arguments.insert(arguments.begin(), RESACTL_PATH);
    arguments.push_back("--server=127.0.0.1:" + std::to_string(grpc_port_));
    return std::make_unique<ChildProcess>(arguments, input);
  }
  void WaitUntilServing() {
    const auto health = Ctl({"health", "--wait", "--timeout=15s"});
    ASSERT_EQ(health->Wait(), 0) << health->Stderr() << process_->Stderr();
  }

  ChildProcess& process() { return *process_; }
  int http_port() const { return http_port_; }

 private:
  TempFolder folder_;
  std::unique_ptr<ChildProcess> process_;
  int grpc_port_ = 0;
  int http_port_ = 0;
};

class ProcessTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = new ModelFolder({.max_position = 131072}, 1, kChatMlTemplate);
  }
  static void TearDownTestSuite() {
    delete model_;
    model_ = nullptr;
  }
  // Runs resad to its end, with the model.
  static std::unique_ptr<ChildProcess> RunResad(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), RESAD_PATH);
    auto child = std::make_unique<ChildProcess>(arguments);
    EXPECT_TRUE(child->Wait().has_value());
    return child;
  }
  static std::string model() { return "--model=" + model_->path(); }

  static ModelFolder* model_;
};

ModelFolder* ProcessTest::model_ = nullptr;

TEST_F(ProcessTest, CheckSaysWhatWouldBeServedAndExits) {
  const auto child = RunResad({"--check", model(), "--pool-memory=32MiB"});
  EXPECT_EQ(child->Wait(), 0);
  EXPECT_THAT(child->Stderr(), HasSubstr("llama, 2 layers"));
  EXPECT_THAT(child->Stderr(), HasSubstr("weights: "));
  EXPECT_THAT(child->Stderr(), HasSubstr("of descriptors"));
  EXPECT_THAT(child->Stderr(), AnyOf(HasSubstr("attention: rectified, keep 0.1"),
                                     HasSubstr("attention: sparse, keep 0.1")));
  EXPECT_THAT(child->Stderr(), HasSubstr("attention chosen: at "));
  EXPECT_THAT(child->Stderr(), AnyOf(HasSubstr("the limit of 25%"),  // On a CPU; on a GPU:
                                     HasSubstr("since matrix units")));
  EXPECT_THAT(child->Stderr(), HasSubstr("the settings and the model are good"));
}

TEST_F(ProcessTest, APoolThatCannotFitBesideTheWeightsIsWarnedOf) {
  const auto child = RunResad({"--check", model(), "--device=cpu", "--pool-memory=64TiB"});
  child->Wait();
  EXPECT_THAT(child->Stderr(), HasSubstr("--pool-memory: 64.0 TiB is more than the "));
}

TEST_F(ProcessTest, WrongSettingsAndModelsEndItWithOneLine) {
  TempFolder empty;
  TempFolder broken;
  broken.Write("config.json", "{");
  struct Case {
    std::vector<std::string> arguments;
    std::string message;
  };
  const Case cases[] = {
      {{}, "resad: --model: required"},
      {{model(), "--planes=9"}, "resad: --planes: 9 is not from 1 to 3"},
      {{model(), "--sped=1"}, "resad: unknown flag --sped"},
      {{model(), "--device=cuda:99"}, "resad: --device: "},
      {{"--model=/nonexistent"}, "/nonexistent"},
      {{"--model=" + empty.path()}, "config.json"},
      {{"--model=" + broken.path()}, "config.json"},
      {{model(), "--max-context=200000"}, "resad: --max-context: the model was made for 131072"},
      {{model(), "--pool-memory=1KiB"}, "resad: --pool-memory: 1.0 KiB is less than one page"},
      {{model(), "--listen=no.such.host.invalid:1"},
       "resad: --listen: cannot resolve 'no.such.host.invalid': "},
      {{model(), "--http-listen=foo.bar:99"}, "resad: --http-listen: 'foo.bar' is neither"},
      {{model(), "--max-sequences=2000000000", "--max-step-tokens=2147483647"},
       "resad: --max-sequences: 2000000000 is not from 1 to 4096"},
  };
  for (const Case& c : cases) {
    std::vector<std::string> arguments = c.arguments;
    arguments.push_back("--check");
    const auto child = RunResad(arguments);
    EXPECT_EQ(child->Wait(), 1) << c.message;
    std::istringstream lines(child->Stderr());
    std::string last;
    for (std::string line; std::getline(lines, line);) last = line;
    EXPECT_THAT(last, StartsWith("resad: "));
    EXPECT_THAT(last, HasSubstr(c.message));
  }
}

TEST_F(ProcessTest, HelpAndVersion) {
  EXPECT_THAT(RunResad({"--help"})->Stdout(), HasSubstr("--rectify-interval TOKENS"));
  EXPECT_THAT(RunResad({"--version"})->Stdout(), StartsWith("resad 0."));
}

TEST_F(ProcessTest, ATakenPortIsSaid) {
  Resad first(model_->path());
  first.WaitUntilServing();
  const auto load = first.Ctl({"load", "--json"});
  const std::string log = first.process().Stderr();
  const size_t at = log.find("gRPC, port ");
  ASSERT_NE(at, std::string::npos);
  const std::string port = std::to_string(std::stoi(log.substr(at + 11)));
  const auto second = RunResad({model(), "--listen=127.0.0.1:" + port, "--http-listen="});
  EXPECT_EQ(second->Wait(), 1);
  EXPECT_THAT(second->Stderr(), HasSubstr("--listen: cannot listen on 127.0.0.1:" + port));
  const std::string http = std::to_string(first.http_port());
  const auto third = RunResad({model(), "--listen=127.0.0.1:0", "--http-listen=127.0.0.1:" + http});
  EXPECT_EQ(third->Wait(), 1);
  EXPECT_THAT(third->Stderr(), HasSubstr("127.0.0.1:" + http));
}

TEST_F(ProcessTest, TheClientsCommandsWork) {
  Resad resad(model_->path(), {"--served-model-name=tiny"});
  resad.WaitUntilServing();

  const auto health = resad.Ctl({"health"});
  EXPECT_EQ(health->Stdout(), "SERVING\n");

  const auto tokens = resad.Ctl({"tokenize", "the"});
  EXPECT_EQ(tokens->Stdout(), std::to_string(kTheToken) + "\n");

  const auto model = resad.Ctl({"model", "--json"});
  const json description = json::parse(model->Stdout(), nullptr, false);
  EXPECT_EQ(description["name"], "tiny");
  EXPECT_EQ(description["default_attention"]["rectify_interval"], 32);

  const auto load = resad.Ctl({"load"});
  EXPECT_THAT(load->Stdout(), HasSubstr("pages_total: "));

  // Text goes to stdout as it is, the rest to stderr; the prompt may come from stdin.
  const std::vector<std::string> flags = {"generate", "--seed=1", "--max-tokens=100",
                                          "--ignore-eos"};
  const auto from_stdin = resad.Ctl(flags, "A prompt");
  EXPECT_EQ(from_stdin->Wait(), 0) << from_stdin->Stderr();
  EXPECT_THAT(from_stdin->Stderr(), HasSubstr("8 prompt + 100 output tokens"));
  EXPECT_THAT(from_stdin->Stderr(), HasSubstr("1 rectifications of"));
  std::vector<std::string> with_words = flags;
  with_words.push_back("A");
  with_words.push_back("prompt");
  EXPECT_EQ(resad.Ctl(with_words)->Stdout(), from_stdin->Stdout());
  with_words.push_back("--json");
  std::istringstream events(resad.Ctl(with_words)->Stdout());
  std::string text;
  json last;
  for (std::string line; std::getline(events, line);) {
    last = json::parse(line, nullptr, false);
    ASSERT_TRUE(last.is_object()) << line;
    if (last.contains("delta") && last["delta"].contains("text")) {
      text += last["delta"]["text"].get<std::string>();
    }
  }
  EXPECT_EQ(text, from_stdin->Stdout());
  EXPECT_EQ(last["finished"]["reason"], "FINISH_REASON_LENGTH");

  const auto chat = resad.Ctl(
      {"generate", "--chat", "--system=Be brief.", "--max-tokens=3", "--ignore-eos", "Hello"});
  EXPECT_EQ(chat->Wait(), 0) << chat->Stderr();
}

TEST_F(ProcessTest, BenchReportsLatencyAndThroughput) {
  Resad resad(model_->path());
  resad.WaitUntilServing();
  const auto closed = resad.Ctl({"bench", "--requests=6", "--concurrency=3", "--prompt-tokens=64",
                                 "--output-tokens=20", "--json"});
  EXPECT_EQ(closed->Wait(), 0) << closed->Stderr();
  const json report = json::parse(closed->Stdout(), nullptr, false);
  EXPECT_EQ(report["succeeded"], 6);
  EXPECT_EQ(report["prompt_tokens"], 6 * 64);
  EXPECT_EQ(report["output_tokens"], 6 * 20);
  EXPECT_GT(report["output_tokens_per_second"], 0);
  EXPECT_GT(report["first_token_seconds"]["p50"], 0);
  EXPECT_GE(report["first_token_seconds"]["p99"], report["first_token_seconds"]["p50"]);
  const auto open = resad.Ctl({"bench", "--requests=5", "--rate=50", "--output-tokens=5"});
  EXPECT_EQ(open->Wait(), 0) << open->Stderr();
  EXPECT_THAT(open->Stdout(), HasSubstr("5 of 5 requests"));
  EXPECT_THAT(open->Stdout(), HasSubstr("time to first token"));
}

TEST_F(ProcessTest, ErrorsOfTheClientSayWhatIsWrong) {
  EXPECT_EQ(ChildProcess({RESACTL_PATH, "dance"}).Wait(), 2);
  EXPECT_EQ(ChildProcess({RESACTL_PATH, "generate", "--frobnicate"}).Wait(), 2);
  ChildProcess nobody({RESACTL_PATH, "load", "--server=127.0.0.1:1", "--timeout=2s"});
  EXPECT_EQ(nobody.Wait(), 1);
  EXPECT_THAT(nobody.Stderr(), StartsWith("resactl: UNAVAILABLE: "));
  Resad resad(model_->path());
  resad.WaitUntilServing();
  const auto bad = resad.Ctl({"generate", "--top-p=7", "x"});
  EXPECT_EQ(bad->Wait(), 2);
  EXPECT_THAT(bad->Stderr(), HasSubstr("sampling.top_p"));
}

TEST_F(ProcessTest, SigtermLetsStreamsFinishAndExitsWithZero) {
  Resad resad(model_->path(), {"--drain-timeout=15s"});
  resad.WaitUntilServing();
  const auto stream =
      resad.Start({"generate", "--max-tokens=3000", "--ignore-eos", "--token-ids", "finish me"});
  // Wait for the first text.
  const absl::Time give_up = absl::Now() + absl::Seconds(20);
  while (stream->Stdout().empty() && absl::Now() < give_up) absl::SleepFor(absl::Milliseconds(5));
  resad.process().Signal(SIGTERM);
  EXPECT_EQ(stream->Wait(), 0) << stream->Stderr();
  EXPECT_THAT(stream->Stderr(), HasSubstr("3000 output tokens"));
  EXPECT_EQ(resad.process().Wait(), 0) << resad.process().Stderr();
}

TEST_F(ProcessTest, ASecondSigtermEndsAtOnce) {
  Resad resad(model_->path(), {"--drain-timeout=10m"});
  resad.WaitUntilServing();
  const auto stream = resad.Start({"generate", "--ignore-eos", "endless"});
  const absl::Time give_up = absl::Now() + absl::Seconds(20);
  while (stream->Stdout().empty() && absl::Now() < give_up) absl::SleepFor(absl::Milliseconds(5));
  resad.process().Signal(SIGTERM);
  EXPECT_EQ(resad.process().Wait(absl::Milliseconds(300)), std::nullopt);
  // Meanwhile monitors are told, as long as a stream is running.
  while (resad.process().Stderr().find("readiness: draining") == std::string::npos &&
         absl::Now() < give_up) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  const std::string health = HttpRequest(resad.http_port(), "GET", "/healthz");
  EXPECT_THAT(health, StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(health, EndsWith("draining\n"));
  resad.process().Signal(SIGTERM);
  EXPECT_EQ(resad.process().Wait(absl::Seconds(5)), 0);
  EXPECT_EQ(stream->Wait(), 1);
}

TEST_F(ProcessTest, HttpTellsHealthAndMetrics) {
  Resad resad(model_->path());
  resad.WaitUntilServing();
  const std::string health = HttpRequest(resad.http_port(), "GET", "/healthz");
  EXPECT_THAT(health, StartsWith("HTTP/1.1 200 OK"));
  EXPECT_THAT(health, EndsWith("serving\n"));
  EXPECT_THAT(HttpRequest(resad.http_port(), "GET", "/metrics"),
              HasSubstr("vllm:num_requests_running"));
}

TEST_F(ProcessTest, PromptsAreLoggedOnlyWhenSwitchedOn) {
  for (const bool log : {false, true}) {
    Resad resad(model_->path(), {log ? "--log-prompts" : "--no-log-prompts"});
    resad.WaitUntilServing();
    const auto stream = resad.Ctl(
        {"generate", "--max-tokens=5", "--ignore-eos", "--request-id=my-name", "a secret"});
    EXPECT_EQ(stream->Wait(), 0) << stream->Stderr();
    const std::string written = resad.process().Stderr();
    EXPECT_THAT(written, HasSubstr("request my-name: OK, 8 prompt and 5 output tokens"));
    EXPECT_EQ(written.find("a secret") != std::string::npos, log);
  }
}

}  // namespace
}  // namespace resa::testing
