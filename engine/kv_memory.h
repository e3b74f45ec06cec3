#ifndef RESA_ENGINE_KV_MEMORY_H_
#define RESA_ENGINE_KV_MEMORY_H_

// The memory behind the KV pool: K, V and descriptors of every page of every layer, as
// kernels::KvLayout lays them out. Which page belongs to whom is KvPool's business.

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/executor.h"
#include "engine/model_config.h"
#include "kernels/ops.h"
#include "kernels/params.h"

namespace resa::engine {

// The layout of `num_pages` pages for a model.
kernels::KvLayout LayoutFor(const ModelConfig& config, const kernels::SelectorSpec& selector,
                            kernels::DType kv_dtype, int64_t num_pages);

// Thread: the engine's. Owns its buffers; `ops` must outlive it.
class KvMemory {
 public:
  // RESOURCE_EXHAUSTED when the backend cannot give the memory; INVALID_ARGUMENT when it cannot
  // hold K and V in layout.kv_dtype. Contents are undefined: ops never read what was not written.
  static absl::StatusOr<std::unique_ptr<KvMemory>> Create(const kernels::KvLayout& layout,
                                                          kernels::Ops* ops);

  const kernels::KvLayout& layout() const { return layout_; }
  const kernels::KvLayer& layer(int i) const { return layers_[i]; }
  absl::Span<const kernels::KvLayer> layers() const { return layers_; }

  // Copies whole pages, all layers. REQUIRES that no page is both read and written.
  void Copy(absl::Span<const PageCopy> copies);

 private:
  KvMemory(const kernels::KvLayout& layout, kernels::Ops* ops) : layout_(layout), ops_(ops) {}
  absl::Status AllocateLayers();

  // Constant after Create.
  const kernels::KvLayout layout_;
  kernels::Ops* const ops_;
  std::vector<std::unique_ptr<kernels::Buffer>> buffers_;
  std::vector<kernels::KvLayer> layers_;

  std::vector<int32_t> copy_from_;
  std::vector<int32_t> copy_to_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_KV_MEMORY_H_
