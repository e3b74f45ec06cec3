#ifndef RESA_SERVER_STREAM_WRITER_H_
#define RESA_SERVER_STREAM_WRITER_H_

// Between the engine, which hands out tokens without ever waiting, and a stream that takes one
// message at a time. While a write is outstanding, further deltas of the same output join into one
// message; what waits is bounded, and a reader that falls behind the bound loses its request, and a
// while later its stream.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "resa/v1/inference.pb.h"

namespace resa::server {

// What is below: one stream of one call. All methods return without waiting and without calling
// back into the StreamWriter on the same thread.
class StreamTransport {
 public:
  virtual ~StreamTransport() = default;
  // One at a time: the next comes after StreamWriter::OnWriteDone. `response` stays until then.
  virtual void StartWrite(const resa::v1::GenerateResponse& response) = 0;
  // The last call. The transport may be gone when it returns.
  virtual void Finish(const absl::Status& status) = 0;
  // The reader has lost its request while a write is under way. Calls StreamWriter::OnGraceOver
  // when it has had its time to take that one and to hear why; once at most.
  virtual void StartGrace() = 0;
  // Breaks the stream, so that OnWriteDone(false) comes for a write that nobody takes.
  virtual void Abandon() = 0;
};

// What became of a call, for the log; however it ended.
struct StreamSummary {
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;                  // That the engine made, over all outputs.
  int64_t messages = 0;                       // That the stream took.
  std::optional<absl::Duration> first_token;  // From arrival to here; unset: there was none.
  std::vector<std::string> texts;             // By output; only with Options::keep_text.
};

// Thread-safe: the engine's thread calls the sink, the transport's threads OnWriteDone.
class StreamWriter final : public engine::OutputSink {
 public:
  struct Options {
    std::string request_id = {};  // Told in Accepted, with the seed.
    uint64_t seed = 0;
    absl::Time arrival = absl::InfinitePast();
    bool token_ids = false;  // Show token ids.
    bool logprobs = false;
    int outputs = 1;         // How many Finished end the stream.
    bool keep_text = false;  // Collect the outputs for the log.
    // OnDelta refuses once more than this waits beside the prompt's echo, which comes at once.
    size_t max_waiting_bytes = 4 << 20;
    // Larger deltas are cut. gRPC clients take messages of 4 MiB unless told otherwise.
    size_t max_message_bytes = 1 << 20;
  };

  // `transport` must live until its Finish has been called.
  StreamWriter(Options options, StreamTransport* transport);

  void OnAccepted(int32_t prompt_tokens, int32_t cached_tokens) override;
  bool OnDelta(const engine::Delta& delta) override;
  void OnFinished(engine::Finished finished) override;
  void OnError(const absl::Status& status) override;

  // The write that StartWrite began is over; `ok` false: the stream is broken, nothing more will be
  // written, and Finish follows when the engine ends the request.
  void OnWriteDone(bool ok);
  // The time that StartGrace gave is over.
  void OnGraceOver();

  StreamSummary Summary() const;

 private:
  using Message = std::unique_ptr<resa::v1::GenerateResponse>;
  struct Waiting {
    Message response;
    size_t bytes = 0;
  };
  // What the transport is to do next, if anything: StartWrite(*write), or Finish(end).
  struct Call {
    StreamTransport* transport = nullptr;
    const resa::v1::GenerateResponse* write = nullptr;
    absl::Status end;
  };

  // Notes what the engine made, whether or not it can still be written.
  void Count(const engine::Delta& delta) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Append(const engine::Delta& delta) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The waiting delta of this output that can take `bytes` more, or a new one at the end.
  Waiting* DeltaFor(int32_t index, size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // An empty delta, in memory that an earlier one has left when there is some.
  Message NewDelta(int32_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Nothing more will be written.
  void Break() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes what can be started: the next write, or the end.
  Call NextCall() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Makes it, without the lock: a write may go as far as the socket, and neither the engine nor the
  // transport's threads are to wait for one another's.
  static void Make(const Call& call);

  const Options options_;

  mutable absl::Mutex mutex_;
  StreamTransport* transport_ ABSL_GUARDED_BY(mutex_);  // Null once finished.
  // Oldest first. Few: the deltas of one output join, so that there are two or three per output.
  std::vector<Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t waiting_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t echo_bytes_ ABSL_GUARDED_BY(mutex_) = 0;       // Of all echoes so far.
  Waiting in_flight_ ABSL_GUARDED_BY(mutex_);           // Of the write under way.
  std::vector<Message> spare_ ABSL_GUARDED_BY(mutex_);  // Deltas that were written, for reuse.
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
  int open_outputs_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  StreamSummary summary_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace resa::server

#endif  // RESA_SERVER_STREAM_WRITER_H_
