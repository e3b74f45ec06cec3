#include "server/config.h"

#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/invalid.h"
#include "engine/scheduler.h"
#include "engine/status_macros.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "server/flag_set.h"
#include "server/proto_field.h"

namespace resa::server {
namespace {

using engine::Invalid;
using ::google::protobuf::FieldDescriptor;
using ::resa::v1::ServerConfig;

// ---- reading ----------------------------------------------------------------------------------

std::string FlagName(const FieldDescriptor& field) {
  return absl::StrReplaceAll(field.name(), {{"_", "-"}});
}

// A number that may also be "auto", which is what an unset field means.
bool TakesAuto(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_INT32 &&
         absl::EndsWith(field.options().GetExtension(resa::v1::flag).value(), "|auto");
}

// One flag for every field of ServerConfig, and those that are not settings. Fields that a flag
// sets back to "auto" go into `unset`.
void AddFlags(FlagSet* flags, ServerConfig* settings, std::vector<const FieldDescriptor*>* unset,
              std::string* file, CommandLine* line) {
  const google::protobuf::Descriptor* descriptor = ServerConfig::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    const resa::v1::FlagHelp& help = field->options().GetExtension(resa::v1::flag);
    FlagSet::Setter set = [field, settings, unset](absl::string_view text) -> absl::Status {
      if (text != "auto" || !TakesAuto(*field)) return SetField(field, text, settings);
      unset->push_back(field);
      return absl::OkStatus();
    };
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_BOOL) {
      flags->AddSwitch(FlagName(*field), help.text(), std::move(set));
    } else {
      flags->Add(FlagName(*field), help.value(), help.text(), std::move(set));
    }
  }
  flags->Add("config", "FILE.textproto", "settings as a resa.v1.ServerConfig in text format", file);
  flags->AddSwitch("check", "check settings and model, say what would be served, and exit",
                   &line->check);
  flags->AddSwitch("help", "print this and exit", &line->help);
  flags->AddSwitch("version", "print the version and exit", &line->version);
}

// Keeps the first error of a text-format file.
class FirstError final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text.empty()) text = absl::StrCat(line + 1, ":", column + 1, ": ", message);
  }
  std::string text;
};

absl::StatusOr<ServerConfig> ReadConfigFile(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return absl::NotFoundError(absl::StrCat("--config: cannot read ", path));
  }
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  ServerConfig settings;
  if (!parser.ParseFromString(text.str(), &settings)) return Invalid(path, ":", error.text);
  return settings;
}

// ---- resolving --------------------------------------------------------------------------------

// Far above what any machine serves well, and low enough that buffers sized by them can be had.
constexpr int32_t kMaxThreads = 1024;
constexpr int32_t kMaxSequences = 4096;
constexpr int32_t kMaxStepTokens = 1 << 16;
constexpr int32_t kMaxWaiting = 1 << 16;

absl::Status CheckAddress(absl::string_view flag, absl::string_view address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return Invalid("--", flag, ": '", address, "' is not HOST:PORT");
  }
  return absl::OkStatus();
}

// Index of `value` in `choices`.
absl::StatusOr<size_t> Choose(absl::string_view flag, absl::string_view value,
                              const std::vector<absl::string_view>& choices) {
  for (size_t i = 0; i < choices.size(); ++i) {
    if (value == choices[i]) return i;
  }
  return Invalid("--", flag, ": '", value, "' is none of ", absl::StrJoin(choices, ", "));
}

absl::StatusOr<int32_t> AtLeast(absl::string_view flag, int32_t value, int32_t least) {
  if (value >= least) return value;
  return Invalid("--", flag, ": ", value, " is not at least ", least);
}

absl::StatusOr<int32_t> InRange(absl::string_view flag, int32_t value, int32_t least,
                                int32_t most) {
  if (value >= least && value <= most) return value;
  return Invalid("--", flag, ": ", value, " is not from ", least, " to ", most);
}

