// resa_bench: times the decoder's steps on this machine. `resa_bench --help` lists the flags.
//
//   resa_bench --shape 0.5b --context 1024,32768 --batch 1,8 --mode dense,sparse,rectified
//   resa_bench --model deploy/models/demo --prefill 512,512@7600 --json figures.json
//   resa_bench --device cuda:0 --shape qwen2.5-7b --context 262144 --batch 8 --planes 2
//
// By hand, on a quiet machine. The machine's ceilings come first; then, for each context, all modes
// and batches take their steps in turn; then the prefills. What ran is proved from the backend's
// counters.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/activations.h"
#include "engine/kv_pool.h"
#include "engine/model_executor.h"
#include "engine/model_files.h"
#include "engine/status_macros.h"
#include "hwy/targets.h"
#include "kernels/cpu/cpu_ops.h"
#include "server/resources.h"
#include "tests/bench/bench_options.h"
#include "tests/bench/bench_report.h"
#include "tests/bench/bench_results.h"
#include "tests/bench/bench_run.h"
#include "tests/bench/gpu_device.h"
#include "tests/bench/random_model.h"
#include "tests/bench/synthetic_pool.h"
#include "tests/bench/timed_ops.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;

struct Device {
  std::unique_ptr<kernels::Ops> ops;
  bool runs_ahead = false;  // Ops return before they are done.
};

absl::Status ChooseTarget(const std::string& name) {
  if (name.empty()) return absl::OkStatus();
  std::string known;
  int64_t up_to = 0;  // A set of targets grows with the machine, lower bits are newer.
  for (int64_t left = hwy::SupportedTargets(); left != 0; left &= left - 1) {
    const int64_t target = left & -left;
#if defined(__x86_64__)
    if (target > HWY_AVX2) break;  // The least that kernels are compiled for.
#endif
    if (name == hwy::TargetName(target)) up_to = target;
    absl::StrAppend(&known, known.empty() ? "" : ", ", hwy::TargetName(target));
  }
  if (up_to == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--target: \"", name, "\" is none of this machine's: ", known));
  }
  // It and all that it includes: some kernels are compiled for fewer targets than others.
  hwy::SetSupportedTargetsForTest(hwy::SupportedTargets() & ~(up_to - 1));
  return absl::OkStatus();
}

absl::StatusOr<Device> MakeDevice(const BenchOptions& options) {
  if (options.device != "cpu") {
    RESA_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Ops> ops, MakeGpuOps(options.device));
    return Device{std::move(ops), /*runs_ahead=*/true};
  }
  if (!kernels::CpuSupported()) return absl::UnavailableError("this CPU lacks AVX2 and FMA");
  RESA_RETURN_IF_ERROR(ChooseTarget(options.target));
  const auto bf16 = options.cpu_bf16 ? kernels::Bf16Linear::kAuto : kernels::Bf16Linear::kOff;
  return Device{kernels::CreateCpuOps({.threads = options.threads, .bf16_linear = bf16}), false};
}

// The better of a few, since a busy moment makes a ceiling look low and every share high.
kernels::Ceilings MeasureCeilings(kernels::Ops* ops) {
  kernels::Ceilings best;
  for (int i = 0; i < 3; ++i) {
    const kernels::Ceilings c = ops->MeasureCeilings();
    best.read_bytes_per_s = std::max(best.read_bytes_per_s, c.read_bytes_per_s);
    best.flops_per_s = std::max(best.flops_per_s, c.flops_per_s);
  }
  return best;
}

// Groups of runs that are measured in turn: one for each context, one for the prefills.
std::vector<std::vector<RunSpec>> GroupsOf(const BenchOptions& options) {
  std::vector<std::vector<RunSpec>> groups;
  for (const int32_t context : options.contexts) {
    std::vector<RunSpec> group;
    for (const int32_t batch : options.batches) {
      for (const AttentionMode mode : options.modes) {
        group.push_back({.mode = mode, .context = context, .batch = batch});
      }
    }
    if (!group.empty()) groups.push_back(std::move(group));
  }
  std::vector<RunSpec> prefills;
  for (const PrefillCase& prefill : options.prefills) {
    prefills.push_back({.prefill = true, .context = prefill.position, .rows = prefill.rows});
  }
  if (!prefills.empty()) groups.push_back(std::move(prefills));
  return groups;
}

