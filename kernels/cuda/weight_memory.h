#ifndef RESA_KERNELS_CUDA_WEIGHT_MEMORY_H_
#define RESA_KERNELS_CUDA_WEIGHT_MEMORY_H_

// Weights on the device: copied through pinned memory in pieces, so that reading the file's map and
// the copy over the bus overlap, and laid one behind the other in large slabs.

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <vector>

namespace resa::kernels::cuda {

// Thread: the engine's.
class WeightMemory {
 public:
  WeightMemory() = default;
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  ~WeightMemory();

  // The device's copy, 256-byte aligned, which lives as long as this. Null when there is no room.
  // The copy may still be under way on `stream`; `host` has been read.
  const std::byte* Import(const std::byte* host, size_t bytes, cudaStream_t stream);

 private:
  std::byte* Place(size_t bytes);
  void Copy(std::byte* to, const std::byte* host, size_t bytes, cudaStream_t stream);

  std::vector<std::byte*> slabs_;
  std::byte* free_ = nullptr;  // Of the last slab.
  size_t free_bytes_ = 0;

  struct Piece {
    std::byte* pinned = nullptr;
    cudaEvent_t copied = nullptr;
  };
  std::array<Piece, 4> pieces_ = {};
  size_t next_piece_ = 0;
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_WEIGHT_MEMORY_H_