// "keep_ratio: ..." with the name of the flag in front: "--keep-ratio: ...".
absl::Status AsFlag(const absl::Status& status) {
  const std::pair<std::string, std::string> parts =
      absl::StrSplit(status.message(), absl::MaxSplits(':', 1));
  return Invalid("--", absl::StrReplaceAll(parts.first, {{"_", "-"}}), ":", parts.second);
}

absl::StatusOr<ModelOptions> ResolveModel(const ServerConfig& settings) {
  ModelOptions model;
  model.path = settings.model();
  if (model.path.empty()) {
    return Invalid("--model: required; a Hugging Face model directory or a .gguf file");
  }
  model.served_name = settings.served_model_name();
  if (model.served_name.empty()) {
    if (settings.has_served_model_name()) return Invalid("--served-model-name: must not be empty");
    const std::vector<absl::string_view> parts = absl::StrSplit(model.path, '/', absl::SkipEmpty());
    model.served_name = parts.empty() ? model.path : std::string(parts.back());
  }
  return model;
}

absl::StatusOr<ListenOptions> ResolveListen(const ServerConfig& settings) {
  ListenOptions listen;
  listen.grpc_address = settings.has_listen() ? settings.listen() : "127.0.0.1:50051";
  listen.http_address = settings.has_http_listen() ? settings.http_listen() : "127.0.0.1:9090";
  listen.port_file = settings.port_file();
  RESA_RETURN_IF_ERROR(CheckAddress("listen", listen.grpc_address));
  if (!listen.http_address.empty()) {
    RESA_RETURN_IF_ERROR(CheckAddress("http-listen", listen.http_address));
    if (listen.http_address == listen.grpc_address && !absl::EndsWith(listen.grpc_address, ":0")) {
      return Invalid("--http-listen: ", listen.http_address, " is also --listen; use two ports");
    }
  }
  // Kubernetes kills what has not ended after 30s; aborted streams need a moment to say so.
  const std::string drain = settings.has_drain_timeout() ? settings.drain_timeout() : "25s";
  const absl::StatusOr<absl::Duration> timeout = ParseDuration(drain);
  if (!timeout.ok()) return Invalid("--drain-timeout: ", timeout.status().message());
  listen.drain_timeout = *timeout;
  return listen;
}

absl::StatusOr<DeviceOptions> ResolveDevice(const ServerConfig& settings) {
  DeviceOptions device;
  const std::string name = settings.has_device() ? settings.device() : "auto";
  absl::string_view index = name;
  if (absl::ConsumePrefix(&index, "cuda:") && absl::SimpleAtoi(index, &device.cuda_index) &&
      device.cuda_index >= 0) {
    device.device = Device::kCuda;
  } else {
    RESA_ASSIGN_OR_RETURN(const size_t choice, Choose("device", name, {"auto", "cpu", "cuda:N"}));
    if (choice == 2) return Invalid("--device: cuda:N is cuda:0 for the first GPU");
    device.device = choice == 0 ? Device::kAuto : Device::kCpu;
  }
  device.deterministic = settings.deterministic();
  if (settings.has_threads()) {
    RESA_ASSIGN_OR_RETURN(device.threads, InRange("threads", settings.threads(), 1, kMaxThreads));
  }
  const std::string bf16 = settings.has_cpu_bf16() ? settings.cpu_bf16() : "auto";
  RESA_ASSIGN_OR_RETURN(const size_t bf16_choice, Choose("cpu-bf16", bf16, {"auto", "off"}));
  device.cpu_bf16 = bf16_choice == 0;
  return device;
}

