#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_

// A CTA's way through its part of a row: the words of its tokens from memory, the masses of its
// blocks to where they wait for the heads' totals. The arithmetic is in select_sketch_score.cuh.
//
// A warp has a ring of steps in shared memory, filled by asynchronous copies of 16 bytes per lane,
// which each lane reads back itself. (Loads to registers would wait in the L1 cache, of which
// masses in shared memory leave little: 2.8 TB/s instead of 4.5.)

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/select_sketch_score.cuh"
#include "kernels/cuda/select_topk.cuh"
#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr int kSketchThreads = 512;
inline constexpr int kSketchWarps = kSketchThreads / 32;
inline constexpr int kChunkSteps = 2;
inline constexpr int kChunkTokens = kChunkSteps * kStepTokens;
inline constexpr int kChunkQuarters = kChunkTokens / kQuarterTokens;
inline constexpr int kSlots = 3;  // Of a warp's ring: planes under way.

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

// What is used while tokens are scored.
struct SketchScanShared {
  SketchQueries queries;
  Total totals[kMaxGroup];      // Of this CTA, then of the team.
  uint32_t saturated;           // A mass was cut off: in this CTA,
  uint32_t team_saturated;      // in the team.
  uint32_t largest[kMaxGroup];  // Estimates in octaves, as keys (TopKKey).
  float weight[kMaxGroup];      // What a head's masses are multiplied by.
};

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

// A warp's ring of planes: 16 bytes per lane and pair of words, then the scales of the step, which
// come with its first plane.
template <int kDim>
struct SketchRing {
  static constexpr int kScalesAt = kDim / 64 * 512;
  static constexpr int kSlotBytes = kScalesAt + kStepTokens * 2;
  static constexpr int kBytes = kSlots * kSlotBytes;
};

// A lane's way to the words of a step. kList: the source has a list.
template <int kDim, bool kList>
struct StepReader {
  using Ring = SketchRing<kDim>;

  const SketchSource& source;
  const std::byte* words;  // The lane's, of page 0.
  const std::byte* scales;
  uint32_t scales_in_slot;  // From the lane's words to the scales of its row.

  __device__ __forceinline__ explicit StepReader(const SketchSource& from) : source(from) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int in_block = (1 << Shift()) - 1;
    words = from.descriptors + lane % 4 / 2 * 64 + (Quarter() & in_block) * 16;
    scales = from.descriptors + from.scales_at + (Quarter() & in_block) * 8;
    scales_in_slot = Ring::kScalesAt + static_cast<uint32_t>(lane / 4 * 16 - lane * 16);
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

  // Asks for the scales of a step of the chunk with these places, into a slot of which `slot` is
  // the lane's place. Returns where the lane's words are.
  __device__ __forceinline__ const std::byte* CopyScales(uint32_t places, int step,
                                                         uint32_t slot) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t place = __shfl_sync(~0u, places, (step * 16 + Quarter()) >> Shift());
    const uint32_t to = slot + scales_in_slot;
    // The scales of quarters 2 r and 2 r + 1 follow each other, unless they are blocks of a list.
    if (!kList || Shift() != 0) {
      if (lane % 4 == 0) CopyAsync16(to, At(scales, place, 8));
    } else if (lane % 4 < 2) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to + lane % 4 * 8),
                   "l"(At(scales, place, 8))
                   : "memory");
    }
    return At(words, place, 16);
  }
  // Asks for a plane of the step.
  __device__ __forceinline__ static void CopyPlane(const std::byte* step_words, int plane,
                                                   uint32_t slot) {
#pragma unroll
    for (int pair = 0; pair < kDim / 64; ++pair) {
      CopyAsync16(slot + pair * 512, step_words + plane * (kDim * 2) + pair * 128);
    }
    CopyAsyncCommit();
  }
  // What has come.
  __device__ __forceinline__ static PlaneWords<kDim> ReadPlane(uint32_t slot) {
    PlaneWords<kDim> words;
#pragma unroll
    for (int pair = 0; pair < kDim / 64; ++pair) words.pair[pair] = LoadShared16(slot + pair * 512);
    return words;
  }
  __device__ __forceinline__ uint4 ReadScales(uint32_t slot) const {
    return LoadShared16(slot + scales_in_slot);
  }

  __device__ __forceinline__ const std::byte* At(const std::byte* base, uint32_t place,
                                                 int quarter_bytes) const {
    const uint32_t page = kList ? place & 0x3fffffffu : place;
    const std::byte* at;  // One instruction, which the compiler makes three of.
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(page), "r"(source.page_bytes), "l"(base));
    return kList ? at + (place >> 30) * quarter_bytes : at;
  }
  __device__ __forceinline__ static uint4 LoadShared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
  }
};

