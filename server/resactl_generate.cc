#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/status_macros.h"
#include "google/protobuf/util/time_util.h"
#include "grpcpp/grpcpp.h"
#include "server/generate_flags.h"
#include "server/resactl_client.h"

namespace resa::server {
namespace {

double Seconds(const google::protobuf::Duration& duration) {
  return google::protobuf::util::TimeUtil::DurationToNanoseconds(duration) * 1e-9;
}

// Prints a stream for people: text to stdout as it comes, what it cost to stderr.
class TextPrinter {
 public:
  explicit TextPrinter(int outputs) : texts_(outputs) {}

  void Print(const resa::v1::GenerateResponse& response) {
    if (response.has_delta()) {
      const resa::v1::Delta& delta = response.delta();
      if (texts_.size() == 1) {
        Write(delta.text());
      } else if (static_cast<size_t>(delta.index()) < texts_.size()) {
        texts_[delta.index()] += delta.text();  // Outputs interleave; each is shown at its end.
      }
    } else if (response.has_finished()) {
      Finish(response.finished());
    }
  }

 private:
  void Write(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
    if (!text.empty()) at_line_start_ = text.back() == '\n';
  }

  void Finish(const resa::v1::Finished& finished) {
    if (texts_.size() > 1 && static_cast<size_t>(finished.index()) < texts_.size()) {
      Write(absl::StrFormat("--- output %d\n", finished.index()));
      Write(texts_[finished.index()]);
    }
    // The summary gets a line of its own on a terminal; a file gets the text as it is.
    if (!at_line_start_ && (texts_.size() > 1 || isatty(STDOUT_FILENO))) Write("\n");
    PrintSummary(finished);
  }

  static void PrintSummary(const resa::v1::Finished& finished) {
    const resa::v1::Usage& usage = finished.usage();
    const double first = Seconds(finished.timings().first_token());
    const double decode = Seconds(finished.timings().decode());
    const int later = usage.output_tokens() - 1;
    absl::FPrintF(stderr, "%d prompt + %d output tokens in %.2f s: first token after %.2f s",
                  usage.prompt_tokens(), usage.output_tokens(), Seconds(finished.timings().total()),
                  first);
    if (later > 0 && decode > 0) absl::FPrintF(stderr, ", then %.1f tokens/s", later / decode);
    std::string reason =
        finished.reason() == resa::v1::FINISH_REASON_LENGTH ? "length" : "end of sequence";
    if (!finished.matched_stop_string().empty()) {
      reason = absl::StrFormat("stop string '%s'", finished.matched_stop_string());
    } else if (finished.has_matched_stop_token_id()) {
      reason = absl::StrFormat("token %d", finished.matched_stop_token_id());
    }
    absl::FPrintF(stderr, "; ended by %s\n", reason);
    const resa::v1::AttentionStats& attention = finished.attention();
    absl::FPrintF(stderr, "attention: %d sparse and %d dense steps", attention.sparse_steps(),
                  attention.dense_steps());
    if (attention.sparse_steps() > 0) {
      absl::FPrintF(stderr, ", %.1f%% of the blocks kept", 100 * attention.kept_block_ratio());
    }
    absl::FPrintF(stderr, ", %d rectifications of %d tokens", attention.rectifications(),
                  attention.rectified_tokens());
    if (usage.preemptions() > 0) absl::FPrintF(stderr, ", preempted %d times", usage.preemptions());
    absl::FPrintF(stderr, "\n");
  }

  std::vector<std::string> texts_;  // By output.
  bool at_line_start_ = true;
};

}  // namespace

absl::Status RunGenerate(absl::Span<const std::string> args) {
  FlagSet flags;
  ClientFlags client;
  GenerateFlags generate;
  client.AddTo(&flags);
  generate.AddPromptTo(&flags);
  generate.AddTo(&flags);
  RESA_ASSIGN_OR_RETURN(const auto words, ParseArgs(&flags, args));
  if (!words.has_value()) return absl::OkStatus();
  RESA_RETURN_IF_ERROR(generate.SetPrompt(*words));

  const resa::v1::GenerateRequest& request = generate.request();
  const auto stub = resa::v1::InferenceService::NewStub(Connect(client));
  grpc::ClientContext context;
  SetDeadline(client, &context);
  const auto stream = stub->Generate(&context, request);
  TextPrinter printer(request.has_n() ? std::max(1, request.n()) : 1);
  resa::v1::GenerateResponse response;
  while (stream->Read(&response)) {
    if (client.json) {
      std::puts(ToJson(response).c_str());
      std::fflush(stdout);
    } else {
      printer.Print(response);
    }
  }
  return FromGrpcStatus(stream->Finish());
}

}  // namespace resa::server
