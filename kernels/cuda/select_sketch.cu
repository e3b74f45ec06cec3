// The sketch selector: an estimated logit for every token from its few-bit code, a block's score
// the attention mass that the estimates give it (params.h), and the exact top-k of select_topk.cuh.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk]{u32 words[planes][d / 32][16], bf16 scale[16]},
//   pages through the page table; ids [row][KV head][keep] out.
//
// A cluster of CTAs has one (row, KV head), each CTA a contiguous range of chunks of 128 tokens,
// each of its warps a chunk at a time, read from memory to registers one chunk ahead. The masses of
// a block, one per head, stay in shared memory until the cluster knows every head's total; then
// they become one score per block. When a CTA's part does not fit it lies in global scratch.
//
// Progressive reading is a loop of such passes: the ids that one pass keeps are a list in global
// scratch, which the next one cuts anew among the CTAs and reads with one plane more.
//
// A row's choice does not depend on the batch, although the number of CTAs does: masses are
// relative to a base that the row's own tokens at fixed places give, chunks are cut at fixed
// places, and totals over chunks are sums of integers.
//
// Bound: the bytes of the planes read at the device's read bandwidth, plus 4 us.

#include <cooperative_groups.h>

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/select_sketch_score.cuh"
#include "kernels/cuda/select_topk.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkSteps = 4;
constexpr int kChunkTokens = kChunkSteps * kStepTokens;
constexpr int kChunkQuarters = kChunkTokens / kQuarterTokens;

struct SketchArgs {
  const uint16_t* q;
  const SparseRow* rows;
  PageTables tables;
  const std::byte* descriptors;
  int32_t* ids;
  std::byte* mass_scratch;    // [row][KV head][CTA][scratch_bytes], for CTAs whose part is large.
  int32_t* survivor_scratch;  // [row][KV head][2][survivor_stride]
  int64_t scratch_bytes;
  int64_t survivor_stride;
  int shared_bytes;  // For masses and keys.
  int num_kv_heads;
  int group;
  int block_tokens;
  int run_bytes;                      // DescriptorRunBytes()
  int scales_at;                      // Bytes before the scales.
  float ratio[kSketchMaxPlanes + 1];  // Of the scale of p planes to the stored one.
  float refine_share[2];
};

// A total over chunks, exact whatever the order of additions: in units of 2^-24 and 2^-74.
struct Total {
  unsigned long long upper = 0;
  unsigned long long lower = 0;

  __device__ __forceinline__ void Add(float x) {  // 0 <= x < 256
    const float units = floorf(x * 0x1p24f);
    upper += static_cast<uint32_t>(units);
    lower += __float2ull_rn(fmaf(units, -0x1p-24f, x) * 0x1p74f);
  }
  __device__ __forceinline__ void Add(const Total& other) {
    upper += other.upper;
    lower += other.lower;
  }
  __device__ __forceinline__ double Value() const {
    return static_cast<double>(upper) * 0x1p-24 + static_cast<double>(lower) * 0x1p-74;
  }
};

// At the same place in every CTA of the cluster.
struct SketchShared {
  TopKShared topk;
  SketchQueries queries;
  Total totals[kMaxGroup];   // Of this CTA; others read them.
  uint32_t saturated;        // Others read it.
  float largest[kMaxGroup];  // Estimate, in octaves; others read it.
  float base[kMaxGroup];
  float warp_largest[kWarps][kMaxGroup];
  float weight[kMaxGroup];  // What a head's masses are multiplied by.
};

// What a pass scores: all blocks of a row in order, or those of a list.
struct SketchSource {
  const int32_t* pages;          // Of the sequence.
  const int32_t* list;           // Null: all blocks.
  const std::byte* descriptors;  // Of the KV head, of page 0.
  int64_t page_bytes;
  int scales_at;
  int quarter_shift;  // log2 of the quarters of a page in a block.
  int blocks;
  int tokens;

  __device__ __forceinline__ int Chunks() const {
    return (tokens + kChunkTokens - 1) / kChunkTokens;
  }
};

