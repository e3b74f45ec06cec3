#ifndef RESA_TESTS_SUPPORT_REFERENCE_SCHEDULE_H_
#define RESA_TESTS_SUPPORT_REFERENCE_SCHEDULE_H_

// Which step a request takes at which position: the rules of Rectified Sparse Attention as a
// function of the request alone, written a second time for tests. The reference decoder takes the
// result as an input, and the engine's own plans are compared with it.

#include <vector>

#include "tests/support/reference_selection.h"

namespace resa::testing {

enum class ReferenceMode { kDense, kSparse, kRectified };

struct ScheduleRules {
  ReferenceMode mode = ReferenceMode::kRectified;
  double keep_ratio = 0.1;
  int min_tokens = 64;
  int local_tokens = 32;
  int sink_tokens = 16;
  int interval = 32;     // f: position p is due when (p + 1) % f == 0.
  int block_tokens = 8;  // Of the selector.
  int sparse_from = 0;   // Shorter sequences take the dense path.
};

// Feeds the tokens at [begin, end) and emits the token at position `end`.
struct ScheduleStep {
  enum class Kind {
    kDense,   // One row over everything.
    kSparse,  // One row over `budget` blocks.
    kWindow,  // A rectification window: end - begin > 1 rows, dense and causal.
  };
  Kind kind = Kind::kDense;
  int begin = 0;
  int end = 0;
  Budget budget;      // Sparse steps only.
  int exact_len = 0;  // After the step, K/V below this position are what dense prefill makes.
};

// The decode steps after a dense prefill of `prompt_tokens`, which emits the first token itself:
// `new_tokens` - 1 steps. REQUIRES both >= 1.
std::vector<ScheduleStep> MakeSchedule(int prompt_tokens, int new_tokens,
                                       const ScheduleRules& rules);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_REFERENCE_SCHEDULE_H_
