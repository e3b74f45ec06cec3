#include "tests/kernels/staged_ops.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "kernels/check.h"

namespace resa::testing {
namespace {

using kernels::bf16;
using kernels::Buffer;
using kernels::DType;
using kernels::Matrix;

class HostBuffer : public Buffer {
 public:
  explicit HostBuffer(size_t bytes) : bytes_(bytes), lines_((bytes + 63) / 64) {}
  std::byte* data() override { return reinterpret_cast<std::byte*>(lines_.data()); }
  size_t bytes() const override { return bytes_; }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  const size_t bytes_;
  std::vector<Line> lines_;
};

}  // namespace

// What one op has on the device. The same host memory given twice is one buffer there, so that an
// op in place stays one.
class StagedOps::Staging {
 public:
  explicit Staging(kernels::Ops* inner) : inner_(*inner) {}
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  // Brings back what was written.
  ~Staging() {
    for (auto& [host, copy] : copies_) {
      if (copy.written) Return(static_cast<std::byte*>(host), copy);
    }
  }

  // Matrices: activations in the inner type, `As` in their own.
  Matrix Read(const Matrix& host) { return Rounded(host, /*written=*/false); }
  Matrix Write(const Matrix& host) { return Rounded(host, /*written=*/true); }
  Matrix ReadAs(const Matrix& host) {
    return {Stage(host.data, host.bytes(), false, false), host.dtype, host.rows, host.cols};
  }
  Matrix WriteAs(const Matrix& host) {
    return {Stage(host.data, host.bytes(), true, false), host.dtype, host.rows, host.cols};
  }

  // Arrays; null stays null.
  template <class T>
  const T* Read(const T* host, int64_t count) {
    return reinterpret_cast<const T*>(
        Stage(const_cast<T*>(host), static_cast<size_t>(count) * sizeof(T), false, false));
  }
  template <class T>
  T* Write(T* host, int64_t count) {
    return reinterpret_cast<T*>(Stage(host, static_cast<size_t>(count) * sizeof(T), true, false));
  }

  kernels::KvLayer Layer(const kernels::KvLayout& layout, const kernels::KvLayer& kv,
                         bool written) {
    return {Stage(kv.k, layout.LayerKvBytes(), written, false),
            Stage(kv.v, layout.LayerKvBytes(), written, false),
            Stage(kv.descriptors, layout.LayerDescriptorBytes(), written, false)};
  }

 private:
  struct Copy {
    std::unique_ptr<Buffer> buffer;
    size_t host_bytes = 0;
    bool rounded = false;  // f32 on the host, bf16 on the device.
    bool written = false;
  };

  Matrix Rounded(const Matrix& host, bool written) {
    RESA_CHECK(host.dtype == DType::kF32);
    const DType inner = inner_.activation_dtype();
    return {Stage(host.data, host.bytes(), written, inner == DType::kBF16), inner, host.rows,
            host.cols};
  }

  std::byte* Stage(void* host, size_t bytes, bool written, bool rounded) {
    if (host == nullptr) return nullptr;
    const auto [it, is_new] = copies_.try_emplace(host);
    Copy& copy = it->second;
    copy.written = copy.written || written;
    if (!is_new) {
      RESA_CHECK(copy.host_bytes == bytes && copy.rounded == rounded)
          << "the same memory is given as two different things";
      return copy.buffer->data();
    }
    copy.host_bytes = bytes;
    copy.rounded = rounded;
    copy.buffer = inner_.Allocate(rounded ? bytes / 2 : bytes);
    RESA_CHECK(copy.buffer != nullptr) << "no memory for a copy of " << bytes << " bytes";
    if (rounded) {
      const auto* const from = static_cast<const float*>(host);
      std::vector<bf16> values(bytes / sizeof(float));
      std::transform(from, from + values.size(), values.begin(), kernels::RoundToBf16);
      inner_.Upload(copy.buffer->data(), values.data(), values.size() * sizeof(bf16));
    } else {
      inner_.Upload(copy.buffer->data(), host, bytes);
    }
    return copy.buffer->data();
  }

  void Return(std::byte* host, const Copy& copy) {
    if (!copy.rounded) return inner_.Download(host, copy.buffer->data(), copy.host_bytes);
    std::vector<bf16> values(copy.host_bytes / sizeof(float));
    inner_.Download(values.data(), copy.buffer->data(), values.size() * sizeof(bf16));
    std::transform(values.begin(), values.end(), reinterpret_cast<float*>(host),
                   [](bf16 value) { return kernels::ToFloat(value); });
  }