// Where the blocks of a chunk lie, block i of it in lane i: page * 4 + quarter of the page. Without
// a list the blocks may as well be pages.
__device__ __forceinline__ int LoadPlaces(const SketchSource& source, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int shift = source.list == nullptr ? 2 : source.quarter_shift;
  const int per_chunk = kChunkQuarters >> shift;
  const int count =
      source.list == nullptr ? (source.tokens + kPageTokens - 1) / kPageTokens : source.blocks;
  int block = min(chunk * per_chunk + min(lane, per_chunk - 1), count - 1);
  if (source.list != nullptr) block = source.list[block];
  const int quarter = block << shift;
  return source.pages[quarter / 4] * 4 + quarter % 4;
}

template <int kDim, int kPlanes>
__device__ __forceinline__ void LoadStep(const SketchSource& source, int places, int step,
                                         SketchWords<kPlanes>* words) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int shift = source.list == nullptr ? 2 : source.quarter_shift;
  const int row = lane / 4;
  const int place = __shfl_sync(~0u, places, (step * 8 + row) >> shift);
  const int quarter = place % 4 + (row & ((1 << shift) - 1));
  const std::byte* const run = source.descriptors + (place / 4) * source.page_bytes;
  const std::byte* const at = run + lane % (kDim / 32) * 64 + quarter * 16;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) words->plane[p] = LoadOnce16(at + p * (kDim * 2));
  words->scales = LoadOnce8(run + source.scales_at + quarter * 8);
}

// What a lane needs of the heads tile * 8 + lane % 4 * 2 + {0, 1}.
template <int kTiles>
struct LaneHeads {
  int start[kTiles][2];
  float factor[kTiles][2];
  float offset[kTiles][2];

  template <int kPlanes>
  __device__ __forceinline__ void Load(const SketchQueries& queries, const float* base, int group,
                                       float ratio) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i;
        const float octaves = queries.octaves[head] * ratio / 8.0f;
        start[tile][i] = SketchStart<kPlanes>(queries, head);
        factor[tile][i] = head < group ? octaves / kWindowOctaves : 0.0f;
        offset[tile][i] = head < group ? (127.0f - base[head]) / kWindowOctaves : -1.0f;
      }
    }
  }
};

// Where a CTA keeps masses and keys: [head][stride] each.
struct MassMemory {
  uint32_t* keys;
  uint16_t* upper;
  uint8_t* lower;
  int stride;  // 4 past a multiple of 64: the heads' parts begin in different banks.

  __device__ __forceinline__ static int StrideFor(int blocks) {
    return (blocks + 63) / 64 * 64 + 4;
  }
  __device__ __forceinline__ static int BytesFor(int blocks, int group) {
    return StrideFor(blocks) * (4 + 3 * group);
  }
  __device__ __forceinline__ static MassMemory At(std::byte* memory, int blocks, int group) {
    MassMemory out;
    out.stride = StrideFor(blocks);
    out.keys = reinterpret_cast<uint32_t*>(memory);
    out.upper = reinterpret_cast<uint16_t*>(out.keys + out.stride);
    out.lower = reinterpret_cast<uint8_t*>(out.upper + static_cast<int64_t>(out.stride) * group);
    return out;
  }
  __device__ __forceinline__ void Store(int head, int block, float mass) const {
    const uint32_t bits = PackMass(mass);
    upper[head * stride + block] = static_cast<uint16_t>(bits >> 8);
    lower[head * stride + block] = static_cast<uint8_t>(bits);
  }
};

// Calls step(words, chunk, step, valid tokens of the lane) for the steps of chunks first, first +
// stride .. of [.., end), and chunk_end() after each chunk.
template <int kDim, int kPlanes, typename Step, typename ChunkEnd>
__device__ __forceinline__ void ForSteps(const SketchSource& source, int first, int end, int stride,
                                         const Step& step, const ChunkEnd& chunk_end) {
  if (first >= end) return;
  constexpr int kDepth = kPlanes == 3 ? 2 : 4;  // Steps in flight.
  const int quarter = static_cast<int>(threadIdx.x) % 32 / 4;
  int places = LoadPlaces(source, first);
  int next_places = first + stride < end ? LoadPlaces(source, first + stride) : 0;
  SketchWords<kPlanes> words[kDepth];
#pragma unroll
  for (int j = 0; j < kDepth; ++j) LoadStep<kDim>(source, places, j, &words[j]);
#pragma unroll 1
  for (int chunk = first; chunk < end; chunk += stride) {
    const int left = source.tokens - chunk * kChunkTokens - quarter * kQuarterTokens;
    const bool more = chunk + stride < end;
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) {
      step(words[j % kDepth], chunk, j, left - j * kStepTokens);
      const int ahead = j + kDepth;
      if (ahead < kChunkSteps) {
        LoadStep<kDim>(source, places, ahead, &words[j % kDepth]);
      } else if (more) {
        LoadStep<kDim>(source, next_places, ahead - kChunkSteps, &words[j % kDepth]);
      }
    }
    chunk_end();
    places = next_places;
    if (chunk + 2 * stride < end) next_places = LoadPlaces(source, chunk + 2 * stride);
  }
}

