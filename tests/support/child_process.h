#ifndef RESA_TESTS_SUPPORT_CHILD_PROCESS_H_
#define RESA_TESTS_SUPPORT_CHILD_PROCESS_H_

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "tests/support/file_builders.h"

namespace resa::testing {

// A program that a test runs, with its outputs collected in files. Killed when the object goes.
class ChildProcess {
 public:
  // `arguments` begin with the program's path. Standard input holds `input`.
  explicit ChildProcess(const std::vector<std::string>& arguments, const std::string& input = "");
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void Signal(int signal) const;
  // The exit code, or 1000 + the signal that ended it; nothing when it still runs after `timeout`.
  std::optional<int> Wait(absl::Duration timeout = absl::Seconds(20));
  // What it has written so far.
  std::string Stdout() const { return ReadFile(folder_.Path("stdout")); }
  std::string Stderr() const { return ReadFile(folder_.Path("stderr")); }

 private:
  TempFolder folder_;
  pid_t pid_ = -1;
  std::optional<int> exit_;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_CHILD_PROCESS_H_
