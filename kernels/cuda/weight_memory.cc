#include "kernels/cuda/weight_memory.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "kernels/cuda/context.h"

namespace resa::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSlabBytes = size_t{256} << 20;
constexpr size_t kPieceBytes = size_t{16} << 20;
// One thread copies from a map at 3 to 6 GB/s where the bus takes 50.
constexpr size_t kCopyThreads = 4;
constexpr size_t kBytesWorthThreads = size_t{4} << 20;

void CopyInParallel(std::byte* to, const std::byte* from, size_t bytes) {
  if (bytes < kBytesWorthThreads) {
    std::memcpy(to, from, bytes);
    return;
  }
  const size_t part = (bytes / kCopyThreads + 4095) / 4096 * 4096;
  std::vector<std::thread> threads;
  for (size_t begin = part; begin < bytes; begin += part) {
    threads.emplace_back(
        [=] { std::memcpy(to + begin, from + begin, std::min(part, bytes - begin)); });
  }
  std::memcpy(to, from, std::min(part, bytes));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

WeightMemory::~WeightMemory() {
  for (std::byte* slab : slabs_) cudaFree(slab);
  for (Piece& piece : pieces_) {
    cudaFreeHost(piece.pinned);
    if (piece.copied != nullptr) cudaEventDestroy(piece.copied);
  }
}

std::byte* WeightMemory::Place(size_t bytes) {
  const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (padded > free_bytes_) {
    const size_t slab = padded > kSlabBytes / 2 ? padded : kSlabBytes;
    std::byte* data = nullptr;
    if (cudaMalloc(reinterpret_cast<void**>(&data), slab) != cudaSuccess) {
      (void)cudaGetLastError();  // Being out of memory is the caller's to tell.
      return nullptr;
    }
    slabs_.push_back(data);
    // A tensor with a slab of its own leaves the open one to the small ones after it.
    if (slab == padded) return data;
    free_ = data;
    free_bytes_ = slab;
  }
  std::byte* const place = free_;
  free_ += padded;
  free_bytes_ -= padded;
  return place;
}

void WeightMemory::Copy(std::byte* to, const std::byte* host, size_t bytes, cudaStream_t stream) {
  for (size_t done = 0; done < bytes; done += kPieceBytes) {
    Piece& piece = pieces_[next_piece_];
    next_piece_ = (next_piece_ + 1) % pieces_.size();
    if (piece.pinned == nullptr) {
      RESA_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&piece.pinned), kPieceBytes));
      RESA_CUDA_CHECK(cudaEventCreateWithFlags(&piece.copied, cudaEventDisableTiming));
    } else {
      RESA_CUDA_CHECK(cudaEventSynchronize(piece.copied));
    }
    const size_t now = std::min(kPieceBytes, bytes - done);
    CopyInParallel(piece.pinned, host + done, now);
    RESA_CUDA_CHECK(cudaMemcpyAsync(to + done, piece.pinned, now, cudaMemcpyHostToDevice, stream));
    RESA_CUDA_CHECK(cudaEventRecord(piece.copied, stream));
  }
}

const std::byte* WeightMemory::Import(const std::byte* host, size_t bytes, cudaStream_t stream) {
  std::byte* const place = Place(bytes);
  if (place != nullptr) Copy(place, host, bytes, stream);
  return place;
}

}  // namespace resa::kernels::cuda