// Masses of the blocks of a CTA's chunks [begin, end), and the CTA's totals of the heads.
template <int kDim, int kTiles, int kPlanes>
__device__ __forceinline__ void ScoreChunks(const SketchSource& source, int begin, int end,
                                            int group, const SketchOperand<kDim, kTiles>& operand,
                                            const LaneHeads<kTiles>& heads,
                                            const MassMemory& memory, SketchShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int quarter = lane / 4;
  const bool odd = (quarter & 1) != 0;
  const int head = lane % 4 * 2 + (odd ? 1 : 0);  // After the exchange.
  float chunk_sum[kTiles] = {};
  Total totals[kTiles];
  bool saturated = false;

  const auto step = [&](const SketchWords<kPlanes>& words, int chunk, int j, int valid) {
    float products[kTiles][4][2];
    SketchProducts<kDim, kTiles, kPlanes>(words, operand, heads.start, products);
    float scales[4];
    SketchScales(words.scales, valid, scales);
    const int block =
        (((chunk - begin) * kChunkQuarters + j * 8 + quarter) >> source.quarter_shift);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float sums[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float mass[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float scaled = fmaf(products[tile][t][i], scales[t], -kSumOriginValue * scales[t]);
          mass[t] = SketchMass(scaled, heads.factor[tile][i], heads.offset[tile][i]);
        }
        sums[i] = (mass[0] + mass[1]) + (mass[2] + mass[3]);
      }
      // Pairs of lanes bring their quarters together, a head each.
      float sum = odd ? sums[1] : sums[0];
      sum += __shfl_xor_sync(~0u, odd ? sums[0] : sums[1], 4);
      chunk_sum[tile] += sum;
      if (source.quarter_shift == 0) {
        const int first = tile * 8 + lane % 4 * 2;
        if (first < group) memory.Store(first, block, sums[0]);
        if (first + 1 < group) memory.Store(first + 1, block, sums[1]);
      } else {
        if (source.quarter_shift == 2) sum += __shfl_xor_sync(~0u, sum, 8);
        if (tile * 8 + head < group) memory.Store(tile * 8 + head, block, sum);
      }
    }
  };
  const auto chunk_end = [&] {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      saturated = saturated || !(chunk_sum[tile] < kSaturated);
      totals[tile].Add(chunk_sum[tile]);
      chunk_sum[tile] = 0;
    }
  };
  const int warp = static_cast<int>(threadIdx.x) / 32;
  ForSteps<kDim, kPlanes>(source, begin + warp, end, kWarps, step, chunk_end);

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int bit = 8; bit < 32; bit *= 2) {
      totals[tile].upper += __shfl_xor_sync(~0u, totals[tile].upper, bit);
      totals[tile].lower += __shfl_xor_sync(~0u, totals[tile].lower, bit);
    }
    if (lane < 8) {
      atomicAdd(&shared.totals[tile * 8 + head].upper, totals[tile].upper);
      atomicAdd(&shared.totals[tile * 8 + head].lower, totals[tile].lower);
    }
  }
  if (saturated) shared.saturated = 1;
}

