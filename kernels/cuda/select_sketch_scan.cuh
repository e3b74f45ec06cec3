#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_

// A CTA's way through its part of a row: the words of its tokens from memory, the masses of its
// blocks to where they wait for the heads' totals. The arithmetic is in select_sketch_score.cuh,
// what is scored when in select_sketch.cu.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/select_sketch_score.cuh"
#include "kernels/cuda/select_team.cuh"
#include "kernels/cuda/select_topk.cuh"
#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr int kSketchThreads = 512;
inline constexpr int kSketchWarps = kSketchThreads / 32;
inline constexpr int kChunkSteps = 2;
inline constexpr int kChunkTokens = kChunkSteps * kStepTokens;
inline constexpr int kChunkQuarters = kChunkTokens / kQuarterTokens;

// A total over chunks, exact whatever the order of additions: in units of 2^-24 and 2^-74.
struct Total {
  unsigned long long upper = 0;
  unsigned long long lower = 0;

  __device__ __forceinline__ void Add(float x) {  // 0 <= x < 256
    const float units = floorf(x * 0x1p24f);
    upper += static_cast<uint32_t>(units);
    lower += __float2ull_rn(fmaf(units, -0x1p-24f, x) * 0x1p74f);
  }
  __device__ __forceinline__ double Value() const {
    return static_cast<double>(upper) * 0x1p-24 + static_cast<double>(lower) * 0x1p-74;
  }
};

// The part of the work that a CTA has.
struct TeamPlace {
  SparseRow row;
  int index;  // Of the row; -1: none.
  int kv_head;
  int rank;
  int size;
};

struct SketchShared {
  TeamShared team;
  TopKShared topk;
  TeamPlace place;
  SketchQueries queries;
  Total totals[kMaxGroup];  // Of this CTA, then of the team.
  uint32_t saturated;
  float base[kMaxGroup];
  float warp_largest[kSketchWarps][kMaxGroup];
  float weight[kMaxGroup];          // What a head's masses are multiplied by.
  alignas(16) uint32_t beside[32];  // Written and never read.
};
static_assert(sizeof(SketchShared) % 16 == 0);

// What a pass scores: all blocks of a row in order, or those of a list.
struct SketchSource {
  const int32_t* pages;          // Of the sequence.
  const int32_t* list;           // Null: all blocks.
  const std::byte* descriptors;  // Of the KV head, of page 0.
  uint32_t page_bytes;
  int scales_at;
  int quarter_shift;  // log2 of the quarters of a page in a block.
  int blocks;
  int tokens;

  __device__ __forceinline__ int Chunks() const {
    return (tokens + kChunkTokens - 1) / kChunkTokens;
  }
};

// A lane's way to the words of a step. kList: the source has a list.
template <int kDim, int kPlanes, bool kList>
struct StepReader {
  const SketchSource& source;
  const std::byte* words;  // The lane's, of page 0.
  const std::byte* scales;

  __device__ __forceinline__ explicit StepReader(const SketchSource& from) : source(from) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int in_block = (1 << Shift()) - 1;
    words = from.descriptors + lane % 4 / 2 * 64 + (Quarter() & in_block) * 16;
    scales = from.descriptors + from.scales_at + (Quarter() & ~1 & in_block) * 8;
  }
  __device__ __forceinline__ static int Quarter() {  // Of the step.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return lane / 4 * 2 + lane % 2;
  }
  // Without a list the blocks may as well be pages.
  __device__ __forceinline__ int Shift() const { return kList ? source.quarter_shift : 2; }

  // Where the blocks of a chunk lie, block i of it in lane i: the page, with the quarter of the
  // page in the upper bits.
  __device__ __forceinline__ uint32_t Places(int chunk) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int per_chunk = kChunkQuarters >> Shift();
    const int place = chunk * per_chunk + min(lane, per_chunk - 1);
    if constexpr (!kList) {
      return static_cast<uint32_t>(source.pages[min(place, (source.tokens - 1) / kPageTokens)]);
    } else {
      const int quarter = __ldcg(source.list + min(place, source.blocks - 1)) << Shift();
      return static_cast<uint32_t>(source.pages[quarter / 4]) | static_cast<uint32_t>(quarter % 4)
                                                                    << 30;
    }
  }

  __device__ __forceinline__ void Load(uint32_t places, int step,
                                       SketchWords<kDim, kPlanes>* to) const {
    const uint32_t place = __shfl_sync(~0u, places, (step * 16 + Quarter()) >> Shift());
    const std::byte* const from = At(words, place, 16);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int pair = 0; pair < kDim / 64; ++pair) {
        to->plane[p][pair] = LoadOnce16(from + p * (kDim * 2) + pair * 128);
      }
    }
    if (kList && Shift() == 0) {  // Two blocks.
      const int first = step * 16 + (Quarter() & ~1);
      const uint2 a = LoadOnce8(At(scales, __shfl_sync(~0u, places, first), 8));
      const uint2 b = LoadOnce8(At(scales, __shfl_sync(~0u, places, first + 1), 8));
      to->scales = make_uint4(a.x, a.y, b.x, b.y);
    } else {
      to->scales = LoadOnce16(At(scales, place, 8));
    }
  }

  __device__ __forceinline__ const std::byte* At(const std::byte* base, uint32_t place,
                                                 int quarter_bytes) const {
    const uint32_t page = kList ? place & 0x3fffffffu : place;
    const std::byte* at;  // One instruction, which the compiler makes three of.
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(page), "r"(source.page_bytes), "l"(base));
    return kList ? at + (place >> 30) * quarter_bytes : at;
  }
};