absl::StatusOr<kernels::SelectorSpec> ResolveSelector(const ServerConfig& settings, bool paper) {
  kernels::SelectorSpec spec;
  const std::string name = settings.has_selector() ? settings.selector()
                           : paper                 ? "minmax"
                                                   : "sketch";
  RESA_ASSIGN_OR_RETURN(const size_t kind, Choose("selector", name, {"sketch", "minmax"}));
  if (paper && kind != 1) {
    return Invalid("--selector: --preset paper means minmax; drop one of the two");
  }
  if (kind == 1) {
    spec.kind = kernels::SelectorKind::kMinMax;
    spec.block_tokens = 16;
    spec.planes = 0;
    if (settings.has_block_tokens() && settings.block_tokens() != 16) {
      return Invalid("--block-tokens: minmax has blocks of 16, not of ", settings.block_tokens());
    }
    if (settings.has_planes()) return Invalid("--planes: minmax has none; drop it or use sketch");
    if (settings.refine_share_size() > 0) {
      return Invalid("--refine-share: minmax has no planes; drop it or use --selector sketch");
    }
    return spec;
  }
  spec.kind = kernels::SelectorKind::kSketch;
  spec.block_tokens = settings.has_block_tokens() ? settings.block_tokens() : 8;
  if (spec.block_tokens != 4 && spec.block_tokens != 8 && spec.block_tokens != 16) {
    return Invalid("--block-tokens: ", spec.block_tokens, " is not 4, 8 or 16");
  }
  spec.planes = settings.has_planes() ? settings.planes() : kernels::SelectorSpec().planes;
  if (spec.planes < 1 || spec.planes > 3) {
    return Invalid("--planes: ", spec.planes, " is not from 1 to 3");
  }
  if (settings.refine_share_size() > spec.planes - 1) {
    return Invalid("--refine-share: ", settings.refine_share_size(), " shares, but ", spec.planes,
                   " planes take at most ", spec.planes - 1);
  }
  float above = 1.0f;
  for (int i = 0; i < settings.refine_share_size(); ++i) {
    const double share = settings.refine_share(i);
    if (!(share > 0 && share <= above)) {
      return Invalid("--refine-share: ", share, " is not above 0 and at most ", above);
    }
    spec.refine_share[i] = static_cast<float>(share);
    above = spec.refine_share[i];
  }
  // A third plane is never read for more blocks than the second.
  if (settings.refine_share_size() == 1) spec.refine_share[1] = spec.refine_share[0];
  return spec;
}

absl::StatusOr<PoolOptions> ResolvePool(const ServerConfig& settings, bool paper) {
  PoolOptions pool;
  const std::string dtype = settings.has_kv_dtype() ? settings.kv_dtype() : "bf16";
  RESA_ASSIGN_OR_RETURN(const size_t kv, Choose("kv-dtype", dtype, {"bf16", "f32"}));
  pool.kv_dtype = kv == 0 ? kernels::DType::kBF16 : kernels::DType::kF32;
  if (settings.has_pool_memory()) {
    const absl::StatusOr<int64_t> bytes = ParseByteSize(settings.pool_memory());
    if (!bytes.ok()) return Invalid("--pool-memory: ", bytes.status().message());
    pool.bytes = *bytes;
  }
  RESA_ASSIGN_OR_RETURN(pool.selector, ResolveSelector(settings, paper));
  return pool;
}

absl::StatusOr<LimitOptions> ResolveLimits(const ServerConfig& settings) {
  LimitOptions limits;
  if (settings.has_max_context()) {
    RESA_ASSIGN_OR_RETURN(limits.max_context, AtLeast("max-context", settings.max_context(), 2));
  }
  RESA_ASSIGN_OR_RETURN(
      limits.max_sequences,
      InRange("max-sequences", settings.has_max_sequences() ? settings.max_sequences() : 64, 1,
              kMaxSequences));
  RESA_ASSIGN_OR_RETURN(
      limits.max_waiting,
      InRange("max-waiting", settings.has_max_waiting() ? settings.max_waiting() : 256, 1,
              kMaxWaiting));
  RESA_ASSIGN_OR_RETURN(
      limits.max_step_tokens,
      InRange("max-step-tokens", settings.has_max_step_tokens() ? settings.max_step_tokens() : 512,
              1, kMaxStepTokens));
  engine::SchedulerLimits scheduler;
  scheduler.max_step_tokens = limits.max_step_tokens;
  scheduler.max_sequences = limits.max_sequences;
  if (absl::Status status = engine::ValidateLimits(scheduler); !status.ok()) {
    return Invalid(AsFlag(status).message(), "; raise it or lower --max-sequences");
  }
  return limits;
}

