#include "server/stream_writer.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "kernels/check.h"
#include "server/rpc_status.h"

namespace resa::server {
namespace {

// Upper bounds of what a token id and an alternative take on the wire, with tags and lengths.
constexpr size_t kTokenIdBytes = 6;
constexpr size_t kLogprobBytes = 16;

// Written messages up to this size are kept to be filled again, so many at most: one is written
// while the next is filled.
constexpr size_t kMaxSpareBytes = 4096;
constexpr size_t kMaxSpares = 2;

size_t LogprobBytes(const engine::TokenLogprob& logprob) {
  return kLogprobBytes * (1 + logprob.top.size());
}

// The longest prefix of valid UTF-8 that has at most `limit` bytes and cuts no code point.
size_t Utf8Prefix(const std::string& text, size_t begin, size_t limit) {
  if (text.size() - begin <= limit) return text.size() - begin;
  size_t length = limit;
  while (length > 0 && (static_cast<uint8_t>(text[begin + length]) & 0xC0) == 0x80) --length;
  return length;
}

void Fill(const engine::TokenLogprob& logprob, int32_t token_id, resa::v1::TokenLogprob* out) {
  out->set_token_id(token_id);
  out->set_logprob(logprob.logprob);
  for (const auto& [id, value] : logprob.top) {
    resa::v1::TopLogprob* top = out->add_top();
    top->set_token_id(id);
    top->set_logprob(value);
  }
}

void Fill(const engine::Finished& finished, resa::v1::Finished* out) {
  out->set_index(finished.index);
  out->set_reason(finished.reason == engine::FinishReason::kStop ? resa::v1::FINISH_REASON_STOP
                                                                 : resa::v1::FINISH_REASON_LENGTH);
  if (!finished.matched_stop.empty()) {
    out->set_matched_stop_string(finished.matched_stop);
  } else if (finished.matched_stop_token.has_value()) {
    out->set_matched_stop_token_id(*finished.matched_stop_token);
  }
  resa::v1::Usage* usage = out->mutable_usage();
  usage->set_prompt_tokens(finished.usage.prompt_tokens);
  usage->set_output_tokens(finished.usage.output_tokens);
  usage->set_cached_tokens(finished.usage.cached_tokens);
  usage->set_preemptions(finished.usage.preemptions);
  resa::v1::Timings* timings = out->mutable_timings();
  *timings->mutable_queued() = ToProtoDuration(finished.timings.queued);
  *timings->mutable_prefill() = ToProtoDuration(finished.timings.prefill);
  *timings->mutable_first_token() = ToProtoDuration(finished.timings.first_token);
  *timings->mutable_decode() = ToProtoDuration(finished.timings.decode);
  *timings->mutable_total() = ToProtoDuration(finished.timings.total);
  resa::v1::AttentionStats* attention = out->mutable_attention();
  const engine::AttentionStats& stats = finished.attention;
  attention->set_sparse_steps(stats.sparse_steps);
  attention->set_dense_steps(stats.dense_steps);
  attention->set_rectifications(stats.rectifications);
  attention->set_rectified_tokens(stats.rectified_rows);
  if (stats.blocks_total > 0) {
    attention->set_kept_block_ratio(static_cast<double>(stats.blocks_kept) /
                                    static_cast<double>(stats.blocks_total));
  }
  attention->set_stalled_steps(stats.stalled_steps);
}

}  // namespace

StreamWriter::StreamWriter(Options options, StreamTransport* transport)
    : options_(std::move(options)), transport_(transport), open_outputs_(options_.outputs) {
  RESA_CHECK(options_.outputs > 0);
  if (options_.keep_text) summary_.texts.resize(options_.outputs);
}

void StreamWriter::OnAccepted(int32_t prompt_tokens, int32_t cached_tokens) {
  Call call;
  {
    absl::MutexLock lock(&mutex_);
    Waiting item = {std::make_unique<resa::v1::GenerateResponse>(), 0};
    resa::v1::Accepted* accepted = item.response->mutable_accepted();
    accepted->set_request_id(options_.request_id);
    accepted->set_prompt_tokens(prompt_tokens);
    accepted->set_cached_tokens(cached_tokens);
    accepted->set_seed(options_.seed);
    summary_.prompt_tokens = prompt_tokens;
    waiting_.push_back(std::move(item));
    call = NextCall();
  }
  Make(call);
}

bool StreamWriter::OnDelta(const engine::Delta& delta) {
  Call call;
  {
    absl::MutexLock lock(&mutex_);
    Count(delta);
    if (broken_) return true;  // The cancellation is on its way.
    if (waiting_bytes_ > options_.max_waiting_bytes + echo_bytes_) {
      // What waits can't be read in time anyway; the memory is needed more. Something waits only
      // behind a write, and flow control may keep that one for as long as the connection lives.
      Break();
      transport_->StartGrace();
      return false;
    }
    const size_t before = waiting_bytes_;
    Append(delta);
    if (delta.is_prompt) echo_bytes_ += waiting_bytes_ - before;
    call = NextCall();
  }
  Make(call);
  return true;
}

void StreamWriter::Count(const engine::Delta& delta) {
  if (options_.keep_text) summary_.texts[delta.index] += delta.text;
  if (delta.is_prompt) return;
  summary_.output_tokens += static_cast<int64_t>(delta.token_ids.size());
  if (!summary_.first_token.has_value()) summary_.first_token = absl::Now() - options_.arrival;
}

void StreamWriter::Append(const engine::Delta& delta) {
  const bool with_logprobs = options_.logprobs && delta.logprobs.size() == delta.token_ids.size();
  const bool with_tokens = options_.token_ids || with_logprobs;
  const size_t num_tokens = with_tokens ? delta.token_ids.size() : 0;
  // Text that is still held back, and nobody asked for the ids.
  if (delta.text.empty() && num_tokens == 0) return;
  size_t text = 0;
  size_t token = 0;
  // Once for all but giant deltas, such as the echo of a long prompt.
  do {
    const size_t length = Utf8Prefix(delta.text, text, options_.max_message_bytes / 2);
    size_t bytes = length;
    size_t end = token;
    while (end < num_tokens && bytes < options_.max_message_bytes) {
      if (options_.token_ids) bytes += kTokenIdBytes;
      if (with_logprobs) bytes += LogprobBytes(delta.logprobs[end]);
      ++end;
    }
    Waiting* item = DeltaFor(delta.index, bytes);
    resa::v1::Delta* out = item->response->mutable_delta();
    out->mutable_text()->append(delta.text, text, length);
    for (; token < end; ++token) {
      if (options_.token_ids) out->add_token_ids(delta.token_ids[token]);
      if (with_logprobs) Fill(delta.logprobs[token], delta.token_ids[token], out->add_logprobs());
    }
    text += length;
    item->bytes += bytes;
    waiting_bytes_ += bytes;
  } while (text < delta.text.size() || token < num_tokens);
}

StreamWriter::Waiting* StreamWriter::DeltaFor(int32_t index, size_t bytes) {
  for (auto item = waiting_.rbegin(); item != waiting_.rend(); ++item) {
    if (!item->response->has_delta() || item->response->delta().index() != index) continue;
    if (item->bytes + bytes > options_.max_message_bytes) break;
    return &*item;
  }
  waiting_.push_back({NewDelta(index), 0});
  return &waiting_.back();
}

StreamWriter::Message StreamWriter::NewDelta(int32_t index) {
  Message message;
  if (spare_.empty()) {
    message = std::make_unique<resa::v1::GenerateResponse>();
  } else {
    message = std::move(spare_.back());
    spare_.pop_back();
    message->mutable_delta()->Clear();  // Keeps the memory of its parts.
  }
  message->mutable_delta()->set_index(index);
  return message;
}

void StreamWriter::OnFinished(engine::Finished finished) {
  Call call;
  {
    absl::MutexLock lock(&mutex_);
    RESA_CHECK(open_outputs_ > 0);
    if (!broken_) {
      waiting_.push_back({std::make_unique<resa::v1::GenerateResponse>(), 0});
      Fill(finished, waiting_.back().response->mutable_finished());
    }
    if (--open_outputs_ == 0) end_ = absl::OkStatus();
    call = NextCall();
  }
  Make(call);
}

void StreamWriter::OnError(const absl::Status& status) {
  Call call;
  {
    absl::MutexLock lock(&mutex_);
    RESA_CHECK(!status.ok());
    end_ = status;
    call = NextCall();
  }
  Make(call);
}

void StreamWriter::OnWriteDone(bool ok) {
  Call call;
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ok) {
      ++summary_.messages;
    } else {
      Break();
    }
    if (in_flight_.response->has_delta() && in_flight_.bytes <= kMaxSpareBytes &&
        spare_.size() < kMaxSpares) {
      spare_.push_back(std::move(in_flight_.response));
    }
    call = NextCall();
  }
  Make(call);
}

