#include "engine/kv_memory.h"

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::engine {

kernels::KvLayout LayoutFor(const ModelConfig& config, const kernels::SelectorSpec& selector,
                            kernels::DType kv_dtype, int64_t num_pages) {
  kernels::KvLayout layout;
  layout.num_layers = config.num_layers;
  layout.num_pages = num_pages;
  layout.num_kv_heads = config.num_kv_heads;
  layout.head_dim = config.head_dim;
  layout.kv_dtype = kv_dtype;
  layout.selector = selector;
  return layout;
}

absl::StatusOr<std::unique_ptr<KvMemory>> KvMemory::Create(const kernels::KvLayout& layout,
                                                           kernels::Ops* ops) {
  RESA_CHECK(layout.num_layers > 0 && layout.num_pages > 0 && layout.num_kv_heads > 0);
  if (!ops->SupportsKvDtype(layout.kv_dtype)) {
    return absl::InvalidArgumentError(absl::StrCat("the backend (", ops->Description(),
                                                   ") cannot hold the KV cache as ",
                                                   kernels::NameOf(layout.kv_dtype)));
  }
  std::unique_ptr<KvMemory> memory(new KvMemory(layout, ops));
  if (absl::Status status = memory->AllocateLayers(); !status.ok()) return status;
  return memory;
}

absl::Status KvMemory::AllocateLayers() {
  for (int i = 0; i < layout_.num_layers; ++i) {
    std::byte* parts[3] = {};
    const size_t bytes[3] = {layout_.LayerKvBytes(), layout_.LayerKvBytes(),
                             layout_.LayerDescriptorBytes()};
    for (int part = 0; part < 3; ++part) {
      std::unique_ptr<kernels::Buffer> buffer = ops_->Allocate(bytes[part]);
      if (buffer == nullptr) {
        return absl::ResourceExhaustedError(
            absl::StrCat("no memory for a KV pool of ", layout_.num_pages, " pages (",
                         static_cast<int64_t>(layout_.PageBytes()) * layout_.num_pages,
                         " bytes); configure fewer pages or less memory for the pool"));
      }
      parts[part] = buffer->data();
      buffers_.push_back(std::move(buffer));
    }
    layers_.push_back({parts[0], parts[1], parts[2]});
  }
  return absl::OkStatus();
}

void KvMemory::Copy(absl::Span<const PageCopy> copies) {
  if (copies.empty()) return;
  copy_from_.clear();
  copy_to_.clear();
  for (const PageCopy& copy : copies) {
    copy_from_.push_back(copy.from);
    copy_to_.push_back(copy.to);
  }
  kernels::CopyPagesParams params;
  params.layout = layout_;
  params.layers = layers_.data();
  params.from = copy_from_.data();
  params.to = copy_to_.data();
  params.count = static_cast<int64_t>(copies.size());
  ops_->CopyPages(params);
}

}  // namespace resa::engine
