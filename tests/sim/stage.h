#ifndef RESA_TESTS_SIM_STAGE_H_
#define RESA_TESTS_SIM_STAGE_H_

// What everybody in the simulation can see of the step that is running, and where the first broken
// rule is written down.

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "tests/sim/counts.h"

namespace resa::sim {

struct Stage {
  int64_t step = 0;          // Of the world.
  absl::Time step_start;     // The clock when the step began.
  int64_t failed_step = -1;  // The last one whose execution failed.
  bool abort_requested = false;
  Counts counts;
  std::string violation;  // Empty: none so far.

  // Writes down a broken rule: its name, then what was seen. Only the first counts.
  template <typename... Parts>
  void Fail(const Parts&... parts) {
    if (violation.empty()) violation = absl::StrCat(parts...);
  }
  bool failed() const { return !violation.empty(); }
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_STAGE_H_
