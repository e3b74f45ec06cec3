#ifndef RESA_TESTS_SIM_SABOTEUR_H_
#define RESA_TESTS_SIM_SABOTEUR_H_

// Plants one bug, at random times, between the engine and the executor: what the engine would do if
// it had that bug. Shows that the checker can fail; the product knows nothing of it.

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/engine.h"
#include "engine/executor.h"
#include "tests/sim/paged_memory.h"
#include "tests/sim/random.h"

namespace resa::sim {

enum class Bug : uint8_t {
  kLeakedPage,         // A page's owner goes away without giving it back.
  kLostRectification,  // A window is computed, and its K/V are not written back.
  kSharedPageWritten,  // Copy on write is forgotten.
  kLateCopy,           // Copy on write happens after the step instead of before.
  kLostWrite,          // A sparse row's K/V are not written.
  kForeignPage,        // A page table names another sequence's page.
  kSwappedTokens,      // Two sequences get each other's token.
};
inline constexpr Bug kAllBugs[] = {
    Bug::kLeakedPage, Bug::kLostRectification, Bug::kSharedPageWritten, Bug::kLateCopy,
    Bug::kLostWrite,  Bug::kForeignPage,       Bug::kSwappedTokens,
};
const char* NameOf(Bug bug);
std::optional<Bug> BugNamed(absl::string_view name);

class Saboteur final : public engine::Executor {
 public:
  // Everything must outlive the saboteur. Without a bug it hands everything through.
  Saboteur(std::optional<Bug> bug, engine::Executor* honest, PagedMemory* memory, uint64_t seed)
      : bug_(bug), honest_(honest), memory_(memory), random_(seed) {}

  // To be called before the first step.
  void Watch(const engine::Engine* engine) { engine_ = engine; }
  int64_t planted() const { return planted_; }

  absl::Status DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override;

 private:
  using Segments = std::vector<engine::SegmentInput>;

  absl::Status LeakPage(const engine::StepInput& input, engine::StepOutput* output);
  absl::Status LoseWrites(bool (*hits)(const engine::Work&), const engine::StepInput& input,
                          engine::StepOutput* output);
  absl::Status WriteSharedPage(const engine::StepInput& input, engine::StepOutput* output);
  absl::Status CopyLate(const engine::StepInput& input, engine::StepOutput* output);
  absl::Status ReadForeignPage(const engine::StepInput& input, engine::StepOutput* output);
  absl::Status SwapTokens(const engine::StepInput& input, engine::StepOutput* output);

  const std::optional<Bug> bug_;
  engine::Executor* const honest_;
  PagedMemory* const memory_;
  const engine::Engine* engine_ = nullptr;
  Random random_;
  int64_t planted_ = 0;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_SABOTEUR_H_
