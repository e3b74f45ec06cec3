// Whole models on a device against the CPU backend: the CPU's greedy tokens in every mode but for
// near ties, rectified pages that equal a fresh dense prefill, and results that other sequences of
// the batch do not change.
//
// A device computes with bf16 activations, the CPU with f32. The GPU is a target where there is one
// that the CUDA backend takes. The CPU with rounded activations is a target everywhere: it shows
// what the rounding alone does, and that the bounds below are neither idle nor too tight.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "engine/model_executor.h"
#include "engine/model_files.h"
#include "engine/tokenizer.h"
#include "kernels/cpu/cpu_ops.h"
#include "nlohmann/json.hpp"
#include "tests/support/kv_snapshot.h"
#include "tests/support/observing_ops.h"
#include "tests/support/rounding_ops.h"
#include "tests/support/sequence_driver.h"
#include "tests/support/test_seed.h"
#include "tests/support/tiny_model.h"

#if RESA_HAVE_CUDA
#include "kernels/cuda/cuda_ops.h"
#endif

namespace resa::engine {
namespace {

using resa::testing::KvSnapshot;
using resa::testing::ObservingOps;
using resa::testing::RandomTokens;
using resa::testing::RoundingOps;
using resa::testing::RunTogether;
using resa::testing::SequenceDriver;
using resa::testing::SnapshotKv;
using resa::testing::TinyModelOptions;

// ---- what runs ----------------------------------------------------------------------------------

constexpr kernels::SelectorSpec kMinMax = {kernels::SelectorKind::kMinMax, 16, 0, {1, 1}};
constexpr kernels::SelectorSpec Sketch(int block, int planes, float first = 1, float second = 1) {
  return {kernels::SelectorKind::kSketch, block, planes, {first, second}};
}

struct Case {
  const char* name;
  TinyModelOptions model;
  kernels::SelectorSpec selector;
};

// The models' dimensions are multiples of 8, as those of all that are served.
const Case kCases[] = {
    {"MinMaxGroup1", {.group = 1}, kMinMax},
    {"MinMaxGroup7Dim128Bias",
     {.num_layers = 3, .num_kv_heads = 1, .group = 7, .head_dim = 128, .qkv_bias = true},
     kMinMax},
    {"SketchGroup3", {.num_layers = 3, .num_kv_heads = 3, .group = 3}, Sketch(8, 2)},
    {"Sketch1PlaneBlock4QkNorm", {.group = 2, .qk_norm = true}, Sketch(4, 1)},
    {"Sketch3PlanesBlock16Dim128", {.group = 4, .head_dim = 128}, Sketch(16, 3)},
    {"SketchProgressiveGroup16",
     {.num_kv_heads = 1, .group = 16, .head_dim = 128},
     Sketch(8, 3, 0.4f, 0.2f)},
};

enum class Target { kRounded, kCuda };

std::unique_ptr<kernels::Ops> MakeCuda([[maybe_unused]] bool deterministic) {
#if RESA_HAVE_CUDA
  std::string why_not;
  return kernels::CreateCudaOps({.deterministic = deterministic}, &why_not);
#else
  return nullptr;
#endif
}

std::vector<Target> Targets() {
  std::vector<Target> targets = {Target::kRounded};
  static const bool has_cuda = MakeCuda(false) != nullptr;
  if (has_cuda) targets.push_back(Target::kCuda);
  return targets;
}

std::unique_ptr<kernels::Ops> MakeOps(Target target, const ModelConfig& config,
                                      bool deterministic = false) {
  if (target == Target::kCuda) return MakeCuda(deterministic);
  return std::make_unique<RoundingOps>(kernels::CreateCpuOps({}), config.vocab_size);
}

// A backend, a model on it and a pool full of NaN.
class Machine {
 public:
  Machine(const LoadedModel& model, const kernels::SelectorSpec& selector, int tokens,
          int sequences, kernels::Ops* ops)
      : ops_(*ops), pages_per_sequence_(PagesNeeded(tokens)) {
    const kernels::KvLayout layout = LayoutFor(model.config, selector, kernels::DType::kBF16,
                                               int64_t{pages_per_sequence_} * sequences + 3);
    const BatchLimits limits = {
        .max_rows = 640, .max_segments = sequences, .max_pages_per_sequence = pages_per_sequence_};
    executor_ = ModelExecutor::Create(model.config, model.weights, layout, limits, ops).value();
    const std::vector<std::byte> nan(std::max(layout.LayerKvBytes(), layout.LayerDescriptorBytes()),
                                     std::byte{0xff});
    for (const kernels::KvLayer& layer : executor_->kv().layers()) {
      ops->Upload(layer.k, nan.data(), layout.LayerKvBytes());
      ops->Upload(layer.v, nan.data(), layout.LayerKvBytes());
      ops->Upload(layer.descriptors, nan.data(), layout.LayerDescriptorBytes());
    }
    shuffled_.resize(static_cast<size_t>(layout.num_pages));
    std::iota(shuffled_.begin(), shuffled_.end(), 0);
    std::shuffle(shuffled_.begin(), shuffled_.end(), std::mt19937_64(7));
  }

