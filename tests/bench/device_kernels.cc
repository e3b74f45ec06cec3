#include "tests/bench/device_kernels.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/kv_memory.h"
#include "engine/model_config.h"
#include "engine/status_macros.h"
#include "kernels/roofline.h"
#include "tests/bench/synthetic_pool.h"

namespace resa::bench {
namespace {

using kernels::bf16;
using kernels::Buffer;
using kernels::DType;
using kernels::Matrix;
using kernels::Roofline;
using kernels::SelectorKind;
using kernels::SelectorSpec;
using Clock = std::chrono::steady_clock;

constexpr SelectorSpec kMinMax = {SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}};
constexpr SelectorSpec kSketch = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}};
constexpr SelectorSpec kProgressive = {SelectorKind::kSketch, 8, 2, {0.25f, 0.25f}};

struct Heads {
  int heads;
  int kv_heads;
};
constexpr Heads kQwen = {28, 4};   // Qwen2.5-7B, a group of 7.
constexpr Heads kLlama = {32, 8};  // Llama-3.1-8B and Qwen3-8B, a group of 4.
constexpr int kHeadDim = 128;
constexpr int kSpareRows = 2;  // Of a step's lists.

engine::ModelConfig ConfigOf(const Heads& heads, int layers) {
  engine::ModelConfig config;
  config.num_layers = layers;
  config.num_heads = heads.heads;
  config.num_kv_heads = heads.kv_heads;
  config.head_dim = kHeadDim;
  return config;
}

// Sequences of equal length in a pool of some layers, and queries of some rows.
class World {
 public:
  static absl::StatusOr<std::unique_ptr<World>> Make(const Heads& heads, int layers, int sequences,
                                                     int64_t length, int64_t rows,
                                                     const SelectorSpec& selector,
                                                     kernels::Ops* ops) {
    std::unique_ptr<World> world(new World(heads, layers, sequences, length));
    RESA_ASSIGN_OR_RETURN(
        world->memory_,
        engine::KvMemory::Create(
            engine::LayoutFor(world->config_, selector, DType::kBF16, world->deal_.num_pages()),
            ops));
    const std::vector<int64_t> lengths(static_cast<size_t>(sequences), length);
    RESA_RETURN_IF_ERROR(
        FillPool(world->config_, *world->memory_, world->deal_, lengths, /*seed=*/1, ops));
    const int64_t width = world->config_.QDim();
    std::mt19937_64 rng(2);
    std::normal_distribution<float> normal;
    std::vector<bf16> q(static_cast<size_t>(rows * width));
    for (bf16& x : q) x = kernels::RoundToBf16(normal(rng));
    world->q_ = ops->Allocate(q.size() * sizeof(bf16));
    world->out_ = ops->Allocate(q.size() * sizeof(bf16));
    if (world->q_ == nullptr || world->out_ == nullptr) {
      return absl::ResourceExhaustedError("no memory for queries");
    }
    ops->Upload(world->q_->data(), q.data(), q.size() * sizeof(bf16));
    world->lists_.rows = rows;
    world->zeros_.assign(static_cast<size_t>(rows) + kSpareRows, 0);
    world->lists_.ids = world->lists_.positions = world->zeros_.data();
    world->lists_.tables = world->deal_.tables();
    world->lists_.num_tables = sequences;
    world->lists_.layout = world->memory_->layout();
    return world;
  }

  kernels::StepLists lists() const { return lists_; }
  const kernels::KvLayout& layout() const { return memory_->layout(); }
  const kernels::KvLayer& layer(int i) const { return memory_->layer(i); }
  int layers() const { return config_.num_layers; }
  int num_heads() const { return config_.num_heads; }
  // Of the rows that there are queries for.
  Matrix q() const { return {q_->data(), DType::kBF16, lists_.rows, config_.QDim()}; }
  Matrix out() const { return {out_->data(), DType::kBF16, lists_.rows, config_.QDim()}; }