  kernels::Ops& inner_;
  std::map<void*, Copy> copies_;
};

std::unique_ptr<Buffer> StagedOps::Allocate(size_t bytes) {
  return std::make_unique<HostBuffer>(bytes);
}
void StagedOps::Upload(std::byte* to, const void* from_host, size_t bytes) {
  std::memcpy(to, from_host, bytes);
}
void StagedOps::Download(void* to_host, const std::byte* from, size_t bytes) {
  std::memcpy(to_host, from, bytes);
}

void StagedOps::DoEmbed(const kernels::EmbedParams& params) {
  Staging staging(inner_.get());
  kernels::EmbedParams p = params;
  p.table = staging.ReadAs(params.table);
  p.out = staging.Write(params.out);
  inner_->Embed(p);
}

kernels::RmsNormParams StagedOps::Stage(const kernels::RmsNormParams& params, Staging* staging) {
  kernels::RmsNormParams p = params;
  p.x = staging->Read(params.x);
  p.weight = staging->Read(params.weight, params.x.cols);
  p.out = staging->Write(params.out);
  return p;
}

void StagedOps::DoRmsNorm(const kernels::RmsNormParams& params) {
  Staging staging(inner_.get());
  inner_->RmsNorm(Stage(params, &staging));
}

// `activations`: out is for another op.
kernels::LinearParams StagedOps::Stage(const kernels::LinearParams& params, bool activations,
                                       Staging* staging) const {
  kernels::LinearParams p = params;
  p.x = staging->Read(params.x);
  p.weight = staging->ReadAs(params.weight);
  p.bias = staging->Read(params.bias, params.weight.rows);
  p.out = linear_writes_f32_ && !activations ? staging->WriteAs(params.out)
                                             : staging->Write(params.out);
  return p;
}

void StagedOps::DoLinear(const kernels::LinearParams& params) {
  Staging staging(inner_.get());
  inner_->Linear(Stage(params, false, &staging));
}

void StagedOps::DoLinears(const kernels::LinearsParams& params) {
  Staging staging(inner_.get());
  const bool normed = params.norm.weight != nullptr;
  kernels::LinearsParams p = params;
  if (normed) p.norm = Stage(params.norm, &staging);
  std::vector<kernels::LinearParams> products;
  for (const kernels::LinearParams& product : params.products) {
    products.push_back(Stage(product, params.gated, &staging));
    if (normed) products.back().x = p.norm.out;
  }
  p.products = products;
  inner_->Linears(p);
  counters_.linears_fused = inner_->counters().linears_fused;
}

void StagedOps::DoRopeTable(const kernels::RopeTableParams& params) {
  Staging staging(inner_.get());
  const int64_t half = params.head_dim / 2;
  kernels::RopeTableParams p = params;
  p.inv_freq = staging.Read(params.inv_freq, half);
  p.cos = staging.Write(params.cos, params.rows * half);
  p.sin = staging.Write(params.sin, params.rows * half);
  inner_->RopeTable(p);
}

void StagedOps::DoQkvPost(const kernels::QkvPostParams& params) {
  Staging staging(inner_.get());
  const int64_t d = params.layout.head_dim;
  kernels::QkvPostParams p = params;
  p.q = staging.Write(params.q);
  p.k = staging.Write(params.k);
  p.v = staging.Read(params.v);
  p.q_norm = staging.Read(params.q_norm, d);
  p.k_norm = staging.Read(params.k_norm, d);
  p.cos = staging.Read(params.cos, params.q.rows * d / 2);
  p.sin = staging.Read(params.sin, params.q.rows * d / 2);
  p.kv = staging.Layer(params.layout, params.kv, /*written=*/true);
  inner_->QkvPost(p);
}

void StagedOps::DoSelect(const kernels::SelectParams& params) {
  {
    Staging staging(inner_.get());
    kernels::SelectParams p = params;
    p.q = staging.Read(params.q);
    p.kv = staging.Layer(params.layout, params.kv, /*written=*/false);
    p.ids = staging.Write(params.ids, params.num_ids);
    inner_->Select(p);
  }
  counters_.blocks_scored = inner_->counters().blocks_scored;
  counters_.descriptor_bytes = inner_->counters().descriptor_bytes;
}

void StagedOps::DoSparseAttend(const kernels::SparseAttendParams& params) {
  Staging staging(inner_.get());
  int64_t num_ids = 0;
  for (int64_t i = 0; i < params.num_rows; ++i) {
    const kernels::SparseRow& row = params.rows[i];
    num_ids =
        std::max(num_ids, row.ids_begin + int64_t{row.keep_blocks} * params.layout.num_kv_heads);
  }
  kernels::SparseAttendParams p = params;
  p.q = staging.Read(params.q);
  p.ids = staging.Read(params.ids, num_ids);
  p.kv = staging.Layer(params.layout, params.kv, /*written=*/false);
  p.out = staging.Write(params.out);
  inner_->SparseAttend(p);
}

void StagedOps::DoChunkAttend(const kernels::ChunkAttendParams& params) {
  Staging staging(inner_.get());
  kernels::ChunkAttendParams p = params;
  p.q = staging.Read(params.q);
  p.kv = staging.Layer(params.layout, params.kv, /*written=*/false);
  p.out = staging.Write(params.out);
  inner_->ChunkAttend(p);
}

void StagedOps::DoSiluMul(const kernels::SiluMulParams& params) {
  Staging staging(inner_.get());
  inner_->SiluMul({.gate = staging.Read(params.gate),
                   .up = staging.Read(params.up),
                   .out = staging.Write(params.out)});
}

void StagedOps::DoGatherRows(const kernels::GatherRowsParams& params) {
  Staging staging(inner_.get());
  kernels::GatherRowsParams p = params;
  p.x = staging.Read(params.x);
  p.out = staging.Write(params.out);
  inner_->GatherRows(p);
}

void StagedOps::DoCopyPages(const kernels::CopyPagesParams& params) {
  Staging staging(inner_.get());
  std::vector<kernels::KvLayer> layers;
  for (int i = 0; i < params.layout.num_layers; ++i) {
    layers.push_back(staging.Layer(params.layout, params.layers[i], /*written=*/true));
  }
  kernels::CopyPagesParams p = params;
  p.layers = layers.data();
  inner_->CopyPages(p);
}

void StagedOps::DoSample(const kernels::SampleParams& params) {
  Staging staging(inner_.get());
  kernels::SampleParams p = params;
  p.logits = staging.WriteAs(params.logits);
  inner_->Sample(p);
}

}  // namespace resa::testing
