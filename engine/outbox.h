#ifndef RESA_ENGINE_OUTBOX_H_
#define RESA_ENGINE_OUTBOX_H_

// What a step has for the clients, kept until the device works on the next one: handing it to the
// transport takes longer than planning a step does.
//
// Thread: the engine's. Bounded: a step adds at most two letters for each of its segments, and what
// mail ends; all go with the next step.

#include <cstddef>
#include <deque>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "engine/ids.h"
#include "engine/request.h"

namespace resa::engine {

// Why a request ends whose sink refuses a delta.
absl::Status SlowReaderError();

class Outbox {
 public:
  // A delta to be filled in before the next call. Its memory is that of an earlier one.
  Delta& AddDelta(RequestId id, const std::shared_ptr<OutputSink>& sink);
  void AddFinished(RequestId id, const std::shared_ptr<OutputSink>& sink, Finished finished);
  void AddError(RequestId id, const std::shared_ptr<OutputSink>& sink, const absl::Status& status);

  // Tells the sinks, in the order of the calls above. A sink that refuses a delta gets nothing more
  // but an error: the one that `end`(id, status) adds, or, where the request had ended by itself
  // and nothing is added, `status`.
  void Deliver(absl::FunctionRef<void(RequestId, const absl::Status&)> end);

 private:
  enum class Kind { kDelta, kFinished, kError, kDropped };
  struct Letter {
    Kind kind = Kind::kDropped;
    RequestId id;
    std::shared_ptr<OutputSink> sink;
    Delta delta;
    Finished finished;
    absl::Status status;
  };
  Letter& Add(Kind kind, RequestId id, const std::shared_ptr<OutputSink>& sink);
  void Refuse(const Letter& letter, absl::FunctionRef<void(RequestId, const absl::Status&)> end);

  std::deque<Letter> letters_;  // The first count_ are to be delivered; their places stay.
  size_t count_ = 0;
  size_t next_ = 0;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_OUTBOX_H_