void StreamWriter::OnGraceOver() {
  absl::MutexLock lock(&mutex_);
  // Under the lock: before Finish is called the transport is there.
  if (transport_ != nullptr) transport_->Abandon();
}

void StreamWriter::Break() {
  broken_ = true;
  waiting_.clear();
  waiting_bytes_ = 0;
}

StreamSummary StreamWriter::Summary() const {
  absl::MutexLock lock(&mutex_);
  return summary_;
}

StreamWriter::Call StreamWriter::NextCall() {
  if (writing_ || transport_ == nullptr) return {};
  if (!waiting_.empty()) {
    in_flight_ = std::move(waiting_.front());
    waiting_.erase(waiting_.begin());
    waiting_bytes_ -= in_flight_.bytes;
    writing_ = true;
    return {transport_, in_flight_.response.get(), {}};
  }
  if (!end_.has_value()) return {};
  // An OK end after a failed write cannot be delivered; the transport knows the stream is broken.
  return {std::exchange(transport_, nullptr), nullptr, *end_};
}

void StreamWriter::Make(const Call& call) {
  if (call.transport == nullptr) return;
  if (call.write != nullptr) {
    call.transport->StartWrite(*call.write);
  } else {
    call.transport->Finish(call.end);
  }
}

}  // namespace resa::server
