#include "tests/support/kv_snapshot.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::testing {
namespace {

using kernels::kPageTokens;

// One (page, KV head) run of descriptors, kept to what the page's first `tokens` tokens decide
// (kernels::DescriptorBytes says where things are).
void AppendDescriptors(const std::byte* run, const kernels::KvLayout& layout, int tokens,
                       std::vector<std::byte>* out) {
  if (layout.selector.kind == kernels::SelectorKind::kMinMax) {
    out->insert(out->end(), run, run + layout.DescriptorRunBytes());
    return;
  }
  const int rows = layout.selector.planes * layout.head_dim / 32;  // Of a word per token
  for (int row = 0; row < rows; ++row) {
    const std::byte* words = run + row * kPageTokens * sizeof(uint32_t);
    out->insert(out->end(), words, words + tokens * sizeof(uint32_t));
  }
  const std::byte* scales = run + rows * kPageTokens * sizeof(uint32_t);
  out->insert(out->end(), scales, scales + tokens * sizeof(kernels::bf16));
}

size_t CountDifferent(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  if (a.size() != b.size()) return std::max(a.size(), b.size());
  size_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

}  // namespace

KvSnapshot SnapshotKv(const engine::KvMemory& memory, kernels::Ops* ops,
                      absl::Span<const int32_t> pages, int length) {
  const kernels::KvLayout& layout = memory.layout();
  RESA_CHECK_LE(length, static_cast<int>(pages.size()) * kPageTokens);
  const size_t token_bytes = layout.RunBytes() / kPageTokens;
  KvSnapshot snapshot;
  snapshot.length = length;
  std::vector<std::byte> run(std::max(layout.RunBytes(), layout.DescriptorRunBytes()));
  for (const kernels::KvLayer& layer : memory.layers()) {
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      for (int begin = 0; begin < length; begin += kPageTokens) {
        const int tokens = std::min(kPageTokens, length - begin);
        const size_t index =
            static_cast<size_t>(pages[begin / kPageTokens]) * layout.num_kv_heads + head;
        ops->Download(run.data(), layer.k + index * layout.RunBytes(), layout.RunBytes());
        snapshot.keys.insert(snapshot.keys.end(), run.data(), run.data() + tokens * token_bytes);
        ops->Download(run.data(), layer.v + index * layout.RunBytes(), layout.RunBytes());
        snapshot.values.insert(snapshot.values.end(), run.data(),
                               run.data() + tokens * token_bytes);
        ops->Download(run.data(), layer.descriptors + index * layout.DescriptorRunBytes(),
                      layout.DescriptorRunBytes());
        AppendDescriptors(run.data(), layout, tokens, &snapshot.descriptors);
      }
    }
  }
  return snapshot;
}

std::string DescribeDifference(const KvSnapshot& a, const KvSnapshot& b) {
  if (a == b) return "";
  return absl::StrCat("lengths ", a.length, " and ", b.length, "; bytes that differ: keys ",
                      CountDifferent(a.keys, b.keys), " of ", a.keys.size(), ", values ",
                      CountDifferent(a.values, b.values), " of ", a.values.size(), ", descriptors ",
                      CountDifferent(a.descriptors, b.descriptors), " of ", a.descriptors.size());
}

}  // namespace resa::testing