  std::vector<int32_t> Pages(int sequence) const {
    const auto begin = shuffled_.begin() + int64_t{sequence} * pages_per_sequence_;
    return {begin, begin + pages_per_sequence_};
  }
  Executor* executor() { return executor_.get(); }
  const kernels::OpCounters& counters() const { return ops_.counters(); }
  KvSnapshot Snapshot(absl::Span<const int32_t> pages, int length) const {
    return SnapshotKv(executor_->kv(), &ops_, pages, length);
  }

 private:
  static int32_t PagesNeeded(int tokens) {
    return (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens;
  }

  kernels::Ops& ops_;
  const int32_t pages_per_sequence_;
  std::unique_ptr<ModelExecutor> executor_;
  std::vector<int32_t> shuffled_;
};

Request MakeRequest(AttentionMode mode, std::vector<int32_t> prompt, int output) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.stop.max_tokens = output;
  request.attention.mode = mode;
  request.attention.keep_ratio = 0.1;
  request.attention.min_tokens = 64;
  request.attention.local_tokens = 16;
  request.attention.sink_tokens = 8;
  request.attention.rectify_interval = 32;
  return request;
}

// ---- the same tokens ----------------------------------------------------------------------------

// What rounding activations to bf16 does to logits. Storing a number moves it by 2^-8 / sqrt(7) of
// itself in the root mean square, 1.5e-3 (uniform within half a unit of the last of 8 bits; the
// mantissas' mean square is 7 / 3). The residual stream takes about ten such errors in a layer, in
// and around its ten activations, adding like a random walk: sqrt(10 L) * 1.5e-3 of its norm, and
// so of the logits' deviation. A difference of two logits has sqrt(2) times that, and over
// thousands of tokens the greatest is five deviations.
double NearTieBound(const ModelConfig& config, double logit_deviation) {
  const double error = std::sqrt(10.0 * config.num_layers) * 1.5e-3 * logit_deviation;
  return 5 * std::sqrt(2.0) * error;
}

double Deviation(const std::vector<float>& x) {
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
  double squares = 0;
  for (const float value : x) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(x.size()));
}

// A step of every layer's Select: ids as it lays them out.
using ChosenIds = std::vector<std::vector<int32_t>>;

// The share of attention that falls on each block of a sparse row's sequence, exactly: by a softmax
// over all its tokens, the mean over the heads of one KV head. For a host's backend, since it reads
// what the parameters point to.
std::vector<double> MassOfBlocks(const kernels::SelectParams& p, int kv_head) {
  const kernels::SparseRow& row = p.rows[0];
  const auto d = static_cast<size_t>(p.layout.head_dim);
  const int group = p.num_heads / p.layout.num_kv_heads;
  const int block = p.layout.selector.block_tokens;
  std::vector<double> masses(static_cast<size_t>(row.position / block + 1), 0.0);
  std::vector<double> weights(static_cast<size_t>(row.position) + 1);
  for (int g = 0; g < group; ++g) {
    const float* const q =
        p.q.f32() + row.row * p.q.cols + (kv_head * group + g) * p.layout.head_dim;
    double sum = 0, most = -INFINITY;
    for (int t = 0; t <= row.position; ++t) {
      const int64_t page = p.tables.pages[row.table * p.tables.stride + t / kernels::kPageTokens];
      const auto run = static_cast<size_t>(page * p.layout.num_kv_heads + kv_head);
      const auto* const key =
          reinterpret_cast<const kernels::bf16*>(p.kv.k + run * p.layout.RunBytes()) +
          static_cast<size_t>(t % kernels::kPageTokens) * d;
      double dot = 0;
      for (size_t j = 0; j < d; ++j) dot += double{q[j]} * ToFloat(key[j]);
      weights[static_cast<size_t>(t)] = dot / std::sqrt(static_cast<double>(d));
      most = std::max(most, weights[static_cast<size_t>(t)]);
    }
    for (double& w : weights) sum += w = std::exp(w - most);
    for (size_t t = 0; t < weights.size(); ++t) {
      masses[t / static_cast<size_t>(block)] += weights[t] / sum / group;
    }
  }
  return masses;
}

// A machine whose choices of blocks and logits are seen, and its choices replaced where wanted.
class ObservedMachine {
 public:
  ObservedMachine(const LoadedModel& model, const kernels::SelectorSpec& selector, int tokens,
                  kernels::Ops* ops)
      : ops_(*ops), observing_(ops), machine_(model, selector, tokens, 1, &observing_) {
    observing_.after_select = [this](const kernels::SelectParams& p) { Selected(p); };
    observing_.before_sample = [this](const kernels::SampleParams& p) {
      logits_.resize(static_cast<size_t>(p.logits.cols));
      ops_.Download(logits_.data(), static_cast<const std::byte*>(p.logits.data),
                    logits_.size() * sizeof(float));
    };
  }

