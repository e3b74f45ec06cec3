#include "tests/bench/timed_ops.h"

#include <algorithm>
#include <chrono>

#include "kernels/check.h"

namespace resa::bench {

using kernels::Roofline;
using kernels::RooflineOf;

namespace {

double SecondsOf(const auto& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double MedianSeconds(const auto& run) {
  std::array<double, 51> seconds;
  for (double& s : seconds) s = SecondsOf(run);
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

const char* NameOf(Stage stage) {
  static constexpr std::array<const char*, kNumStages> kNames = {
      "embed",   "qkv",  "qkv_post", "select",    "attend sparse", "attend dense", "output",
      "gate_up", "down", "linear",   "pointwise", "logits",        "sample",       "copy_pages"};
  return kNames[static_cast<size_t>(stage)];
}

StageTotals& StageTotals::operator+=(const StageTotals& other) {
  calls += other.calls;
  seconds += other.seconds;
  bytes += other.bytes;
  flops += other.flops;
  seconds_at_ceiling += other.seconds_at_ceiling;
  return *this;
}

TimedOps::TimedOps(kernels::Ops* inner, const kernels::Ceilings& ceilings, bool runs_ahead)
    : inner_(*inner),
      ceilings_(ceilings),
      fence_(runs_ahead ? inner->Allocate(1) : nullptr),
      seconds_to_wait_(runs_ahead ? MedianSeconds([this] { Wait(); }) : 0) {}

Stages TimedOps::Take() {
  const Stages taken = stages_;
  stages_ = {};
  return taken;
}

const std::byte* TimedOps::ImportWeights(const std::byte* host, size_t bytes) {
  const std::byte* const imported = inner_.ImportWeights(host, bytes);
  const auto label = stage_of_host_.find(host);
  if (label != stage_of_host_.end()) stage_of_weight_[imported] = label->second;
  return imported;
}

void TimedOps::Wait() {
  std::byte ignored;
  inner_.Download(&ignored, fence_->data(), 1);  // Waits for everything before it.
}

double TimedOps::Timed(const auto& run) {
  if (!times_stages_) {  // Nothing may be waited for within a step that is being recorded.
    run();
    return 0;
  }
  const double seconds = SecondsOf([&] {
    run();
    if (fence_ != nullptr) Wait();
  });
  return std::max(0.0, seconds - seconds_to_wait_);
}

void TimedOps::Add(Stage stage, double seconds, const Roofline& roofline) {
  stages_[static_cast<size_t>(stage)] +=
      StageTotals{.calls = 1,
                  .seconds = seconds,
                  .bytes = roofline.bytes,
                  .flops = roofline.flops,
                  .seconds_at_ceiling = roofline.Seconds(ceilings_)};
}

template <class Run>
void TimedOps::Book(Stage stage, const Roofline& roofline, const Run& run) {
  Add(stage, Timed(run), roofline);
}

void TimedOps::DoEmbed(const kernels::EmbedParams& p) {
  Book(Stage::kEmbed, RooflineOf(p), [&] { inner_.Embed(p); });
}
void TimedOps::DoRmsNorm(const kernels::RmsNormParams& p) {
  Book(Stage::kPointwise, RooflineOf(p), [&] { inner_.RmsNorm(p); });
}
Stage TimedOps::StageOf(const kernels::LinearParams& p) const {
  const auto label = stage_of_weight_.find(p.weight.data);
  return label == stage_of_weight_.end() ? Stage::kLinear : label->second;
}

void TimedOps::DoLinear(const kernels::LinearParams& p) {
  Book(StageOf(p), RooflineOf(p), [&] { inner_.Linear(p); });
}
void TimedOps::DoLinears(const kernels::LinearsParams& p) {
  Book(StageOf(p.products[0]), RooflineOf(p), [&] { inner_.Linears(p); });
}
void TimedOps::DoRopeTable(const kernels::RopeTableParams& p) {
  Book(Stage::kEmbed, RooflineOf(p), [&] { inner_.RopeTable(p); });
}
void TimedOps::DoQkvPost(const kernels::QkvPostParams& p) {
  Book(Stage::kQkvPost, RooflineOf(p), [&] { inner_.QkvPost(p); });
}
void TimedOps::DoSelect(const kernels::SelectParams& p) {
  const int64_t before = inner_.counters().descriptor_bytes;
  const double seconds = Timed([&] { inner_.Select(p); });
  Roofline roofline = RooflineOf(p);
  roofline.bytes = static_cast<double>(inner_.counters().descriptor_bytes - before);
  Add(Stage::kSelect, seconds, roofline);
}
void TimedOps::DoSparseAttend(const kernels::SparseAttendParams& p) {
  Book(Stage::kSparseAttend, RooflineOf(p), [&] { inner_.SparseAttend(p); });
}
void TimedOps::DoChunkAttend(const kernels::ChunkAttendParams& p) {
  Book(Stage::kChunkAttend, RooflineOf(p), [&] { inner_.ChunkAttend(p); });
}
void TimedOps::DoSiluMul(const kernels::SiluMulParams& p) {
  Book(Stage::kPointwise, RooflineOf(p), [&] { inner_.SiluMul(p); });
}
void TimedOps::DoGatherRows(const kernels::GatherRowsParams& p) {
  Book(Stage::kPointwise, RooflineOf(p), [&] { inner_.GatherRows(p); });
}
void TimedOps::DoCopyPages(const kernels::CopyPagesParams& p) {
  Book(Stage::kCopyPages, RooflineOf(p), [&] { inner_.CopyPages(p); });
}
void TimedOps::DoSample(const kernels::SampleParams& p) {
  Book(Stage::kSample, RooflineOf(p), [&] { inner_.Sample(p); });
}

void TimedOps::DoRunStep(const kernels::StepLists& lists, absl::FunctionRef<void()> issue,
                         absl::FunctionRef<void()> meanwhile) {
  kernels::StepLists as_told = lists;
  as_told.may_replay = lists.may_replay && !times_stages_;
  inner_.RunStep(as_told, issue, meanwhile);
}

}  // namespace resa::bench