// The base of a head whose largest estimate is this: any whole number when none counts.
__device__ __forceinline__ float BaseFor(float largest, float headroom) {
  return largest > -1e30f ? ceilf(largest) + headroom : 0.0f;
}

// The float of a TopKKey.
__device__ __forceinline__ float FloatOfKey(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key);
}

// What a lane needs of its heads.
template <int kHeads>
struct LaneHeads {
  static constexpr int kTiles = SketchColumns<kHeads>::kTiles;
  static constexpr int kEach = SketchColumns<kHeads>::kEach;
  float factor[kTiles][kEach];
  float offset[kTiles][kEach];

  __device__ __forceinline__ void LoadFactors(const SketchQueries& queries, int group,
                                              float ratio) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int head = SketchColumns<kHeads>::Head(tile, i);
        const float octaves = queries.octaves[head] * ratio;
        factor[tile][i] = head < group ? octaves / kWindowOctaves : 0.0f;
      }
    }
  }
  // Given the largest estimates. A head that does not exist has no mass.
  __device__ __forceinline__ void LoadOffsets(const uint32_t* largest, int group, float headroom) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int head = SketchColumns<kHeads>::Head(tile, i);
        const float base = BaseFor(FloatOfKey(largest[head]), headroom);
        offset[tile][i] = head < group ? (127.0f - base) / kWindowOctaves : -1.0f;
      }
    }
  }
};

// Where a CTA keeps masses and keys, in shared or in global memory: [head][stride] each.
struct MassMemory {
  uint32_t* keys;
  uint16_t* upper;
  uint8_t* lower;
  int stride;

  // 4 past a multiple of 64: the heads' parts begin in different banks.
  __host__ __device__ static constexpr int64_t StrideFor(int64_t blocks) {
    return (blocks + 63) / 64 * 64 + 4;
  }
  __host__ __device__ static constexpr int64_t KeyBytesFor(int64_t blocks) {
    return StrideFor(blocks) * 4;
  }
  __host__ __device__ static constexpr int64_t MassBytesFor(int64_t blocks, int group) {
    return (StrideFor(blocks) * 3 * group + 15) / 16 * 16;
  }
  __device__ __forceinline__ MassMemory(std::byte* keys_at, std::byte* masses_at, int blocks,
                                        int group)
      : keys(reinterpret_cast<uint32_t*>(keys_at)),
        upper(reinterpret_cast<uint16_t*>(masses_at)),
        stride(static_cast<int>(StrideFor(blocks))) {
    lower = reinterpret_cast<uint8_t*>(upper + static_cast<int64_t>(stride) * group);
  }
};

// Where a lane stores the masses of its heads' next block, one tile of them.
template <int kEach>
struct MassColumn {
  uint32_t upper[kEach];  // In shared memory.
  uint32_t lower[kEach];
  int blocks;  // From a step to the next; zero where nothing is stored.

  // A head that does not exist is stored first, where its neighbour's is stored then.
  __device__ __forceinline__ void Store(int block, const float (&masses)[kEach]) const {
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      const uint32_t bits = PackMass(masses[i]);
      asm volatile(
          "{\n"
          ".reg .pred stores;\n"
          "setp.ne.s32 stores, %4, 0;\n"
          "@stores st.shared.u16 [%0], %1;\n"
          "@stores st.shared.u8 [%2], %3;\n"
          "}" ::"r"(upper[i] + block * 2),
          "h"(static_cast<uint16_t>(bits >> 16)), "r"(lower[i] + block), "r"(bits >> 8), "r"(blocks)
          : "memory");
    }
  }
  __device__ __forceinline__ void Advance(int by) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      upper[i] += static_cast<uint32_t>(by * 2);
      lower[i] += static_cast<uint32_t>(by);
    }
  }
};

// The chunks of one warp: begin + warp, every kSketchWarps-th, up to end. The planes of their steps
// go through the warp's ring, one after the other.
template <int kDim, int kPlanes, bool kList>
struct ChunkStream {
  using Ring = SketchRing<kDim>;
  static constexpr bool kReadsList = kList;
  static constexpr int kStepBytes = kPlanes * Ring::kSlotBytes;
  static constexpr int kTurns = kChunkSteps * kPlanes;           // Planes of a chunk.
  static constexpr int kAhead = (kTurns - 1 + kSlots) / kTurns;  // Chunks that copies go ahead.

  const StepReader<kDim, kList> reader;
  int first;
  int end;
  const uint32_t ring;          // The lane's place in the warp's first slot.
  uint32_t places[kAhead + 1];  // Of the chunk that is scored, and of the warp's next ones.
  const std::byte* step_words;  // Of the step that was asked for last.

