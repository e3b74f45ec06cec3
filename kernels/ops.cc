#include "kernels/ops.h"

#include <algorithm>
#include <span>

#include "kernels/check.h"

namespace resa::kernels {
namespace {

// A matrix that must exist when it has elements, with this many rows and columns.
void CheckMatrix(const char* op, const char* name, const Matrix& m, int64_t rows, int64_t cols) {
  RESA_CHECK(m.rows == rows && m.cols == cols)
      << op << ": " << name << " is [" << m.rows << ", " << m.cols << "], expected [" << rows
      << ", " << cols << "]";
  RESA_CHECK(m.data != nullptr || rows * cols == 0) << op << ": " << name << " has no data";
}

void CheckDtype(const char* op, const char* name, const Matrix& m, DType dtype) {
  RESA_CHECK(m.dtype == dtype) << op << ": " << name << " is " << NameOf(m.dtype) << ", expected "
                               << NameOf(dtype);
}

void CheckSelector(const char* op, const SelectorSpec& spec) {
  if (spec.kind == SelectorKind::kMinMax) {
    RESA_CHECK(spec.block_tokens == kPageTokens && spec.planes == 0)
        << op << ": minmax needs blocks of " << kPageTokens << " tokens and no planes, not "
        << spec.block_tokens << " and " << spec.planes;
    return;
  }
  RESA_CHECK(spec.block_tokens == 4 || spec.block_tokens == 8 || spec.block_tokens == 16)
      << op << ": sketch blocks of " << spec.block_tokens << " tokens, expected 4, 8 or 16";
  RESA_CHECK(spec.planes >= 1 && spec.planes <= 3)
      << op << ": " << spec.planes << " planes, expected 1 to 3";
  RESA_CHECK(spec.refine_share[1] > 0 && spec.refine_share[1] <= spec.refine_share[0] &&
             spec.refine_share[0] <= 1)
      << op << ": refine shares " << spec.refine_share[0] << " and " << spec.refine_share[1]
      << ", expected 0 < second <= first <= 1";
}

void CheckLayout(const char* op, const KvLayout& layout) {
  RESA_CHECK(layout.head_dim == 64 || layout.head_dim == 128)
      << op << ": head size " << layout.head_dim << ", expected 64 or 128";
  RESA_CHECK_GT(layout.num_kv_heads, 0) << op << ": no KV heads";
  CheckSelector(op, layout.selector);
}

void CheckPool(const char* op, const KvLayout& layout, const KvLayer& kv) {
  CheckLayout(op, layout);
  RESA_CHECK(kv.k != nullptr && kv.v != nullptr && kv.descriptors != nullptr)
      << op << ": the pool's layer has no memory";
}

void CheckHeads(const char* op, int num_heads, const KvLayout& layout) {
  RESA_CHECK(num_heads > 0 && num_heads % layout.num_kv_heads == 0 &&
             num_heads / layout.num_kv_heads <= kMaxGroup)
      << op << ": " << num_heads << " query heads on " << layout.num_kv_heads
      << " KV heads, expected a group of 1 to " << kMaxGroup;
}

void CheckTables(const char* op, const PageTables& tables, int32_t table, int64_t tokens) {
  RESA_CHECK(table >= 0) << op << ": page table " << table;
  RESA_CHECK(tables.pages != nullptr && tokens <= tables.stride * kPageTokens)
      << op << ": " << tokens << " tokens in a page table of " << tables.stride << " pages";
}

void CheckSparseRow(const char* op, const SparseRow& row, const SelectorSpec& spec,
                    int64_t batch_rows, const PageTables& tables) {
  RESA_CHECK(row.row >= 0 && row.row < batch_rows) << op << ": row " << row.row;
  RESA_CHECK(row.position >= 0) << op << ": position " << row.position;
  CheckTables(op, tables, row.table, row.position + int64_t{1});
  const int64_t blocks = (row.position + int64_t{spec.block_tokens}) / spec.block_tokens;
  RESA_CHECK(row.keep_blocks >= 1 && row.keep_blocks <= blocks)
      << op << ": keep " << row.keep_blocks << " of " << blocks << " blocks";
  RESA_CHECK(row.local_blocks >= 0 && row.sink_blocks >= 0 &&
             std::min<int64_t>(blocks, int64_t{row.local_blocks} + row.sink_blocks) <=
                 row.keep_blocks)
      << op << ": " << row.local_blocks << " local and " << row.sink_blocks
      << " sink blocks in a budget of " << row.keep_blocks;
  RESA_CHECK_GE(row.ids_begin, 0) << op << ": negative ids_begin";
}

}  // namespace

void Ops::Embed(const EmbedParams& p) {
  CheckMatrix("Embed", "out", p.out, p.out.rows, p.table.cols);
  CheckMatrix("Embed", "table", p.table, p.table.rows, p.table.cols);
  CheckDtype("Embed", "table", p.table, DType::kBF16);
  CheckDtype("Embed", "out", p.out, activation_dtype());
  if (p.out.rows == 0) return;
  RESA_CHECK(p.ids != nullptr) << "Embed: no ids";
  for (int64_t t = 0; t < p.out.rows; ++t) {
    RESA_CHECK(p.ids[t] >= 0 && p.ids[t] < p.table.rows)
        << "Embed: id " << p.ids[t] << " of a vocabulary of " << p.table.rows;
  }
  DoEmbed(p);
}

void Ops::CheckRmsNorm(const RmsNormParams& p) {
  CheckMatrix("RmsNorm", "x", p.x, p.x.rows, p.x.cols);
  CheckMatrix("RmsNorm", "out", p.out, p.x.rows, p.x.cols);
  CheckDtype("RmsNorm", "x", p.x, activation_dtype());
  CheckDtype("RmsNorm", "out", p.out, activation_dtype());
  RESA_CHECK(p.weight != nullptr) << "RmsNorm: no weight";
}

void Ops::RmsNorm(const RmsNormParams& p) {
  CheckRmsNorm(p);
  if (p.x.rows > 0) DoRmsNorm(p);
}

bool Ops::CheckLinear(const LinearParams& p) {
  CheckMatrix("Linear", "x", p.x, p.x.rows, p.weight.cols);
  CheckMatrix("Linear", "weight", p.weight, p.weight.rows, p.weight.cols);
  CheckMatrix("Linear", "out", p.out, p.x.rows, p.weight.rows);
  CheckDtype("Linear", "x", p.x, activation_dtype());
  CheckDtype("Linear", "weight", p.weight, DType::kBF16);
  RESA_CHECK(p.out.dtype == activation_dtype() || p.out.dtype == DType::kF32)
      << "Linear: out is " << NameOf(p.out.dtype);
  RESA_CHECK(p.weight.rows > 0 && p.weight.cols > 0) << "Linear: empty weight";
  if (p.x.rows == 0) return false;
  RESA_CHECK(p.x.data != p.out.data) << "Linear: out may not be x";
  counters_.linear_rows += p.x.rows;
  counters_.linear_flops += 2 * p.x.rows * p.weight.rows * p.weight.cols;
  counters_.weight_bytes += static_cast<int64_t>(p.weight.bytes());
  return true;
}

void Ops::Linear(const LinearParams& p) {
  if (CheckLinear(p)) DoLinear(p);
}

void Ops::Linears(const LinearsParams& params) {
  const std::span<const LinearParams> products = params.products;
  RESA_CHECK(!products.empty() && products.size() <= 3)
      << "Linears: " << products.size() << " products";
  const RmsNormParams& norm = params.norm;
  const bool normed = norm.weight != nullptr;
  if (normed) CheckRmsNorm(norm);
  bool any = false;
  for (const LinearParams& p : products) {
    RESA_CHECK(p.x.data == products[0].x.data && p.x.rows == products[0].x.rows)
        << "Linears: products of different x";
    RESA_CHECK(!normed || (p.x.data == norm.out.data && p.x.rows == norm.out.rows))
        << "Linears: x is not what the norm makes";
    any = CheckLinear(p);
    RESA_CHECK(!any || !normed || p.out.data != norm.x.data) << "Linears: out may not be norm.x";
  }
  if (params.gated) {
    RESA_CHECK(products.size() == 2 && products[0].weight.rows == products[1].weight.rows)
        << "Linears: gate and up are not two of a size";
    for (const LinearParams& p : products) {
      RESA_CHECK(!p.accumulate) << "Linears: gate and up may not accumulate";
      CheckDtype("Linears", "out of gate and up", p.out, activation_dtype());
    }
  }
  if (any) DoLinears(params);
}

void Ops::DoLinears(const LinearsParams& params) {
  if (params.norm.weight != nullptr) DoRmsNorm(params.norm);
  for (const LinearParams& p : params.products) DoLinear(p);
  if (!params.gated) return;
  const Matrix& gate = params.products[0].out;
  DoSiluMul({.gate = gate, .up = params.products[1].out, .out = gate});
}

void Ops::RopeTable(const RopeTableParams& p) {
  RESA_CHECK(p.head_dim == 64 || p.head_dim == 128) << "RopeTable: head size " << p.head_dim;
  if (p.rows == 0) return;
  RESA_CHECK(p.positions != nullptr && p.inv_freq != nullptr && p.cos != nullptr &&
             p.sin != nullptr)
      << "RopeTable: a pointer is null";
  DoRopeTable(p);
}

void Ops::QkvPost(const QkvPostParams& p) {
  CheckPool("QkvPost", p.layout, p.kv);
  const int64_t d = p.layout.head_dim;
  RESA_CHECK(p.q.cols % d == 0) << "QkvPost: q has " << p.q.cols << " columns, head size " << d;
  CheckHeads("QkvPost", static_cast<int>(p.q.cols / d), p.layout);
  CheckMatrix("QkvPost", "q", p.q, p.q.rows, p.q.cols);
  CheckMatrix("QkvPost", "k", p.k, p.q.rows, d * p.layout.num_kv_heads);
  CheckMatrix("QkvPost", "v", p.v, p.q.rows, d * p.layout.num_kv_heads);
  CheckDtype("QkvPost", "q", p.q, activation_dtype());
  CheckDtype("QkvPost", "k", p.k, activation_dtype());
  CheckDtype("QkvPost", "v", p.v, activation_dtype());
  RESA_CHECK(SupportsKvDtype(p.layout.kv_dtype)) << "QkvPost: " << NameOf(p.layout.kv_dtype);
  if (p.num_runs == 0) return;
  RESA_CHECK(p.runs != nullptr && p.cos != nullptr && p.sin != nullptr)
      << "QkvPost: a pointer is null";
  for (int64_t i = 0; i < p.num_runs; ++i) {
    const KvRun& run = p.runs[i];
    RESA_CHECK(run.rows > 0 && run.row_begin >= 0 &&
               int64_t{run.row_begin} + run.rows <= p.q.rows && run.position >= 0)
        << "QkvPost: run " << i << " of " << run.rows << " rows at " << run.row_begin
        << ", position " << run.position << ", in a batch of " << p.q.rows;
    CheckTables("QkvPost", p.tables, run.table, int64_t{run.position} + run.rows);
  }
  DoQkvPost(p);
}

void Ops::Select(const SelectParams& p) {
  CheckPool("Select", p.layout, p.kv);
  CheckHeads("Select", p.num_heads, p.layout);
  CheckMatrix("Select", "q", p.q, p.q.rows, int64_t{p.num_heads} * p.layout.head_dim);
  CheckDtype("Select", "q", p.q, activation_dtype());
  if (p.num_rows == 0) return;
  RESA_CHECK(p.rows != nullptr && p.ids != nullptr) << "Select: a pointer is null";
  for (int64_t i = 0; i < p.num_rows; ++i) {
    CheckSparseRow("Select", p.rows[i], p.layout.selector, p.q.rows, p.tables);
    RESA_CHECK_LE(p.rows[i].ids_begin + int64_t{p.rows[i].keep_blocks} * p.layout.num_kv_heads,
                  p.num_ids)
        << "Select: ids of row " << i << " past the end";
  }
  DoSelect(p);
}

void Ops::SparseAttend(const SparseAttendParams& p) {
  CheckPool("SparseAttend", p.layout, p.kv);
  CheckHeads("SparseAttend", p.num_heads, p.layout);
  CheckMatrix("SparseAttend", "q", p.q, p.q.rows, int64_t{p.num_heads} * p.layout.head_dim);
  CheckMatrix("SparseAttend", "out", p.out, p.q.rows, p.q.cols);
  CheckDtype("SparseAttend", "q", p.q, activation_dtype());
  CheckDtype("SparseAttend", "out", p.out, activation_dtype());
  if (p.num_rows == 0) return;
  RESA_CHECK(p.rows != nullptr && p.ids != nullptr) << "SparseAttend: a pointer is null";
  for (int64_t i = 0; i < p.num_rows; ++i) {
    CheckSparseRow("SparseAttend", p.rows[i], p.layout.selector, p.q.rows, p.tables);
    counters_.sparse_blocks_read += int64_t{p.rows[i].keep_blocks} * p.layout.num_kv_heads;
  }
  counters_.sparse_rows += p.num_rows;
  DoSparseAttend(p);
}

void Ops::ChunkAttend(const ChunkAttendParams& p) {
  CheckPool("ChunkAttend", p.layout, p.kv);
  CheckHeads("ChunkAttend", p.num_heads, p.layout);
  CheckMatrix("ChunkAttend", "q", p.q, p.q.rows, int64_t{p.num_heads} * p.layout.head_dim);
  CheckMatrix("ChunkAttend", "out", p.out, p.q.rows, p.q.cols);
  CheckDtype("ChunkAttend", "q", p.q, activation_dtype());
  CheckDtype("ChunkAttend", "out", p.out, activation_dtype());
  if (p.num_chunks == 0) return;
  RESA_CHECK(p.chunks != nullptr) << "ChunkAttend: no chunks";
  for (int64_t i = 0; i < p.num_chunks; ++i) {
    const DenseChunk& chunk = p.chunks[i];
    RESA_CHECK(chunk.rows > 0 && chunk.row_begin >= 0 &&
               int64_t{chunk.row_begin} + chunk.rows <= p.q.rows && chunk.position >= 0)
        << "ChunkAttend: chunk " << i << " of " << chunk.rows << " rows at " << chunk.row_begin
        << ", position " << chunk.position << ", in a batch of " << p.q.rows;
    CheckTables("ChunkAttend", p.tables, chunk.table, int64_t{chunk.position} + chunk.rows);
    const int64_t rows = chunk.rows;
    counters_.dense_rows += rows;
    counters_.dense_tokens_attended +=
        (rows * (int64_t{chunk.position} + 1) + rows * (rows - 1) / 2) * p.layout.num_kv_heads;
  }
  DoChunkAttend(p);
}

void Ops::SiluMul(const SiluMulParams& p) {
  CheckMatrix("SiluMul", "gate", p.gate, p.out.rows, p.out.cols);
  CheckMatrix("SiluMul", "up", p.up, p.out.rows, p.out.cols);
  CheckMatrix("SiluMul", "out", p.out, p.out.rows, p.out.cols);
  CheckDtype("SiluMul", "gate", p.gate, activation_dtype());
  CheckDtype("SiluMul", "up", p.up, activation_dtype());
  CheckDtype("SiluMul", "out", p.out, activation_dtype());
  if (p.out.rows > 0) DoSiluMul(p);
}

void Ops::GatherRows(const GatherRowsParams& p) {
  CheckMatrix("GatherRows", "out", p.out, p.out.rows, p.x.cols);
  CheckMatrix("GatherRows", "x", p.x, p.x.rows, p.x.cols);
  CheckDtype("GatherRows", "out", p.out, p.x.dtype);
  if (p.out.rows == 0) return;
  RESA_CHECK(p.rows != nullptr) << "GatherRows: no rows";
  for (int64_t i = 0; i < p.out.rows; ++i) {
    RESA_CHECK(p.rows[i] >= 0 && p.rows[i] < p.x.rows)
        << "GatherRows: row " << p.rows[i] << " of " << p.x.rows;
  }
  DoGatherRows(p);
}

void Ops::CopyPages(const CopyPagesParams& p) {
  CheckLayout("CopyPages", p.layout);
  if (p.count == 0) return;
  RESA_CHECK(p.layers != nullptr && p.from != nullptr && p.to != nullptr)
      << "CopyPages: a pointer is null";
  for (int64_t i = 0; i < p.count; ++i) {
    RESA_CHECK(p.from[i] >= 0 && p.from[i] < p.layout.num_pages && p.to[i] >= 0 &&
               p.to[i] < p.layout.num_pages && p.from[i] != p.to[i])
        << "CopyPages: page " << p.from[i] << " to " << p.to[i] << " in a pool of "
        << p.layout.num_pages;
  }
  DoCopyPages(p);
}

void Ops::Sample(const SampleParams& p) {
  CheckMatrix("Sample", "logits", p.logits, p.logits.rows, p.logits.cols);
  CheckDtype("Sample", "logits", p.logits, DType::kF32);
  if (p.num_rows == 0) return;
  RESA_CHECK(p.rows != nullptr && p.out != nullptr) << "Sample: a pointer is null";
  const int64_t vocabulary = p.logits.cols;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const SampleRow& row = p.rows[i];
    RESA_CHECK(row.row >= 0 && row.row < p.logits.rows) << "Sample: row " << row.row;
    RESA_CHECK(row.forced_token < vocabulary) << "Sample: forced token " << row.forced_token;
    RESA_CHECK(row.temperature >= 0 && row.top_k >= 0 && row.top_p > 0 && row.top_p <= 1 &&
               row.min_p >= 0 && row.min_p <= 1 && row.repetition_penalty > 0)
        << "Sample: temperature " << row.temperature << ", top_k " << row.top_k << ", top_p "
        << row.top_p << ", min_p " << row.min_p << ", repetition_penalty "
        << row.repetition_penalty;
    RESA_CHECK(row.top_logprobs >= 0 && row.top_logprobs <= kMaxTopLogprobs)
        << "Sample: " << row.top_logprobs << " top logprobs";
    RESA_CHECK((row.num_counts == 0 || row.counts != nullptr) &&
               (row.num_bias == 0 || row.bias != nullptr))
        << "Sample: counts or bias missing";
    for (int64_t j = 0; j < row.num_counts; ++j) {
      RESA_CHECK(row.counts[j].id >= 0 && row.counts[j].id < vocabulary)
          << "Sample: count of token " << row.counts[j].id;
    }
    for (int64_t j = 0; j < row.num_bias; ++j) {
      RESA_CHECK(row.bias[j].id >= 0 && row.bias[j].id < vocabulary)
          << "Sample: bias of token " << row.bias[j].id;
    }
  }
  DoSample(p);
}

void Ops::RunStep(const StepLists& lists, absl::FunctionRef<void()> issue,
                  absl::FunctionRef<void()> meanwhile) {
  RESA_CHECK_GT(lists.rows, 0) << "RunStep: no rows";
  RESA_CHECK(lists.ids != nullptr && lists.positions != nullptr) << "RunStep: a pointer is null";
  CheckLayout("RunStep", lists.layout);
  RESA_CHECK(lists.num_samples == 0 || (lists.sampled_rows != nullptr && lists.samples != nullptr &&
                                        lists.results != nullptr))
      << "RunStep: samples without lists";
  RESA_CHECK(lists.num_chunks == 0 ||
             (lists.num_heads > 0 && lists.num_heads % lists.layout.num_kv_heads == 0))
      << "RunStep: chunks of " << lists.num_heads << " heads";
  DoRunStep(lists, issue, meanwhile);
}

}  // namespace resa::kernels
