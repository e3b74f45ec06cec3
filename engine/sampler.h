#ifndef RESA_ENGINE_SAMPLER_H_
#define RESA_ENGINE_SAMPLER_H_

// What one sequence brings to each draw: its request's parameters and what it has emitted so far.
// The draw itself is kernels::Ops::Sample. Everything follows from the request and the accepted
// tokens alone, so a sequence draws the same tokens whatever runs beside it, and a preempted one
// goes on where it was.

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/request.h"
#include "kernels/params.h"

namespace resa::engine {

// Thread: the engine's. The request must outlive it. Movable; a copy goes on independently.
class SamplerState {
 public:
  // `output_index` says which of the request's n outputs this is (it draws with seed + index).
  // `eos_ids` are banned, like the request's stop tokens, until min_tokens are out; with ignore_eos
  // they end nothing and are not banned. REQUIRES a validated request.
  SamplerState(const Request& request, int output_index, absl::Span<const int32_t> eos_ids);

  // The row to sample the next token with; `row` itself is left to the executor. Its pointers look
  // into this object and are valid until Accept, a move or destruction.
  kernels::SampleRow Next() const;

  // Takes the token that was sampled or forced. Allocates only when penalties are used and the
  // token is new.
  void Accept(int32_t token);

  int32_t output_count() const { return output_count_; }

 private:
  bool EndIsBanned() const { return output_count_ < request_->stop.min_tokens; }
  void CountPrompt();

  const Request* request_;
  uint64_t seed_;
  bool counts_tokens_;  // Some penalty is in use.
  int32_t output_count_ = 0;

  std::vector<kernels::TokenBias> bias_;             // The request's.
  std::vector<kernels::TokenBias> bias_before_end_;  // The same with the bans; until min_tokens.

  std::vector<kernels::TokenCount> counts_;         // Every distinct token seen.
  absl::flat_hash_map<int32_t, int32_t> count_of_;  // Token id to index in counts_.
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_SAMPLER_H_
