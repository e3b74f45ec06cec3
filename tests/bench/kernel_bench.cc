// Times the kernels of a backend against the machine's ceilings, which are measured first: the
// bandwidth of reading memory and the peak of multiply-adds, of a CPU with all the threads of the
// backend. Prints one line per case: time, bytes/s, FLOP/s and the share of whichever ceiling binds
// (kernels/roofline.h says what each op has to move and compute).
//
//   kernel_bench [--threads N] [--filter TEXT] [--target AVX2|AVX3|VNNI]
//   kernel_bench --device cuda:N [--filter TEXT]
//
// By hand, on a quiet machine.

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "hwy/targets.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/roofline.h"
#include "tests/bench/bench_clock.h"
#include "tests/bench/device_kernels.h"
#include "tests/bench/gpu_device.h"

namespace resa::bench {
namespace {

using kernels::bf16;
using kernels::DType;
using kernels::Matrix;
using kernels::Ops;
using kernels::Roofline;
using kernels::SelectorKind;
using kernels::SelectorSpec;

struct Options {
  int threads = 0;
  std::string filter;
  std::string device = "cpu";
};

// The fastest of several runs within about half a second, in seconds.
double BestOf(int threads, const std::function<void()>& run) {
  double best = 1e30, total = 0;
  for (int i = 0; i < 3 || (total < 0.5 && i < 10000); ++i) {
    const double start = Now(threads);
    run();
    const double s = Now(threads) - start;
    best = std::min(best, s);
    total += s;
  }
  return best;
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        ops_(kernels::CreateCpuOps({.threads = options.threads})),
        threads_(options.threads == 0 ? kernels::AvailableCores() : options.threads),
        ceilings_(ops_->MeasureCeilings()) {
    std::printf("%s; read %.1f GB/s, FMA peak %.0f GFLOP/s\n", ops_->Description().c_str(),
                ceilings_.read_bytes_per_s / 1e9, ceilings_.flops_per_s / 1e9);
    std::printf("%-44s %10s %8s %9s %7s\n", "case", "us", "GB/s", "GFLOP/s", "ceiling");
  }

  void Run() {
    RunLinear();
    RunChunk();
    RunSelect();
    RunSparse();
  }

 private:
  void Report(const std::string& name, const Roofline& roofline, const std::function<void()>& run) {
    if (name.find(options_.filter) == std::string::npos) return;
    const double seconds = BestOf(threads_, run);
    std::printf("%-44s %10.1f %8.1f %9.1f %6.1f%%\n", name.c_str(), seconds * 1e6,
                roofline.bytes / seconds / 1e9, roofline.flops / seconds / 1e9,
                100 * roofline.Seconds(ceilings_) / seconds);
  }
  bool Wanted(const std::string& prefix) const {
    return options_.filter.empty() || options_.filter.find(prefix) == 0 ||
           prefix.find(options_.filter) != std::string::npos;
  }

  std::vector<float> Floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> out(static_cast<size_t>(n));
    for (float& x : out) x = normal(rng_);
    return out;
  }
  // Weights and caches: plausible values fast, since there are many.
  std::vector<bf16> Bf16s(int64_t n) {
    std::vector<bf16> out(static_cast<size_t>(n));
    uint32_t state = 12345;
    for (bf16& x : out) {
      state = state * 1664525u + 1013904223u;
      x = bf16{static_cast<uint16_t>(0x3c00u | (state >> 16 & 0x81ffu))};
    }
    return out;
  }

  void RunLinear() {
    if (!Wanted("linear")) return;
    // Beyond any cache, so that few rows run at the speed of memory.
    const int64_t in = 2048, out = 32768;
    std::vector<bf16> weight = Bf16s(in * out);
    for (int64_t rows : {1, 2, 4, 8, 16, 32, 512}) {
      const int64_t columns = rows == 512 ? 512 : out;
      std::vector<float> x = Floats(rows * in), y(static_cast<size_t>(rows * columns));
      const kernels::LinearParams p = {.x = {x.data(), DType::kF32, rows, in},
                                       .weight = {weight.data(), DType::kBF16, columns, in},
                                       .out = {y.data(), DType::kF32, rows, columns}};
      Report("linear " + std::to_string(rows) + " rows, [" + std::to_string(columns) + ", " +
                 std::to_string(in) + "]",
             RooflineOf(p), [&] { ops_->Linear(p); });
    }
  }

  // A pool of `tokens` on shuffled pages, and queries for `rows` rows.
  struct World {
    kernels::KvLayout layout;
    std::unique_ptr<kernels::Buffer> k, v, descriptors;
    std::vector<int32_t> pages;
    std::vector<float> q, out;