  // Attends to the blocks of `instead` where it is given, and counts how many it had not chosen.
  kernels::SampleResult Step(const SegmentInput& segment, const ChosenIds* instead) {
    instead_ = instead;
    chosen_.clear();
    StepOutput output;
    RESA_CHECK(machine_.executor()->Execute({{}, {segment}}, &output).ok());
    return output.samples.empty() ? kernels::SampleResult{} : output.samples[0];
  }

  Machine& machine() { return machine_; }
  const ChosenIds& chosen() const { return chosen_; }
  const std::vector<float>& logits() const { return logits_; }
  int64_t kept() const { return kept_; }
  int64_t differing() const { return differing_; }
  // The share of attention that the other choices miss beyond this machine's own: mean and worst
  // over layers and KV heads of all sparse rows. Below 0 where they catch more.
  double mean_loss() const { return choices_ > 0 ? loss_ / static_cast<double>(choices_) : 0; }
  double worst_loss() const { return worst_loss_; }

 private:
  void Selected(const kernels::SelectParams& p) {
    std::vector<int32_t> ids(static_cast<size_t>(p.num_ids));
    const size_t bytes = ids.size() * sizeof(int32_t);
    ops_.Download(ids.data(), reinterpret_cast<const std::byte*>(p.ids), bytes);
    if (instead_ != nullptr) {
      const std::vector<int32_t>& wanted = instead_->at(chosen_.size());
      RESA_CHECK_EQ(wanted.size(), ids.size());
      const int64_t keep = p.rows[0].keep_blocks;
      for (auto begin = int64_t{0}; begin < p.num_ids; begin += keep) {
        std::vector<int32_t> both;
        std::set_intersection(ids.begin() + begin, ids.begin() + begin + keep,
                              wanted.begin() + begin, wanted.begin() + begin + keep,
                              std::back_inserter(both));
        kept_ += keep;
        differing_ += keep - static_cast<int64_t>(both.size());
        const std::vector<double> masses = MassOfBlocks(p, static_cast<int>(begin / keep));
        double loss = 0;
        for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(begin + keep); ++i) {
          loss += masses[static_cast<size_t>(ids[i])] - masses[static_cast<size_t>(wanted[i])];
        }
        choices_ += 1;
        loss_ += loss;
        worst_loss_ = std::max(worst_loss_, loss);
      }
      ops_.Upload(reinterpret_cast<std::byte*>(p.ids), wanted.data(), bytes);
    }
    chosen_.push_back(std::move(ids));
  }

  kernels::Ops& ops_;
  ObservingOps observing_;
  Machine machine_;
  const ChosenIds* instead_ = nullptr;
  ChosenIds chosen_;
  std::vector<float> logits_;
  int64_t kept_ = 0, differing_ = 0, choices_ = 0;
  double loss_ = 0, worst_loss_ = 0;
};

