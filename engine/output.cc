#include "engine/output.h"

#include <utility>

#include "absl/algorithm/container.h"

namespace resa::engine {
namespace {

void Fill(const kernels::SampleResult& sample, TokenLogprob* out) {
  out->logprob = sample.logprob;
  out->top.clear();
  for (int32_t i = 0; i < sample.num_top; ++i) {
    out->top.emplace_back(sample.top_ids[i], sample.top_logprobs[i]);
  }
}

// Whether the newest token, by its id, ends the output.
bool IsStopToken(const Sequence& sequence, absl::Span<const int32_t> eos_ids) {
  const StopCriteria& stop = sequence.request->stop;
  if (sequence.forced()) return false;
  const int32_t token = sequence.tokens.back();
  return absl::c_linear_search(stop.token_ids, token) ||
         (!stop.ignore_eos && absl::c_linear_search(eos_ids, token));
}

}  // namespace

bool GiveToken(const kernels::SampleResult& sample, absl::Span<const int32_t> eos_ids,
               Sequence* sequence, Delta* delta, Finished* finished) {
  const Request& request = *sequence->request;
  sequence->tokens.push_back(sample.token);
  sequence->sampler.Accept(sample.token);
  delta->index = sequence->index;
  delta->token_ids.assign(1, sample.token);
  delta->logprobs.resize(request.output.logprobs ? 1 : 0);
  if (request.output.logprobs) Fill(sample, &delta->logprobs[0]);

  const bool stop_token = IsStopToken(*sequence, eos_ids);
  bool ends = stop_token;
  finished->reason = FinishReason::kStop;
  if (stop_token) finished->matched_stop_token = sample.token;
  if (sequence->detokenizer != nullptr && (!stop_token || request.stop.include_stop)) {
    const bool may_stop = !sequence->forced() && sequence->output_len() >= request.stop.min_tokens;
    Detokenizer::Step step = sequence->detokenizer->Push(sample.token, may_stop);
    delta->text.append(step.text);
    if (step.matched_stop.has_value()) {
      ends = true;
      finished->matched_stop = *std::move(step.matched_stop);
    }
  }
  if (!ends && sequence->output_len() >= sequence->max_output) {
    ends = true;
    finished->reason = FinishReason::kLength;
  }
  if (ends && sequence->detokenizer != nullptr && finished->matched_stop.empty()) {
    delta->text += sequence->detokenizer->Finish();
  }
  return ends;
}

void Account(const Sequence& sequence, absl::Time now, Finished* finished) {
  const absl::Time arrival = sequence.request->arrival;
  finished->index = sequence.index;
  finished->usage.prompt_tokens = sequence.prompt_len;
  finished->usage.output_tokens = sequence.output_len();
  finished->usage.cached_tokens = sequence.cached_tokens;
  finished->usage.preemptions = sequence.preemptions;
  finished->timings.queued = sequence.first_scheduled - arrival;
  finished->timings.prefill = sequence.first_token - sequence.first_scheduled;
  finished->timings.first_token = sequence.first_token - arrival;
  finished->timings.decode = now - sequence.first_token;
  finished->timings.total = now - arrival;
  finished->attention = sequence.attention;
}

}  // namespace resa::engine
