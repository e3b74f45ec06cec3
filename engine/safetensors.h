#ifndef RESA_ENGINE_SAFETENSORS_H_
#define RESA_ENGINE_SAFETENSORS_H_

// The safetensors format: 8 bytes N (little endian), N bytes of JSON header, then the data. The
// header maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end]}, offsets
// counted from the end of the header, and may have "__metadata__", a map of strings.

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/stored_tensor.h"

namespace resa::engine {

// Headers above this are refused; the largest published ones are near 10 MB.
inline constexpr size_t kMaxSafetensorsHeaderBytes = 64u << 20;

// Parses a whole file in memory. The result's spans point into `bytes`. `file` is for messages.
//
// INVALID_ARGUMENT, naming the tensor, for anything that the format forbids: a header longer than
// the file, malformed JSON, unknown or repeated keys, repeated names, offsets that are not
// integers, lie outside the data, overlap or leave a hole, a size that does not equal shape x
// dtype; and for a dtype other than F32, F16 and BF16.
absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(std::span<const std::byte> bytes,
                                                           absl::string_view file);

}  // namespace resa::engine

#endif  // RESA_ENGINE_SAFETENSORS_H_
