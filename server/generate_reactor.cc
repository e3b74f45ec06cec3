#include "server/generate_reactor.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "engine/status_macros.h"
#include "server/grpc_status.h"
#include "server/rpc_status.h"
#include "server/validate.h"

namespace resa::server {
namespace {

// What a reader that has fallen too far behind gets to take the message under way and the status.
constexpr std::chrono::seconds kReadGrace(10);

uint64_t RandomSeed() {
  thread_local std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

// What the caller's deadline is by the engine's clock, which tells `now`.
absl::Time Deadline(const grpc::CallbackServerContext& context, absl::Time now) {
  const std::chrono::system_clock::time_point deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return now + (absl::FromChrono(deadline) - absl::Now());
}

// The trace id of a W3C traceparent header, "00-<32 hex>-<16 hex>-<2 hex>", or "".
std::string TraceId(const grpc::CallbackServerContext& context) {
  const auto header = context.client_metadata().find("traceparent");
  if (header == context.client_metadata().end()) return "";
  const std::vector<std::string> parts =
      absl::StrSplit(absl::string_view(header->second.data(), header->second.size()), '-');
  if (parts.size() < 4 || parts[1].size() != 32) return "";
  for (const char c : parts[1]) {
    if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) return "";
  }
  return parts[1];
}

std::string NameFor(const resa::v1::GenerateRequest& request, uint64_t random) {
  if (!request.request_id().empty()) return request.request_id();
  return absl::StrCat("req-", absl::Hex(random, absl::kZeroPad16));
}

}  // namespace

GenerateReactor::GenerateReactor(grpc::CallbackServerContext* context,
                                 const resa::v1::GenerateRequest& request, GenerateCalls* calls)
    : context_(context),
      calls_(calls),
      arrival_(absl::Now()),
      random_(RandomSeed()),
      name_(NameFor(request, random_)),
      // A longer one will be refused; the log takes its beginning.
      log_name_(absl::CEscape(name_.substr(0, kMaxRequestIdBytes))),
      trace_(TraceId(*context)) {
  ++calls_->live;
}

void GenerateReactor::Start(const resa::v1::GenerateRequest& request, const ServedModel& model,
                            engine::Engine* engine) {
  engine_ = engine;
  absl::StatusOr<engine::RequestId> id = Submit(request, model);
  if (!id.ok()) {
    Refuse(id.status());
    return;
  }
  id_ = *id;
}

absl::StatusOr<engine::RequestId> GenerateReactor::Submit(const resa::v1::GenerateRequest& request,
                                                          const ServedModel& model) {
  // First, since a long prompt is work and who finds no room will come again.
  RESA_RETURN_IF_ERROR(engine_->CheckRoom());
  RESA_ASSIGN_OR_RETURN(auto engine_request, ToEngineRequest(request, model, random_));
  engine_request->deadline = Deadline(*context_, engine_->Now());
  if (calls_->log_prompts) {
    calls_->logger->info("request {}: prompt {}", log_name_, request.ShortDebugString());
  }
  StreamWriter::Options options;
  options.request_id = name_;
  options.arrival = arrival_;
  options.seed = engine_request->sampling.seed;
  options.token_ids = engine_request->output.token_ids;
  options.logprobs = engine_request->output.logprobs;
  options.outputs = std::max(1, engine_request->n);  // The engine refuses what is below.
  options.keep_text = calls_->log_prompts;
  writer_ = std::make_shared<StreamWriter>(std::move(options), static_cast<StreamTransport*>(this));
  engine_request->sink = writer_;
  return engine_->Submit(std::move(engine_request));
}

void GenerateReactor::Refuse(const absl::Status& status) {
  calls_->metrics->CountRefusal(status);
  if (absl::IsResourceExhausted(status)) {
    context_->AddTrailingMetadata("grpc-retry-pushback-ms",
                                  absl::StrCat(absl::ToInt64Milliseconds(kRetryDelay)));
  }
  status_ = status;
  ServerWriteReactor::Finish(ToGrpcStatus(ToRefusal(status)));
}

void GenerateReactor::StartWrite(const resa::v1::GenerateResponse& response) {
  ServerWriteReactor::StartWrite(&response);
}

void GenerateReactor::Finish(const absl::Status& status) {
  status_ = status;
  ServerWriteReactor::Finish(ToGrpcStatus(ToRpcStatus(status)));
}

void GenerateReactor::StartGrace() {
  // The writer, not this, is kept alive for the alarm: it knows whether the call has ended.
  grace_.Set(std::chrono::system_clock::now() + kReadGrace, [writer = writer_](bool expired) {
    if (expired) writer->OnGraceOver();
  });
}

void GenerateReactor::Abandon() { context_->TryCancel(); }

void GenerateReactor::OnWriteDone(bool ok) {
  if (!ok) engine_->Cancel(id_);
  writer_->OnWriteDone(ok);
}

void GenerateReactor::OnCancel() {
  if (engine_ != nullptr && id_ != engine::RequestId()) engine_->Cancel(id_);
}

void GenerateReactor::OnDone() {
  Log();
  --calls_->live;
  delete this;
}

void GenerateReactor::Log() {
  const StreamSummary summary = writer_ != nullptr ? writer_->Summary() : StreamSummary();
  const std::string trace = trace_.empty() ? "" : absl::StrCat(" trace ", trace_);
  std::string end(absl::StatusCodeToString(status_.code()));
  if (!status_.ok()) {
    absl::StrAppend(&end, ": ", absl::CEscape(ToRpcStatus(status_).message()));
  }
  calls_->logger->info(
      "request {}{}: {}, {} prompt and {} output tokens in {} messages, first token {}, "
      "total {}",
      log_name_, trace, end, summary.prompt_tokens, summary.output_tokens, summary.messages,
      summary.first_token.has_value() ? absl::FormatDuration(*summary.first_token) : "never",
      absl::FormatDuration(absl::Now() - arrival_));
  for (size_t i = 0; i < summary.texts.size(); ++i) {
    calls_->logger->info("request {}: output {} {}", log_name_, i, absl::CEscape(summary.texts[i]));
  }
}

}  // namespace resa::server
