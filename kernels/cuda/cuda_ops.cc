#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <sstream>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/chunk_plan.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/cublas_library.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/step_memory.h"
#include "kernels/cuda/weight_memory.h"
#include "kernels/sketch.h"

namespace resa::kernels {
namespace {

using cuda::Context;
using cuda::DeviceStep;
using cuda::StepKey;
using cuda::StepMemory;

// Recordings kept, and how often a step of the same counts must have been seen before it is worth
// one: the first of its kind also makes the workspaces, which a recording cannot.
constexpr size_t kMaxGraphs = 64;
constexpr int kStepsBeforeRecording = 2;
// Rows of the largest step that is recorded. Making a recording takes milliseconds, which a step
// with a prefill chunk seldom brings in: its counts change from step to step, and its kernels are
// long.
constexpr int64_t kMaxRecordedRows = 256;
constexpr size_t kCublasWorkspaceBytes = size_t{32} << 20;

class DeviceBuffer : public Buffer {
 public:
  DeviceBuffer(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}
  ~DeviceBuffer() override { cudaFree(data_); }
  std::byte* data() override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  std::byte* const data_;
  const size_t bytes_;
};

// Pinned host memory and device memory for the results of Sample.
struct ResultMemory {
  SampleResult* host = nullptr;
  SampleResult* device = nullptr;
  int64_t count = 0;
  int generation = 0;

  ~ResultMemory() { Free(); }
  void Free() {
    cudaFreeHost(host);
    cudaFree(device);
  }
  void Reserve(int64_t wanted) {
    if (wanted <= count) return;
    Free();
    count = std::max<int64_t>(wanted, 256);
    const size_t bytes = static_cast<size_t>(count) * sizeof(SampleResult);
    RESA_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&host), bytes));
    RESA_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device), bytes));
    ++generation;
  }
};

struct Graph {
  StepKey key;
  int seen = 0;
  cudaGraphExec_t exec = nullptr;
};

// Blocks and descriptor bytes that Select reads for one row, all KV heads: what SparseRow and the
// shares say, since survivors are counted and not measured.
void CountSelect(const SelectorSpec& spec, const KvLayout& layout, const SparseRow& row,
                 OpCounters* counters) {
  const int64_t blocks = (row.position + int64_t{spec.block_tokens}) / spec.block_tokens;
  const int64_t forced = std::min<int64_t>(blocks, int64_t{row.local_blocks} + row.sink_blocks);
  if (row.keep_blocks == blocks || row.keep_blocks <= forced) return;
  if (spec.kind == SelectorKind::kMinMax) {
    counters->blocks_scored += blocks * layout.num_kv_heads;
    counters->descriptor_bytes +=
        blocks * layout.num_kv_heads * static_cast<int64_t>(layout.DescriptorRunBytes());
    return;
  }
  const int64_t plane_bytes = int64_t{spec.block_tokens} * layout.head_dim / 8;
  const int64_t scale_bytes = int64_t{spec.block_tokens} * 2;
  int64_t scored = blocks;
  counters->blocks_scored += scored * layout.num_kv_heads;
  counters->descriptor_bytes += scored * (plane_bytes + scale_bytes) * layout.num_kv_heads;
  for (int plane = 1; plane < spec.planes; ++plane) {
    scored =
        std::min(scored, SketchRefineCount(spec.refine_share[plane - 1], blocks, row.keep_blocks));
    counters->blocks_scored += scored * layout.num_kv_heads;
    counters->descriptor_bytes += scored * plane_bytes * layout.num_kv_heads;
  }
}

