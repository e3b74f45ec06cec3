#ifndef RESA_ENGINE_SEQUENCE_H_
#define RESA_ENGINE_SEQUENCE_H_

// One output of one request while it is being made: its tokens, how many of them are in the pool,
// and how many of those are exact. What it does next follows from these numbers alone (NextWork);
// there is no phase.
//
//   tokens:   0 ........ prompt_len ........ rectified_len ........ kv_len ........ size()
//             |<-------- exact K/V in the pool ------>|<- approximate ->|<- not run yet ->|
//
// Invariant: rectified_len <= kv_len < tokens.size(), and between steps of an undisturbed decoding
// sequence kv_len + 1 == tokens.size(): the newest token was sampled, but has not been run.
//
// Thread: the engine's.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "engine/detokenizer.h"
#include "engine/page_table.h"
#include "engine/request.h"
#include "engine/sampler.h"
#include "kernels/params.h"

namespace resa::engine {

enum class SegmentKind : uint8_t { kPrefill, kDecode, kRectification };

struct Sequence {
  // `request` must outlive the sequence.
  Sequence(const Request& request, int32_t index, uint64_t order,
           absl::Span<const int32_t> eos_ids);

  const Request* const request;
  const int32_t index;   // Which of the request's n outputs.
  const uint64_t order;  // By arrival, then index; unique.

  std::vector<int32_t> tokens;  // Prompt and output.
  int32_t prompt_len = 0;
  int32_t max_output = 0;  // Output tokens at most.

  PageTable pages;  // Covers kv_len. Each entry is one ownership.
  int32_t kv_len = 0;
  int32_t rectified_len = 0;
  // Tokens below are prefilled densely: the prompt, and after a preemption all that was exact.
  int32_t dense_target = 0;

  bool running = false;   // Takes part in steps; else it waits its turn.
  bool done = false;      // Owns nothing any more; forgotten with the step.
  int64_t last_step = 0;  // The last step that ran a segment of it (or made it).

  SamplerState sampler;
  std::unique_ptr<Detokenizer> detokenizer;  // Null without a tokenizer.

  int32_t cached_tokens = 0;
  int32_t preemptions = 0;
  AttentionStats attention;
  absl::Time first_scheduled = absl::InfiniteFuture();
  absl::Time first_token = absl::InfiniteFuture();
  absl::Time last_token = absl::InfiniteFuture();

  int32_t size() const { return static_cast<int32_t>(tokens.size()); }
  int32_t output_len() const { return size() - prompt_len; }
  // The newest output token was forced: nothing but its length ends the output here.
  bool forced() const {
    return output_len() <= static_cast<int32_t>(request->forced_tokens.size());
  }
  bool prefilling() const { return kv_len < dense_target; }
};

// The next segment of a sequence when rows and pages are no object. Depends on the request's own
// tokens and policy and on `sparse_from` alone: never on load, unless the scheduler lets a step's
// tokens decide that.
struct Work {
  SegmentKind kind = SegmentKind::kPrefill;
  int32_t begin = 0;  // Token positions [begin, end).
  int32_t end = 0;
  std::optional<SparseBudget> sparse;  // Unset: dense.
  bool emits = false;                  // A token is sampled after the last position.
};
Work NextWork(const Sequence& sequence, const kernels::SelectorSpec& selector, int32_t sparse_from);

// Moves kv_len and rectified_len past a segment that has run. Dense attention over an exact history
// leaves exact K/V; mode SPARSE counts only what is prefilled.
void Advance(Sequence* sequence, const Work& work);

// What a sequence keeps when its pages are taken: everything exact will be prefilled, the open
// window replayed as decode rows that emit nothing. Mode SPARSE is prefilled whole. REQUIRES that
// the caller has released the pages.
void ForgetPages(Sequence* sequence);

}  // namespace resa::engine

#endif  // RESA_ENGINE_SEQUENCE_H_
