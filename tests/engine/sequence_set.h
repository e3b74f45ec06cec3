#ifndef RESA_TESTS_ENGINE_SEQUENCE_SET_H_
#define RESA_TESTS_ENGINE_SEQUENCE_SET_H_

// Sequences in any state a test wants, with the requests and the pages that belong to them.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "engine/kv_pool.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "kernels/check.h"

namespace resa::engine {

struct SequenceState {
  int32_t prompt = 1;          // Tokens.
  int32_t output = 0;          // Tokens.
  int32_t kv_len = 0;          // Its pages are taken from the pool.
  int32_t rectified_len = -1;  // -1: kv_len.
  int32_t dense_target = -1;   // -1: the prompt.
  bool running = true;
  int32_t priority = 0;
  int64_t last_step = 0;
  AttentionPolicy policy;
};

class SequenceSet {
 public:
  explicit SequenceSet(int32_t num_pages) : pool_(num_pages) {}

  // A sequence of a request of its own. Younger than all before.
  Sequence* Add(const SequenceState& state) {
    auto request = std::make_unique<Request>();
    request->prompt.assign(state.prompt, 5);
    request->priority = state.priority;
    request->attention = state.policy;
    requests_.push_back(std::move(request));
    Sequence* sequence = Append(*requests_.back(), 0);
    sequence->tokens.resize(state.prompt + state.output, 6);
    sequence->kv_len = state.kv_len;
    sequence->rectified_len = state.rectified_len >= 0 ? state.rectified_len : state.kv_len;
    if (state.dense_target >= 0) sequence->dense_target = state.dense_target;
    sequence->running = state.running;
    sequence->last_step = state.last_step;
    for (int32_t i = 0; i < PagesFor(state.kv_len); ++i) {
      sequence->pages.push_back(pool_.Allocate().value().value);
    }
    return sequence;
  }

  // One more output of the request of `first`, which waits with its prompt's pages, as the engine
  // leaves it when the first output has run the prompt.
  Sequence* AddSibling(Sequence* first) {
    Request& request = const_cast<Request&>(*first->request);
    Sequence* sequence = Append(request, request.n++);
    sequence->kv_len = sequence->rectified_len = sequence->prompt_len - 1;
    for (int32_t i = 0; i < PagesFor(sequence->kv_len); ++i) {
      sequence->pages.push_back(first->pages[i]);
      pool_.AddOwner(PageId{first->pages[i]});
    }
    return sequence;
  }

  absl::Span<const Sequence* const> view() const { return view_; }
  KvPool& pool() { return pool_; }

 private:
  Sequence* Append(Request& request, int32_t index) {
    request.n = std::max(request.n, index + 1);
    sequences_.push_back(
        std::make_unique<Sequence>(request, index, /*order=*/sequences_.size(), kNoEos));
    view_.push_back(sequences_.back().get());
    return sequences_.back().get();
  }

  static constexpr absl::Span<const int32_t> kNoEos = {};

  KvPool pool_;
  std::vector<std::unique_ptr<Request>> requests_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<const Sequence*> view_;
};

}  // namespace resa::engine

#endif  // RESA_TESTS_ENGINE_SEQUENCE_SET_H_
