#ifndef RESA_ENGINE_INBOX_H_
#define RESA_ENGINE_INBOX_H_

// The only door into the engine thread: bounded, and emptied once a step.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/request.h"

namespace resa::engine {

// What arrived since the last step.
struct Mail {
  std::vector<std::unique_ptr<Request>> requests;
  // At most two per accepted request: a failed write and the cancelled call both tell of its end.
  std::vector<RequestId> cancels;
  bool abort_all = false;

  bool empty() const { return requests.empty() && cancels.empty() && !abort_all; }
};

// Thread-safe.
class Inbox {
 public:
  // `max_waiting`: requests that have been pushed and have not left the queue (OneLeftQueue).
  explicit Inbox(int32_t max_waiting);

  // RESOURCE_EXHAUSTED when the queue is full, UNAVAILABLE when closed; the request is then
  // destroyed without its sink being called.
  absl::Status Push(std::unique_ptr<Request> request);
  // What Push would say of a request at this moment.
  absl::Status CheckRoom() const;
  void PushCancel(RequestId id);
  void PushAbortAll();
  // Push refuses from now on.
  void Close();
  bool closed() const;

  // The engine says that a request has begun to run, or ended before it did.
  void OneLeftQueue();
  // Moves everything that arrived into `mail`, whose memory is reused.
  void Take(Mail* mail);
  // Requests that have been pushed and not marked: what the engine's account of its load lacks.
  int32_t unread() const;
  void MarkRead(int32_t requests);
  // Blocks until something arrives, Wake() is called or the timeout passes.
  void Wait(absl::Duration timeout);
  void Wake();

 private:
  absl::Status CheckRoomLocked() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  const int32_t max_waiting_;
  mutable absl::Mutex mutex_;
  Mail mail_ ABSL_GUARDED_BY(mutex_);
  int32_t waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t unread_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_INBOX_H_
