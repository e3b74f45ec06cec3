#ifndef RESA_KERNELS_PARAMS_H_
#define RESA_KERNELS_PARAMS_H_

// One plain struct per op of kernels/ops.h, with the shape of everything a pointer points to, and
// the layout of the paged KV pool that the attention ops share.
//
// Names: T rows of the step's ragged batch (all tokens of all segments, flat), D hidden size,
// Hq query heads, Hk KV heads, G = Hq / Hk the group, d head size, V vocabulary, S sequences of the
// step. "Position" is a token's 0-based place in its own sequence.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/tensor.h"

namespace resa::kernels {

// The unit of allocation of the KV pool, in tokens. Blocks (the unit of sparsity) divide it.
inline constexpr int kPageTokens = 16;
inline constexpr int kMaxGroup = 16;
inline constexpr int kMaxHeadDim = 128;

// ---- selection: what lies beside each page and how it is scored -------------------------------

enum class SelectorKind : uint8_t {
  kMinMax,  // The paper's: element-wise bounds of a block's keys, scored with the group-mean query.
  kSketch,  // A rotated few-bit code of every key, scored as approximate attention mass.
};

// A daemon has one selector, since it shapes the pool. Budgets are per request (SparseRow).
struct SelectorSpec {
  SelectorKind kind = SelectorKind::kSketch;
  int block_tokens = 8;  // minmax: 16; sketch: 4, 8 or 16.
  int planes = 3;        // sketch: 1 to 3 bits per component; minmax: 0.
  // sketch, progressive reading: the share of all blocks that survive to be scored with planes 1+2,
  // and of those that survive again, with planes 1+2+3. In (0, 1], second <= first; never below the
  // row's budget. 1.0 reads every block with that plane.
  std::array<float, 2> refine_share = {1.0f, 1.0f};

  friend bool operator==(const SelectorSpec&, const SelectorSpec&) = default;
};

// Bytes of descriptors per (page, KV head).
//   minmax: bf16 kmin[d], then bf16 kmax[d]                            (one block of 16 per page)
//   sketch: u32 words[planes][d / 32][16]: plane p (sign plane first), component j, token t of the
//           page is bit (j % 32) of words[p][j / 32][t]; after the planes, bf16 scale[16], the
//           scale of the finest level. So a vector of words holds the same components of several
//           tokens.
constexpr size_t DescriptorBytes(const SelectorSpec& spec, int head_dim) {
  if (spec.kind == SelectorKind::kMinMax) return static_cast<size_t>(head_dim) * 2 * 2;
  return static_cast<size_t>(kPageTokens) * (static_cast<size_t>(head_dim) / 8 * spec.planes + 2);
}

// Where things are in the pool. Three arrays, each [layer][page][kv_head][...]:
//   K and V: [16][d] of kv_dtype, so one (page, KV head) is one contiguous run;
//   descriptors: DescriptorBytes() bytes.
struct KvLayout {
  int num_layers = 0;
  int64_t num_pages = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  DType kv_dtype = DType::kBF16;
  SelectorSpec selector;