// What a lane needs of its heads.
template <int kHeads>
struct LaneHeads {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  static constexpr int kEach = SketchColumns<kHeads>::kEach;
  float factor[kTiles][kEach];
  float offset[kTiles][kEach];

  __device__ __forceinline__ void Load(const SketchQueries& queries, const float* base, int group,
                                       float ratio) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int head = SketchColumns<kHeads>::Head(tile, i);
        const float octaves = queries.octaves[head] * ratio;
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

  __host__ __device__ __forceinline__ static int64_t StrideFor(int64_t blocks) {
    return (blocks + 63) / 64 * 64 + 4;
  }
  __host__ __device__ __forceinline__ static int64_t BytesFor(int64_t blocks, int group) {
    return StrideFor(blocks) * (4 + 3 * group);
  }
  __device__ __forceinline__ static MassMemory At(std::byte* memory, int blocks, int group) {
    MassMemory out;
    out.stride = static_cast<int>(StrideFor(blocks));
    out.keys = reinterpret_cast<uint32_t*>(memory);
    out.upper = reinterpret_cast<uint16_t*>(out.keys + out.stride);
    out.lower = reinterpret_cast<uint8_t*>(out.upper + static_cast<int64_t>(out.stride) * group);
    return out;
  }
};

// Where a lane stores the masses of one head's blocks. A lane that has nothing to store does so
// beside the masses, which takes no question.
struct MassColumn {
  uint16_t* upper = nullptr;
  uint8_t* lower = nullptr;
  int advance = 0;

  __device__ __forceinline__ MassColumn() {}
  __device__ __forceinline__ MassColumn(const MassMemory& memory, bool stores, int head, int block,
                                        int blocks_per_turn, uint32_t* beside)
      : upper(reinterpret_cast<uint16_t*>(beside)),
        lower(reinterpret_cast<uint8_t*>(beside)),
        advance(0) {
    if (stores) {
      upper = memory.upper + head * memory.stride + block;
      lower = memory.lower + head * memory.stride + block;
      advance = blocks_per_turn;
    }
  }
  __device__ __forceinline__ void Store(int block, float mass) const {
    const uint32_t bits = PackMass(mass);
    upper[block] = static_cast<uint16_t>(bits >> 16);
    lower[block] = static_cast<uint8_t>(bits >> 8);
  }
  __device__ __forceinline__ void Advance() {
    upper += advance;
    lower += advance;
  }
};

// The chunks of one warp: begin + warp, every kSketchWarps-th, up to end. Calls step(words, j) for
// each step j of a whole chunk, short_step(words, j, left) for those of the row's last one where it
// is not whole, `left` the tokens from the chunk's beginning on, and chunk_end() behind a chunk.
template <int kDim, int kHeads, int kPlanes, bool kList, typename Step, typename ShortStep,
          typename ChunkEnd>
__device__ __forceinline__ void ForChunks(const SketchSource& source, int begin, int end,
                                          const Step& step, const ShortStep& short_step,
                                          const ChunkEnd& chunk_end) {
  constexpr int kDepth = kPlanes == 3 || kHeads == 4 ? 1 : 2;  // Steps in flight.
  const StepReader<kDim, kPlanes, kList> reader(source);
  int chunk = begin + static_cast<int>(threadIdx.x) / 32;
  const int whole = min(end, source.tokens / kChunkTokens);
  if (chunk < whole) {
    uint32_t places = reader.Places(chunk);
    // Behind the last chunk it is read again, to no use: cheaper than a question at each step.
    uint32_t next = reader.Places(min(chunk + kSketchWarps, whole - 1));
    SketchWords<kDim, kPlanes> words[kDepth];
#pragma unroll
    for (int j = 0; j < kDepth; ++j) reader.Load(places, j, &words[j]);
#pragma unroll 1
    for (; chunk < whole; chunk += kSketchWarps) {
      const uint32_t after = reader.Places(min(chunk + 2 * kSketchWarps, whole - 1));
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j) {
        step(words[j % kDepth], j);
        const int ahead = j + kDepth;
        reader.Load(ahead < kChunkSteps ? places : next, ahead % kChunkSteps, &words[j % kDepth]);
      }
      chunk_end();
      places = next;
      next = after;
    }
  }
  if (chunk < end) {
    const uint32_t places = reader.Places(chunk);
#pragma unroll 1
    for (int j = 0; j < kChunkSteps; ++j) {
      SketchWords<kDim, kPlanes> words;
      reader.Load(places, j, &words);
      short_step(words, j, source.tokens - chunk * kChunkTokens);
    }
    chunk_end();
  }
}