  __device__ __forceinline__ ChunkStream(const SketchSource& source, int begin, int end_chunk,
                                         std::byte* rings)
      : reader(source),
        first(begin + static_cast<int>(threadIdx.x) / 32),
        end(end_chunk),
        ring(SharedAddress(rings) + static_cast<int>(threadIdx.x) / 32 * Ring::kBytes +
             static_cast<int>(threadIdx.x) % 32 * 16) {}

  __device__ __forceinline__ void Move(int begin, int end_chunk) {
    first = begin + static_cast<int>(threadIdx.x) / 32;
    end = end_chunk;
  }
  // Behind the last chunk it is read again, to no use: cheaper than a question at each step.
  __device__ __forceinline__ uint32_t PlacesOf(int chunk) const {
    return reader.Places(min(chunk, end - 1));
  }
  // Asks for a turn of the chunk that is scored or, counted on, of the warp's next ones: they come
  // one after the other.
  __device__ __forceinline__ void Copy(int turn, uint32_t slot) {
    if (turn % kPlanes == 0) {
      step_words = reader.CopyScales(places[turn / kTurns], turn / kPlanes % kChunkSteps, slot);
    }
    reader.CopyPlane(step_words, turn % kPlanes, slot);
  }
  __device__ __forceinline__ void FindPlaces() {
    if (first >= end) return;
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) places[i] = PlacesOf(first + i * kSketchWarps);
  }
  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int turn = 0; turn < kSlots; ++turn) {
      if (first < end) {
        Copy(turn, ring + turn * Ring::kSlotBytes);
      } else {
        CopyAsyncCommit();
      }
    }
  }

  // One step beside the stream, through slots that are not the ring's: the lane's place in them.
  __device__ __forceinline__ void CopyOne(uint32_t chunk_places, int step, uint32_t slots) const {
    const std::byte* const from = reader.CopyScales(chunk_places, step, slots);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) reader.CopyPlane(from, p, slots + p * Ring::kSlotBytes);
  }
  // kLater: how many planes have been asked for since.
  template <int kLater, int kHeads>
  __device__ __forceinline__ void ReadOne(const SketchOperand<kDim, kHeads>& operand,
                                          uint32_t slots, SketchSums<kHeads>* sums,
                                          uint4* scales) const {
    CopyAsyncWait<kLater>();
    __syncwarp();
    PlaneWords<kDim> words[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) words[p] = reader.ReadPlane(slots + p * Ring::kSlotBytes);
    sums->AddStep(words, operand);
    *scales = reader.ReadScales(slots);
    __syncwarp();
  }

  // Calls step(cut, sums, scales, j, left) for the steps j of each chunk, and chunk_end() behind a
  // chunk. `cut` is true where the row's last chunk is not whole, `left` the tokens from the
  // chunk's beginning on.
  template <int kHeads, typename Step, typename ChunkEnd>
  __device__ __forceinline__ void Run(const SketchOperand<kDim, kHeads>& operand, const Step& step,
                                      const ChunkEnd& chunk_end) {
    uint32_t slot = ring;
    int chunk = first;
    const int whole = min(end, reader.source.tokens / kChunkTokens);
#pragma unroll 1
    for (; chunk < whole; chunk += kSketchWarps) {
      RunChunk<false>(chunk, operand, step, &slot);
      chunk_end();
    }
    if (chunk < end) {
      RunChunk<true>(chunk, operand, step, &slot);
      chunk_end();
    }
    CopyAsyncWait<0>();
  }

 private:
  template <bool kCut, int kHeads, typename Step>
  __device__ __forceinline__ void RunChunk(int chunk, const SketchOperand<kDim, kHeads>& operand,
                                           const Step& step, uint32_t* slot) {
    const uint32_t newest = PlacesOf(chunk + (kAhead + 1) * kSketchWarps);
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) {
      PlaneWords<kDim> words[kPlanes];
      uint4 scales;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        CopyAsyncWait<kSlots - 1>();
        words[p] = reader.ReadPlane(*slot);
        if (p == 0) {  // The scales, other lanes have asked for.
          __syncwarp();
          scales = reader.ReadScales(*slot);
          __syncwarp();
        }
        Copy(j * kPlanes + p + kSlots, *slot);
        *slot = *slot == ring + (kSlots - 1) * Ring::kSlotBytes ? ring : *slot + Ring::kSlotBytes;
      }
      SketchSums<kHeads> sums;
      sums.AddStep(words, operand);
      step(std::bool_constant<kCut>(), sums, scales, j,
           reader.source.tokens - chunk * kChunkTokens);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) places[i] = places[i + 1];
    // Where it stands: the compiler would wait for the load where it begins.
    asm volatile("mov.b32 %0, %1;" : "=r"(places[kAhead]) : "r"(newest));
  }
};

