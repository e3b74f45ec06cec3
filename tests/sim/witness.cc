#include "tests/sim/witness.h"

#include <algorithm>

namespace resa::sim {
namespace {

engine::Request WithoutSink(engine::Request request) {
  request.sink = nullptr;
  return request;
}

bool SameLogprobs(const engine::TokenLogprob& got, const kernels::SampleResult& expected) {
  if (got.logprob != expected.logprob) return false;
  if (static_cast<int32_t>(got.top.size()) != expected.num_top) return false;
  for (int32_t i = 0; i < expected.num_top; ++i) {
    if (got.top[i].first != expected.top_ids[i]) return false;
    if (got.top[i].second != expected.top_logprobs[i]) return false;
  }
  return true;
}

}  // namespace

Witness::Witness(const engine::Request& request, const engine::EngineOptions& options,
                 int32_t refuse_after, Stage* stage)
    : request_(WithoutSink(request)),
      refuse_after_(refuse_after),
      stage_(stage),
      outputs_left_(request.n) {
  outputs_.reserve(request.n);
  for (int32_t index = 0; index < request.n; ++index) {
    outputs_.emplace_back(request_, index, options);
  }
}

bool Witness::IsAliveFor(const char* event) {
  if (ended_) stage_->Fail("told after the end: request ", id.value, " got ", event);
  if (!accepted_) stage_->Fail("told before acceptance: request ", id.value, " got ", event);
  if (refused_) stage_->Fail("told a slow reader: request ", id.value, " got ", event);
  return !stage_->failed();
}

void Witness::OnAccepted(int32_t prompt_tokens, int32_t cached_tokens) {
  if (accepted_ || ended_) stage_->Fail("accepted twice: request ", id.value);
  accepted_ = true;
  if (prompt_tokens != static_cast<int32_t>(request_.prompt.size()) || cached_tokens != 0) {
    stage_->Fail("wrong acceptance: request ", id.value, " has ", prompt_tokens, " tokens, ",
                 cached_tokens, " cached");
  }
}

bool Witness::OnDelta(const engine::Delta& delta) {
  if (!IsAliveFor("a delta")) return true;
  Output& output = outputs_[delta.index];
  if (output.finished || output.must_finish) {
    stage_->Fail("token after the end: request ", id.value, " output ", delta.index);
    return true;
  }
  if (request_.output.echo && !output.echoed) {
    CheckEcho(delta, &output);
  } else {
    CheckToken(delta, &output);
  }
  if (++deltas_ > refuse_after_ && refuse_after_ >= 0) {
    refused_ = true;
    return false;
  }
  return true;
}

void Witness::CheckEcho(const engine::Delta& delta, Output* output) {
  output->echoed = true;
  if (delta.token_ids != request_.prompt || !delta.logprobs.empty()) {
    stage_->Fail("wrong echo: request ", id.value, " output ", delta.index);
  }
}

void Witness::CheckToken(const engine::Delta& delta, Output* output) {
  if (delta.token_ids.size() != 1 ||
      delta.logprobs.size() != (request_.output.logprobs ? size_t{1} : size_t{0})) {
    stage_->Fail("wrong delta: request ", id.value, " output ", delta.index, " got ",
                 delta.token_ids.size(), " tokens and ", delta.logprobs.size(), " logprobs");
    return;
  }
  SoloRun& solo = output->solo;
  const int32_t place = solo.output_len();
  output->last = solo.Next();
  const kernels::SampleResult& expected = output->last.sample;
  if (!expected.finite) {
    stage_->Fail("garbage delivered: request ", id.value, " output ", delta.index, " token ", place,
                 " comes from logits that are not finite");
    return;
  }
  if (delta.token_ids[0] != expected.token) {
    stage_->Fail("wrong token: request ", id.value, " output ", delta.index, " token ", place,
                 " is ", delta.token_ids[0], ", alone it is ", expected.token);
    return;
  }
  if (request_.output.logprobs && !SameLogprobs(delta.logprobs[0], expected)) {
    stage_->Fail("wrong logprobs: request ", id.value, " output ", delta.index, " token ", place);
    return;
  }
  output->must_finish = output->last.ends;
  ++stage_->counts.tokens;
  if (place < static_cast<int32_t>(request_.forced_tokens.size())) ++stage_->counts.forced_tokens;
}

void Witness::OnFinished(engine::Finished finished) {
  if (!IsAliveFor("an end")) return;
  Output& output = outputs_[finished.index];
  if (!output.must_finish || output.finished) {
    stage_->Fail("ended at the wrong token: request ", id.value, " output ", finished.index,
                 " after ", output.solo.output_len(), " tokens");
    return;
  }
  output.finished = true;
  if (finished.reason != output.last.reason || !finished.matched_stop.empty() ||
      finished.matched_stop_token != output.last.stop_token) {
    stage_->Fail("wrong reason: request ", id.value, " output ", finished.index, " ended by ",
                 NameOf(finished.reason), ", expected ", NameOf(output.last.reason));
  }
  CheckUsage(finished, output);
  stage_->counts.sparse_rows += finished.attention.sparse_steps;
  stage_->counts.rectifications += finished.attention.rectifications;
  (finished.reason == engine::FinishReason::kStop ? stage_->counts.finished_stop
                                                  : stage_->counts.finished_length) += 1;
  if (--outputs_left_ == 0) ended_ = true;
}

void Witness::CheckUsage(const engine::Finished& finished, const Output& output) {
  const engine::Usage& usage = finished.usage;
  const engine::Timings& timings = finished.timings;
  // All but the prompt's last token comes from the first output, unless the pages were lost.
  const bool may_share = finished.index > 0 && usage.preemptions == 0;
  const bool shares = may_share && usage.cached_tokens == usage.prompt_tokens - 1;
  if (usage.prompt_tokens != output.solo.prompt_len() ||
      usage.output_tokens != output.solo.output_len() || (usage.cached_tokens != 0 && !shares)) {
    stage_->Fail("wrong usage: request ", id.value, " output ", finished.index, ": ",
                 usage.prompt_tokens, " + ", usage.output_tokens, " tokens, ", usage.cached_tokens,
                 " cached");
  }
  const absl::Duration parts = timings.queued + timings.prefill + timings.decode;
  if (timings.queued < absl::ZeroDuration() || timings.prefill < absl::ZeroDuration() ||
      timings.decode < absl::ZeroDuration() || parts != timings.total ||
      timings.first_token != timings.queued + timings.prefill) {
    stage_->Fail("wrong timings: request ", id.value, " output ", finished.index);
  }
  // A preempted output takes some of its steps twice.
  const engine::AttentionStats& got = finished.attention;
  const engine::AttentionStats& expected = output.solo.attention();
  const bool enough = got.sparse_steps >= expected.sparse_steps &&
                      got.dense_steps >= expected.dense_steps &&
                      got.rectifications == expected.rectifications &&
                      got.rectified_rows == expected.rectified_rows;
  const bool exact =
      got.sparse_steps == expected.sparse_steps && got.dense_steps == expected.dense_steps;
  if (!enough || (usage.preemptions == 0 && !exact)) {
    stage_->Fail("wrong attention counts: request ", id.value, " output ", finished.index);
  }
}

void Witness::OnError(const absl::Status& status) {
  if (ended_ || !accepted_) {
    stage_->Fail("ended twice: request ", id.value, " got ", status.ToString());
    return;
  }
  ended_ = true;
  if (!HasCauseFor(status)) {
    stage_->Fail("ended without a cause: request ", id.value, " got ", status.ToString());
  }
}

bool Witness::HasCauseFor(const absl::Status& status) {
  Counts& counts = stage_->counts;
  switch (status.code()) {
    case absl::StatusCode::kCancelled:
      ++counts.cancelled;
      return cancel_step_ >= 0;
    case absl::StatusCode::kDeadlineExceeded:
      ++counts.deadlines;
      return request_.deadline <= stage_->step_start;
    case absl::StatusCode::kResourceExhausted:
      ++counts.slow_readers;
      return refused_;
    case absl::StatusCode::kUnavailable:
      ++counts.aborted;
      return stage_->abort_requested;
    case absl::StatusCode::kInternal:
      if (stage_->failed_step == stage_->step) {
        ++counts.failed;
        return ran_step_ == stage_->step;
      }
      ++counts.not_finite;
      return SomeOutputTurnsNonFinite();
    default:
      return false;
  }
}

bool Witness::SomeOutputTurnsNonFinite() {
  for (Output& output : outputs_) {
    if (!output.finished && !output.must_finish && !output.solo.Next().sample.finite) return true;
  }
  return false;
}

void Witness::CheckAfterStep(int32_t max_sequences) {
  if (ended_) return;
  if (refused_) stage_->Fail("slow reader goes on: request ", id.value);
  if (!accepted_) stage_->Fail("not accepted in a step: request ", id.value);
  if (cancel_step_ >= 0) stage_->Fail("cancel ignored for a step: request ", id.value);
  if (stage_->abort_requested) stage_->Fail("abort ignored for a step: request ", id.value);
  if (request_.deadline <= stage_->step_start) {
    stage_->Fail("deadline ignored for a step: request ", id.value);
  }
  if (stage_->failed_step == stage_->step && ran_step_ == stage_->step) {
    stage_->Fail("failed step ignored: request ", id.value);
  }
  for (const Output& output : outputs_) {
    if (output.must_finish && !output.finished) {
      stage_->Fail("end not told: request ", id.value);
    }
  }
  const int64_t life = stage_->step - arrival_step;
  const int64_t bound = steps_ahead * (1 + outputs_ahead) * (1 + max_sequences);
  if (life > bound) {
    stage_->Fail("starved: request ", id.value, " lives for ", life, " steps, bound ", bound);
  }
  int64_t& longest = stage_->counts.longest_life_percent;
  longest = std::max(longest, 100 * life / steps_ahead);
}

}  // namespace resa::sim