// The largest estimate of each head, in octaves, over chunks first, first + stride .. of [.., end)
// of this warp: shared.warp_largest.
template <int kDim, int kTiles, int kPlanes>
__device__ __forceinline__ void LargestOfSteps(const SketchSource& source, int first, int end,
                                               int stride,
                                               const SketchOperand<kDim, kTiles>& operand,
                                               const LaneHeads<kTiles>& heads,
                                               SketchShared& shared) {
  float largest[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    largest[tile][0] = largest[tile][1] = -INFINITY;
  }
  const auto step = [&](const SketchWords<kPlanes>& words, int, int, int valid) {
    float products[kTiles][4][2];
    SketchProducts<kDim, kTiles, kPlanes>(words, operand, heads.start, products);
    float scales[4];
    SketchScales(words.scales, valid, scales);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scaled = fmaf(products[tile][t][i], scales[t], -kSumOriginValue * scales[t]);
          largest[tile][i] = fmaxf(largest[tile][i], scaled * heads.factor[tile][i]);
        }
      }
    }
  };
  ForSteps<kDim, kPlanes>(source, first, end, stride, step, [] {});
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = largest[tile][i];
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
      if (lane < 4) shared.warp_largest[warp][tile * 8 + lane * 2 + i] = x * kWindowOctaves;
    }
  }
}

// The base of a head whose largest estimate is this: any whole number when none counts.
__device__ __forceinline__ float BaseFor(float largest, float headroom) {
  return largest > -1e30f ? ceilf(largest) + headroom : 0.0f;
}

// shared.base of all heads: from one chunk per warp, spread over the row (`exact` false), or from
// all of the cluster's chunks.
template <int kDim, int kTiles, int kPlanes>
__device__ __forceinline__ void FindBases(const SketchSource& source, int begin, int end,
                                          bool exact, int group, float ratio,
                                          const SketchOperand<kDim, kTiles>& operand,
                                          SketchShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  LaneHeads<kTiles> heads;
  heads.template Load<kPlanes>(shared.queries, shared.base, group, ratio);
  if (!exact) {
    const int chunk =
        static_cast<int>(static_cast<int64_t>(source.Chunks() - 1) * warp / (kWarps - 1));
    LargestOfSteps<kDim, kTiles, kPlanes>(source, chunk, chunk + 1, 1, operand, heads, shared);
  } else {
    LargestOfSteps<kDim, kTiles, kPlanes>(source, begin + warp, end, kWarps, operand, heads,
                                          shared);
  }
  __syncthreads();
  float largest = -INFINITY;
  if (thread < kTiles * 8) {
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.warp_largest[w][thread]);
    shared.largest[thread] = largest;
  }
  if (exact) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    if (thread < kTiles * 8) {
      for (unsigned r = 0; r < cluster.num_blocks(); ++r) {
        largest = fmaxf(largest, *cluster.map_shared_rank(&shared.largest[thread], r));
      }
    }
    cluster.sync();
  }
  // With the largest of all known, a row's tokens together stay below the bound on sums.
  if (thread < kTiles * 8) shared.base[thread] = BaseFor(largest, kHeadroomOctaves);
  __syncthreads();
}

// Scores of the CTA's blocks, as keys.
__device__ __forceinline__ void FoldMasses(const MassMemory& memory, int blocks, int group,
                                           const float* weights) {
  for (int i = static_cast<int>(threadIdx.x) * 4; i < blocks; i += kThreads * 4) {
    float score[4] = {};
    for (int h = 0; h < group; ++h) {
      const uint2 upper = *reinterpret_cast<const uint2*>(memory.upper + h * memory.stride + i);
      const uint32_t lower =
          *reinterpret_cast<const uint32_t*>(memory.lower + h * memory.stride + i);
      const float weight = weights[h];
      const uint32_t packed[4] = {
          __byte_perm(upper.x, lower, 0x7104), __byte_perm(upper.x, lower, 0x7325),
          __byte_perm(upper.y, lower, 0x7106), __byte_perm(upper.y, lower, 0x7327)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // The byte above the 24 bits is shifted out but for its lowest bit, the sign.
        score[j] = fmaf(fabsf(__uint_as_float(packed[j] << 7)), weight, score[j]);
      }
    }
    *reinterpret_cast<uint4*>(memory.keys + i) =
        make_uint4(__float_as_uint(score[0]), __float_as_uint(score[1]), __float_as_uint(score[2]),
                   __float_as_uint(score[3]));
  }
}

// The number of blocks that the pass with `planes` scores when one before it scored all.
__device__ __forceinline__ int RefineCount(const SketchArgs& args, const TopKBudget& budget,
                                           int planes) {
  const double share = args.refine_share[planes - 2];
  const int wanted = static_cast<int>(ceil(share * static_cast<double>(budget.blocks)));
  return min(max(wanted, budget.keep), budget.blocks);
}