class CudaOps : public Ops {
 public:
  CudaOps(const cuda::DeviceInfo& device, const CudaOptions& options) {
    context_.device = device;
    context_.deterministic = options.deterministic;
    RESA_CUDA_CHECK(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking));
    RESA_CUBLAS_CHECK(cublasLtCreate(&context_.cublas));
    context_.cublas_workspace.Reserve(kCublasWorkspaceBytes);
  }
  ~CudaOps() override {
    cudaStreamSynchronize(context_.stream);
    for (Graph& graph : graphs_) Destroy(&graph);
    cublasLtDestroy(context_.cublas);
    cudaStreamDestroy(context_.stream);
  }

  std::string Description() const override {
    std::ostringstream text;
    text << "cuda:" << context_.device.index << ", " << context_.device.name << ", "
         << context_.device.memory_bytes / (size_t{1} << 30) << " GiB";
    if (context_.deterministic) text << ", deterministic";
    return text.str();
  }
  DType activation_dtype() const override { return DType::kBF16; }
  bool SupportsKvDtype(DType dtype) const override { return dtype == DType::kBF16; }
  Ceilings MeasureCeilings() override { return cuda::MeasureCeilings(context_); }

  std::optional<int64_t> DeviceMemoryFree() const override {
    size_t free = 0;
    size_t total = 0;
    RESA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return static_cast<int64_t>(free);
  }
  std::unique_ptr<Buffer> Allocate(size_t bytes) override {
    std::byte* data = nullptr;
    if (cudaMalloc(reinterpret_cast<void**>(&data), std::max<size_t>(bytes, 1)) != cudaSuccess) {
      (void)cudaGetLastError();  // Being out of memory is the caller's to tell.
      return nullptr;
    }
    return std::make_unique<DeviceBuffer>(data, bytes);
  }
  const std::byte* ImportWeights(const std::byte* host, size_t bytes) override {
    return weights_.Import(host, bytes, context_.stream);
  }
  void Upload(std::byte* to, const void* from_host, size_t bytes) override {
    RESA_CUDA_CHECK(cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, context_.stream));
    RESA_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  }
  void Download(void* to_host, const std::byte* from, size_t bytes) override {
    RESA_CUDA_CHECK(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, context_.stream));
    RESA_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  }

 private:
  // ---- one op ----

  void DoEmbed(const EmbedParams& p) override {
    if (replaying_) return;
    EmbedParams there = p;
    there.ids = p.ids == step_.lists().ids && in_step_
                    ? step_.device().ids
                    : Loose({.rows = p.out.rows, .ids = p.ids}).ids;
    cuda::Embed(context_, there);
  }
  void DoRmsNorm(const RmsNormParams& p) override {
    if (!replaying_) cuda::RmsNorm(context_, p);
  }
  void DoLinear(const LinearParams& p) override { DoLinears({.products = {&p, 1}}); }
  void DoLinears(const LinearsParams& p) override {
    if (!replaying_ && cuda::Linears(context_, p)) ++counters_.linears_fused;
  }
  void DoRopeTable(const RopeTableParams& p) override {
    if (replaying_) return;
    RopeTableParams there = p;
    there.positions = p.positions == step_.lists().positions && in_step_
                          ? step_.device().positions
                          : Loose({.rows = p.rows, .positions = p.positions}).positions;
    cuda::RopeTable(context_, there);
  }
  void DoQkvPost(const QkvPostParams& p) override {
    if (replaying_) return;
    const DeviceStep& step = p.runs == step_.lists().runs && in_step_
                                 ? step_.device()
                                 : Loose({.rows = p.q.rows,
                                          .runs = p.runs,
                                          .num_runs = p.num_runs,
                                          .tables = p.tables,
                                          .layout = p.layout});
    QkvPostParams there = p;
    there.runs = nullptr;
    there.tables = step.tables;
    cuda::QkvPost(context_, there, step.places, step.writes, step.num_writes);
  }
  void DoSelect(const SelectParams& p) override {
    for (int64_t i = 0; i < p.num_rows; ++i) {
      CountSelect(p.layout.selector, p.layout, p.rows[i], &counters_);
    }
    if (replaying_) return;
    const DeviceStep& step = SparseStep(p.rows, p.num_rows, p.tables, p.layout);
    SelectParams there = p;
    there.rows = step.sparse_rows;
    there.tables = step.tables;
    if (p.layout.selector.kind == SelectorKind::kMinMax) {
      cuda::SelectMinMax(context_, there);
    } else {
      cuda::SelectSketch(context_, there);
    }
  }
  void DoSparseAttend(const SparseAttendParams& p) override {
    if (replaying_) return;
    const DeviceStep& step = SparseStep(p.rows, p.num_rows, p.tables, p.layout);
    SparseAttendParams there = p;
    there.rows = step.sparse_rows;
    there.tables = step.tables;
    cuda::DecodeAttend(context_, there, step.sparse_plan);
  }
  void DoChunkAttend(const ChunkAttendParams& p) override {
    if (replaying_) return;
    const bool staged = p.chunks == step_.lists().chunks && in_step_;
    const DeviceStep& step = staged ? step_.device()
                                    : Loose({.rows = p.q.rows,
                                             .chunks = p.chunks,
                                             .num_chunks = p.num_chunks,
                                             .tables = p.tables,
                                             .layout = p.layout});
    if (step.num_single_rows > 0) {
      cuda::DecodeAttend(context_,
                         {.q = p.q,
                          .num_heads = p.num_heads,
                          .rows = step.single_rows,
                          .num_rows = step.num_single_rows,
                          .tables = step.tables,
                          .layout = p.layout,
                          .kv = p.kv,
                          .out = p.out},
                         step.single_plan);
    }
    const std::vector<DenseChunk>& chunks = (staged ? step_ : loose_).multi_row_chunks();
    if (chunks.empty()) return;
    ChunkAttendParams there = p;
    there.chunks = step.chunks;
    there.num_chunks = static_cast<int64_t>(chunks.size());
    there.tables = step.tables;
    cuda::ChunkAttend(context_, there, chunks.data());
  }
  void DoSiluMul(const SiluMulParams& p) override {
    if (!replaying_) cuda::SiluMul(context_, p);
  }
  void DoGatherRows(const GatherRowsParams& p) override {
    if (replaying_) return;
    GatherRowsParams there = p;
    there.rows = p.rows == step_.lists().sampled_rows && in_step_
                     ? step_.device().sampled_rows
                     : Loose({.rows = p.out.rows, .ids = p.rows}).ids;
    cuda::GatherRows(context_, there);
  }
  void DoCopyPages(const CopyPagesParams& p) override {
    const DeviceStep& step = Loose({.rows = p.count, .ids = p.from, .positions = p.to});
    const std::vector<KvLayer> layers(p.layers, p.layers + p.layout.num_layers);
    const size_t bytes = layers.size() * sizeof(KvLayer);
    if (layers != copied_layers_) {
      Upload(layers_.Reserve(bytes), layers.data(), bytes);
      copied_layers_ = layers;
    }
    CopyPagesParams there = p;
    there.layers = reinterpret_cast<const KvLayer*>(layers_.Reserve(bytes));
    there.from = step.ids;
    there.to = step.positions;
    cuda::CopyPages(context_, there);
  }
  void DoSample(const SampleParams& p) override {
    if (replaying_) return;
    SampleParams there = p;
    there.out = nullptr;
    if (p.rows == step_.lists().samples && in_step_) {
      there.rows = step_.device().samples;
      cuda::Sample(context_, there, results_.device);
      return;  // RunStep fetches the results.
    }
    results_.Reserve(p.num_rows);
    there.rows = Loose({.rows = p.num_rows, .samples = p.rows, .num_samples = p.num_rows}).samples;
    cuda::Sample(context_, there, results_.device);
    FetchResults(p.out, p.num_rows);
  }

  // The lists of an op outside of a step.
  const DeviceStep& Loose(const StepLists& lists) {
    StepLists all = lists;
    for (int64_t i = 0; i < lists.num_runs; ++i) {
      all.num_tables = std::max<int64_t>(all.num_tables, lists.runs[i].table + 1);
    }
    for (int64_t i = 0; i < lists.num_sparse_rows; ++i) {
      all.num_tables = std::max<int64_t>(all.num_tables, lists.sparse_rows[i].table + 1);
    }
    for (int64_t i = 0; i < lists.num_chunks; ++i) {
      all.num_tables = std::max<int64_t>(all.num_tables, lists.chunks[i].table + 1);
    }
    loose_.Stage(all, context_.stream);
    return loose_.device();
  }
  const DeviceStep& SparseStep(const SparseRow* rows, int64_t num_rows, const PageTables& tables,
                               const KvLayout& layout) {
    if (rows == step_.lists().sparse_rows && in_step_) return step_.device();
    return Loose(
        {.sparse_rows = rows, .num_sparse_rows = num_rows, .tables = tables, .layout = layout});
  }
  void FetchResults(SampleResult* to, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(SampleResult);
    RESA_CUDA_CHECK(cudaMemcpyAsync(results_.host, results_.device, bytes, cudaMemcpyDeviceToHost,
                                    context_.stream));
    RESA_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
    std::copy(results_.host, results_.host + count, to);
  }

  // ---- a step ----

  void DoRunStep(const StepLists& lists, absl::FunctionRef<void()> issue,
                 absl::FunctionRef<void()> meanwhile) override {
    step_.Stage(lists, context_.stream);
    counters_.page_ids_staged = step_.page_ids_staged();
    const StepKey key = PlanChunks();
    results_.Reserve(lists.num_samples);
    DropStaleGraphs();
    in_step_ = true;
    const bool recordable =
        lists.may_replay && lists.rows <= kMaxRecordedRows && key.chunk_capacity.passes <= 1;
    Graph* const graph = recordable ? FindGraph(key) : nullptr;
    if (graph == nullptr || graph->seen < kStepsBeforeRecording) {
      if (graph != nullptr) ++graph->seen;
      issue();
    } else if (graph->exec == nullptr) {
      Record(graph, issue);
      RESA_CUDA_CHECK(cudaGraphLaunch(graph->exec, context_.stream));
    } else {
      // The device works while the ops are checked and counted.
      RESA_CUDA_CHECK(cudaGraphLaunch(graph->exec, context_.stream));
      replaying_ = true;
      issue();
      replaying_ = false;
      ++counters_.steps_replayed;
    }
    in_step_ = false;
    meanwhile();
    if (lists.num_samples > 0) FetchResults(lists.results, lists.num_samples);
  }

  // Plans the step's chunks, and says what tells its recording apart.
  StepKey PlanChunks() {
    StepKey key = step_.key();
    const std::vector<DenseChunk>& chunks = step_.multi_row_chunks();
    if (chunks.empty()) return key;
    cuda::PlanChunkAttend(context_, chunks.data(), static_cast<int64_t>(chunks.size()),
                          step_.lists().num_heads, step_.lists().layout);
    key.chunk_capacity = context_.chunk_planner->capacity();
    return key;
  }

  void Record(Graph* graph, absl::FunctionRef<void()> issue) {
    RESA_CUDA_CHECK(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal));
    issue();
    cudaGraph_t recorded = nullptr;
    RESA_CUDA_CHECK(cudaStreamEndCapture(context_.stream, &recorded));
    RESA_CUDA_CHECK(cudaGraphInstantiate(&graph->exec, recorded, 0));
    RESA_CUDA_CHECK(cudaGraphDestroy(recorded));
    ++counters_.steps_recorded;
  }

  // The most recently used are in front.
  Graph* FindGraph(const StepKey& key) {
    const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                    [&](const Graph& graph) { return graph.key == key; });
    if (found != graphs_.end()) {
      graphs_.splice(graphs_.begin(), graphs_, found);
      return &graphs_.front();
    }
    if (graphs_.size() == kMaxGraphs) {
      Destroy(&graphs_.back());
      graphs_.splice(graphs_.begin(), graphs_, std::prev(graphs_.end()));
    } else {
      graphs_.emplace_front();
    }
    graphs_.front() = Graph{key, 0, nullptr};
    return &graphs_.front();
  }

  // A recording holds addresses; when memory it used has moved, it is worthless.
  void DropStaleGraphs() {
    const auto& planner = context_.chunk_planner;
    const std::array<int, 9> generations = {step_.generation(),
                                            planner != nullptr ? planner->generation() : 0,
                                            context_.chunk_partials.generation(),
                                            results_.generation,
                                            context_.cublas_workspace.generation(),
                                            context_.decode_partials.generation(),
                                            context_.decode_counters.generation(),
                                            context_.select.generation(),
                                            context_.select_counters.generation()};
    if (generations == generations_) return;
    generations_ = generations;
    for (Graph& graph : graphs_) Destroy(&graph);
  }
  static void Destroy(Graph* graph) {
    if (graph->exec != nullptr) cudaGraphExecDestroy(graph->exec);
    graph->exec = nullptr;
  }

  Context context_;
  cuda::WeightMemory weights_;
  StepMemory step_;
  StepMemory loose_;
  ResultMemory results_;
  cuda::Scratch layers_;  // KvLayer of every layer, for CopyPages, and what it holds.
  std::vector<KvLayer> copied_layers_;

  bool in_step_ = false;
  bool replaying_ = false;
  std::list<Graph> graphs_;
  std::array<int, 9> generations_ = {};
};

