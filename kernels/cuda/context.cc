#include "kernels/cuda/context.h"

namespace resa::kernels::cuda {

Scratch::~Scratch() { cudaFree(data_); }

std::byte* Scratch::Reserve(size_t bytes) {
  if (bytes <= bytes_) return data_;
  // Work that still uses the old memory is waited for by cudaFree.
  RESA_CUDA_CHECK(cudaFree(data_));
  data_ = nullptr;
  bytes_ = (bytes + bytes / 8 + 0xffff) & ~size_t{0xffff};
  const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&data_), bytes_);
  RESA_CHECK(error == cudaSuccess)
      << "no device memory for " << bytes_ << " bytes of workspace: " << cudaGetErrorString(error)
      << "; give the KV pool less";
  ++generation_;
  return data_;
}

ZeroedScratch::~ZeroedScratch() { cudaFree(data_); }

uint32_t* ZeroedScratch::Reserve(size_t count, cudaStream_t stream) {
  if (count <= count_) return data_;
  RESA_CUDA_CHECK(cudaFree(data_));
  count_ = (count + count / 4 + 1023) & ~size_t{1023};
  RESA_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), count_ * sizeof(uint32_t)));
  RESA_CUDA_CHECK(cudaMemsetAsync(data_, 0, count_ * sizeof(uint32_t), stream));
  ++generation_;
  return data_;
}

}  // namespace resa::kernels::cuda