absl::StatusOr<AttentionOptions> ResolveAttention(const ServerConfig& settings, bool paper) {
  AttentionOptions attention;
  engine::AttentionPolicy& policy = attention.default_policy;
  if (paper) policy = engine::PaperPolicy();
  const std::string name = settings.has_attention_mode() ? settings.attention_mode()
                           : paper                       ? "rectified"
                                                         : "auto";
  RESA_ASSIGN_OR_RETURN(const size_t mode,
                        Choose("attention-mode", name, {"auto", "dense", "sparse", "rectified"}));
  static constexpr engine::AttentionMode kModes[] = {
      engine::AttentionMode::kRectified, engine::AttentionMode::kDense,
      engine::AttentionMode::kSparse, engine::AttentionMode::kRectified};
  policy.mode = kModes[mode];
  attention.auto_mode = mode == 0;
  if (settings.has_keep_ratio()) policy.keep_ratio = settings.keep_ratio();
  if (settings.has_min_tokens()) policy.min_tokens = settings.min_tokens();
  if (settings.has_local_tokens()) policy.local_tokens = settings.local_tokens();
  if (settings.has_sink_tokens()) policy.sink_tokens = settings.sink_tokens();
  if (settings.has_rectify_interval()) policy.rectify_interval = settings.rectify_interval();
  if (absl::Status status = engine::ValidatePolicy(policy); !status.ok()) return AsFlag(status);
  if (settings.has_sparse_from()) {
    RESA_ASSIGN_OR_RETURN(attention.sparse_from, AtLeast("sparse-from", settings.sparse_from(), 0));
  }
  return attention;
}

}  // namespace

absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const std::string> args) {
  CommandLine line;
  ServerConfig from_flags;
  std::vector<const FieldDescriptor*> unset;
  std::string file;
  FlagSet flags;
  AddFlags(&flags, &from_flags, &unset, &file, &line);
  RESA_ASSIGN_OR_RETURN(const std::vector<std::string> rest, flags.Parse(args));
  if (!rest.empty()) {
    return Invalid("unexpected argument '", rest[0], "'; settings are flags, see --help");
  }
  if (!file.empty()) {
    RESA_ASSIGN_OR_RETURN(line.settings, ReadConfigFile(file));
  }
  // A merge would append to the file's shares; a flag overrides them.
  if (from_flags.refine_share_size() > 0) line.settings.clear_refine_share();
  line.settings.MergeFrom(from_flags);
  for (const FieldDescriptor* field : unset) {
    line.settings.GetReflection()->ClearField(&line.settings, field);
  }
  return line;
}

std::string HelpText() {
  FlagSet flags;
  ServerConfig settings;
  std::vector<const FieldDescriptor*> unset;
  std::string file;
  CommandLine line;
  AddFlags(&flags, &settings, &unset, &file, &line);
  return absl::StrCat(
      "resad: serves a language model over gRPC with Rectified Sparse Attention.\n\n"
      "Usage: resad --model DIR|FILE.gguf [flags]\n\n",
      flags.Help());
}

absl::StatusOr<Config> ResolveConfig(const ServerConfig& settings) {
  Config config;
  const std::string preset = settings.has_preset() ? settings.preset() : "default";
  RESA_ASSIGN_OR_RETURN(const size_t chosen, Choose("preset", preset, {"default", "paper"}));
  const bool paper = chosen == 1;
  RESA_ASSIGN_OR_RETURN(config.model, ResolveModel(settings));
  RESA_ASSIGN_OR_RETURN(config.listen, ResolveListen(settings));
  RESA_ASSIGN_OR_RETURN(config.device, ResolveDevice(settings));
  RESA_ASSIGN_OR_RETURN(config.pool, ResolvePool(settings, paper));
  RESA_ASSIGN_OR_RETURN(config.limits, ResolveLimits(settings));
  RESA_ASSIGN_OR_RETURN(config.attention, ResolveAttention(settings, paper));
  config.log.level = settings.has_log_level() ? settings.log_level() : "info";
  RESA_RETURN_IF_ERROR(
      Choose("log-level", config.log.level, {"debug", "info", "warning", "error"}).status());
  config.log.prompts = settings.log_prompts();
  return config;
}

}  // namespace resa::server