// Blocks whose estimated masses are within rounding of each other may swap. Their true masses may
// lie further apart, since an estimate is one, but on either side alike: over the hundreds of
// choices of a run the loss averages out to a tenth of what one swap may cost (5e-2 of attention
// where 20 blocks are kept), were every choice to swap one.
constexpr double kMeanLoss = 5e-3;

struct Agreement {
  int tokens = 0;
  int near_ties = 0;         // Tokens that differ.
  double worst_gap = 0;      // Between the CPU's logits of both tokens, in units of the bound.
  double worst_logprob = 0;  // Of the token taken, absolute difference.
  int64_t kept = 0, differing = 0;  // Blocks that the device kept, and those the CPU would not.
  double mean_loss = 0, worst_loss = 0;  // Of attention, by those.
  int replays_that_differ = 0;           // Steps that gave other bits when they ran as in service.
  int64_t sparse_rows = 0, steps_replayed = 0;
  int64_t windows = 0, windows_replayed = 0;  // Rectifications.
};

// One sequence, step by step: on the device looked at; on the CPU with the blocks that the device
// chose, so that a tie among blocks is not taken for an error of attention; and on the device as in
// service, where steps are replayed from recordings. All take the same tokens, those of `feed` or,
// where it ends, the CPU's; so one near tie is one difference and not the end of the comparison.
Agreement CompareGreedy(const LoadedModel& model, const kernels::SelectorSpec& selector,
                        const Request& request, const std::vector<int32_t>& feed,
                        kernels::Ops* device_ops) {
  const int tokens = static_cast<int>(request.prompt.size()) + *request.stop.max_tokens;
  const auto cpu_ops = kernels::CreateCpuOps({});
  ObservedMachine cpu(model, selector, tokens, cpu_ops.get());
  ObservedMachine device(model, selector, tokens, device_ops);
  Machine service(model, selector, tokens, 1, device_ops);
  SequenceDriver driver(request, cpu.machine().Pages(0), selector);
  Agreement agreement;
  while (!driver.done()) {
    SegmentInput segment = driver.Next(/*max_rows=*/512);
    const bool sampled = segment.sample.has_value();
    if (sampled) segment.sample->top_logprobs = 1;
    const size_t emitted = driver.output().size();
    if (sampled && emitted < feed.size()) segment.sample->forced_token = feed[emitted];
    const kernels::SampleResult looked_at = device.Step(segment, nullptr);
    const kernels::SampleResult expected = cpu.Step(segment, &device.chosen());
    StepOutput output;
    const int64_t replayed = device_ops->counters().steps_replayed;
    RESA_CHECK(service.executor()->Execute({{}, {segment}}, &output).ok());
    if (emitted > 0 && segment.tokens.size() > 1) {
      ++agreement.windows;
      agreement.windows_replayed += device_ops->counters().steps_replayed - replayed;
    }
    driver.Finish(sampled ? &expected : nullptr);
    if (!sampled) continue;
    ++agreement.tokens;
    agreement.replays_that_differ += output.samples[0].top_ids != looked_at.top_ids ||
                                     output.samples[0].top_logprobs != looked_at.top_logprobs;
    agreement.worst_logprob = std::max<double>(
        agreement.worst_logprob, std::abs(looked_at.top_logprobs[0] - expected.top_logprobs[0]));
    const auto best = static_cast<size_t>(expected.top_ids[0]);
    const auto other = static_cast<size_t>(looked_at.top_ids[0]);
    if (best == other) continue;
    ++agreement.near_ties;
    const double gap = cpu.logits()[best] - cpu.logits()[other];
    agreement.worst_gap =
        std::max(agreement.worst_gap, gap / NearTieBound(model.config, Deviation(cpu.logits())));
  }
  agreement.kept = cpu.kept();
  agreement.differing = cpu.differing();
  agreement.mean_loss = cpu.mean_loss();
  agreement.worst_loss = cpu.worst_loss();
  agreement.sparse_rows = cpu_ops->counters().sparse_rows;
  agreement.steps_replayed = device_ops->counters().steps_replayed;
  return agreement;
}

