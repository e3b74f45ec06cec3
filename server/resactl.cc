// resactl: talks to a running resad from the command line.

#include <cstdio>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/resactl_client.h"

namespace {

using ::resa::server::Command;

constexpr Command kCommands[] = {
    {"generate", "[PROMPT]", "generate text for a prompt, streamed as it comes",
     &resa::server::RunGenerate},
    {"tokenize", "[TEXT]", "show the token ids of a text", &resa::server::RunTokenize},
    {"model", "", "show the model, its limits and defaults", &resa::server::RunModel},
    {"load", "", "show how busy the server is", &resa::server::RunLoad},
    {"health", "", "show or await readiness", &resa::server::RunHealth},
    {"bench", "", "put load on the server and measure latency and throughput",
     &resa::server::RunBench},
};

constexpr int kUsageError = 2;

void PrintUsage(std::FILE* out) {
  std::fputs("Usage: resactl COMMAND [flags]\n\n", out);
  for (const Command& command : kCommands) {
    std::fprintf(out, "  %-9s%-10s%s\n", command.name, command.usage, command.help);
  }
  std::fputs("\nresactl COMMAND --help shows the command's flags.\n", out);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.empty()) {
    PrintUsage(stderr);
    return kUsageError;
  }
  if (args[0] == "--help" || args[0] == "help") {
    PrintUsage(stdout);
    return 0;
  }
  for (const Command& command : kCommands) {
    if (args[0] != command.name) continue;
    const absl::Status status = command.run(absl::MakeConstSpan(args).subspan(1));
    if (status.ok()) return 0;
    std::fprintf(stderr, "resactl: %s: %s\n", absl::StatusCodeToString(status.code()).c_str(),
                 std::string(status.message()).c_str());
    return absl::IsInvalidArgument(status) ? kUsageError : 1;
  }
  std::fprintf(stderr, "resactl: no command '%s'\n\n", args[0].c_str());
  PrintUsage(stderr);
  return kUsageError;
}
