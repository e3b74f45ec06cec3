#include "engine/inbox.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {

Inbox::Inbox(int32_t max_waiting) : max_waiting_(max_waiting) { RESA_CHECK(max_waiting > 0); }

absl::Status Inbox::CheckRoomLocked() const {
  if (closed_) return absl::UnavailableError("the server is shutting down; try another replica");
  if (waiting_ >= max_waiting_) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%d requests are waiting already; try again later", waiting_));
  }
  return absl::OkStatus();
}

absl::Status Inbox::CheckRoom() const {
  absl::MutexLock lock(&mutex_);
  return CheckRoomLocked();
}

absl::Status Inbox::Push(std::unique_ptr<Request> request) {
  absl::MutexLock lock(&mutex_);
  RESA_RETURN_IF_ERROR(CheckRoomLocked());
  ++waiting_;
  ++unread_;
  mail_.requests.push_back(std::move(request));
  woken_ = true;
  return absl::OkStatus();
}

void Inbox::PushCancel(RequestId id) {
  absl::MutexLock lock(&mutex_);
  mail_.cancels.push_back(id);
  woken_ = true;
}

void Inbox::PushAbortAll() {
  absl::MutexLock lock(&mutex_);
  mail_.abort_all = true;
  woken_ = true;
}

void Inbox::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
}

bool Inbox::closed() const {
  absl::MutexLock lock(&mutex_);
  return closed_;
}

void Inbox::OneLeftQueue() {
  absl::MutexLock lock(&mutex_);
  RESA_CHECK(waiting_ > 0);
  --waiting_;
}

void Inbox::Take(Mail* mail) {
  mail->requests.clear();
  mail->cancels.clear();
  mail->abort_all = false;
  absl::MutexLock lock(&mutex_);
  std::swap(*mail, mail_);
  woken_ = false;
}

int32_t Inbox::unread() const {
  absl::MutexLock lock(&mutex_);
  return unread_;
}

void Inbox::MarkRead(int32_t requests) {
  absl::MutexLock lock(&mutex_);
  unread_ -= requests;
  RESA_CHECK_GE(unread_, 0);
}

void Inbox::Wait(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  mutex_.AwaitWithTimeout(absl::Condition(&woken_), timeout);
  woken_ = false;
}

void Inbox::Wake() {
  absl::MutexLock lock(&mutex_);
  woken_ = true;
}

}  // namespace resa::engine