void ExpectAgreement(const LoadedModel& model, const kernels::SelectorSpec& selector,
                     const std::vector<int32_t>& prompt, int output,
                     const std::vector<int32_t>& feed, Target target, const std::string& name) {
  for (const AttentionMode mode :
       {AttentionMode::kDense, AttentionMode::kSparse, AttentionMode::kRectified}) {
    const auto ops = MakeOps(target, model.config);
    const Agreement a =
        CompareGreedy(model, selector, MakeRequest(mode, prompt, output), feed, ops.get());
    std::printf(
        "%-26s %-9s %3d tokens, %2d near ties (%.2f of the bound), logprobs within %.4f, "
        "%lld of %lld blocks differ (loss %.1e, at worst %.1e), %lld steps replayed, %lld of %lld "
        "windows\n",
        name.c_str(), std::string(NameOf(mode)).c_str(), a.tokens, a.near_ties, a.worst_gap,
        a.worst_logprob, static_cast<long long>(a.differing), static_cast<long long>(a.kept),
        a.mean_loss, a.worst_loss, static_cast<long long>(a.steps_replayed),
        static_cast<long long>(a.windows_replayed), static_cast<long long>(a.windows));
    const std::string where = name + ", " + std::string(NameOf(mode));
    EXPECT_EQ(a.tokens, output) << where;
    EXPECT_LE(a.worst_gap, 1.0) << where;
    // Near ties are rare, or something else than rounding decides.
    EXPECT_LE(a.near_ties, output / 10) << where;
    EXPECT_LE(a.mean_loss, kMeanLoss) << where;
    EXPECT_LE(a.differing, a.kept / 5) << where;
    EXPECT_EQ(a.replays_that_differ, 0) << where;
    EXPECT_EQ(a.sparse_rows > 0, mode != AttentionMode::kDense) << where;
    if (target != Target::kCuda) continue;
    EXPECT_GT(a.steps_replayed, output / 2) << where;
    // Windows are recorded when two of the same counts have been seen.
    if (a.windows > 6) {
      EXPECT_GT(a.windows_replayed, a.windows / 3) << where;
    }
  }
}

class DeviceTest : public ::testing::TestWithParam<Target> {
 protected:
  DeviceTest()
      : seed_(resa::testing::TestSeed()),
        trace_(__FILE__, __LINE__, ::testing::Message() << "RESA_TEST_SEED=" << seed_),
        random_(seed_) {}

  uint64_t seed() const { return seed_; }
  std::vector<int32_t> Prompt(const LoadedModel& model, int count) {
    return RandomTokens(count, model.config.vocab_size, random_());
  }

 private:
  const uint64_t seed_;
  const ::testing::ScopedTrace trace_;
  std::mt19937_64 random_;
};

TEST_P(DeviceTest, RandomModelsGiveTheCpusTokens) {
  for (const Case& c : kCases) {
    const LoadedModel model = resa::testing::MakeTinyModel(c.model, seed());
    ExpectAgreement(model, c.selector, Prompt(model, 700), 150, Prompt(model, 150), GetParam(),
                    c.name);
  }
}

std::string SourceDir() {
  const char* root = std::getenv("RESA_SOURCE_DIR");
  return root == nullptr ? "." : root;
}

// The model that comes with the sources, on a task of its own.
struct Demo {
  LoadedModel model;
  std::vector<int32_t> prompt;
};
Demo LoadDemo(const std::string& example) {
  const std::string folder = SourceDir() + "/deploy/models/demo";
  absl::StatusOr<LoadedModel> model = LoadModel(folder);
  RESA_CHECK(model.ok()) << model.status().message();
  std::ifstream file(folder + "/examples/" + example);
  const std::string prompt = nlohmann::json::parse(file).at("prompt");
  std::vector<int32_t> tokens = Tokenizer::FromDirectory(folder).value()->Encode(prompt).value();
  return {*std::move(model), std::move(tokens)};
}

TEST_P(DeviceTest, TheDemoModelGivesTheCpusTokens) {
  const Demo demo = LoadDemo("ledger.json");
  ExpectAgreement(demo.model, Sketch(8, 3), demo.prompt, 400, {}, GetParam(), "demo, ledger");
}

// ---- page tables --------------------------------------------------------------------------------

