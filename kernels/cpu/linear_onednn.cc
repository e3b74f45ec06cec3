#include "kernels/cpu/linear_onednn.h"

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_onednn.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// to = x [rows, cols] as bf16, then zeros up to `padded_rows`.
void RoundRowsImpl(Context& context, const float* x, int64_t rows, int64_t cols,
                   int64_t padded_rows, bf16* to) {
  constexpr auto lanes = static_cast<int64_t>(kLanes);
  context.pool.For(padded_rows, [=](int64_t row, int) {
    bf16* const out = to + row * cols;
    if (row >= rows) {
      std::fill_n(out, cols, bf16{0});
      return;
    }
    const float* const in = x + row * cols;
    int64_t i = 0;
    for (; i + lanes <= cols; i += lanes) StoreNarrow(hn::LoadU(DF(), in + i), out + i);
    for (; i < cols; ++i) out[i] = RoundToBf16(in[i]);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#if !RESA_ONEDNN

namespace resa::kernels::cpu {

std::unique_ptr<OneDnnLinear> OneDnnLinear::Create(int, bool emulated, std::string* reason) {
  *reason = emulated ? "this build has no oneDNN" : "";
  return nullptr;
}

}  // namespace resa::kernels::cpu

#else

#include <array>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "dnnl.hpp"
#include "kernels/cpu/product_check.h"

#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
// Of the OpenMP runtime that oneDNN is linked with. Its header belongs to one compiler or the
// other, its C interface to none.
extern "C" void omp_set_num_threads(int threads);
#endif

namespace resa::kernels::cpu {

HWY_EXPORT(RoundRowsImpl);

namespace {

using dnnl::memory;

constexpr int64_t kPanel = 64;  // Columns of a task, and the width of oneDNN's own panels.
// Rows of a tile: the one that the others are compared with, then few for decoding, many for
// prompts.
constexpr int64_t kBaseRows = 16;
constexpr std::array<int64_t, 5> kTileRows = {kBaseRows, 1, 4, 64, 256};

// OpenMP's number of threads belongs to the calling thread, so each thread sets its own; it costs a
// few nanoseconds.
void KeepToThisThread() {
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
  omp_set_num_threads(1);
#endif
}

// A product of [rows, in] by the transpose of [cols, in], on one thread.
struct Tile {
  struct Operands {  // Of one thread; their addresses are set for each run.
    memory x, weights, out, scratch;
  };
  int64_t rows = 0;
  size_t scratch_bytes = 0;
  dnnl::primitive primitive;
  std::vector<Operands> of_thread;
};

// All tiles of one shape, by rising number of rows; none where oneDNN is not used.
struct Shape {
  int64_t in = 0;
  int64_t cols = 0;
  std::vector<Tile> tiles;
};

class OneDnnLinearImpl : public OneDnnLinear {
 public:
  explicit OneDnnLinearImpl(int threads)
      : engine_(dnnl::engine::kind::cpu, 0), threads_(static_cast<size_t>(threads)) {
    for (int i = 0; i < threads; ++i) streams_.emplace_back(engine_);
  }

  bool Run(Context& context, const LinearParams& params) override;
  std::string Description() const override {
    return refusals_.empty() ? "oneDNN bf16" : "oneDNN bf16 but for" + refusals_;
  }
  const std::string& refusals() const { return refusals_; }

  // The shape's tiles, made and checked on first use. `scratch` serves the check.
  const Shape& Find(int64_t in, int64_t cols, Scratch& scratch);

 private:
  // Consecutive rows of a call that one tile computes.
  struct Part {
    int64_t begin;
    const Tile* tile;
  };

  std::string MakeTile(const Shape& shape, int64_t rows, Tile* tile) const;
  void Execute(const Tile& tile, size_t thread, const bf16* x, const bf16* weights, float* out,
               std::byte* scratch);
  int64_t Cut(const Shape& shape, int64_t rows);

  dnnl::engine engine_;
  const size_t threads_;
  std::vector<dnnl::stream> streams_;                    // [threads]
  std::map<std::pair<int64_t, int64_t>, Shape> shapes_;  // By (in, cols).
  std::string refusals_;
  std::vector<Part> parts_;  // Of the current call.
};

// Empty, or why oneDNN has no such product.
std::string OneDnnLinearImpl::MakeTile(const Shape& shape, int64_t rows, Tile* tile) const {
  const memory::desc x({rows, shape.in}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc weights({shape.in, shape.cols}, memory::data_type::bf16,
                             memory::dims{1, shape.in});
  const memory::desc out({rows, shape.cols}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc kernel(engine_, x, weights, out, attributes, true);
#else
  const dnnl::matmul::primitive_desc kernel({x, weights, out}, attributes, engine_, true);
#endif
  if (!kernel) return "oneDNN has no kernel";
  // The scalar fallback.
  if (std::strncmp(kernel.impl_info_str(), "ref", 3) == 0) return "oneDNN has no fast kernel";
  tile->rows = rows;
  tile->primitive = dnnl::matmul(kernel);
  tile->scratch_bytes = kernel.scratchpad_desc().get_size();
  for (size_t i = 0; i < threads_; ++i) {
    tile->of_thread.push_back({memory(x, engine_, nullptr), memory(weights, engine_, nullptr),
                               memory(out, engine_, nullptr),
                               memory(kernel.scratchpad_desc(), engine_, nullptr)});
  }
  return "";
}

const Shape& OneDnnLinearImpl::Find(int64_t in, int64_t cols, Scratch& scratch) {
  const auto [found, added] = shapes_.try_emplace({in, cols}, Shape{in, cols, {}});
  Shape& shape = found->second;
  if (!added) return shape;
  KeepToThisThread();
  ProductCheck check(in, cols);
  for (const int64_t rows : kTileRows) {
    Tile tile;
    std::string wrong;
    // oneDNN's C++ interface reports by throwing: here only what the hardware lacks.
    try {
      wrong = MakeTile(shape, rows, &tile);
    } catch (const dnnl::error& error) {
      wrong = std::string("oneDNN: ") + error.what();
    }
    if (wrong.empty()) {
      scratch.Reset(Scratch::BytesFor<std::byte>(tile.scratch_bytes));
      auto* const own = scratch.Take<std::byte>(tile.scratch_bytes);
      wrong = check.Run(rows, [&](const bf16* x, const bf16* weights, float* out) {
        Execute(tile, 0, x, weights, out, own);
      });
    }
    if (wrong.empty()) {
      shape.tiles.push_back(std::move(tile));
    } else if (rows == kBaseRows) {
      refusals_ += " " + std::to_string(in) + " x " + std::to_string(cols) + " (" + wrong + ")";
      break;
    }
  }
  std::sort(shape.tiles.begin(), shape.tiles.end(),
            [](const Tile& a, const Tile& b) { return a.rows < b.rows; });
  return shape;
}

void OneDnnLinearImpl::Execute(const Tile& tile, size_t thread, const bf16* x, const bf16* weights,
                               float* out, std::byte* scratch) {
  const Tile::Operands& operands = tile.of_thread[thread];
  // oneDNN has no pointers to const; it reads these two.
  operands.x.set_data_handle(const_cast<bf16*>(x));
  operands.weights.set_data_handle(const_cast<bf16*>(weights));
  operands.out.set_data_handle(out);
  operands.scratch.set_data_handle(scratch);
  const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, operands.x.get()},
                                       {DNNL_ARG_WEIGHTS, operands.weights.get()},
                                       {DNNL_ARG_DST, operands.out.get()},
                                       {DNNL_ARG_SCRATCHPAD, operands.scratch.get()}};
  KeepToThisThread();
  const dnnl_status_t status =
      dnnl_primitive_execute(tile.primitive.get(), streams_[thread].get(),
                             static_cast<int>(std::size(arguments)), arguments);
  RESA_CHECK(status == dnnl_success) << "oneDNN matmul: status " << static_cast<int>(status);
}

// Cuts `rows` into parts_ and returns how many rows they span, padding included: the smallest tile
// that takes all that is left, if at least half of it is used, else the largest that is filled.
int64_t OneDnnLinearImpl::Cut(const Shape& shape, int64_t rows) {
  parts_.clear();
  int64_t begin = 0;
  while (begin < rows) {
    const int64_t left = rows - begin;
    auto tile = std::find_if(shape.tiles.begin(), shape.tiles.end(),
                             [left](const Tile& t) { return t.rows >= left; });
    if (tile != shape.tiles.begin() && (tile == shape.tiles.end() || tile->rows > 2 * left)) --tile;
    parts_.push_back({begin, &*tile});
    begin += tile->rows;
  }
  return begin;
}

bool OneDnnLinearImpl::Run(Context& context, const LinearParams& params) {
  const int64_t rows = params.x.rows, in = params.weight.cols, cols = params.weight.rows;
  if (rows == 0 || in == 0 || cols == 0) return false;
  const Shape& shape = Find(in, std::min(cols, kPanel), context.shared);
  if (shape.tiles.empty()) return false;
  const int64_t padded_rows = Cut(shape, rows);

  context.shared.Reset(Scratch::BytesFor<bf16>(static_cast<size_t>(padded_rows * in)));
  bf16* const rounded = context.shared.Take<bf16>(static_cast<size_t>(padded_rows * in));
  HWY_DYNAMIC_DISPATCH(RoundRowsImpl)(context, params.x.f32(), rows, in, padded_rows, rounded);

  const bf16* const weights = params.weight.b16();
  float* const out = params.out.f32();
  const auto parts = static_cast<int64_t>(parts_.size());
  // The parts of one panel are neighbours: its weights come from memory once.
  context.pool.For((cols + kPanel - 1) / kPanel * parts, [&](int64_t task, int thread) {
    const Part& part = parts_[static_cast<size_t>(task % parts)];
    const int64_t begin = task / parts * kPanel;
    const int64_t end = std::min(cols, begin + kPanel);
    // The last panel is moved left to be as wide as the others; only its own columns are stored.
    const int64_t first = end - shape.cols;
    Scratch& scratch = context.of_thread[static_cast<size_t>(thread)];
    const auto count = static_cast<size_t>(part.tile->rows * shape.cols);
    scratch.Reset(Scratch::BytesFor<float>(count) +
                  Scratch::BytesFor<std::byte>(part.tile->scratch_bytes));
    float* const sums = scratch.Take<float>(count);
    Execute(*part.tile, static_cast<size_t>(thread), rounded + part.begin * in,
            weights + first * in, sums, scratch.Take<std::byte>(part.tile->scratch_bytes));
    const int64_t stored = std::min(part.tile->rows, rows - part.begin);
    for (int64_t r = 0; r < stored; ++r) {
      const float* const from = sums + r * shape.cols;
      float* const to = out + (part.begin + r) * cols;
      for (int64_t c = begin; c < end; ++c) {
        float sum = from[c - first];
        if (params.bias != nullptr) sum += params.bias[c];
        to[c] = params.accumulate ? to[c] + sum : sum;
      }
    }
  });
  return true;
}

// oneDNN's word, not CPUID alone: it also asks the system for the use of AMX.
bool Has(dnnl::cpu_isa wanted) {
  const auto bits = static_cast<unsigned>(wanted);
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & bits) == bits;
}

}  // namespace

std::unique_ptr<OneDnnLinear> OneDnnLinear::Create(int threads, bool emulated,
                                                   std::string* reason) {
  reason->clear();
#if DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP && DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_SEQ
  *reason = "this oneDNN starts threads of its own";
  return nullptr;
#endif
  if (!Has(dnnl::cpu_isa::avx512_core_bf16) && !emulated) return nullptr;
  if (!Has(dnnl::cpu_isa::avx512_core)) {
    *reason = "this CPU has no AVX-512";
    return nullptr;
  }
  constexpr int64_t kFirstIn = 4096;  // A hidden size of many models.
  auto linear = std::make_unique<OneDnnLinearImpl>(threads);
  Scratch scratch;
  if (linear->Find(kFirstIn, kPanel, scratch).tiles.empty()) {
    *reason = "oneDNN bf16 refused:" + linear->refusals();
    return nullptr;
  }
  return linear;
}

}  // namespace resa::kernels::cpu

#endif  // RESA_ONEDNN
#endif  // HWY_ONCE
