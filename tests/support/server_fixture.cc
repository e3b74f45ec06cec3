#include "tests/support/server_fixture.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "kernels/cpu/cpu_ops.h"
#include "server/config.h"

namespace resa::testing {
namespace {

constexpr size_t kLogLines = 1000;

// `flags` after those defaults that they do not replace.
std::vector<std::string> WithDefaults(const std::vector<std::string>& flags) {
  std::vector<std::string> all;
  for (const std::string flag :
       {"--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--threads=1", "--sparse-from=0",
        "--attention-mode=rectified", "--pool-memory=16MiB", "--drain-timeout=10s"}) {
    const std::string name = std::vector<std::string>(absl::StrSplit(flag, '=')).front();
    bool replaced = false;
    for (const std::string& given : flags) replaced |= given.rfind(name + "=", 0) == 0;
    if (!replaced) all.push_back(flag);
  }
  all.insert(all.end(), flags.begin(), flags.end());
  return all;
}

}  // namespace

TestServer::TestServer(const TestServerOptions& options)
    : folder_(
          std::make_unique<ModelFolder>(options.model, options.model_seed, options.chat_template)) {
  auto line = server::ParseCommandLine(WithDefaults(options.flags));
  RESA_CHECK(line.ok()) << line.status();
  line->settings.set_model(folder_->path());
  if (!line->settings.has_served_model_name()) line->settings.set_served_model_name("tiny");
  const auto config = server::ResolveConfig(line->settings);
  RESA_CHECK(config.ok()) << config.status();
  log_ = std::make_shared<spdlog::sinks::ringbuffer_sink_mt>(kLogLines);
  auto logger = std::make_shared<spdlog::logger>("test", log_);
  auto daemon = server::Daemon::Create(*config, std::move(logger));
  RESA_CHECK(daemon.ok()) << daemon.status();
  daemon_ = *std::move(daemon);
  threads_ = config->device.threads;
  if (options.load) LoadModel();

  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  // Every server has a connection of its own, even if an earlier one had the same port.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  channel_ = grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments);
  stub_ = resa::v1::InferenceService::NewStub(channel_);
}

TestServer::~TestServer() = default;

void TestServer::LoadModel() {
  const absl::Status loaded =
      daemon_->Load(kernels::CreateCpuOps(kernels::CpuOptions{.threads = threads_}));
  RESA_CHECK(loaded.ok()) << loaded;
}

std::string TestServer::address() const { return absl::StrCat("127.0.0.1:", daemon_->grpc_port()); }

std::vector<std::string> TestServer::LogLines() const { return log_->last_formatted(); }

resa::v1::GetLoadResponse TestServer::Load() {
  grpc::ClientContext context;
  resa::v1::GetLoadResponse load;
  const grpc::Status status = stub_->GetLoad(&context, {}, &load);
  RESA_CHECK(status.ok()) << status.error_message();
  return load;
}

bool TestServer::WaitForLoad(const std::function<bool(const resa::v1::GetLoadResponse&)>& condition,
                             absl::Duration timeout) {
  const absl::Time give_up = absl::Now() + timeout;
  while (!condition(Load())) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

std::string Generation::Describe() const {
  return absl::StrCat("status ", static_cast<int>(status.error_code()), " '",
                      status.error_message(), "' ", protocol_error);
}

Generation Generate(resa::v1::InferenceService::Stub& stub,
                    const resa::v1::GenerateRequest& request, grpc::ClientContext* context) {
  grpc::ClientContext plain;
  const auto stream = stub.Generate(context != nullptr ? context : &plain, request);
  return ReadToEnd(stream.get());
}

Generation ReadToEnd(grpc::ClientReader<resa::v1::GenerateResponse>* stream) {
  Generation result;
  const auto complain = [&](const std::string& what) {
    if (result.protocol_error.empty()) result.protocol_error = what;
  };
  const auto output = [&](int32_t index) -> Generation::Output& {
    if (index < 0 || index > 1000) {
      complain(absl::StrCat("output index ", index));
      index = 0;
    }
    if (result.outputs.size() <= static_cast<size_t>(index)) result.outputs.resize(index + 1);
    if (result.outputs[index].finished.has_value()) {
      complain(absl::StrCat("output ", index, " goes on after its end"));
    }
    return result.outputs[index];
  };
  resa::v1::GenerateResponse response;
  while (stream->Read(&response)) {
    if (response.has_accepted()) {
      if (result.accepted.has_value()) complain("accepted twice");
      result.accepted = response.accepted();
      continue;
    }
    if (!result.accepted.has_value()) complain("something comes before accepted");
    if (response.has_delta()) {
      Generation::Output& out = output(response.delta().index());
      out.text += response.delta().text();
      for (int32_t id : response.delta().token_ids()) out.token_ids.push_back(id);
      for (const auto& logprob : response.delta().logprobs()) out.logprobs.push_back(logprob);
      ++out.deltas;
    } else if (response.has_finished()) {
      output(response.finished().index()).finished = response.finished();
    } else {
      complain("an empty response");
    }
  }
  result.status = stream->Finish();
  if (!result.status.ok()) return result;
  if (result.outputs.empty()) complain("an OK stream without outputs");
  for (const Generation::Output& out : result.outputs) {
    if (!out.finished.has_value()) complain("an OK stream with an output that does not end");
  }
  return result;
}

resa::v1::GenerateRequest RequestFor(const std::string& prompt, int tokens) {
  resa::v1::GenerateRequest request;
  request.set_text(prompt);
  request.mutable_stop()->set_max_tokens(tokens);
  request.mutable_stop()->set_ignore_eos(true);
  request.mutable_output()->set_token_ids(true);
  return request;
}

}  // namespace resa::testing