// A step would otherwise look at 16384 entries per sequence of 256K.
TEST_P(DeviceTest, OfAKnownPageTableOnlyNewEntriesAreLookedAt) {
  constexpr int kPrompt = 300, kOutput = 60;
  const LoadedModel model = resa::testing::MakeTinyModel(kCases[2].model, seed());
  const auto ops = MakeOps(GetParam(), model.config);
  const Request request = MakeRequest(AttentionMode::kSparse, Prompt(model, kPrompt), kOutput);
  Machine machine(model, kCases[2].selector, kPrompt + kOutput, 1, ops.get());
  SequenceDriver driver(request, machine.Pages(0), kCases[2].selector);
  while (!driver.done()) {
    SegmentInput segment = driver.Next(128);
    segment.pages_id = 1;
    StepOutput output;
    ASSERT_TRUE(machine.executor()->Execute({{}, {segment}}, &output).ok());
    driver.Finish(segment.sample.has_value() ? &output.samples[0] : nullptr);
  }
  const int64_t pages =
      (driver.sequence().kv_len + kernels::kPageTokens - 1) / kernels::kPageTokens;
  EXPECT_EQ(ops->counters().page_ids_staged, GetParam() == Target::kCuda ? pages : 0);
}

// ---- rectified pages ----------------------------------------------------------------------------

double RelativeDifference(const std::vector<std::byte>& got, const std::vector<std::byte>& want) {
  RESA_CHECK_EQ(got.size(), want.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); i += sizeof(kernels::bf16)) {
    kernels::bf16 a, b;
    std::memcpy(&a, &got[i], sizeof(a));
    std::memcpy(&b, &want[i], sizeof(b));
    const double difference = ToFloat(a) - ToFloat(b);
    error += difference * difference;
    norm += double{ToFloat(b)} * ToFloat(b);
  }
  return std::sqrt(error / norm);
}

double ShareOfBitsThatDiffer(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  RESA_CHECK_EQ(a.size(), b.size());
  int64_t bits = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    bits += std::popcount(static_cast<unsigned>(a[i] ^ b[i]));
  }
  return static_cast<double>(bits) / (8.0 * static_cast<double>(a.size()));
}

// K and V of a window are computed from activations that are rounded alike, but by kernels that add
// in another order when rows are few: a sum next to a rounding boundary goes the other way, which
// moves an activation by a unit of its last place, 2^-7 to 2^-8. Were it all of them it would be
// the error of rounding twice, 2.1e-3, after L layers sqrt(10 L) times that: 1.2e-2 for three; it
// is some of them, since sums agree to f32.
constexpr double kPageTolerance = 1e-2;
// A bit of a sketch's code differs where a component crosses a level: with levels 0.6 deviations
// apart, 2.5 % of the components per 1e-2 of error, and most bits of a code stay then.
constexpr double kBitTolerance = 2e-2;

TEST_P(DeviceTest, ARectifiedWindowLeavesWhatDensePrefillLeaves) {
  constexpr int kPrompt = 300, kOutput = 3 * 32 + 9;
  for (const Case& c : kCases) {
    const LoadedModel model = resa::testing::MakeTinyModel(c.model, seed());
    const auto ops = MakeOps(GetParam(), model.config);
    const Request request = MakeRequest(AttentionMode::kRectified, Prompt(model, kPrompt), kOutput);
    Machine machine(model, c.selector, kPrompt + kOutput, 2, ops.get());
    SequenceDriver driver(request, machine.Pages(0), c.selector);
    StepOutput output;
    double drift = 0;  // Of the pages before they were rectified.
    int windows = 0;
    // Of what the same tokens leave on other pages when they are fed as a prompt.
    const auto prefilled = [&](int length) {
      const std::vector<int32_t> pages = machine.Pages(1);
      const absl::Span<const int32_t> tokens = driver.sequence().tokens;
      for (int begin = 0; begin < length; begin += 512) {
        const SegmentInput segment = {
            .tokens = tokens.subspan(begin, std::min(512, length - begin)),
            .position = begin,
            .pages = pages};
        StepOutput ignored;
        RESA_CHECK(machine.executor()->Execute({{}, {segment}}, &ignored).ok());
      }
      return machine.Snapshot(pages, length);
    };
    while (!driver.done()) {
      const int before = driver.rectifications();
      const SegmentInput segment = driver.Next(512);
      const int kv_len = driver.sequence().kv_len;
      const KvSnapshot stale = machine.Snapshot(driver.pages(), kv_len);
      ASSERT_TRUE(machine.executor()->Execute({{}, {segment}}, &output).ok());
      driver.Finish(segment.sample.has_value() ? &output.samples[0] : nullptr);
      if (driver.rectifications() == before) continue;
      ++windows;
      const int exact = driver.sequence().rectified_len;
      const KvSnapshot got = machine.Snapshot(driver.pages(), exact);
      const KvSnapshot want = prefilled(exact);
      const double keys = RelativeDifference(got.keys, want.keys);
      const double values = RelativeDifference(got.values, want.values);
      const double bits = ShareOfBitsThatDiffer(got.descriptors, want.descriptors);
      std::printf("%-28s window %d: keys %.2e, values %.2e, bits of descriptors %.2e\n", c.name,
                  windows, keys, values, bits);
      EXPECT_LE(keys, kPageTolerance) << c.name;
      EXPECT_LE(values, kPageTolerance) << c.name;
      EXPECT_LE(bits, kBitTolerance) << c.name;
      const KvSnapshot exact_before = prefilled(kv_len);
      drift = std::max(drift, RelativeDifference(stale.values, exact_before.values));
    }
    EXPECT_GE(windows, 3);
    EXPECT_GT(drift, kPageTolerance) << c.name << ": nothing was left to repair";
  }
}