// Empty when the device can be used.
std::string WhyNot(int index, cuda::DeviceInfo* info) {
  std::ostringstream why;
  int count = 0;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    why << "cuda:" << index << ": " << cudaGetErrorString(error) << " (built with CUDA "
        << CUDART_VERSION / 1000 << "." << CUDART_VERSION % 1000 / 10 << ", the driver is ";
    if (driver == 0) {
      why << "not there";
    } else {
      why << "for CUDA " << driver / 1000 << "." << driver % 1000 / 10;
    }
    why << ")";
    return why.str();
  }
  if (index < 0 || index >= count) {
    why << "cuda:" << index << ": there " << (count == 1 ? "is 1 device" : "are ");
    if (count != 1) why << count << " devices";
    return why.str();
  }
  cudaDeviceProp properties;
  if (const cudaError_t e = cudaGetDeviceProperties(&properties, index); e != cudaSuccess) {
    return std::string("cudaGetDeviceProperties: ") + cudaGetErrorString(e);
  }
  if (properties.major != 9 || properties.minor != 0) {
    why << "cuda:" << index << " is an " << properties.name << " of compute capability "
        << properties.major << "." << properties.minor
        << "; the kernels are made for 9.0 (H100, H200, GH200)";
    return why.str();
  }
  *info = {.index = index,
           .name = properties.name,
           .sms = properties.multiProcessorCount,
           .l2_bytes = static_cast<size_t>(properties.l2CacheSize),
           .memory_bytes = properties.totalGlobalMem,
           .shared_bytes_per_block = properties.sharedMemPerBlockOptin};
  return "";
}

}  // namespace

int CudaDeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::unique_ptr<Ops> CreateCudaOps(const CudaOptions& options, std::string* why_not) {
  cuda::DeviceInfo device;
  *why_not = WhyNot(options.device, &device);
  if (why_not->empty()) *why_not = cuda::OpenCublas();
  if (!why_not->empty()) return nullptr;
  if (const cudaError_t error = cudaSetDevice(options.device); error != cudaSuccess) {
    *why_not = std::string("cudaSetDevice: ") + cudaGetErrorString(error);
    return nullptr;
  }
  return std::make_unique<CudaOps>(device, options);
}

}  // namespace resa::kernels
