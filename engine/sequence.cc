#include "engine/sequence.h"

#include <algorithm>

#include "kernels/check.h"

namespace resa::engine {

Sequence::Sequence(const Request& request, int32_t index, uint64_t order,
                   absl::Span<const int32_t> eos_ids)
    : request(&request),
      index(index),
      order(order),
      tokens(request.prompt),
      prompt_len(static_cast<int32_t>(request.prompt.size())),
      dense_target(prompt_len),
      sampler(request, index, eos_ids) {}

Work NextWork(const Sequence& sequence, const kernels::SelectorSpec& selector,
              int32_t sparse_from) {
  const AttentionPolicy& policy = sequence.request->attention;
  Work work;
  if (sequence.prefilling()) {
    work.kind = SegmentKind::kPrefill;
    work.begin = sequence.kv_len;
    work.end = sequence.dense_target;
    work.emits = work.end == sequence.size();
    return work;
  }
  const int32_t position = sequence.kv_len;
  RESA_CHECK_LT(position, sequence.size());
  work.kind = SegmentKind::kDecode;
  work.begin = position;
  work.end = position + 1;
  work.emits = work.end == sequence.size();
  const bool due =
      policy.mode == AttentionMode::kRectified && (position + 1) % policy.rectify_interval == 0;
  if (!due) {
    work.sparse = BudgetFor(policy, selector, position + 1, sparse_from);
    return work;
  }
  // A due position attends densely. It is a rectification when there is anything to repair.
  if (sequence.rectified_len < position) {
    work.kind = SegmentKind::kRectification;
    work.begin = sequence.rectified_len;
  }
  return work;
}

void Advance(Sequence* sequence, const Work& work) {
  RESA_CHECK_LE(work.begin, sequence->kv_len);
  sequence->kv_len = work.end;
  const bool exact = !work.sparse.has_value() && work.begin <= sequence->rectified_len;
  const bool counts = work.kind == SegmentKind::kPrefill ||
                      sequence->request->attention.mode != AttentionMode::kSparse;
  if (exact && counts) sequence->rectified_len = work.end;
}

void ForgetPages(Sequence* sequence) {
  const bool whole = sequence->request->attention.mode == AttentionMode::kSparse;
  sequence->dense_target =
      std::max(sequence->dense_target, whole ? sequence->kv_len : sequence->rectified_len);
  sequence->pages.clear();
  sequence->kv_len = 0;
  sequence->rectified_len = 0;
  sequence->cached_tokens = 0;
  sequence->running = false;
}

}  // namespace resa::engine