// Calls use(t, estimates) for the tokens t of a lane's quarters 2 r and 2 r + 1: their estimates
// per head, before the head's factor.
template <int kDim, int kHeads, int kPlanes, bool kShort, typename Use>
__device__ __forceinline__ void ForEstimates(const SketchWords<kDim, kPlanes>& words, int j,
                                             int left, const SketchOperand<kDim, kHeads>& operand,
                                             const Use& use) {
  constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  constexpr int kEach = SketchColumns<kHeads>::kEach;
  float scales[8];
  SketchScales(words.scales, scales);
  if constexpr (kShort) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4;
    CutScales(left - j * kStepTokens - row * 2 * kQuarterTokens, scales);
  }
#pragma unroll
  for (int t = 0; t < kQuarterTokens; ++t) {
    float estimates[kTiles][2][kEach];
    SketchProducts<kDim, kHeads, kPlanes>(words, t, operand, estimates);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float scale = scales[row * kQuarterTokens + t];
      const float origin = -kSumOriginValue * scale;  // Exact.
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          estimates[tile][row][i] = fmaf(estimates[tile][row][i], scale, origin);
        }
      }
    }
    use(t, estimates);
  }
}

// Masses of the blocks of a CTA's chunks [begin, end), and the CTA's totals of the heads.
template <int kDim, int kHeads, int kPlanes, bool kList>
__device__ __forceinline__ void ScoreChunks(const SketchSource& source, int begin, int end,
                                            int group, const SketchOperand<kDim, kHeads>& operand,
                                            const LaneHeads<kHeads>& heads,
                                            const MassMemory& memory, SketchShared& shared) {
  constexpr int kTiles = LaneHeads<kHeads>::kTiles;
  constexpr int kEach = LaneHeads<kHeads>::kEach;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 4;
  const int shift = source.quarter_shift;
  const bool odd = (row & 1) != 0;
  // The head whose total the lane has: with two heads, each of a pair of lanes takes one of them.
  const int total_head = SketchColumns<kHeads>::Head(0, kEach == 2 && odd ? 1 : 0);
  const int first_block =
      static_cast<int>(threadIdx.x) / 32 * (kChunkQuarters >> shift) + ((row * 2) >> shift);
  const int step_blocks = 16 >> shift;
  MassColumn columns[kTiles][kEach];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int head = SketchColumns<kHeads>::Head(tile, i);
      columns[tile][i] = MassColumn(memory, head < group && (shift < 2 || !odd), head, first_block,
                                    kSketchWarps * (kChunkQuarters >> shift), shared.beside);
    }
  }
  float chunk_sum[kTiles][kEach] = {};
  Total totals[kTiles];
  bool saturated = false;

  float quarter_sum[kTiles][2][kEach];
  const auto add_token = [&](int t, const float(&estimates)[kTiles][2][kEach]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float mass =
              SketchMass(estimates[tile][half][i], heads.factor[tile][i], heads.offset[tile][i]);
          quarter_sum[tile][half][i] = t == 0 ? mass : quarter_sum[tile][half][i] + mass;
        }
      }
    }
  };
  const auto end_step = [&](int j) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        float sum = quarter_sum[tile][0][i] + quarter_sum[tile][1][i];
        chunk_sum[tile][i] += sum;
        const MassColumn& column = columns[tile][i];
        if (shift == 0) {
          column.Store(j * step_blocks, quarter_sum[tile][0][i]);
          column.Store(j * step_blocks + 1, quarter_sum[tile][1][i]);
        } else {
          if (shift == 2) sum += __shfl_xor_sync(~0u, sum, 4);
          column.Store(j * step_blocks, sum);
        }
      }
    }
  };
  const auto step = [&](const SketchWords<kDim, kPlanes>& words, int j) {
    ForEstimates<kDim, kHeads, kPlanes, false>(words, j, 0, operand, add_token);
    end_step(j);
  };
  const auto short_step = [&](const SketchWords<kDim, kPlanes>& words, int j, int left) {
    ForEstimates<kDim, kHeads, kPlanes, true>(words, j, left, operand, add_token);
    end_step(j);
  };
  const auto chunk_end = [&] {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float sum = chunk_sum[tile][0];
      if constexpr (kEach == 2) {
        sum = odd ? chunk_sum[tile][1] : chunk_sum[tile][0];
        sum += __shfl_xor_sync(~0u, odd ? chunk_sum[tile][0] : chunk_sum[tile][1], 4);
      }
      saturated = saturated || !(sum < kSaturated);
      totals[tile].Add(sum);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        chunk_sum[tile][i] = 0;
        columns[tile][i].Advance();
      }
    }
  };
  ForChunks<kDim, kHeads, kPlanes, kList>(source, begin, end, step, short_step, chunk_end);

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int bit = kEach == 2 ? 8 : 4; bit < 32; bit *= 2) {
      totals[tile].upper += __shfl_xor_sync(~0u, totals[tile].upper, bit);
      totals[tile].lower += __shfl_xor_sync(~0u, totals[tile].lower, bit);
    }
    if (lane < 4 * kEach) {
      atomicAdd(&shared.totals[tile * 8 + total_head].upper, totals[tile].upper);
      atomicAdd(&shared.totals[tile * 8 + total_head].lower, totals[tile].lower);
    }
  }
  if (saturated) shared.saturated = 1;
}