// A unit's passes.
template <int kDim, int kTiles, int kLastPlanes>
struct SketchUnit {
  const SketchArgs& args;
  SketchShared& shared;
  std::byte* memory;  // Shared, of args.shared_bytes.
  SparseRow row;
  TopKBudget budget;
  int unit;
  int kv_head;
  int rank;
  int size;  // Of the cluster.
  int32_t* ids;

  __device__ __forceinline__ int32_t* List(int planes) const {
    return args.survivor_scratch +
           (static_cast<int64_t>(unit) * 2 + planes % 2) * args.survivor_stride;
  }

  __device__ __forceinline__ SketchSource SourceOf(int planes, bool first) const {
    const int quarters = args.block_tokens / kQuarterTokens;
    SketchSource source;
    source.pages = args.tables.pages + row.table * args.tables.stride;
    source.list = first ? nullptr : List(planes);
    source.descriptors = args.descriptors + static_cast<int64_t>(kv_head) * args.run_bytes;
    source.page_bytes = static_cast<int64_t>(args.num_kv_heads) * args.run_bytes;
    source.scales_at = args.scales_at;
    source.quarter_shift = quarters == 4 ? 2 : quarters - 1;
    source.blocks = first ? budget.blocks : RefineCount(args, budget, planes);
    source.tokens = row.position + 1;
    if (!first) {
      // Only the row's last block may be short; it comes last.
      const bool has_last = source.list[source.blocks - 1] == budget.blocks - 1;
      const int missing = budget.blocks * args.block_tokens - source.tokens;
      source.tokens = source.blocks * args.block_tokens - (has_last ? missing : 0);
    }
    return source;
  }

  // Scores the source's chunks [begin, end) of this CTA, and leaves shared.weight.
  template <int kPlanes>
  __device__ __forceinline__ void Score(const SketchSource& source, int begin, int end,
                                        const MassMemory& masses) {
    const auto cluster = cooperative_groups::this_cluster();
    const int thread = static_cast<int>(threadIdx.x);
    const float ratio = args.ratio[kPlanes];
    SketchOperand<kDim, kTiles> operand;
    operand.Load(shared.queries);
    for (bool exact = false;; exact = true) {
      FindBases<kDim, kTiles, kPlanes>(source, begin, end, exact, args.group, ratio, operand,
                                       shared);
      if (thread < kMaxGroup) shared.totals[thread] = Total();
      if (thread == 0) shared.saturated = 0;
      __syncthreads();
      LaneHeads<kTiles> heads;
      heads.template Load<kPlanes>(shared.queries, shared.base, args.group, ratio);
      ScoreChunks<kDim, kTiles, kPlanes>(source, begin, end, args.group, operand, heads, masses,
                                         shared);
      cluster.sync();
      bool saturated = false;
      for (int r = 0; r < size; ++r) {
        saturated = saturated || *cluster.map_shared_rank(&shared.saturated, r) != 0;
      }
      if (exact || !saturated) break;
      cluster.sync();
    }
    if (thread < args.group) {
      Total total;
      for (int r = 0; r < size; ++r) {
        total.Add(*cluster.map_shared_rank(&shared.totals[thread], r));
      }
      const double value = total.Value();
      shared.weight[thread] = value > 0 ? static_cast<float>(1.0 / value) : 0.0f;
    }
    __syncthreads();
  }

  template <int kPlanes>
  __device__ __forceinline__ void Pass(bool first) {
    const SketchSource source = SourceOf(kPlanes, first);
    const int per_cta = (source.Chunks() + size - 1) / size;
    const int begin = min(source.Chunks(), rank * per_cta);
    const int end = min(source.Chunks(), begin + per_cta);
    const int chunk_blocks = kChunkQuarters >> source.quarter_shift;
    const TopKRange range = {
        min(source.blocks, begin * chunk_blocks),
        min(source.blocks, end * chunk_blocks) - min(source.blocks, begin * chunk_blocks)};
    const int most = per_cta * chunk_blocks;
    const bool fits = MassMemory::BytesFor(most, args.group) <= args.shared_bytes;
    std::byte* const scratch =
        args.mass_scratch + (static_cast<int64_t>(unit) * size + rank) * args.scratch_bytes;
    const MassMemory masses = MassMemory::At(fits ? memory : scratch, most, args.group);

    Score<kPlanes>(source, begin, end, masses);
    FoldMasses(masses, range.count, args.group, shared.weight);

    TopKBudget pass = budget;
    pass.blocks = source.blocks;
    int32_t* out = ids;
    if constexpr (kPlanes < kLastPlanes) {
      pass.keep = RefineCount(args, budget, kPlanes + 1);
      out = List(kPlanes + 1);
    }
    const auto key_at = [&](int i) { return masses.keys[i]; };
    const TopKCut cut = FindTopKCut<kThreads, true>(shared.topk, key_at, range, pass);
    out += cut.Offset();
    const int kept = WriteTopKIds<kThreads>(shared.topk, key_at, range, pass, cut, out);
    if (!first) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kept; i += kThreads) {
        out[i] = source.list[out[i]];
      }
    }
    FinishTopK<true>();
    if constexpr (kPlanes < kLastPlanes) cooperative_groups::this_cluster().sync();
  }
};

