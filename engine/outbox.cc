#include "engine/outbox.h"

#include <utility>

namespace resa::engine {

absl::Status SlowReaderError() {
  return absl::ResourceExhaustedError("the client reads too slowly; its output buffer is full");
}

Outbox::Letter& Outbox::Add(Kind kind, RequestId id, const std::shared_ptr<OutputSink>& sink) {
  if (count_ == letters_.size()) letters_.emplace_back();
  Letter& letter = letters_[count_++];
  letter.kind = kind;
  letter.id = id;
  letter.sink = sink;
  return letter;
}

Delta& Outbox::AddDelta(RequestId id, const std::shared_ptr<OutputSink>& sink) {
  Delta& delta = Add(Kind::kDelta, id, sink).delta;
  delta.text.clear();
  delta.token_ids.clear();
  return delta;
}

void Outbox::AddFinished(RequestId id, const std::shared_ptr<OutputSink>& sink, Finished finished) {
  Add(Kind::kFinished, id, sink).finished = std::move(finished);
}

void Outbox::AddError(RequestId id, const std::shared_ptr<OutputSink>& sink,
                      const absl::Status& status) {
  Add(Kind::kError, id, sink).status = status;
}

void Outbox::Deliver(absl::FunctionRef<void(RequestId, const absl::Status&)> end) {
  for (next_ = 0; next_ < count_; ++next_) {
    Letter& letter = letters_[next_];
    switch (letter.kind) {
      case Kind::kDelta:
        if (!letter.sink->OnDelta(letter.delta)) Refuse(letter, end);
        break;
      case Kind::kFinished:
        letter.sink->OnFinished(std::move(letter.finished));
        break;
      case Kind::kError:
        letter.sink->OnError(letter.status);
        break;
      case Kind::kDropped:
        break;
    }
    letter.sink = nullptr;
  }
  count_ = 0;
}

void Outbox::Refuse(const Letter& letter,
                    absl::FunctionRef<void(RequestId, const absl::Status&)> end) {
  const absl::Status status = SlowReaderError();
  bool told = false;
  const size_t before = count_;
  end(letter.id, status);
  for (size_t i = next_ + 1; i < count_; ++i) {
    Letter& later = letters_[i];
    if (later.id != letter.id) continue;
    if (i < before) {
      later.kind = Kind::kDropped;
    } else {
      told = true;
    }
  }
  if (!told) letter.sink->OnError(status);
}

}  // namespace resa::engine
