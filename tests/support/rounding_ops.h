#ifndef RESA_TESTS_SUPPORT_ROUNDING_OPS_H_
#define RESA_TESTS_SUPPORT_ROUNDING_OPS_H_

// A host backend with the arithmetic of a device whose activations are bf16: it forwards every op
// to another one with f32 activations, and rounds what the op wrote. So what bf16 does to a model
// can be tested without a device. Logits stay f32, as they do there.

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kernels/ops.h"

namespace resa::testing {

class RoundingOps : public kernels::Ops {
 public:
  // A Linear of `vocab_size` columns makes logits. REQUIRES that nothing else has as many.
  RoundingOps(std::unique_ptr<kernels::Ops> inner, int vocab_size)
      : inner_(std::move(inner)), vocab_size_(vocab_size) {}

  std::string Description() const override { return "rounded " + inner_->Description(); }
  kernels::DType activation_dtype() const override { return inner_->activation_dtype(); }
  bool SupportsKvDtype(kernels::DType dtype) const override {
    return inner_->SupportsKvDtype(dtype);
  }
  kernels::Ceilings MeasureCeilings() override { return inner_->MeasureCeilings(); }
  std::unique_ptr<kernels::Buffer> Allocate(size_t bytes) override {
    return inner_->Allocate(bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t bytes) override {
    return inner_->ImportWeights(host, bytes);
  }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override {
    inner_->Upload(to, from_host, bytes);
  }
  void Download(void* to_host, const std::byte* from, size_t bytes) override {
    inner_->Download(to_host, from, bytes);
  }

 private:
  static void Round(const kernels::Matrix& out) {
    std::transform(out.f32(), out.f32() + out.rows * out.cols, out.f32(),
                   [](float x) { return kernels::ToFloat(kernels::RoundToBf16(x)); });
  }

  void DoEmbed(const kernels::EmbedParams& p) override { inner_->Embed(p); }
  void DoRmsNorm(const kernels::RmsNormParams& p) override {
    inner_->RmsNorm(p);
    Round(p.out);
  }
  void DoLinear(const kernels::LinearParams& p) override {
    inner_->Linear(p);
    if (p.out.cols != vocab_size_) Round(p.out);
  }
  void DoRopeTable(const kernels::RopeTableParams& p) override { inner_->RopeTable(p); }
  void DoQkvPost(const kernels::QkvPostParams& p) override {
    inner_->QkvPost(p);
    Round(p.q);
  }
  void DoSelect(const kernels::SelectParams& p) override { inner_->Select(p); }
  void DoSparseAttend(const kernels::SparseAttendParams& p) override {
    inner_->SparseAttend(p);
    Round(p.out);
  }
  void DoChunkAttend(const kernels::ChunkAttendParams& p) override {
    inner_->ChunkAttend(p);
    Round(p.out);
  }
  void DoSiluMul(const kernels::SiluMulParams& p) override {
    inner_->SiluMul(p);
    Round(p.out);
  }
  void DoGatherRows(const kernels::GatherRowsParams& p) override { inner_->GatherRows(p); }
  void DoCopyPages(const kernels::CopyPagesParams& p) override { inner_->CopyPages(p); }
  void DoSample(const kernels::SampleParams& p) override { inner_->Sample(p); }
  void DoRunStep(const kernels::StepLists& lists, absl::FunctionRef<void()> issue,
                 absl::FunctionRef<void()> meanwhile) override {
    inner_->RunStep(lists, issue, meanwhile);
  }

  const std::unique_ptr<kernels::Ops> inner_;
  const int vocab_size_;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_ROUNDING_OPS_H_