    kernels::KvLayer layer() { return {k->data(), v->data(), descriptors->data()}; }
    kernels::PageTables tables() const {
      return {pages.data(), static_cast<int64_t>(pages.size())};
    }
  };
  // Bounds like keys for minmax; for a sketch random bits, and scales around 1/25 as for keys of
  // rms 1/8 at three planes.
  void FillDescriptors(const kernels::KvLayout& layout, std::byte* to) {
    const size_t run = layout.DescriptorRunBytes();
    const size_t scales =
        layout.selector.kind == SelectorKind::kMinMax ? 0 : run - 2 * kernels::kPageTokens;
    const std::vector<bf16> values = Bf16s(static_cast<int64_t>(layout.LayerDescriptorBytes() / 2));
    std::memcpy(to, values.data(), layout.LayerDescriptorBytes());
    uint32_t state = 1;
    for (size_t at = 0; at < layout.LayerDescriptorBytes(); at += run) {
      for (size_t i = 0; i < scales; ++i) {
        state = state * 1664525u + 1013904223u;
        to[at + i] = static_cast<std::byte>(state >> 24);
      }
      if (scales > 0) std::memset(to + at + scales, 0x3d, run - scales);
    }
  }
  World MakeWorld(int heads, int kv_heads, int d, int tokens, int rows, const SelectorSpec& spec) {
    World w;
    const int64_t pages = (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens;
    w.layout = {.num_layers = 1,
                .num_pages = pages,
                .num_kv_heads = kv_heads,
                .head_dim = d,
                .kv_dtype = DType::kBF16,
                .selector = spec};
    w.k = ops_->Allocate(w.layout.LayerKvBytes());
    w.v = ops_->Allocate(w.layout.LayerKvBytes());
    w.descriptors = ops_->Allocate(w.layout.LayerDescriptorBytes());
    const std::vector<bf16> values = Bf16s(pages * kv_heads * kernels::kPageTokens * d);
    ops_->Upload(w.k->data(), values.data(), w.k->bytes());
    ops_->Upload(w.v->data(), values.data(), w.v->bytes());
    FillDescriptors(w.layout, w.descriptors->data());
    w.pages.resize(static_cast<size_t>(pages));
    std::iota(w.pages.begin(), w.pages.end(), 0);
    std::shuffle(w.pages.begin(), w.pages.end(), rng_);
    w.q = Floats(int64_t{rows} * heads * d);
    w.out.resize(w.q.size());
    return w;
  }

  void RunChunk() {
    if (!Wanted("chunk")) return;
    const SelectorSpec spec = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}};
    struct Case {
      int heads, kv_heads, d, tokens, rows;
    };
    for (const Case& c :
         {Case{9, 3, 64, 2048, 512}, Case{28, 4, 128, 2048, 512}, Case{28, 4, 128, 16384, 32},
          Case{9, 3, 64, 32768, 1}, Case{28, 4, 128, 131072, 1}}) {
      World w = MakeWorld(c.heads, c.kv_heads, c.d, c.tokens, c.rows, spec);
      const kernels::DenseChunk chunk = {0, c.rows, c.tokens - c.rows, 0};
      const int64_t width = int64_t{c.heads} * c.d;
      const kernels::ChunkAttendParams p = {.q = {w.q.data(), DType::kF32, c.rows, width},
                                            .num_heads = c.heads,
                                            .chunks = &chunk,
                                            .num_chunks = 1,
                                            .tables = w.tables(),
                                            .layout = w.layout,
                                            .kv = w.layer(),
                                            .out = {w.out.data(), DType::kF32, c.rows, width}};
      Report("chunk " + std::to_string(c.rows) + " rows, " + std::to_string(c.heads) + "/" +
                 std::to_string(c.kv_heads) + " heads, d " + std::to_string(c.d) + ", " +
                 std::to_string(c.tokens),
             RooflineOf(p), [&] { ops_->ChunkAttend(p); });
    }
  }