// Every row is scored with at least kLeastPlanes: the others are read whole.
template <int kDim, int kTiles, int kLeastPlanes, int kLastPlanes>
__global__ void __launch_bounds__(kThreads, 1) SelectSketchKernel(const SketchArgs args) {
  extern __shared__ uint4 dynamic[];
  SketchShared& shared = *reinterpret_cast<SketchShared*>(dynamic);
  WaitForPrevious();
  const auto cluster = cooperative_groups::this_cluster();
  const int size = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int unit = static_cast<int>(blockIdx.x) / size;
  const int kv_head = unit % args.num_kv_heads;
  const SparseRow row = args.rows[unit / args.num_kv_heads];
  const TopKBudget budget = TopKBudgetOf(row, args.block_tokens);
  int32_t* const ids = args.ids + row.ids_begin + static_cast<int64_t>(kv_head) * row.keep_blocks;
  if (!budget.ScoresDecide()) {
    for (int i = rank * kThreads + static_cast<int>(threadIdx.x); i < budget.keep;
         i += size * kThreads) {
      ids[i] = budget.UnscoredId(i);
    }
    return;
  }

  const int64_t first_head =
      (static_cast<int64_t>(row.row) * args.num_kv_heads + kv_head) * args.group;
  for (int h = static_cast<int>(threadIdx.x) / 32; h < kTiles * 8; h += kWarps) {
    if (h < args.group) {
      PrepareSketchQuery<kDim>(args.q + (first_head + h) * kDim, h, &shared.queries);
    } else {
      for (int j = static_cast<int>(threadIdx.x) % 32; j < kDim; j += 32) {
        shared.queries.rounded[h][j] = 0;
      }
      shared.queries.sum[h] = 0;
      shared.queries.octaves[h] = 0;
    }
  }
  if (threadIdx.x < kMaxGroup) shared.base[threadIdx.x] = 0;
  __syncthreads();

  auto* const memory = reinterpret_cast<std::byte*>(dynamic) + sizeof(SketchShared);
  SketchUnit<kDim, kTiles, kLastPlanes> work = {args, shared,  memory, row,  budget,
                                                unit, kv_head, rank,   size, ids};
  int first = kLeastPlanes;
  if constexpr (kLeastPlanes < kLastPlanes) {
    while (first < kLastPlanes && RefineCount(args, budget, first + 1) == budget.blocks) ++first;
  }
  if constexpr (kLeastPlanes == 1 && kLastPlanes >= 1) {
    if (first <= 1) work.template Pass<1>(first == 1);
  }
  if constexpr (kLeastPlanes <= 2 && kLastPlanes >= 2) {
    if (first <= 2) work.template Pass<2>(first == 2);
  }
  if constexpr (kLastPlanes >= 3) work.template Pass<3>(first == 3);
}

// ---- launcher ---------------------------------------------------------------------------------

constexpr int kMaxCluster = 16;

