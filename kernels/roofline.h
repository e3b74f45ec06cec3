#ifndef RESA_KERNELS_ROOFLINE_H_
#define RESA_KERNELS_ROOFLINE_H_

// What each op has to move and to compute, from its params alone: the denominator of every measured
// figure. Bytes count each operand once however often a backend touches it; FLOPs count a multiply-
// add as two and leave out the exponentials and reductions, which are lower-order.

#include <algorithm>
#include <cstdint>

#include "kernels/ceilings.h"
#include "kernels/params.h"

namespace resa::kernels {

struct Roofline {
  double bytes = 0;
  double flops = 0;

  Roofline& operator+=(const Roofline& other) {
    bytes += other.bytes;
    flops += other.flops;
    return *this;
  }
  // Seconds at the least on such a machine: bytes and FLOPs overlap perfectly.
  double Seconds(const Ceilings& ceilings) const {
    return std::max(bytes / ceilings.read_bytes_per_s, flops / ceilings.flops_per_s);
  }
};

inline Roofline RooflineOf(const EmbedParams& p) {
  const double row_bytes = static_cast<double>(p.table.cols) * BytesOf(p.table.dtype);
  return {.bytes = static_cast<double>(p.out.rows) * row_bytes + static_cast<double>(p.out.bytes()),
          .flops = 0};
}

inline Roofline RooflineOf(const RmsNormParams& p) {
  return {.bytes = static_cast<double>(p.x.bytes() + p.out.bytes()) + 4.0 * p.x.cols,
          .flops = 4.0 * p.x.rows * p.x.cols};
}

inline Roofline RooflineOf(const LinearParams& p) {
  return {.bytes = static_cast<double>(p.x.bytes() + p.weight.bytes() + p.out.bytes()) +
                   (p.accumulate ? static_cast<double>(p.out.bytes()) : 0.0) +
                   (p.bias != nullptr ? 4.0 * p.out.cols : 0.0),
          .flops = 2.0 * p.x.rows * p.weight.rows * p.weight.cols};
}

// The norm's and the gate's own bytes are left out: within the products x and out count anyway.
inline Roofline RooflineOf(const LinearsParams& p) {
  Roofline total;
  for (const LinearParams& product : p.products) total += RooflineOf(product);
  return total;
}

inline Roofline RooflineOf(const RopeTableParams& p) {
  return {.bytes = 4.0 * p.rows * (1.0 + p.head_dim), .flops = 1.0 * p.rows * p.head_dim};
}

// Activations in and out, K and V into the pool, the descriptors of the tokens written.
inline Roofline RooflineOf(const QkvPostParams& p) {
  double tokens = 0;
  for (int64_t i = 0; i < p.num_runs; ++i) tokens += p.runs[i].rows;
  const double kv_values = tokens * static_cast<double>(p.k.cols);
  const double q_values = tokens * static_cast<double>(p.q.cols);
  const double descriptor_bytes = tokens / kPageTokens * p.layout.num_kv_heads *
                                  static_cast<double>(p.layout.DescriptorRunBytes());
  return {.bytes = q_values * 2.0 * BytesOf(p.q.dtype) +
                   2.0 * kv_values * (BytesOf(p.k.dtype) + BytesOf(p.layout.kv_dtype)) +
                   descriptor_bytes,
          .flops = 6.0 * (q_values + kv_values)};
}

// Every descriptor of every row's blocks with all planes; progressive reading needs less, by an
// amount that OpCounters::descriptor_bytes tells exactly.
inline Roofline RooflineOf(const SelectParams& p) {
  const SelectorSpec& spec = p.layout.selector;
  const double d = p.layout.head_dim;
  Roofline total;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const double blocks = (p.rows[i].position + spec.block_tokens) / spec.block_tokens;
    const double block_bytes =
        static_cast<double>(p.layout.DescriptorRunBytes()) * spec.block_tokens / kPageTokens;
    total.bytes += blocks * p.layout.num_kv_heads * block_bytes;
    total.flops += spec.kind == SelectorKind::kMinMax
                       ? 4.0 * d * blocks * p.layout.num_kv_heads
                       : 2.0 * d * blocks * spec.block_tokens * p.num_heads;
  }
  return total;
}

inline Roofline RooflineOf(const SparseAttendParams& p) {
  Roofline total;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const double tokens = std::min<double>(
        static_cast<double>(p.rows[i].keep_blocks) * p.layout.selector.block_tokens,
        p.rows[i].position + 1.0);
    total.bytes +=
        tokens * p.layout.num_kv_heads * 2.0 * p.layout.head_dim * BytesOf(p.layout.kv_dtype);
    total.flops += 4.0 * tokens * p.num_heads * p.layout.head_dim;
  }
  return total;
}

// K and V are read once per chunk; a row computes over the tokens up to its own.
inline Roofline RooflineOf(const ChunkAttendParams& p) {
  Roofline total;
  for (int64_t i = 0; i < p.num_chunks; ++i) {
    const double rows = p.chunks[i].rows;
    const double first = p.chunks[i].position;
    const double attended = rows * (first + 1.0) + rows * (rows - 1.0) / 2.0;
    total.bytes += (first + rows) * p.layout.num_kv_heads * 2.0 * p.layout.head_dim *
                       BytesOf(p.layout.kv_dtype) +
                   rows * static_cast<double>(p.q.cols) * 2.0 * BytesOf(p.q.dtype);
    total.flops += 4.0 * attended * p.num_heads * p.layout.head_dim;
  }
  return total;
}

inline Roofline RooflineOf(const SiluMulParams& p) {
  return {.bytes = 3.0 * static_cast<double>(p.out.bytes()),
          .flops = 4.0 * p.out.rows * p.out.cols};
}

inline Roofline RooflineOf(const GatherRowsParams& p) {
  return {.bytes = 2.0 * static_cast<double>(p.out.bytes()), .flops = 0};
}

inline Roofline RooflineOf(const CopyPagesParams& p) {
  return {.bytes = 2.0 * static_cast<double>(p.count) * static_cast<double>(p.layout.PageBytes()),
          .flops = 0};
}

inline Roofline RooflineOf(const SampleParams& p) {
  return {.bytes = static_cast<double>(p.num_rows) * p.logits.cols * 4.0, .flops = 0};
}

}  // namespace resa::kernels

#endif  // RESA_KERNELS_ROOFLINE_H_