// ---- batches ------------------------------------------------------------------------------------

// With products that are independent of the batch too, a sequence's every bit is.
TEST_P(DeviceTest, InDeterministicModeTheBatchChangesNothing) {
  for (const Case& c : kCases) {
    const LoadedModel model = resa::testing::MakeTinyModel(c.model, seed());
    std::vector<Request> requests;
    for (const auto& [mode, prompt] :
         {std::pair{AttentionMode::kRectified, 33}, std::pair{AttentionMode::kDense, 150},
          std::pair{AttentionMode::kSparse, 97}, std::pair{AttentionMode::kRectified, 141}}) {
      requests.push_back(MakeRequest(mode, Prompt(model, prompt), 90));
    }
    struct Trace {
      std::vector<int32_t> output;
      std::vector<float> logprobs;
      KvSnapshot kv;
    };
    const auto trace_of = [](const Machine& machine, const SequenceDriver& driver) {
      return Trace{{driver.output().begin(), driver.output().end()},
                   driver.logprobs(),
                   machine.Snapshot(driver.pages(), driver.sequence().kv_len)};
    };
    std::vector<Trace> alone;
    for (const Request& request : requests) {
      const auto ops = MakeOps(GetParam(), model.config, /*deterministic=*/true);
      Machine machine(model, c.selector, 256, 4, ops.get());
      SequenceDriver driver(request, machine.Pages(2), c.selector);
      SequenceDriver* const all[] = {&driver};
      RunTogether(all, machine.executor());
      alone.push_back(trace_of(machine, driver));
    }
    const auto ops = MakeOps(GetParam(), model.config, /*deterministic=*/true);
    Machine machine(model, c.selector, 256, 4, ops.get());
    std::vector<std::unique_ptr<SequenceDriver>> drivers;
    std::vector<SequenceDriver*> all;
    for (size_t i = 0; i < requests.size(); ++i) {
      drivers.push_back(std::make_unique<SequenceDriver>(
          requests[i], machine.Pages(static_cast<int>(i)), c.selector));
      all.push_back(drivers.back().get());
    }
    RunTogether(all, machine.executor());
    for (size_t i = 0; i < requests.size(); ++i) {
      const Trace together = trace_of(machine, *drivers[i]);
      EXPECT_EQ(together.output, alone[i].output) << c.name << ", request " << i;
      EXPECT_EQ(together.logprobs, alone[i].logprobs) << c.name << ", request " << i;
      EXPECT_EQ(resa::testing::DescribeDifference(together.kv, alone[i].kv), "")
          << c.name << ", request " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Target, DeviceTest, ::testing::ValuesIn(Targets()),
                         [](const ::testing::TestParamInfo<Target>& info) {
                           return info.param == Target::kCuda ? "cuda" : "rounded";
                         });

}  // namespace
}  // namespace resa::engine