  void RunSelect() {
    if (!Wanted("select")) return;
    struct Case {
      const char* name;
      SelectorSpec spec;
    };
    for (const Case& c :
         {Case{"minmax", {SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}}},
          Case{"sketch 1", {SelectorKind::kSketch, 8, 1, {1.0f, 1.0f}}},
          Case{"sketch 2", {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}}},
          Case{"sketch 3", {SelectorKind::kSketch, 8, 3, {1.0f, 1.0f}}},
          Case{"sketch 3 progressive", {SelectorKind::kSketch, 8, 3, {0.25f, 0.12f}}}}) {
      for (const auto& [heads, kv_heads, d, tokens] :
           {std::array<int, 4>{28, 4, 128, 131072}, std::array<int, 4>{14, 2, 64, 131072},
            std::array<int, 4>{14, 2, 64, 32768}, std::array<int, 4>{9, 3, 64, 8192}}) {
        World w = MakeWorld(heads, kv_heads, d, tokens, 1, c.spec);
        const int blocks = tokens / c.spec.block_tokens;
        const kernels::SparseRow row = {
            .row = 0, .position = tokens - 1, .table = 0, .keep_blocks = blocks / 10};
        std::vector<int32_t> ids(static_cast<size_t>(kv_heads * row.keep_blocks));
        const kernels::SelectParams p = {.q = {w.q.data(), DType::kF32, 1, int64_t{heads} * d},
                                         .num_heads = heads,
                                         .rows = &row,
                                         .num_rows = 1,
                                         .tables = w.tables(),
                                         .layout = w.layout,
                                         .kv = w.layer(),
                                         .ids = ids.data(),
                                         .num_ids = static_cast<int64_t>(ids.size())};
        Report("select " + std::string(c.name) + ", " + std::to_string(heads) + "/" +
                   std::to_string(kv_heads) + " heads, d " + std::to_string(d) + ", " +
                   std::to_string(tokens),
               RooflineOf(p), [&] { ops_->Select(p); });
      }
    }
  }

  void RunSparse() {
    if (!Wanted("sparse")) return;
    for (int block : {4, 8, 16}) {
      for (const auto& [heads, kv_heads, d, tokens] :
           {std::array<int, 4>{28, 4, 128, 131072}, std::array<int, 4>{9, 3, 64, 8192}}) {
        World w = MakeWorld(heads, kv_heads, d, tokens, 1,
                            {SelectorKind::kSketch, block, 1, {1.0f, 1.0f}});
        const int blocks = tokens / block;
        const kernels::SparseRow row = {
            .row = 0, .position = tokens - 1, .table = 0, .keep_blocks = blocks / 10};
        std::vector<int32_t> ids;
        for (int h = 0; h < kv_heads; ++h) {
          std::vector<int32_t> all(static_cast<size_t>(blocks));
          std::iota(all.begin(), all.end(), 0);
          std::shuffle(all.begin(), all.end(), rng_);
          std::sort(all.begin(), all.begin() + row.keep_blocks);
          ids.insert(ids.end(), all.begin(), all.begin() + row.keep_blocks);
        }
        const int64_t width = int64_t{heads} * d;
        const kernels::SparseAttendParams p = {.q = {w.q.data(), DType::kF32, 1, width},
                                               .num_heads = heads,
                                               .rows = &row,
                                               .num_rows = 1,
                                               .ids = ids.data(),
                                               .tables = w.tables(),
                                               .layout = w.layout,
                                               .kv = w.layer(),
                                               .out = {w.out.data(), DType::kF32, 1, width}};
        Report("sparse 10 % of " + std::to_string(tokens) + ", " + std::to_string(heads) + "/" +
                   std::to_string(kv_heads) + " heads, d " + std::to_string(d) + ", block " +
                   std::to_string(block),
               RooflineOf(p), [&] { ops_->SparseAttend(p); });
      }
    }
  }

  const Options options_;
  const std::unique_ptr<Ops> ops_;
  const int threads_;
  const kernels::Ceilings ceilings_;
  std::mt19937 rng_{1};
};

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--threads") == 0) {
      options.threads = std::atoi(argv[++i]);
    } else if (has_value && std::strcmp(argv[i], "--device") == 0) {
      options.device = argv[++i];
    } else if (has_value && std::strcmp(argv[i], "--filter") == 0) {
      options.filter = argv[++i];
    } else if (has_value && std::strcmp(argv[i], "--target") == 0) {
      const std::string target = argv[++i];
      hwy::SetSupportedTargetsForTest(target == "AVX2"   ? int64_t{HWY_AVX2}
                                      : target == "AVX3" ? int64_t{HWY_AVX3}
                                                         : int64_t{HWY_AVX3 | HWY_AVX3_DL});
    } else {
      std::fprintf(stderr,
                   "usage: %s [--threads N] [--filter TEXT] [--target AVX2|AVX3|VNNI] "
                   "[--device cuda:N]\n",
                   argv[0]);
      return 2;
    }
  }
  if (options.device != "cpu") {
    const absl::Status status =
        BenchDeviceKernels(options.filter, [&] { return MakeGpuOps(options.device); });
    if (status.ok()) return 0;
    std::fprintf(stderr, "%s: %s\n", argv[0], std::string(status.message()).c_str());
    return 1;
  }
  Bench(options).Run();
  return 0;
}

}  // namespace
}  // namespace resa::bench

int main(int argc, char** argv) { return resa::bench::Main(argc, argv); }
