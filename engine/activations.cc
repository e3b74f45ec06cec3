#include "engine/activations.h"

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using kernels::DType;
using kernels::Matrix;

// Calls `matrix(Matrix*, rows, cols, dtype)` or `array(pointer*, count)` for every intermediate, so
// that sizes are stated once for allocating and for counting.
template <typename MatrixFn, typename ArrayFn>
void ForEachTensor(const ModelConfig& config, const BatchLimits& limits, int64_t block_ids,
                   DType dtype, Activations* a, HeadActivations* head, const MatrixFn& matrix,
                   const ArrayFn& array) {
  const int64_t rows = limits.max_rows;
  const int64_t head_rows = limits.max_segments;
  const int64_t half_head = config.head_dim / 2;
  matrix(&a->hidden, rows, config.hidden_size, dtype);
  matrix(&a->normed, rows, config.hidden_size, dtype);
  matrix(&a->q, rows, config.QDim(), dtype);
  matrix(&a->k, rows, config.KvDim(), dtype);
  matrix(&a->v, rows, config.KvDim(), dtype);
  matrix(&a->attended, rows, config.QDim(), dtype);
  matrix(&a->gate, rows, config.intermediate_size, dtype);
  matrix(&a->up, rows, config.intermediate_size, dtype);
  array(&a->cos, rows * half_head);
  array(&a->sin, rows * half_head);
  array(&a->block_ids, block_ids);
  matrix(&head->hidden, head_rows, config.hidden_size, dtype);
  matrix(&head->logits, head_rows, config.vocab_size, DType::kF32);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ActivationMemory>> ActivationMemory::Create(
    const ModelConfig& config, const BatchLimits& limits, int64_t block_ids, kernels::Ops* ops) {
  std::unique_ptr<ActivationMemory> memory(new ActivationMemory);
  const DType dtype = ops->activation_dtype();
  bool complete = true;
  const auto allocate = [&](size_t bytes) -> std::byte* {
    std::unique_ptr<kernels::Buffer> buffer = ops->Allocate(bytes);
    if (buffer == nullptr) {
      complete = false;
      return nullptr;
    }
    memory->buffers_.push_back(std::move(buffer));
    return memory->buffers_.back()->data();
  };
  ForEachTensor(
      config, limits, block_ids, dtype, &memory->largest_, &memory->largest_head_,
      [&](Matrix* view, int64_t rows, int64_t cols, DType type) {
        *view = Matrix{nullptr, type, rows, cols};
        view->data = allocate(view->bytes());
      },
      [&](auto** view, int64_t count) {
        *view = reinterpret_cast<std::remove_reference_t<decltype(*view)>>(
            allocate(static_cast<size_t>(count) * sizeof(**view)));
      });
  if (!complete) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for the activations of a step of ", limits.max_rows, " tokens (",
                     BytesNeeded(config, limits, block_ids, dtype),
                     " bytes); configure a smaller step or fewer sequences"));
  }
  return memory;
}

size_t ActivationMemory::BytesNeeded(const ModelConfig& config, const BatchLimits& limits,
                                     int64_t block_ids, DType activation_dtype) {
  Activations views;
  HeadActivations head;
  size_t bytes = 0;
  ForEachTensor(
      config, limits, block_ids, activation_dtype, &views, &head,
      [&](Matrix*, int64_t rows, int64_t cols, DType type) {
        bytes += static_cast<size_t>(rows * cols) * kernels::BytesOf(type);
      },
      [&](auto** view, int64_t count) { bytes += static_cast<size_t>(count) * sizeof(**view); });
  return bytes;
}

Activations ActivationMemory::ForRows(int64_t rows) const {
  Activations a = largest_;
  for (Matrix* view : {&a.hidden, &a.normed, &a.q, &a.k, &a.v, &a.attended, &a.gate, &a.up}) {
    *view = view->First(rows);
  }
  return a;
}

HeadActivations ActivationMemory::ForHead(int64_t rows) const {
  return {largest_head_.hidden.First(rows), largest_head_.logits.First(rows)};
}

}  // namespace resa::engine