 private:
  World(const Heads& heads, int layers, int sequences, int64_t length)
      : config_(ConfigOf(heads, layers)), deal_(sequences, length, /*seed=*/3) {}

  const engine::ModelConfig config_;
  const PageDeal deal_;
  std::unique_ptr<engine::KvMemory> memory_;
  std::unique_ptr<Buffer> q_, out_;
  std::vector<int32_t> zeros_;
  kernels::StepLists lists_;
};

class DeviceBench {
 public:
  DeviceBench(const std::string& filter, const MakeOps& make) : filter_(filter), make_(make) {}

  absl::Status Run() {
    RESA_RETURN_IF_ERROR(Renew());
    ceilings_ = ops_->MeasureCeilings();
    std::printf("%s; read %.0f GB/s, multiply-add %.0f TFLOP/s\n", ops_->Description().c_str(),
                ceilings_.read_bytes_per_s / 1e9, ceilings_.flops_per_s / 1e12);
    std::printf("%-52s %10s %8s %9s %8s\n", "case", "us", "GB/s", "TFLOP/s", "ceiling");
    RESA_RETURN_IF_ERROR(RunLinears());
    for (const auto& [sequences, length] :
         {std::pair{1, 32768}, std::pair{4, 131072}, std::pair{8, 131072}, std::pair{8, 262144}}) {
      RESA_RETURN_IF_ERROR(RunDense(kQwen, sequences, length));
      for (const SelectorSpec& selector : {kMinMax, kSketch, kProgressive}) {
        RESA_RETURN_IF_ERROR(RunSparse(kQwen, sequences, length, selector));
      }
    }
    for (const Heads& heads : {kQwen, kLlama}) {
      RESA_RETURN_IF_ERROR(RunChunk("rectify", heads, 1, 131072, 32));
      RESA_RETURN_IF_ERROR(RunChunk("rectify", heads, 4, 131072, 32));
      RESA_RETURN_IF_ERROR(RunChunk("prefill", heads, 1, 32768, 32768));
      RESA_RETURN_IF_ERROR(RunChunk("prefill", heads, 1, 32768, 2048));
    }
    return absl::OkStatus();
  }

 private:
  // Enough layers that a step reads far more than a cache of 50 MB.
  static int LayersFor(const Heads& heads, int64_t tokens, double bytes_per_value) {
    const double bytes = static_cast<double>(tokens) * heads.kv_heads * kHeadDim * bytes_per_value;
    return static_cast<int>(std::clamp(4e8 / bytes, 3.0, 8.0));
  }

  // Steps of the same counts must call the same ops on the same memory: a backend for each case.
  absl::Status Renew() {
    fence_ = nullptr;
    RESA_ASSIGN_OR_RETURN(ops_, make_());
    fence_ = ops_->Allocate(1);
    return fence_ == nullptr ? absl::ResourceExhaustedError("no memory at all") : absl::OkStatus();
  }