  size_t RunBytes() const {  // One (page, KV head) of K or of V.
    return static_cast<size_t>(kPageTokens) * head_dim * BytesOf(kv_dtype);
  }
  size_t DescriptorRunBytes() const { return DescriptorBytes(selector, head_dim); }
  size_t LayerKvBytes() const {  // K or V of one layer.
    return static_cast<size_t>(num_pages) * num_kv_heads * RunBytes();
  }
  size_t LayerDescriptorBytes() const {
    return static_cast<size_t>(num_pages) * num_kv_heads * DescriptorRunBytes();
  }
  // What one page costs over all layers, K, V and descriptors together.
  size_t PageBytes() const {
    return static_cast<size_t>(num_layers) * num_kv_heads * (2 * RunBytes() + DescriptorRunBytes());
  }
  int BlocksPerPage() const { return kPageTokens / selector.block_tokens; }
};

// One layer's part of the pool.
struct KvLayer {
  std::byte* k = nullptr;            // [num_pages][Hk][16][d] of kv_dtype
  std::byte* v = nullptr;            // same
  std::byte* descriptors = nullptr;  // [num_pages][Hk][DescriptorRunBytes()]
  friend bool operator==(const KvLayer&, const KvLayer&) = default;
};

// Page tables of the step's sequences: entry [s * stride + i] is the page that holds positions
// 16 i .. 16 i + 15 of sequence s. Entries past a sequence's last page are never read.
struct PageTables {
  const int32_t* pages = nullptr;  // [S, stride]
  int64_t stride = 0;
};

// ---- the two lists that attention sees ------------------------------------------------------

// A run of consecutive tokens of one sequence that attends densely and causally to everything up
// to itself: a prefill chunk, a rectification window, or one dense decode row.
struct DenseChunk {
  int32_t row_begin = 0;  // In the flat batch.
  int32_t rows = 0;       // > 0
  int32_t position = 0;   // Of the first row.
  int32_t table = 0;      // Row of PageTables.
};

// One decode row that attends to `keep_blocks` blocks of its sequence.
struct SparseRow {
  int32_t row = 0;       // In the flat batch.
  int32_t position = 0;  // Its own K/V are in the pool before selection: kv_len = position + 1.
  int32_t table = 0;
  int32_t keep_blocks = 0;   // 1 .. number of blocks ceil(kv_len / block_tokens).
  int32_t local_blocks = 0;  // The last ones, always kept; counts inside keep_blocks.
  int32_t sink_blocks = 0;   // The first ones, always kept; counts inside keep_blocks.
  int64_t ids_begin = 0;     // Its ids are at [ids_begin + kv_head * keep_blocks + i].
};

// ---- ops --------------------------------------------------------------------------------------

struct EmbedParams {
  const int32_t* ids = nullptr;  // [T], each in [0, V)
  Matrix table;                  // [V, D] bf16
  Matrix out;                    // [T, D] activation type
};

// out = x / sqrt(mean(x^2) + eps) * weight, mean over the row.
struct RmsNormParams {
  Matrix x;                       // [T, D]
  const float* weight = nullptr;  // [D]
  float eps = 0;
  Matrix out;  // [T, D]; may be x.
};

// out = x weight^T + bias, or out += ... when accumulate (the residual connection).
// A row's result depends on that row and the weight alone, bit for bit, however many rows there
// are.
struct LinearParams {
  Matrix x;                     // [T, in]
  Matrix weight;                // [out, in] bf16
  const float* bias = nullptr;  // [out] or null
  bool accumulate = false;
  Matrix out;  // [T, out]
};

// Products of one x, with what stands before and behind them in a layer: a backend may do it all in
// one pass, or op by op, with the same result within the rounding of activations.
struct LinearsParams {
  std::span<const LinearParams> products;  // 1 to 3, all of the same x.
  // With a weight: x is norm.out, the RmsNorm of norm.x. Whether norm.out is written is left open.
  RmsNormParams norm = {};
  // The products are gate and up [T, F], and gate's out = silu(gate) * up. What up's out then holds
  // is left open.
  bool gated = false;
};

// Cosines and sines of the step's rotary angles, once for all layers:
// out[t][j] = factor * cos(position[t] * inv_freq[j]), the same with sin.
struct RopeTableParams {
  const int32_t* positions = nullptr;  // [T]
  int64_t rows = 0;                    // T
  const float* inv_freq = nullptr;     // [d / 2]
  int head_dim = 0;
  float factor = 1.0f;   // YaRN's attention factor; 1 elsewhere.
  float* cos = nullptr;  // [T, d / 2] out
  float* sin = nullptr;  // [T, d / 2] out
};

// A run of consecutive tokens of one sequence whose K and V enter the pool (any segment).
struct KvRun {
  int32_t row_begin = 0;
  int32_t rows = 0;
  int32_t position = 0;
  int32_t table = 0;
};

// Between the projections and attention: optional q/k RMS norm per head, rotary embedding (the two
// halves of a head form the pairs: (x_j, x_{j + d/2})), K and V into their pages, and the
// descriptors of every block touched rebuilt from the keys in the pool up to the run's last token.
// (Rebuilding is the same as merging when tokens are appended, and is what rectification needs.)
struct QkvPostParams {
  Matrix q;                       // [T, Hq * d], normed and rotated in place
  Matrix k;                       // [T, Hk * d], clobbered
  Matrix v;                       // [T, Hk * d]
  const float* q_norm = nullptr;  // [d] or null
  const float* k_norm = nullptr;  // [d] or null
  float eps = 0;
  const float* cos = nullptr;  // [T, d / 2]
  const float* sin = nullptr;  // [T, d / 2]
  const KvRun* runs = nullptr;
  int64_t num_runs = 0;
  PageTables tables;
  KvLayout layout;
  KvLayer kv;
};

// For each sparse row and KV head the ids of the kept blocks, ascending (id i covers positions
// i * block_tokens ...). Always kept: the first sink_blocks and the last local_blocks; the rest of
// the budget goes to the highest scores, ties to the lower id. The whole group shares the choice.
//
// minmax (arXiv 2506.04108): q = mean over the group's heads, f32; block score
//   s_i = sum_j max(q_j kmin_ij, q_j kmax_ij).
// sketch: keys and queries are rotated by one fixed orthonormal sign flip + Hadamard transform
//   (kernels/sketch.h has the constants). The query is rounded to s8 per head, the dot product with
//   the codes is in integers. Estimated logit of a token with p planes:
//   e = q_scale * token_scale_p * d^-1/2 * sum_j q8_j level_j;  score of a block: for each head the
//   share of its tokens in the attention mass (mass(e) there, about exp(e)) of all tokens of the
//   blocks that were scored, summed over the heads. Read progressively, each pass scores the
//   survivors of the one before with one plane more, and only they take part in its shares and its
//   ranking; the sink and the local blocks always survive.
struct SelectParams {
  Matrix q;  // [T, Hq * d] after QkvPost
  int num_heads = 0;
  const SparseRow* rows = nullptr;
  int64_t num_rows = 0;
  PageTables tables;
  KvLayout layout;
  KvLayer kv;
  int32_t* ids = nullptr;  // out, capacity num_ids
  int64_t num_ids = 0;
};

// Exact softmax attention of each sparse row over the tokens of its kept blocks (those at positions
// <= its own), scale d^-1/2, accumulated in f32 in the order of the id list.
struct SparseAttendParams {
  Matrix q;  // [T, Hq * d]
  int num_heads = 0;
  const SparseRow* rows = nullptr;
  int64_t num_rows = 0;
  const int32_t* ids = nullptr;
  PageTables tables;
  KvLayout layout;
  KvLayer kv;
  Matrix out;  // [T, Hq * d]; only the listed rows are written.
};

// Exact causal attention of each chunk's rows over positions 0 .. own. The order of every
// reduction is fixed by absolute position, so a row's bits do not depend on its chunk.
struct ChunkAttendParams {
  Matrix q;  // [T, Hq * d]
  int num_heads = 0;
  const DenseChunk* chunks = nullptr;
  int64_t num_chunks = 0;
  PageTables tables;
  KvLayout layout;
  KvLayer kv;
  Matrix out;  // [T, Hq * d]; only the listed rows are written.
};

// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).
struct SiluMulParams {
  Matrix gate;  // [T, F]
  Matrix up;    // [T, F]
  Matrix out;   // [T, F]; may be gate.
};

// out[i] = x[rows[i]].
struct GatherRowsParams {
  Matrix x;                       // [T, D]
  const int32_t* rows = nullptr;  // [R]
  Matrix out;                     // [R, D]
};

// Copies whole pages within the pool, all layers, K, V and descriptors (copy on write).
struct CopyPagesParams {
  KvLayout layout;
  const KvLayer* layers = nullptr;  // [num_layers]
  const int32_t* from = nullptr;    // [count]
  const int32_t* to = nullptr;      // [count], disjoint from `from`
  int64_t count = 0;
};

// ---- sampling -----------------------------------------------------------------------------------

// How often a token stands in the prompt and in the output so far; what the penalties look at.
struct TokenCount {
  int32_t id = 0;
  int32_t output_count = 0;
  bool in_prompt = false;
};
struct TokenBias {
  int32_t id = 0;
  float bias = 0;  // Added to the logit; -infinity bans the token.
};

inline constexpr int kMaxTopLogprobs = 20;

// One row to sample. The order: logit_bias, then penalties (repetition over prompt and output:
// positive logits are divided, negative multiplied; presence and frequency over the output:
// subtracted), then temperature, then min_p, top_k, top_p on what is left, then one draw with the
// counter-based generator Philox4x32-10 keyed by (seed, draw_index). temperature 0 takes the
// highest penalised logit, ties to the lower id.
struct SampleRow {
  int32_t row = 0;            // Of logits.
  int32_t forced_token = -1;  // >= 0: taken in place of sampling (teacher forcing).
  float temperature = 1.0f;   // >= 0
  int32_t top_k = 0;          // 0: off
  float top_p = 1.0f;         // (0, 1]
  float min_p = 0.0f;         // [0, 1]
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
  uint64_t draw_index = 0;             // Which output token of the sequence this is.
  int32_t top_logprobs = 0;            // 0 .. kMaxTopLogprobs alternatives to report
  const TokenCount* counts = nullptr;  // [num_counts], any order, ids distinct
  int64_t num_counts = 0;
  const TokenBias* bias = nullptr;  // [num_bias]
  int64_t num_bias = 0;
};

struct SampleResult {
  int32_t token = 0;
  bool finite = true;  // False when a logit is NaN or +infinity, or all are -infinity: token is 0.
  float logprob = 0;   // Of the token, natural log, the model's own: before bias and penalties.
  int32_t num_top = 0;
  std::array<int32_t, kMaxTopLogprobs> top_ids = {};  // By falling logprob, ties to the lower id.
  std::array<float, kMaxTopLogprobs> top_logprobs = {};
};

struct SampleParams {
  Matrix logits;  // [R, V] f32; clobbered
  const SampleRow* rows = nullptr;
  int64_t num_rows = 0;
  SampleResult* out = nullptr;  // [num_rows], host memory
};

// ---- a whole step -------------------------------------------------------------------------------

// The host lists of one step's ops: what Embed, RopeTable, QkvPost, Select, SparseAttend,
// ChunkAttend, GatherRows and Sample are given in the step are these very arrays, so that a device
// backend copies each once and not once per layer.
struct StepLists {
  // Whose step it is: a recording is replayed for nobody else. Anything that tells executors apart.
  const void* owner = nullptr;
  int64_t rows = 0;                    // T
  const int32_t* ids = nullptr;        // [T]
  const int32_t* positions = nullptr;  // [T]
  const KvRun* runs = nullptr;
  int64_t num_runs = 0;
  const SparseRow* sparse_rows = nullptr;
  int64_t num_sparse_rows = 0;
  const DenseChunk* chunks = nullptr;
  int64_t num_chunks = 0;
  PageTables tables = {};
  int64_t num_tables = 0;  // S
  // [S] or null: how many entries of a table are what they were when a step of the same owner last
  // had a table in this row. Null: any may have changed.
  const int32_t* known_pages = nullptr;
  KvLayout layout = {};
  int num_heads = 0;                      // Hq
  const int32_t* sampled_rows = nullptr;  // [R]
  const SampleRow* samples = nullptr;     // [R]
  int64_t num_samples = 0;                // R
  SampleResult* results = nullptr;        // [R], out
  // The ops may be replayed from a recording. Off: each runs when it is called.
  bool may_replay = true;
};

}  // namespace resa::kernels

#endif  // RESA_KERNELS_PARAMS_H_
