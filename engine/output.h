#ifndef RESA_ENGINE_OUTPUT_H_
#define RESA_ENGINE_OUTPUT_H_

// What a sampled token makes of an output: its text, and whether it ends there.
//
// Thread: the engine's.

#include <cstdint>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "kernels/params.h"

namespace resa::engine {

// Makes the sampled token the newest of `sequence`, and `delta`, which is empty but for memory,
// what the client is told of it. True when the output ends with it: `finished` then says why. A
// token that ends an output is told, its text only where the request wants stops to be included.
bool GiveToken(const kernels::SampleResult& sample, absl::Span<const int32_t> eos_ids,
               Sequence* sequence, Delta* delta, Finished* finished);

// What else is told at the end, `now`: usage, timings, attention.
void Account(const Sequence& sequence, absl::Time now, Finished* finished);

}  // namespace resa::engine

#endif  // RESA_ENGINE_OUTPUT_H_
