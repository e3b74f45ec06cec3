#ifndef RESA_TESTS_SUPPORT_RECORDING_OPS_H_
#define RESA_TESTS_SUPPORT_RECORDING_OPS_H_

// A backend that computes nothing: it notes which op was called with what, and can run out of
// memory at a chosen moment. For tests of who calls what.

#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace resa::testing {

class RecordingOps : public kernels::Ops {
 public:
  struct Call {
    std::string op;
    kernels::Matrix in = {}, weight = {}, out = {};
    const float* vector = nullptr;  // Norm weight or bias.
    bool accumulate = false;
  };

  std::string Description() const override { return "recording"; }
  kernels::DType activation_dtype() const override { return kernels::DType::kF32; }
  bool SupportsKvDtype(kernels::DType dtype) const override {
    return dtype == kernels::DType::kBF16;
  }
  kernels::Ceilings MeasureCeilings() override { return {1, 1}; }

  std::unique_ptr<kernels::Buffer> Allocate(size_t bytes) override {
    if (allocations_left == 0) return nullptr;
    --allocations_left;
    ++allocations;
    allocated_bytes += bytes;
    return std::make_unique<HostBuffer>(bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t) override {
    if (imports_left == 0) return nullptr;
    --imports_left;
    imported.push_back(host);
    return host;
  }
  void Upload(std::byte* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void Download(void* to, const std::byte* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Call& call : calls) names.push_back(call.op);
    return names;
  }

  std::vector<Call> calls;
  std::vector<const std::byte*> imported;
  std::vector<kernels::SampleRow> sample_rows;  // Of the last Sample.
  std::vector<int32_t> gathered_rows;           // Of the last GatherRows.
  int allocations = 0;
  size_t allocated_bytes = 0;
  int allocations_left = 1 << 30;
  int imports_left = 1 << 30;

 private:
  class HostBuffer : public kernels::Buffer {
   public:
    explicit HostBuffer(size_t bytes) : data_(bytes) {}
    std::byte* data() override { return data_.data(); }
    size_t bytes() const override { return data_.size(); }

   private:
    std::vector<std::byte> data_;
  };

  void DoEmbed(const kernels::EmbedParams& p) override {
    calls.push_back({"Embed", {}, p.table, p.out});
  }
  void DoRmsNorm(const kernels::RmsNormParams& p) override {
    calls.push_back({"RmsNorm", p.x, {}, p.out, p.weight});
  }
  void DoLinear(const kernels::LinearParams& p) override {
    calls.push_back({"Linear", p.x, p.weight, p.out, p.bias, p.accumulate});
  }
  void DoRopeTable(const kernels::RopeTableParams&) override { calls.push_back({"RopeTable"}); }
  void DoQkvPost(const kernels::QkvPostParams& p) override {
    calls.push_back({"QkvPost", p.q, {}, p.q, p.q_norm});
  }
  void DoSelect(const kernels::SelectParams& p) override { calls.push_back({"Select", p.q}); }
  void DoSparseAttend(const kernels::SparseAttendParams& p) override {
    calls.push_back({"SparseAttend", p.q, {}, p.out});
  }
  void DoChunkAttend(const kernels::ChunkAttendParams& p) override {
    calls.push_back({"ChunkAttend", p.q, {}, p.out});
  }
  void DoSiluMul(const kernels::SiluMulParams& p) override {
    calls.push_back({"SiluMul", p.gate, p.up, p.out});
  }
  void DoGatherRows(const kernels::GatherRowsParams& p) override {
    gathered_rows.assign(p.rows, p.rows + p.out.rows);
    calls.push_back({"GatherRows", p.x, {}, p.out});
  }
  void DoCopyPages(const kernels::CopyPagesParams&) override { calls.push_back({"CopyPages"}); }
  void DoSample(const kernels::SampleParams& p) override {
    sample_rows.assign(p.rows, p.rows + p.num_rows);
    for (int64_t i = 0; i < p.num_rows; ++i) p.out[i].token = static_cast<int32_t>(i);
    calls.push_back({"Sample", p.logits});
  }
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_RECORDING_OPS_H_
