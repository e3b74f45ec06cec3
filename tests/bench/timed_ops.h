#ifndef RESA_TESTS_BENCH_TIMED_OPS_H_
#define RESA_TESTS_BENCH_TIMED_OPS_H_

// A backend that forwards every op to another one and keeps the books: time, bytes, FLOPs and the
// time at the machine's ceilings, by stage of the step. Any backend can be inside.

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "kernels/ops.h"
#include "kernels/roofline.h"

namespace resa::bench {

// In the order of a step. Weights are told apart by TimedOps::Label.
enum class Stage : uint8_t {
  kEmbed,  // Embed and RopeTable.
  kQkv,    // The projections.
  kQkvPost,
  kSelect,
  kSparseAttend,
  kChunkAttend,
  kOutput,     // The projection after attention.
  kGateUp,     // First half of the MLP,
  kDown,       // and second.
  kLinear,     // By a weight that nobody labelled.
  kPointwise,  // RmsNorm, SiluMul, GatherRows.
  kLogits,
  kSample,
  kCopyPages,
};
inline constexpr int kNumStages = 14;
const char* NameOf(Stage stage);

struct StageTotals {
  int64_t calls = 0;
  double seconds = 0;
  double bytes = 0;
  double flops = 0;
  double seconds_at_ceiling = 0;  // Sum over calls of the longer of bytes and FLOPs.

  StageTotals& operator+=(const StageTotals& other);
};
using Stages = std::array<StageTotals, kNumStages>;

// Thread: one at a time, as any Ops. Bytes and FLOPs are those of kernels/roofline.h, but for
// Select, which reads planes progressively: there the bytes are those that the backend counted.
class TimedOps : public kernels::Ops {
 public:
  // `inner` must outlive it and does the work; its counters count too. `runs_ahead`: it may return
  // before an op is done; each is then waited for, so that its time is its own, less what waiting
  // for nothing takes.
  TimedOps(kernels::Ops* inner, const kernels::Ceilings& ceilings, bool runs_ahead);

  // Books Linear with the weight at `host`, as it will be given to ImportWeights, under `stage`.
  void Label(const std::byte* host, Stage stage) { stage_of_host_[host] = stage; }
  // What has been booked since the last call.
  Stages Take();
  // Whether ops are timed one by one, as they are at first. If not, whole steps run as they do in
  // service, replayed from recordings where the backend makes them, and stages show no time.
  void TimeStages(bool on) { times_stages_ = on; }
  const kernels::OpCounters& inner_counters() const { return inner_.counters(); }

  std::string Description() const override { return inner_.Description(); }
  kernels::DType activation_dtype() const override { return inner_.activation_dtype(); }
  bool SupportsKvDtype(kernels::DType dtype) const override {
    return inner_.SupportsKvDtype(dtype);
  }
  kernels::Ceilings MeasureCeilings() override { return inner_.MeasureCeilings(); }
  std::unique_ptr<kernels::Buffer> Allocate(size_t bytes) override {
    return inner_.Allocate(bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t bytes) override;
  std::optional<int64_t> DeviceMemoryFree() const override { return inner_.DeviceMemoryFree(); }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override {
    inner_.Upload(to, from_host, bytes);
  }
  void Download(void* to_host, const std::byte* from, size_t bytes) override {
    inner_.Download(to_host, from, bytes);
  }

 private:
  template <class Run>
  void Book(Stage stage, const kernels::Roofline& roofline, const Run& run);
  void Add(Stage stage, double seconds, const kernels::Roofline& roofline);
  Stage StageOf(const kernels::LinearParams& p) const;
  double Timed(const auto& run);
  void Wait();

  void DoEmbed(const kernels::EmbedParams& p) override;
  void DoRmsNorm(const kernels::RmsNormParams& p) override;
  void DoLinear(const kernels::LinearParams& p) override;
  void DoLinears(const kernels::LinearsParams& p) override;
  void DoRopeTable(const kernels::RopeTableParams& p) override;
  void DoQkvPost(const kernels::QkvPostParams& p) override;
  void DoSelect(const kernels::SelectParams& p) override;
  void DoSparseAttend(const kernels::SparseAttendParams& p) override;
  void DoChunkAttend(const kernels::ChunkAttendParams& p) override;
  void DoSiluMul(const kernels::SiluMulParams& p) override;
  void DoGatherRows(const kernels::GatherRowsParams& p) override;
  void DoCopyPages(const kernels::CopyPagesParams& p) override;
  void DoSample(const kernels::SampleParams& p) override;
  void DoRunStep(const kernels::StepLists& lists, absl::FunctionRef<void()> issue,
                 absl::FunctionRef<void()> meanwhile) override;

  // Constant after construction.
  kernels::Ops& inner_;
  const kernels::Ceilings ceilings_;
  const std::unique_ptr<kernels::Buffer> fence_;  // Null unless the backend runs ahead.
  const double seconds_to_wait_;                  // When nothing is left to be done.

  absl::flat_hash_map<const std::byte*, Stage> stage_of_host_;
  absl::flat_hash_map<const void*, Stage> stage_of_weight_;  // By the backend's address.
  Stages stages_ = {};
  bool times_stages_ = true;
};

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_TIMED_OPS_H_