// What all runs together need.
struct Needs {
  engine::BatchLimits limits;
  std::vector<int64_t> lengths;  // Of each sequence to be filled, and
  int64_t tokens = 0;            // the longest that any may become.
};
Needs NeedsOf(const std::vector<std::vector<RunSpec>>& groups, int32_t interval) {
  Needs needs;
  for (const std::vector<RunSpec>& group : groups) {
    for (const RunSpec& spec : group) {
      const int64_t tokens = BenchRun::TokensNeeded(spec, interval);
      needs.tokens = std::max(needs.tokens, tokens);
      if (needs.lengths.size() < static_cast<size_t>(spec.batch)) needs.lengths.resize(spec.batch);
      for (int32_t s = 0; s < spec.batch; ++s) {
        needs.lengths[s] = std::max(needs.lengths[s], tokens);
      }
      needs.limits.max_rows = std::max(needs.limits.max_rows, BenchRun::MaxRows(spec, interval));
      needs.limits.max_segments = std::max(needs.limits.max_segments, spec.batch);
    }
  }
  needs.limits.max_pages_per_sequence = engine::PagesFor(static_cast<int32_t>(needs.tokens));
  return needs;
}

void LabelWeights(const engine::ModelWeights& weights, TimedOps* ops) {
  for (const engine::LayerWeights& layer : weights.layers) {
    for (const engine::WeightTensor* w : {&layer.q_proj, &layer.k_proj, &layer.v_proj}) {
      ops->Label(w->data, Stage::kQkv);
    }
    ops->Label(layer.o_proj.data, Stage::kOutput);
    ops->Label(layer.gate_proj.data, Stage::kGateUp);
    ops->Label(layer.up_proj.data, Stage::kGateUp);
    ops->Label(layer.down_proj.data, Stage::kDown);
  }
  ops->Label(weights.lm_head.data, Stage::kLogits);
}

// Says how long what has to be done before measuring took.
class Phase {
 public:
  explicit Phase(std::string what) : what_(std::move(what)) {}
  ~Phase() {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start_;
    std::fprintf(stderr, "%s: %.1f s\n", what_.c_str(), seconds.count());
  }

 private:
  const std::string what_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

absl::StatusOr<engine::LoadedModel> MakeModel(const BenchOptions& options) {
  const Phase phase("making or loading the weights");
  if (!options.model.empty()) return engine::LoadModel(options.model);
  RESA_ASSIGN_OR_RETURN(const engine::ModelConfig config, ConfigOfShape(options.shape));
  return MakeRandomModel(config, options.seed);
}

// A pool that the machine cannot hold would be killed for it half filled. A device has room for the
// whole pool, the weights and the activations, or fails before anything is made.
absl::Status CheckMemory(const BenchReport& report, const Needs& needs, kernels::Ops* ops) {
  const kernels::KvLayout& layout = report.layout;
  int64_t pages = 0;
  for (const int64_t length : needs.lengths) {
    pages += engine::PagesFor(static_cast<int32_t>(length));
  }
  int64_t bytes = pages * static_cast<int64_t>(layout.PageBytes());
  std::fprintf(stderr, "filling %s of KV pool\n", server::FormatBytes(bytes).c_str());
  std::string beside;
  int64_t available = 0;
  if (const std::optional<int64_t> free = ops->DeviceMemoryFree()) {
    const auto activations = static_cast<int64_t>(engine::ActivationMemory::BytesNeeded(
        report.config, needs.limits, engine::RaggedBatch::MaxBlockIds(needs.limits, layout),
        ops->activation_dtype()));
    const auto weights = static_cast<int64_t>(report.weight_bytes);
    bytes = layout.num_pages * static_cast<int64_t>(layout.PageBytes()) + weights + activations;
    beside = absl::StrCat(" with ", server::FormatBytes(weights), " of weights and ",
                          server::FormatBytes(activations), " of activations");
    available = *free;
  } else {
    RESA_ASSIGN_OR_RETURN(available, server::MemoryAvailable());
  }
  if (bytes <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the KV pool", beside, " takes ", server::FormatBytes(bytes), " and ",
      server::FormatBytes(available),
      " are to be had; shorten --context or --prefill, lower --batch, or cut the shape's layers"));
}

