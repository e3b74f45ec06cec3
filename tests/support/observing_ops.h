#ifndef RESA_TESTS_SUPPORT_OBSERVING_OPS_H_
#define RESA_TESTS_SUPPORT_OBSERVING_OPS_H_

// A backend that forwards every op to another one and lets a test look at some of them: what was
// selected, and the logits before sampling clobbers them. What the parameters point to is the inner
// backend's memory: of a device it has to be downloaded.

#include <functional>
#include <memory>
#include <string>

#include "kernels/ops.h"

namespace resa::testing {

class ObservingOps : public kernels::Ops {
 public:
  // `inner` must outlive it and does the work; its counters count too.
  explicit ObservingOps(kernels::Ops* inner) : inner_(*inner) {}

  // Called with the ids filled in, once per layer.
  std::function<void(const kernels::SelectParams&)> after_select;
  // Called before the logits are clobbered.
  std::function<void(const kernels::SampleParams&)> before_sample;

  std::string Description() const override { return "observed " + inner_.Description(); }
  kernels::DType activation_dtype() const override { return inner_.activation_dtype(); }
  bool SupportsKvDtype(kernels::DType dtype) const override {
    return inner_.SupportsKvDtype(dtype);
  }
  kernels::Ceilings MeasureCeilings() override { return inner_.MeasureCeilings(); }
  std::unique_ptr<kernels::Buffer> Allocate(size_t bytes) override {
    return inner_.Allocate(bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t bytes) override {
    return inner_.ImportWeights(host, bytes);
  }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override {
    inner_.Upload(to, from_host, bytes);
  }
  void Download(void* to_host, const std::byte* from, size_t bytes) override {
    inner_.Download(to_host, from, bytes);
  }

 private:
  void DoEmbed(const kernels::EmbedParams& p) override { inner_.Embed(p); }
  void DoRmsNorm(const kernels::RmsNormParams& p) override { inner_.RmsNorm(p); }
  void DoLinear(const kernels::LinearParams& p) override { inner_.Linear(p); }
  void DoLinears(const kernels::LinearsParams& p) override { inner_.Linears(p); }
  void DoRopeTable(const kernels::RopeTableParams& p) override { inner_.RopeTable(p); }
  void DoQkvPost(const kernels::QkvPostParams& p) override { inner_.QkvPost(p); }
  void DoSelect(const kernels::SelectParams& p) override {
    inner_.Select(p);
    if (after_select) after_select(p);
  }
  void DoSparseAttend(const kernels::SparseAttendParams& p) override { inner_.SparseAttend(p); }
  void DoChunkAttend(const kernels::ChunkAttendParams& p) override { inner_.ChunkAttend(p); }
  void DoSiluMul(const kernels::SiluMulParams& p) override { inner_.SiluMul(p); }
  void DoGatherRows(const kernels::GatherRowsParams& p) override { inner_.GatherRows(p); }
  void DoCopyPages(const kernels::CopyPagesParams& p) override { inner_.CopyPages(p); }
  void DoSample(const kernels::SampleParams& p) override {
    if (before_sample) before_sample(p);
    inner_.Sample(p);
  }
  void DoRunStep(const kernels::StepLists& lists, absl::FunctionRef<void()> issue,
                 absl::FunctionRef<void()> meanwhile) override {
    kernels::StepLists observed = lists;
    // A replay would run without the looks.
    observed.may_replay = lists.may_replay && !after_select && !before_sample;
    inner_.RunStep(observed, issue, meanwhile);
  }

  kernels::Ops& inner_;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_OBSERVING_OPS_H_
