#ifndef RESA_TESTS_KERNELS_STAGED_OPS_H_
#define RESA_TESTS_KERNELS_STAGED_OPS_H_

// A backend whose params point to host memory, over one whose params point to a device's: so the
// tests of kernels, which keep everything in vectors, run over any backend.
//
// Each op copies what it reads, and what it will write as it stands before, to buffers of exactly
// that size; runs; and copies back what it may have written. So poison that the inner op leaves
// alone is seen again, and a tool that watches the device's memory sees an access past the end.
// Activations are f32 outside and rounded to the inner backend's type on the way in; weights,
// vectors, the pool and logits travel as they are. The lists that a device backend copies by itself
// (rows, chunks, runs, tables, token ids) stay where they are.

#include <memory>
#include <string>

#include "kernels/ops.h"

namespace resa::testing {

class StagedOps : public kernels::Ops {
 public:
  explicit StagedOps(std::unique_ptr<kernels::Ops> inner) : inner_(std::move(inner)) {}

  kernels::Ops& inner() { return *inner_; }
  // From now on Linear writes f32, as it does to make logits, and not the inner activation type.
  void set_linear_writes_f32(bool on) { linear_writes_f32_ = on; }

  std::string Description() const override { return "staged " + inner_->Description(); }
  kernels::DType activation_dtype() const override { return kernels::DType::kF32; }
  bool SupportsKvDtype(kernels::DType dtype) const override {
    return inner_->SupportsKvDtype(dtype);
  }
  kernels::Ceilings MeasureCeilings() override { return inner_->MeasureCeilings(); }
  std::unique_ptr<kernels::Buffer> Allocate(size_t bytes) override;
  const std::byte* ImportWeights(const std::byte* host, size_t) override { return host; }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override;
  void Download(void* to_host, const std::byte* from, size_t bytes) override;

 private:
  class Staging;

  void DoEmbed(const kernels::EmbedParams& params) override;
  void DoRmsNorm(const kernels::RmsNormParams& params) override;
  void DoLinear(const kernels::LinearParams& params) override;
  void DoLinears(const kernels::LinearsParams& params) override;
  void DoRopeTable(const kernels::RopeTableParams& params) override;
  void DoQkvPost(const kernels::QkvPostParams& params) override;
  void DoSelect(const kernels::SelectParams& params) override;
  void DoSparseAttend(const kernels::SparseAttendParams& params) override;
  void DoChunkAttend(const kernels::ChunkAttendParams& params) override;
  void DoSiluMul(const kernels::SiluMulParams& params) override;
  void DoGatherRows(const kernels::GatherRowsParams& params) override;
  void DoCopyPages(const kernels::CopyPagesParams& params) override;
  void DoSample(const kernels::SampleParams& params) override;

  static kernels::RmsNormParams Stage(const kernels::RmsNormParams& params, Staging* staging);
  kernels::LinearParams Stage(const kernels::LinearParams& params, bool activations,
                              Staging* staging) const;

  const std::unique_ptr<kernels::Ops> inner_;
  bool linear_writes_f32_ = false;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_STAGED_OPS_H_