// The largest estimate of each head, in octaves, over chunks first, first + kSketchWarps .. of [..,
// end): a warp's, to shared.warp_largest. Done once or, of all chunks, hardly ever.
template <int kDim, int kHeads, int kPlanes, bool kList>
__device__ __forceinline__ void LargestOfChunks(const SketchSource& source, int first, int end,
                                                int group, float ratio, SketchShared& shared) {
  constexpr int kTiles = LaneHeads<kHeads>::kTiles;
  constexpr int kEach = LaneHeads<kHeads>::kEach;
  SketchOperand<kDim, kHeads> operand;
  operand.Load(shared.queries);
  LaneHeads<kHeads> heads;
  heads.Load(shared.queries, shared.base, group, ratio);
  float largest[kTiles][kEach];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) largest[tile][i] = -INFINITY;
  }
  const StepReader<kDim, kPlanes, kList> reader(source);
  for (int chunk = first; chunk < end; chunk += kSketchWarps) {
    const uint32_t places = reader.Places(chunk);
    SketchWords<kDim, kPlanes> words[kChunkSteps];
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) reader.Load(places, j, &words[j]);
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) {
      const auto compare = [&](int, const float(&estimates)[kTiles][2][kEach]) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const float factor = heads.factor[tile][i];
            largest[tile][i] = fmaxf(largest[tile][i], fmaxf(estimates[tile][0][i] * factor,
                                                             estimates[tile][1][i] * factor));
          }
        }
      };
      ForEstimates<kDim, kHeads, kPlanes, true>(words[j], j, source.tokens - chunk * kChunkTokens,
                                                operand, compare);
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float x = largest[tile][i];
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
      if (lane < 4) {
        shared.warp_largest[warp][SketchColumns<kHeads>::Head(tile, i)] = x * kWindowOctaves;
      }
    }
  }
}

// The base of a head whose largest estimate is this: any whole number when none counts.
__device__ __forceinline__ float BaseFor(float largest, float headroom) {
  return largest > -1e30f ? ceilf(largest) + headroom : 0.0f;
}

// The float of a TopKKey.
__device__ __forceinline__ float FloatOfKey(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// shared.base of all heads: from one chunk per warp, spread over the row (`exact` false), or from
// all of the team's chunks.
template <int kDim, int kHeads, int kPlanes, bool kList>
__device__ __forceinline__ void FindBases(Team& team, const SketchSource& source, int begin,
                                          int end, bool exact, int group, float ratio,
                                          SketchShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const auto sample = static_cast<int>(int64_t{source.Chunks() - 1} * warp / (kSketchWarps - 1));
  LargestOfChunks<kDim, kHeads, kPlanes, kList>(source, exact ? begin + warp : sample,
                                                exact ? end : sample + 1, group, ratio, shared);
  __syncthreads();
  const bool has_head = thread < SketchColumns<kHeads>::kGroup;
  float largest = -INFINITY;
  if (has_head) {
#pragma unroll
    for (int w = 0; w < kSketchWarps; ++w) largest = fmaxf(largest, shared.warp_largest[w][thread]);
  }
  if (exact && team.size > 1) {
    if (has_head) atomicMax(&team.counters->largest[thread], TopKKey(largest));
    team.Meet();
    if (has_head) largest = FloatOfKey(__ldcg(&team.counters->largest[thread]));
  }
  if (has_head) shared.base[thread] = BaseFor(largest, exact ? 2.0f : kHeadroomOctaves);
  __syncthreads();
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_