  bool Wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }

  void Wait() {
    std::byte ignored;
    ops_->Download(&ignored, fence_->data(), 1);
  }

  // How often a step runs its ops so that it takes some milliseconds: a step's own start takes 30
  // us.
  int RoundsFor(kernels::StepLists lists, const std::function<void()>& issue) {
    constexpr auto kLeast = std::chrono::milliseconds(4);
    constexpr int kMost = 64;
    lists.may_replay = false;
    ops_->RunStep(lists, issue);
    Wait();
    const Clock::time_point begin = Clock::now();
    ops_->RunStep(lists, issue);
    Wait();
    return static_cast<int>(std::clamp<int64_t>(kLeast / (Clock::now() - begin) + 1, 1, kMost));
  }

  // The median over steps of the time of one of `calls` ops; `issue` calls all of them.
  void Report(const std::string& name, const Roofline& roofline, int calls,
              const kernels::StepLists& lists, const std::function<void()>& issue) {
    const int rounds = RoundsFor(lists, issue);
    const auto step = [&] {
      ops_->RunStep(lists, [&] {
        for (int i = 0; i < rounds; ++i) issue();
      });
    };
    for (int i = 0; i < 4; ++i) step();  // A recording is made on the way.
    Wait();
    std::vector<double> seconds;
    const Clock::time_point start = Clock::now();
    while (seconds.size() < 5 ||
           (seconds.size() < 200 && Clock::now() - start < std::chrono::milliseconds(200))) {
      // Several at once, so that neither starting nor waiting is what is timed.
      constexpr int kSteps = 4;
      const Clock::time_point begin = Clock::now();
      for (int i = 0; i < kSteps; ++i) step();
      Wait();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count() / kSteps /
                        rounds / calls);
    }
    std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
    const double s = seconds[seconds.size() / 2];
    std::printf("%-52s %10.1f %8.0f %9.1f %7.1f%%\n", name.c_str(), s * 1e6,
                roofline.bytes / s / 1e9, roofline.flops / s / 1e12,
                100 * roofline.Seconds(ceilings_) / s);
    std::fflush(stdout);
  }

  static std::string NameOf(const char* what, const Heads& heads, int sequences, int64_t length) {
    return absl::StrCat(what, ", ", heads.heads, "/", heads.kv_heads, " heads, ", sequences, " x ",
                        length);
  }

  // One row of each sequence attends to everything.
  absl::Status RunDense(const Heads& heads, int sequences, int length) {
    const std::string name = NameOf("dense decode", heads, sequences, length);
    if (!Wanted(name)) return absl::OkStatus();
    RESA_RETURN_IF_ERROR(Renew());
    RESA_ASSIGN_OR_RETURN(const std::unique_ptr<World> world,
                          World::Make(heads, LayersFor(heads, int64_t{sequences} * length, 4),
                                      sequences, length, sequences, kMinMax, ops_.get()));
    std::vector<kernels::DenseChunk> chunks;
    for (int s = 0; s < sequences; ++s) chunks.push_back({s, 1, length - 1, s});
    Attend(name, *world, chunks);
    return absl::OkStatus();
  }

  // A chunk of `rows` rows at the end of each sequence.
  absl::Status RunChunk(const char* what, const Heads& heads, int sequences, int length, int rows) {
    const std::string name =
        absl::StrCat(NameOf(what, heads, sequences, length), ", ", rows, " rows");
    if (!Wanted(name)) return absl::OkStatus();
    RESA_RETURN_IF_ERROR(Renew());
    RESA_ASSIGN_OR_RETURN(
        const std::unique_ptr<World> world,
        World::Make(heads, LayersFor(heads, int64_t{sequences} * length, 4), sequences, length,
                    int64_t{sequences} * rows, kMinMax, ops_.get()));
    std::vector<kernels::DenseChunk> chunks;
    for (int s = 0; s < sequences; ++s) chunks.push_back({s * rows, rows, length - rows, s});
    Attend(name, *world, chunks);
    return absl::OkStatus();
  }

  void Attend(const std::string& name, const World& world,
              const std::vector<kernels::DenseChunk>& chunks) {
    kernels::StepLists lists = world.lists();
    lists.chunks = chunks.data();
    lists.num_chunks = static_cast<int64_t>(chunks.size());
    lists.num_heads = world.num_heads();
    const auto params = [&](int layer) {
      return kernels::ChunkAttendParams{.q = world.q(),
                                        .num_heads = world.num_heads(),
                                        .chunks = lists.chunks,
                                        .num_chunks = lists.num_chunks,
                                        .tables = lists.tables,
                                        .layout = world.layout(),
                                        .kv = world.layer(layer),
                                        .out = world.out()};
    };
    Report(name, RooflineOf(params(0)), world.layers(), lists, [&] {
      for (int i = 0; i < world.layers(); ++i) ops_->ChunkAttend(params(i));
    });
  }

  // Select, then attention to a tenth of the blocks, then both.
  absl::Status RunSparse(const Heads& heads, int sequences, int length,
                         const SelectorSpec& selector) {
    std::string kind = "minmax";
    if (selector.kind == SelectorKind::kSketch) {
      kind = absl::StrCat("sketch ", selector.planes,
                          selector.refine_share[0] < 1 ? " progressive" : "");
    }
    const std::string where = NameOf("", heads, sequences, length);
    if (!Wanted(absl::StrCat("select ", kind, where)) &&
        !Wanted(absl::StrCat("sparse attend ", kind, where)) &&
        !Wanted(absl::StrCat("select and attend ", kind, where))) {
      return absl::OkStatus();
    }
    RESA_RETURN_IF_ERROR(Renew());
    RESA_ASSIGN_OR_RETURN(const std::unique_ptr<World> world,
                          World::Make(heads, LayersFor(heads, int64_t{sequences} * length, 0.25),
                                      sequences, length, sequences, selector, ops_.get()));
    const int blocks = length / selector.block_tokens;
    std::vector<kernels::SparseRow> rows;
    int64_t num_ids = 0;
    for (int s = 0; s < sequences; ++s) {
      rows.push_back({.row = s,
                      .position = length - 1,
                      .table = s,
                      .keep_blocks = blocks / 10,
                      .local_blocks = 2,
                      .sink_blocks = 1,
                      .ids_begin = num_ids});
      num_ids += int64_t{blocks / 10} * heads.kv_heads;
    }
    // Each layer's own, so that attention alone reads what a selection chose.
    std::vector<std::unique_ptr<Buffer>> ids;
    for (int i = 0; i < world->layers(); ++i) {
      ids.push_back(ops_->Allocate(static_cast<size_t>(num_ids) * sizeof(int32_t)));
      if (ids.back() == nullptr) return absl::ResourceExhaustedError("no memory for ids");
    }
    kernels::StepLists lists = world->lists();
    lists.sparse_rows = rows.data();
    lists.num_sparse_rows = sequences;
    const auto select = [&](int layer) {
      return kernels::SelectParams{.q = world->q(),
                                   .num_heads = heads.heads,
                                   .rows = rows.data(),
                                   .num_rows = sequences,
                                   .tables = lists.tables,
                                   .layout = world->layout(),
                                   .kv = world->layer(layer),
                                   .ids = reinterpret_cast<int32_t*>(ids[layer]->data()),
                                   .num_ids = num_ids};
    };
    const auto attend = [&](int layer) {
      return kernels::SparseAttendParams{.q = world->q(),
                                         .num_heads = heads.heads,
                                         .rows = rows.data(),
                                         .num_rows = sequences,
                                         .ids = reinterpret_cast<int32_t*>(ids[layer]->data()),
                                         .tables = lists.tables,
                                         .layout = world->layout(),
                                         .kv = world->layer(layer),
                                         .out = world->out()};
    };
    const int64_t before = ops_->counters().descriptor_bytes;
    ops_->Select(select(0));
    Roofline of_select = RooflineOf(select(0));
    of_select.bytes = static_cast<double>(ops_->counters().descriptor_bytes - before);
    Roofline of_both = of_select;
    of_both += RooflineOf(attend(0));
    // Recordings are told apart by counts, so each way takes another number of rows.
    Report(absl::StrCat("select ", kind, where), of_select, world->layers(), lists, [&] {
      for (int i = 0; i < world->layers(); ++i) ops_->Select(select(i));
    });
    ++lists.rows;
    Report(absl::StrCat("sparse attend ", kind, where), RooflineOf(attend(0)), world->layers(),
           lists, [&] {
             for (int i = 0; i < world->layers(); ++i) ops_->SparseAttend(attend(i));
           });
    ++lists.rows;
    Report(absl::StrCat("select and attend ", kind, where), of_both, world->layers(), lists, [&] {
      for (int i = 0; i < world->layers(); ++i) {
        ops_->Select(select(i));
        ops_->SparseAttend(attend(i));
      }
    });
    return absl::OkStatus();
  }

  // Products of Qwen2.5-7B's weights, each with copies past the cache.
  absl::Status RunLinears() {
    struct Case {
      const char* name;
      std::vector<int64_t> out;
      int64_t in;
    };
    for (const Case& c : {Case{"qkv", {3584, 512, 512}, 3584}, Case{"o", {3584}, 3584},
                          Case{"gate and up", {18944, 18944}, 3584}, Case{"down", {3584}, 18944},
                          Case{"logits", {152064}, 3584}}) {
      for (const int64_t rows : {1, 8, 32, 64, 264, 2048}) {
        RESA_RETURN_IF_ERROR(RunLinear(c.name, c.out, c.in, rows));
      }
    }
    return absl::OkStatus();
  }

  absl::Status RunLinear(const char* what, const std::vector<int64_t>& out, int64_t in,
                         int64_t rows) {
    const std::string name = absl::StrCat("linear ", what, ", ", rows, " rows");
    if (!Wanted(name)) return absl::OkStatus();
    RESA_RETURN_IF_ERROR(Renew());
    const int64_t columns = std::accumulate(out.begin(), out.end(), int64_t{0});
    const bool logits = std::string(what) == "logits";
    const int copies = static_cast<int>(std::clamp<int64_t>(100'000'000 / (columns * in), 1, 8));
    std::vector<std::unique_ptr<Buffer>> weights;
    for (int i = 0; i < copies; ++i) {
      RESA_ASSIGN_OR_RETURN(weights.emplace_back(), RandomBf16(columns * in, i));
    }
    RESA_ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> x, RandomBf16(rows * in, 99));
    const std::unique_ptr<Buffer> y =
        ops_->Allocate(static_cast<size_t>(rows * columns) * sizeof(float));
    if (y == nullptr) return absl::ResourceExhaustedError("no memory for a product");
    const auto params = [&](int copy) {
      std::vector<kernels::LinearParams> all;
      int64_t at = 0;
      const DType type = logits ? DType::kF32 : DType::kBF16;
      for (const int64_t width : out) {
        all.push_back({.x = {x->data(), DType::kBF16, rows, in},
                       .weight = {weights[copy]->data() + at * in * 2, DType::kBF16, width, in},
                       .out = {y->data() + at * rows * kernels::BytesOf(type), type, rows, width}});
        at += width;
      }
      return all;
    };
    Roofline roofline;
    for (const kernels::LinearParams& p : params(0)) roofline += RooflineOf(p);
    const std::vector<int32_t> zeros(static_cast<size_t>(rows), 0);
    kernels::StepLists lists;
    lists.rows = rows;
    lists.ids = lists.positions = zeros.data();
    lists.layout = engine::LayoutFor(ConfigOf(kQwen, 1), kMinMax, DType::kBF16, 1);
    Report(name, roofline, copies, lists, [&] {
      for (int i = 0; i < copies; ++i) ops_->Linears({.products = params(i)});
    });
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<Buffer>> RandomBf16(int64_t count, int seed) {
    std::vector<bf16> values(static_cast<size_t>(count));
    uint32_t state = 12345u + static_cast<uint32_t>(seed);
    for (bf16& x : values) {  // Of either sign, from 2^-7 to 2^-4.
      state = state * 1664525u + 1013904223u;
      x = bf16{static_cast<uint16_t>(0x3c00u | (state >> 16 & 0x81ffu))};
    }
    std::unique_ptr<Buffer> buffer = ops_->Allocate(values.size() * sizeof(bf16));
    if (buffer == nullptr) return absl::ResourceExhaustedError("no memory for a weight");
    ops_->Upload(buffer->data(), values.data(), values.size() * sizeof(bf16));
    return buffer;
  }

  const std::string filter_;
  const MakeOps make_;
  std::unique_ptr<kernels::Ops> ops_;
  std::unique_ptr<Buffer> fence_;
  kernels::Ceilings ceilings_;
};

}  // namespace

absl::Status BenchDeviceKernels(const std::string& filter, const MakeOps& make) {
  return DeviceBench(filter, make).Run();
}

}  // namespace resa::bench