template <int kDim, int kTiles, int kLeastPlanes, int kLastPlanes>
void Launch(Context& context, SketchArgs args, int64_t num_rows) {
  const auto kernel = SelectSketchKernel<kDim, kTiles, kLeastPlanes, kLastPlanes>;
  const size_t most_shared = context.device.shared_bytes_per_block;
  static const bool configured = [&] {
    RESA_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(most_shared)));
    return true;
  }();
  static_cast<void>(configured);

  const int64_t units = num_rows * args.num_kv_heads;
  const int64_t chunks = (args.tables.stride * kPageTokens + kChunkTokens - 1) / kChunkTokens;
  int size = kMaxCluster;
  while (size > 1 && units * size > context.device.sms) size /= 2;
  // The longest part that a CTA may get, and what it needs.
  const int64_t most_blocks = (chunks + size - 1) / size * (kChunkTokens / args.block_tokens);
  const int64_t most_bytes = ((most_blocks + 63) / 64 * 64 + 4) * (4 + 3 * args.group);
  const auto available = static_cast<int64_t>(most_shared - sizeof(SketchShared));
  args.shared_bytes = static_cast<int>(std::min(available, most_bytes));
  args.scratch_bytes = most_bytes <= available ? 0 : (most_bytes + 255) / 256 * 256;
  const size_t mass_bytes = static_cast<size_t>(args.scratch_bytes * units * size);
  args.survivor_stride =
      kLeastPlanes == kLastPlanes ? 0 : args.tables.stride * (kPageTokens / args.block_tokens);
  const size_t survivor_bytes =
      static_cast<size_t>(args.survivor_stride * units * 2) * sizeof(int32_t);
  args.mass_scratch = context.select.Reserve(mass_bytes + survivor_bytes);
  args.survivor_scratch = reinterpret_cast<int32_t*>(args.mass_scratch + mass_bytes);
  LaunchOverlapped(context.stream, kernel, dim3(static_cast<unsigned>(units * size)),
                   dim3(kThreads), sizeof(SketchShared) + static_cast<size_t>(args.shared_bytes),
                   size, args);
}

template <int kDim, int kTiles>
void LaunchPlanes(Context& context, const SketchArgs& args, const SelectorSpec& spec,
                  int64_t num_rows) {
  const bool whole2 = spec.refine_share[0] == 1.0f;
  const bool whole = whole2 && (spec.planes < 3 || spec.refine_share[1] == 1.0f);
  switch (spec.planes) {
    case 1:
      return Launch<kDim, kTiles, 1, 1>(context, args, num_rows);
    case 2:
      return whole ? Launch<kDim, kTiles, 2, 2>(context, args, num_rows)
                   : Launch<kDim, kTiles, 1, 2>(context, args, num_rows);
    case 3:
      return whole ? Launch<kDim, kTiles, 3, 3>(context, args, num_rows)
                   : Launch<kDim, kTiles, 1, 3>(context, args, num_rows);
    default:
      RESA_CHECK(false) << "SelectSketch: " << spec.planes << " planes";
  }
}

}  // namespace

void SelectSketch(Context& context, const SelectParams& params) {
  if (params.num_rows == 0) return;
  const KvLayout& layout = params.layout;
  const SelectorSpec& spec = layout.selector;
  SketchArgs args = {};
  args.q = reinterpret_cast<const uint16_t*>(params.q.b16());
  args.rows = params.rows;
  args.tables = params.tables;
  args.descriptors = params.kv.descriptors;
  args.ids = params.ids;
  args.num_kv_heads = layout.num_kv_heads;
  args.group = params.num_heads / layout.num_kv_heads;
  args.block_tokens = spec.block_tokens;
  args.run_bytes = static_cast<int>(layout.DescriptorRunBytes());
  args.scales_at = args.run_bytes - kPageTokens * 2;
  for (int p = 1; p <= spec.planes; ++p) args.ratio[p] = SketchScaleRatio(spec.planes, p);
  std::copy(spec.refine_share.begin(), spec.refine_share.end(), args.refine_share);
  RESA_CHECK(args.group >= 1 && args.group <= kMaxGroup) << "SelectSketch: group " << args.group;
  const bool wide = args.group > 8;
  switch (layout.head_dim) {
    case 64:
      return wide ? LaunchPlanes<64, 2>(context, args, spec, params.num_rows)
                  : LaunchPlanes<64, 1>(context, args, spec, params.num_rows);
    case 128:
      return wide ? LaunchPlanes<128, 2>(context, args, spec, params.num_rows)
                  : LaunchPlanes<128, 1>(context, args, spec, params.num_rows);
    default:
      RESA_CHECK(false) << "SelectSketch: head size " << layout.head_dim;
  }
}

}  // namespace resa::kernels::cuda
