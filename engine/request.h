#ifndef RESA_ENGINE_REQUEST_H_
#define RESA_ENGINE_REQUEST_H_

// What a client asks of the engine, and what the engine says back. Plain values; no transport.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "engine/ids.h"

namespace resa::engine {

// Ranges are checked by ValidateRequest (engine/request.cc); semantics are those of
// kernels::SampleRow.
struct SamplingParams {
  float temperature = 1.0f;         // [0, 100]; 0 is greedy.
  int32_t top_k = 0;                // 0: off
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]
  float repetition_penalty = 1.0f;  // (0, 100]
  float presence_penalty = 0.0f;    // [-2, 2]
  float frequency_penalty = 0.0f;   // [-2, 2]
  uint64_t seed = 0;                // The n-th output of a request draws with seed + n.
  // At most kMaxLogitBias, ids distinct; finite or -infinity (a ban).
  std::vector<std::pair<int32_t, float>> logit_bias = {};
};

struct StopCriteria {
  // Output tokens at most, > 0; unset: whatever context and pool allow.
  std::optional<int32_t> max_tokens;
  int32_t min_tokens = 0;  // EOS and stop token ids are banned before; strings do not act.
  std::vector<std::string> strings;  // At most kMaxStopStrings, none empty.
  std::vector<int32_t> token_ids;    // At most kMaxStopTokens.
  bool ignore_eos = false;
  bool include_stop = false;  // Keep the matched stop string or token's text in the output.
};

struct OutputOptions {
  bool token_ids = false;
  bool logprobs = false;
  int32_t top_logprobs = 0;          // 0 .. kernels::kMaxTopLogprobs; needs logprobs.
  bool echo = false;                 // The prompt precedes each output.
  bool keep_special_tokens = false;  // Special tokens appear in the text.
};

inline constexpr int kMaxOutputs = 64;  // n
// Echoed prompt tokens over all outputs of a request with several.
inline constexpr int64_t kMaxEchoTokens = 1 << 18;
inline constexpr int kMaxLogitBias = 1024;
inline constexpr int kMaxStopStrings = 16;
inline constexpr int kMaxStopStringBytes = 1024;
inline constexpr int kMaxStopTokens = 64;
inline constexpr int kMinPriority = -1000;
inline constexpr int kMaxPriority = 1000;

class OutputSink;

// One Generate call, tokenized and with defaults filled in. Immutable once submitted.
struct Request {
  RequestId id;
  std::vector<int32_t> prompt;  // At least one token, each in [0, vocab_size).
  SamplingParams sampling;
  StopCriteria stop;
  OutputOptions output;
  AttentionPolicy attention;
  // Teacher forcing: taken in place of sampled tokens, through the same path, with their logprobs.
  std::vector<int32_t> forced_tokens;
  int32_t n = 1;         // Outputs, 1 .. kMaxOutputs. They share the prompt's pages.
  int32_t priority = 0;  // Higher runs first.
  absl::Time deadline = absl::InfiniteFuture();  // By the engine's clock.
  absl::Time arrival = absl::InfinitePast();     // Set by Engine::Submit.
  // Where the answer goes. Shared, since the transport keeps it until its stream is closed.
  std::shared_ptr<OutputSink> sink;
};

struct ModelLimits {
  int32_t vocab_size = 0;
  int32_t max_context = 0;  // Prompt and output tokens of one sequence.
  int64_t pool_tokens = 0;  // Tokens the whole pool holds.
};

// INVALID_ARGUMENT, with the field as a path ("sampling.top_p") in front of the message: the
// message has the form "field: what is wrong and what is accepted". `eos_ids` end an output unless
// the request ignores them.
absl::Status ValidateRequest(const Request& request, const ModelLimits& limits,
                             absl::Span<const int32_t> eos_ids);

// Output tokens that this request may have at most, given its prompt: the smallest of max_tokens,
// what the context leaves, and what the pool leaves. REQUIRES a validated request.
int32_t MaxOutputTokens(const Request& request, const ModelLimits& limits);

// An output that ends otherwise, ends with its request in OutputSink::OnError.
enum class FinishReason : uint8_t { kStop, kLength };
const char* NameOf(FinishReason reason);

struct TokenLogprob {
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;  // By falling logprob.
};

// A piece of one output. Several tokens can share a delta. `text` is valid UTF-8.
struct Delta {
  int32_t index = 0;       // Which of the n outputs.
  bool is_prompt = false;  // The echo of the prompt, not made by the model.
  std::string text;
  std::vector<int32_t> token_ids;      // Always filled; the transport shows them if asked to.
  std::vector<TokenLogprob> logprobs;  // One per token when asked for, else empty.
};

struct AttentionStats {
  int64_t sparse_steps = 0;    // Decode rows that attended sparsely.
  int64_t dense_steps = 0;     // Decode rows that attended to everything.
  int64_t rectifications = 0;  // Windows rectified.
  int64_t rectified_rows = 0;
  int64_t blocks_kept = 0;    // Over the sparse steps, per KV head.
  int64_t blocks_total = 0;   // What dense attention would have read.
  int64_t stalled_steps = 0;  // Steps that a due window waited for room.
};

struct Usage {
  int32_t prompt_tokens = 0;
  int32_t output_tokens = 0;
  int32_t cached_tokens = 0;  // Prompt tokens not computed for this output.
  int32_t preemptions = 0;
};

struct Timings {
  absl::Duration queued;       // Arrival to first scheduled step.
  absl::Duration prefill;      // First scheduled step to first token.
  absl::Duration first_token;  // Arrival to first token.
  absl::Duration decode;       // First token to the end.
  absl::Duration total;        // Arrival to the end.
};

// The end of one output.
struct Finished {
  int32_t index = 0;
  FinishReason reason = FinishReason::kStop;
  std::string matched_stop;                   // The stop string, if one matched.
  std::optional<int32_t> matched_stop_token;  // The stop token or EOS, if one did.
  Usage usage;
  Timings timings;
  AttentionStats attention;
};

// Where a request's answer goes. Called on the engine thread, in order, and must neither block nor
// call back into the engine. Exactly one of these ends a request: OnFinished for the last of its n
// outputs, or one OnError.
class OutputSink {
 public:
  virtual ~OutputSink() = default;
  virtual void OnAccepted(int32_t prompt_tokens, int32_t cached_tokens) = 0;
  // `delta` is looked at during the call only. False: the reader is so far behind that its bounded
  // buffer is full; the engine then ends the request with RESOURCE_EXHAUSTED.
  virtual bool OnDelta(const Delta& delta) = 0;
  virtual void OnFinished(Finished finished) = 0;
  // CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE or INTERNAL; nothing follows.
  virtual void OnError(const absl::Status& status) = 0;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_REQUEST_H_
