// Gathering rows and copying pages: nothing but memcpy, spread over the threads.

#include <cstring>

#include "kernels/cpu/context.h"

namespace resa::kernels::cpu {

void GatherRows(Context& context, const GatherRowsParams& p) {
  const size_t row_bytes = static_cast<size_t>(p.x.cols) * BytesOf(p.x.dtype);
  const auto* const from = static_cast<const std::byte*>(p.x.data);
  auto* const to = static_cast<std::byte*>(p.out.data);
  constexpr int64_t kRowsPerTask = 16;
  context.pool.For((p.out.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(p.out.rows, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) {
      std::memcpy(to + static_cast<size_t>(i) * row_bytes,
                  from + static_cast<size_t>(p.rows[i]) * row_bytes, row_bytes);
    }
  });
}

void CopyPages(Context& context, const CopyPagesParams& p) {
  const auto heads = static_cast<size_t>(p.layout.num_kv_heads);
  const size_t kv_bytes = heads * p.layout.RunBytes();
  const size_t descriptor_bytes = heads * p.layout.DescriptorRunBytes();
  const auto copy = [](std::byte* array, size_t bytes, int32_t from, int32_t to) {
    std::memcpy(array + static_cast<size_t>(to) * bytes, array + static_cast<size_t>(from) * bytes,
                bytes);
  };
  context.pool.For(p.layout.num_layers * p.count, [&](int64_t task, int) {
    const KvLayer& layer = p.layers[task / p.count];
    const int32_t from = p.from[task % p.count];
    const int32_t to = p.to[task % p.count];
    copy(layer.k, kv_bytes, from, to);
    copy(layer.v, kv_bytes, from, to);
    copy(layer.descriptors, descriptor_bytes, from, to);
  });
}

}  // namespace resa::kernels::cpu
