#ifndef RESA_SERVER_VALIDATE_H_
#define RESA_SERVER_VALIDATE_H_

// From the wire to the engine: fields that are unset get their defaults, the prompt is tokenized,
// and what the wire can say but the engine's types cannot is refused. Ranges that the engine checks
// (engine::ValidateRequest) are left to it; both name fields by their path in the request.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"
#include "resa/v1/inference.pb.h"
#include "server/served_model.h"

namespace resa::server {

inline constexpr size_t kMaxRequestIdBytes = 256;

// The engine's form of `request`, without sink and deadline. `random_seed` is used where the
// request has none. INVALID_ARGUMENT with "field: what is wrong".
absl::StatusOr<std::unique_ptr<engine::Request>> ToEngineRequest(
    const resa::v1::GenerateRequest& request, const ServedModel& model, uint64_t random_seed);

// INVALID_ARGUMENT with "field: what is wrong".
absl::StatusOr<std::vector<int32_t>> Tokenize(const resa::v1::TokenizeRequest& request,
                                              const ServedModel& model);
absl::StatusOr<std::string> Detokenize(const resa::v1::DetokenizeRequest& request,
                                       const ServedModel& model);

// Every field set.
resa::v1::AttentionPolicy ToProto(const engine::AttentionPolicy& policy);

}  // namespace resa::server

#endif  // RESA_SERVER_VALIDATE_H_