absl::Status MeasureGroup(const std::vector<std::unique_ptr<BenchRun>>& runs, double seconds,
                          bool stages_apart, BenchReport* report) {
  for (const auto& run : runs) std::fprintf(stderr, "measuring %s\n", run->spec().Name().c_str());
  RESA_RETURN_IF_ERROR(MeasureRuns(runs, seconds, stages_apart));
  std::vector<RunResult> results;
  for (const auto& run : runs) results.push_back(ResultOf(*run));
  for (Ratio& ratio : RatiosOf(results)) report->ratios.push_back(std::move(ratio));
  for (RunResult& result : results) report->results.push_back(std::move(result));
  return absl::OkStatus();
}

absl::StatusOr<BenchReport> RunBench(const BenchOptions& options) {
  RESA_ASSIGN_OR_RETURN(Device device, MakeDevice(options));
  BenchReport report;
  report.device = device.ops->Description();
  report.policy = options.policy;
  RESA_ASSIGN_OR_RETURN(const engine::LoadedModel model, MakeModel(options));
  report.model = options.model.empty() ? options.shape : options.model;
  report.config = model.config;
  report.weight_bytes = model.weights.mapped_bytes + model.weights.converted_bytes;
  const std::vector<std::vector<RunSpec>> groups = GroupsOf(options);
  const Needs needs = NeedsOf(groups, options.policy.rectify_interval);
  const PageDeal deal(static_cast<int>(needs.lengths.size()), needs.tokens, options.seed);
  report.layout =
      engine::LayoutFor(model.config, options.selector, kernels::DType::kBF16, deal.num_pages());
  RESA_RETURN_IF_ERROR(CheckMemory(report, needs, device.ops.get()));

  report.ceilings = MeasureCeilings(device.ops.get());
  TimedOps timed(device.ops.get(), report.ceilings, device.runs_ahead);
  LabelWeights(model.weights, &timed);
  std::unique_ptr<engine::ModelExecutor> executor;
  {
    const Phase phase("giving them to the backend");
    RESA_ASSIGN_OR_RETURN(executor,
                          engine::ModelExecutor::Create(model.config, model.weights, report.layout,
                                                        needs.limits, &timed));
  }
  {
    const Phase phase("filling the pool");
    RESA_RETURN_IF_ERROR(FillPool(model.config, executor->kv(), deal, needs.lengths, options.seed,
                                  device.ops.get()));
    if (device.runs_ahead) {  // Wait for the last op.
      std::byte ignored;
      device.ops->Download(&ignored, executor->kv().layer(0).k, 1);
    }
  }

  for (const std::vector<RunSpec>& group : groups) {
    std::vector<std::unique_ptr<BenchRun>> runs;
    for (const RunSpec& spec : group) {
      runs.push_back(std::make_unique<BenchRun>(spec, options, model.config.vocab_size, deal,
                                                &timed, executor.get()));
    }
    RESA_RETURN_IF_ERROR(MeasureGroup(runs, options.seconds, device.runs_ahead, &report));
  }
  report.ceilings_at_end = MeasureCeilings(device.ops.get());
  return report;
}

// Measures and shows. The JSON's file is opened before, so that a wrong path costs no minutes.
absl::Status RunAndShow(const BenchOptions& options) {
  const bool to_file = !options.json.empty() && options.json != "-";
  std::ofstream file;
  if (to_file) file.open(options.json);
  const absl::Status cannot_write =
      absl::UnavailableError(absl::StrCat("--json: cannot write ", options.json));
  if (to_file && !file) return cannot_write;

  RESA_ASSIGN_OR_RETURN(const BenchReport report, RunBench(options));
  const bool text = options.json != "-";
  std::fputs(text ? TextOf(report).c_str() : (JsonOf(report) + "\n").c_str(), stdout);
  if (!to_file) return absl::OkStatus();
  file << JsonOf(report) << "\n";
  file.close();
  return file ? absl::OkStatus() : cannot_write;
}

int Main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (std::find(args.begin(), args.end(), "--help") != args.end()) {
    std::fputs(BenchHelp().c_str(), stdout);
    return 0;
  }
  const absl::StatusOr<BenchOptions> options = ParseBenchOptions(args);
  if (!options.ok()) {
    std::fprintf(stderr, "resa_bench: %s (--help lists all flags)\n",
                 std::string(options.status().message()).c_str());
    return 2;
  }
  const absl::Status status = RunAndShow(*options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "resa_bench: %s\n", std::string(status.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace resa::bench

int main(int argc, char** argv) { return resa::bench::Main(argc, argv); }
