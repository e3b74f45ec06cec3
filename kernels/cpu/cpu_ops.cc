#include "kernels/cpu/cpu_ops.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/context.h"
#include "kernels/cpu/linear_onednn.h"

namespace resa::kernels {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

class HostBuffer : public Buffer {
 public:
  HostBuffer(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}
  ~HostBuffer() override { std::free(data_); }
  std::byte* data() override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  std::byte* const data_;
  const size_t bytes_;
};

class CpuOps : public Ops {
 public:
  CpuOps(int threads, Bf16Linear bf16_linear) : context_(threads) {
    if (bf16_linear == Bf16Linear::kOff) return;
    bf16_linear_ =
        cpu::OneDnnLinear::Create(threads, bf16_linear == Bf16Linear::kForce, &no_bf16_linear_);
  }

  std::string Description() const override {
    std::string text = std::string("cpu, ") + cpu::TargetName() + ", " +
                       std::to_string(context_.pool.threads()) +
                       (context_.pool.threads() == 1 ? " thread" : " threads");
    if (bf16_linear_ != nullptr) text += ", " + bf16_linear_->Description();
    if (!no_bf16_linear_.empty()) text += ", no bf16 products: " + no_bf16_linear_;
    return text;
  }
  DType activation_dtype() const override { return DType::kF32; }
  bool SupportsKvDtype(DType) const override { return true; }
  Ceilings MeasureCeilings() override { return cpu::MeasureCeilings(context_); }

  std::unique_ptr<Buffer> Allocate(size_t bytes) override {
    // Pages of a pool are read in no order, one after the other on small system pages would miss
    // the TLB each time; so large buffers ask for huge ones.
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    if (bytes > SIZE_MAX - alignment) return nullptr;
    const size_t rounded = std::max<size_t>(1, (bytes + alignment - 1) / alignment) * alignment;
    auto* const data = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded));
    if (data == nullptr) return nullptr;
    // Refused where the system has none: nothing is lost but speed.
    if (alignment == kHugePage) (void)madvise(data, rounded, MADV_HUGEPAGE);
    return std::make_unique<HostBuffer>(data, bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t) override { return host; }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from_host, bytes);
  }
  void Download(void* to_host, const std::byte* from, size_t bytes) override {
    if (bytes > 0) std::memcpy(to_host, from, bytes);
  }

 private:
  void DoEmbed(const EmbedParams& p) override { cpu::Embed(context_, p); }
  void DoRmsNorm(const RmsNormParams& p) override { cpu::RmsNorm(context_, p); }
  void DoLinear(const LinearParams& p) override {
    if (bf16_linear_ != nullptr && bf16_linear_->Run(context_, p)) return;
    cpu::Linear(context_, p);
  }
  void DoRopeTable(const RopeTableParams& p) override { cpu::RopeTable(context_, p); }
  void DoQkvPost(const QkvPostParams& p) override { cpu::QkvPost(context_, p); }
  void DoSelect(const SelectParams& p) override {
    if (p.layout.selector.kind == SelectorKind::kMinMax) {
      cpu::SelectMinMax(context_, p, &counters_);
    } else {
      cpu::SelectSketch(context_, p, &counters_);
    }
  }
  void DoSparseAttend(const SparseAttendParams& p) override { cpu::SparseAttend(context_, p); }
  void DoChunkAttend(const ChunkAttendParams& p) override { cpu::ChunkAttend(context_, p); }
  void DoSiluMul(const SiluMulParams& p) override { cpu::SiluMul(context_, p); }
  void DoGatherRows(const GatherRowsParams& p) override { cpu::GatherRows(context_, p); }
  void DoCopyPages(const CopyPagesParams& p) override { cpu::CopyPages(context_, p); }
  void DoSample(const SampleParams& p) override { cpu::Sample(context_, p); }

  cpu::Context context_;
  std::unique_ptr<cpu::OneDnnLinear> bf16_linear_;  // Null: gemm.cc does it all.
  std::string no_bf16_linear_;                      // Why, where that is not to be expected.
};

}  // namespace

std::unique_ptr<Ops> CreateCpuOps(const CpuOptions& options) {
  RESA_CHECK(CpuSupported()) << "this CPU lacks AVX2 and FMA";
  RESA_CHECK_GE(options.threads, 0) << "CpuOptions::threads";
  return std::make_unique<CpuOps>(options.threads == 0 ? AvailableCores() : options.threads,
                                  options.bf16_linear);
}

}  // namespace resa::kernels