// The tokens of a lane in a step of the row's last chunk that count.
__device__ __forceinline__ void CutStep(int j, int left, float (&scales)[8]) {
  const int row = static_cast<int>(threadIdx.x) % 32 / 4;
  CutScales(left - j * kStepTokens - row * 2 * kQuarterTokens, scales);
}

// Masses of the blocks of a stream's chunks, to shared memory, and the CTA's totals of the heads.
// kShift: the source's, or -1, for any.
template <int kShift, int kDim, int kHeads, int kPlanes, bool kList>
__device__ __forceinline__ void ScoreChunks(ChunkStream<kDim, kPlanes, kList>& stream, int group,
                                            const SketchOperand<kDim, kHeads>& operand,
                                            const LaneHeads<kHeads>& heads,
                                            const MassMemory& memory, SketchScanShared& shared) {
  using Columns = SketchColumns<kHeads>;
  constexpr int kTiles = Columns::kTiles;
  constexpr int kEach = Columns::kEach;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 4;
  const int shift = kShift >= 0 ? kShift : stream.reader.source.quarter_shift;
  const bool odd = (row & 1) != 0;
  // The head whose total the lane has: with two heads, each of a pair of lanes takes one of them.
  const int total_head = Columns::Head(0, kEach == 2 && odd ? 1 : 0);
  const int chunk_blocks = kChunkQuarters >> shift;
  MassColumn<kEach> columns[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int head = Columns::Head(tile, 0);
    const int at = head * memory.stride + static_cast<int>(threadIdx.x) / 32 * chunk_blocks +
                   ((row * 2) >> shift);
    const bool stores = head < group && (shift < 2 || !odd);
    columns[tile].blocks = stores ? 16 >> shift : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int of_head = head + i < group ? at + i * memory.stride : at;
      columns[tile].upper[i] = SharedAddress(memory.upper + of_head);
      columns[tile].lower[i] = SharedAddress(memory.lower + of_head);
    }
  }
  float chunk_sum[kTiles][kEach] = {};
  Total totals[kTiles];
  bool saturated = false;

  const auto step = [&](auto cut, const SketchSums<kHeads>& sums, const uint4& packed, int j,
                        int left) {
    float scales[8];
    SketchScales(packed, scales);
    if constexpr (cut) CutStep(j, left, scales);
    float quarter_sum[kTiles][2][kEach] = {};
    sums.ForEstimates(scales, [&](int tile, int t, int half, int i, float estimate) {
      const float mass = SketchMass(estimate, heads.factor[tile][i], heads.offset[tile][i]);
      quarter_sum[tile][half][i] = t == 0 ? mass : quarter_sum[tile][half][i] + mass;
    });
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float pair_sum[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        pair_sum[i] = quarter_sum[tile][0][i] + quarter_sum[tile][1][i];
        chunk_sum[tile][i] += pair_sum[i];
      }
      if (shift == 0) {
        columns[tile].Store(0, quarter_sum[tile][0]);
        columns[tile].Store(1, quarter_sum[tile][1]);
      } else {
        if (shift == 2) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) pair_sum[i] += __shfl_xor_sync(~0u, pair_sum[i], 4);
        }
        columns[tile].Store(0, pair_sum);
      }
      columns[tile].Advance(columns[tile].blocks);
    }
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
      for (int i = 0; i < kEach; ++i) chunk_sum[tile][i] = 0;
      columns[tile].Advance((kSketchWarps - 1) * kChunkSteps * columns[tile].blocks);
    }
  };
  stream.Run(operand, step, chunk_end);

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
  if (saturated) atomicOr(&shared.saturated, 1u);
}

// The largest estimates of a warp's heads, in octaves.
template <int kHeads>
struct LargestEstimates {
  using Columns = SketchColumns<kHeads>;
  float largest[Columns::kTiles][Columns::kEach];

  __device__ __forceinline__ LargestEstimates() {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) (&largest[0][0])[i] = -INFINITY;
  }
  __device__ __forceinline__ void AddStep(const SketchSums<kHeads>& sums, const uint4& packed,
                                          int j, int left, const LaneHeads<kHeads>& heads) {
    float scales[8];
    SketchScales(packed, scales);
    CutStep(j, left, scales);
    sums.ForEstimates(scales, [&](int tile, int, int, int i, float estimate) {
      largest[tile][i] = fmaxf(largest[tile][i], estimate * heads.factor[tile][i]);
    });
  }
  // To of_cta[head], if they are larger.
  __device__ __forceinline__ void Store(uint32_t* of_cta) const {
#pragma unroll
    for (int tile = 0; tile < Columns::kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < Columns::kEach; ++i) {
        float x = largest[tile][i];
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, bit));
        if (threadIdx.x % 32 < 4) {
          atomicMax(&of_cta[Columns::Head(tile, i)], TopKKey(x * kWindowOctaves));
        }
      }
    }
  }
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_
