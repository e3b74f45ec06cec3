#ifndef RESA_SERVER_CONFIG_H_
#define RESA_SERVER_CONFIG_H_

// The settings of resad: read once from the command line and a file, checked against each other,
// and handed down in parts. proto/resa/v1/config.proto lists them; each of its fields is a flag.

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "kernels/params.h"
#include "resa/v1/config.pb.h"

namespace resa::server {

struct ModelOptions {
  std::string path;         // A directory or a .gguf file.
  std::string served_name;  // Never empty.
};

struct ListenOptions {
  std::string grpc_address;  // "host:port"; port 0 takes a free one.
  std::string http_address;  // The same; empty: no HTTP listener.
  std::string port_file;     // Empty: none.
  absl::Duration drain_timeout;
};

enum class Device : uint8_t {
  kAuto,  // The first GPU that can be used, else the CPU.
  kCpu,
  kCuda,
};

struct DeviceOptions {
  Device device = Device::kAuto;
  int32_t cuda_index = 0;      // Of kCuda, as the driver counts.
  bool deterministic = false;  // Products on a GPU do not depend on the batch. A CPU's never do.
  int32_t threads = 0;         // 0: the cores this process may use.
  bool cpu_bf16 = true;        // Linear with the CPU's bf16 instructions, where it has them.
};

struct PoolOptions {
  kernels::DType kv_dtype = kernels::DType::kBF16;
  std::optional<int64_t> bytes;  // Unset: from what is free (resources.h).
  kernels::SelectorSpec selector;
};

struct LimitOptions {
  std::optional<int32_t> max_context;  // Unset: the model's.
  int32_t max_sequences = 0;
  int32_t max_step_tokens = 0;
  int32_t max_waiting = 0;
};

struct AttentionOptions {
  engine::AttentionPolicy default_policy;
  bool auto_mode = false;              // default_policy.mode is to be worked out at start.
  std::optional<int32_t> sparse_from;  // In tokens; unset: to be worked out at start.
};

struct LogOptions {
  std::string level;  // "debug", "info", "warning" or "error".
  bool prompts = false;
};

struct Config {
  ModelOptions model;
  ListenOptions listen;
  DeviceOptions device;
  PoolOptions pool;
  LimitOptions limits;
  AttentionOptions attention;
  LogOptions log;
};

// What the command line asks for.
struct CommandLine {
  resa::v1::ServerConfig settings;  // The file's, overridden by flags.
  bool check = false;               // Validate settings and model, then exit.
  bool help = false;
  bool version = false;
};

// `args` without the program's name. Reads the file of --config. INVALID_ARGUMENT or NOT_FOUND with
// one line that names the flag, or the file with line and column.
absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const std::string> args);
std::string HelpText();

// Fills in defaults and refuses what is out of range or contradicts itself; messages name the flag.
absl::StatusOr<Config> ResolveConfig(const resa::v1::ServerConfig& settings);

}  // namespace resa::server

#endif  // RESA_SERVER_CONFIG_H_
