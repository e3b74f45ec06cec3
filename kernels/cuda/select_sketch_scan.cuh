#ifndef RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_
#define RESA_KERNELS_CUDA_SELECT_SKETCH_SCAN_CUH_

// A CTA's way through its part of a row: the words of its tokens from memory, the masses of its
// blocks to where they wait for the heads' totals. The arithmetic is in select_sketch_score.cuh.
//
// A warp has a ring of half steps in shared memory, filled by asynchronous copies of 16 bytes per
// lane. (Loads to registers would wait in the L1 cache, of which masses in shared memory leave
// little: 2.8 TB/s instead of 4.5.) Memory is asked for a page's bytes at once and for each of
// their lines once: the same bytes by 128 at a time, from where the page begins, come a seventh
// slower, and to some multiprocessors a third slower than to others. So does twice as much under
// way.

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
inline constexpr int kStepTurns = 2;  // Half a step is copied at a time.
inline constexpr int kChunkTurns = kChunkSteps * kStepTurns;
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

// A warp's ring of turns, each half a step: two pages as they lie in the pool, the planes that are
// read and the scales behind them.
template <int kDim, int kPlanes>
struct SketchRing {
  static constexpr int kWordBytes = kPlanes * kDim * 2;  // Of a page.
  static constexpr int kPageBytes = kWordBytes + kPageTokens * 2;
  static constexpr int kSlotBytes = 2 * kPageBytes;
  // About as many bytes whatever the planes; one more where masses leave room for it.
  static constexpr int kLeastSlots = kPlanes == 1 ? 6 : kPlanes == 2 ? 3 : 2;
  __host__ __device__ static constexpr int Bytes(bool one_more) {
    return (kLeastSlots + (one_more ? 1 : 0)) * kSlotBytes;
  }
};

// A warp's way to the words of a step. kList: the source has a list.
// kAllPlanes: the pool has no others.
template <int kDim, int kPlanes, bool kAllPlanes, bool kList>
struct StepReader {
  using Ring = SketchRing<kDim, kPlanes>;
  static constexpr int kLine = 128;

  const SketchSource& source;
  const std::byte* from;  // Of page 0, what the lane copies first,
  uint32_t to;            // in a slot;
  int first;              // in the page.
  int last_page;
  const uint64_t policy = EvictFirstPolicy();
  const int32_t* pages;

  __device__ __forceinline__ explicit StepReader(const SketchSource& of)
      : source(of), last_page((of.tokens - 1) / kPageTokens) {
    // Kept: the compiler would work it out anew for each chunk.
    asm volatile("mov.b64 %0, %1;" : "=l"(pages) : "l"(of.pages));
    // Half a warp has a page, of which it copies 256 bytes at a time from where lines of 128 bytes
    // begin: for all pages alike, so where pages are whole lines apart.
    const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(of.descriptors) % kLine);
    first = Lane() % 16 * 16 - past;
    from = of.descriptors + first;
    to = static_cast<uint32_t>(Lane() / 16 * Ring::kPageBytes + first);
  }

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int Quarter() {  // Of the step.
    return Lane() / 4 * 2 + Lane() % 2;
  }
  // Which of a step's turns has the lane's quarter.
  __device__ __forceinline__ static int Turn() { return Lane() / 16; }
  // In the slot of that turn, the lane's words and scales.
  __device__ __forceinline__ static uint32_t WordsInSlot() {
    return static_cast<uint32_t>(Lane() / 8 % 2 * Ring::kPageBytes + Lane() % 4 / 2 * 64 +
                                 Quarter() % 4 * 16);
  }
  __device__ __forceinline__ static uint32_t ScalesInSlot() {
    return static_cast<uint32_t>(Lane() / 8 % 2 * Ring::kPageBytes + Ring::kWordBytes +
                                 Lane() / 4 % 2 * 16);
  }
  // Without a list the blocks may as well be pages.
  __device__ __forceinline__ int Shift() const { return kList ? source.quarter_shift : 2; }

  // Where the blocks of a chunk lie, block i of it in lane i: the page, with the quarter of the
  // page in the upper bits. `turns`: of the chunk's beginning, the warp's next chunk following.
  __device__ __forceinline__ uint32_t Places(int chunk, int end, int turns) const {
    const int per_chunk = kChunkQuarters >> Shift();
    const int block = min(Lane(), per_chunk - 1) + turns * (per_chunk / kChunkTurns);
    // Behind the last chunk it is read again, to no use: cheaper than a question at each step.
    const int of = min(chunk + block / per_chunk * kSketchWarps, end - 1);
    const int place = of * per_chunk + block % per_chunk;
    if constexpr (!kList) {
      return static_cast<uint32_t>(__ldg(pages + min(place, last_page)));
    } else {
      const int quarter = __ldcg(source.list + min(place, source.blocks - 1)) << Shift();
      return static_cast<uint32_t>(source.pages[quarter / 4]) | static_cast<uint32_t>(quarter % 4)
                                                                    << 30;
    }
  }

  // Asks for a turn of the chunk with these places.
  __device__ __forceinline__ void Copy(uint32_t places, int turn, uint32_t slot) const {
    if constexpr (kList) {
      CopyBlocks(places, turn, slot);
    } else {
      CopyPages(places, turn, slot);
    }
    CopyAsyncCommit();
  }
  // What has come, at the lane's words.
  __device__ __forceinline__ static void ReadWords(uint32_t at,
                                                   PlaneWords<kDim> (&words)[kPlanes]) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int pair = 0; pair < kDim / 64; ++pair) {
        const uint4 v = LoadShared16(at + p * kDim * 2 + pair * 128);
        words[p].pair[pair][0] = v.x;
        words[p].pair[pair][1] = v.y;
        words[p].pair[pair][2] = v.z;
        words[p].pair[pair][3] = v.w;
      }
    }
  }
  __device__ __forceinline__ static uint4 LoadShared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
  }

 private:
  // What is at `of_first` in page 0.
  __device__ __forceinline__ const std::byte* PageAt(uint32_t page,
                                                     const std::byte* of_first) const {
    const std::byte* at;  // One instruction, which the compiler makes three of.
    asm("mad.wide.u32 %0, %1, %2, %3;"
        : "=l"(at)
        : "r"(page), "r"(source.page_bytes), "l"(of_first));
    return at;
  }

  __device__ __forceinline__ void CopyPages(uint32_t places, int turn, uint32_t slot) const {
    constexpr int kLines = 2 * kLine, kAlign = 32;
    const std::byte* const page = PageAt(__shfl_sync(~0u, places, turn * 2 + Lane() / 16), from);
#pragma unroll
    for (int at = 0; at < Ring::kPageBytes + kLine - kAlign; at += kLines) {
      const int least = at - (kLine - kAlign), most = at + kLines - 16;
      if ((least >= 0 || first + at >= 0) &&
          (most < Ring::kPageBytes || first + at < Ring::kPageBytes)) {
        const bool scales =
            !kAllPlanes && most >= Ring::kWordBytes && first + at >= Ring::kWordBytes;
        const std::byte* const piece =
            page + at + (scales ? source.scales_at - Ring::kWordBytes : 0);
        CopyAsync16OfLine(slot + to + at, piece, policy);
      }
    }
  }
  // The blocks of a list, to where they would be in pages: each lane what it reads.
  __device__ __forceinline__ void CopyBlocks(uint32_t places, int turn, uint32_t slot) const {
    const uint32_t place = __shfl_sync(~0u, places, (turn / 2 * 16 + Quarter()) >> Shift());
    if (Turn() != turn % 2) return;
    const std::byte* const page = PageAt(place & 0x3fffffffu, source.descriptors);
    const int quarter = static_cast<int>(place >> 30) + (Quarter() & ((1 << Shift()) - 1));
    const std::byte* const from = page + Lane() % 4 / 2 * 64 + quarter * 16;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int pair = 0; pair < kDim / 64; ++pair) {
        const int at = p * kDim * 2 + pair * 128;
        CopyAsync16(slot + WordsInSlot() + at, from + at);
      }
    }
    if (Lane() % 4 < 2) {
      asm volatile(
          "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(slot + ScalesInSlot() + Lane() % 4 * 8),
          "l"(page + source.scales_at + quarter * 8)
          : "memory");
    }
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

// The chunks of one warp: begin + warp, every kSketchWarps-th, up to end. The turns of their steps
// go through the warp's ring, one after the other.
template <int kDim, int kPlanes, bool kAllPlanes, bool kList>
struct ChunkStream {
  using Ring = SketchRing<kDim, kPlanes>;
  static constexpr bool kReadsList = kList;
  static constexpr int kStepBytes = kStepTurns * Ring::kSlotBytes;

  const StepReader<kDim, kPlanes, kAllPlanes, kList> reader;
  int first;
  int end;
  const bool one_more;       // Slot.
  const uint32_t ring;       // The warp's.
  const uint32_t ring_last;  // Slot of it.
  uint32_t first_places[2];  // Of the warp's first chunks.
  uint32_t places;           // Of what is copied while a chunk is scored.

  __device__ __forceinline__ ChunkStream(const SketchSource& source, int begin, int end_chunk,
                                         std::byte* rings, bool more)
      : reader(source),
        first(begin + static_cast<int>(threadIdx.x) / 32),
        end(end_chunk),
        one_more(more),
        ring(SharedAddress(rings) + static_cast<int>(threadIdx.x) / 32 * Ring::Bytes(more)),
        ring_last(ring + Ring::Bytes(more) - Ring::kSlotBytes) {}

  __device__ __forceinline__ int Slots() const { return Ring::kLeastSlots + (one_more ? 1 : 0); }
  __device__ __forceinline__ void Move(int begin, int end_chunk) {
    first = begin + static_cast<int>(threadIdx.x) / 32;
    end = end_chunk;
  }
  __device__ __forceinline__ void FindPlaces() {
    if (first >= end) return;
    first_places[0] = reader.Places(first, end, 0);
    if (Ring::kLeastSlots >= kChunkTurns) first_places[1] = reader.Places(first, end, kChunkTurns);
    places = reader.Places(first, end, Slots());
  }
  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int turn = 0; turn <= Ring::kLeastSlots; ++turn) {
      if (turn == Ring::kLeastSlots && !one_more) break;
      if (first < end) {
        reader.Copy(first_places[turn / kChunkTurns], turn % kChunkTurns,
                    ring + turn * Ring::kSlotBytes);
      } else {
        CopyAsyncCommit();
      }
    }
  }

  // One step beside the stream, through slots that are not the ring's.
  __device__ __forceinline__ void CopyOne(uint32_t chunk_places, int step, uint32_t slots) const {
#pragma unroll
    for (int turn = 0; turn < kStepTurns; ++turn) {
      reader.Copy(chunk_places, step * kStepTurns + turn, slots + turn * Ring::kSlotBytes);
    }
  }
  // kStarted: the stream has been since.
  template <bool kStarted, int kHeads>
  __device__ __forceinline__ void ReadOne(const SketchOperand<kDim, kHeads>& operand,
                                          uint32_t slots, SketchSums<kHeads>* sums,
                                          uint4* scales) const {
    PlaneWords<kDim> words[kPlanes];
    if constexpr (kStarted) {
      Wait<Ring::kLeastSlots>();
    } else {
      CopyAsyncWait<0>();
    }
    Read(slots + reader.Turn() * Ring::kSlotBytes, words, scales);
    sums->Compute(words, operand);
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
  // Until at most kLater turns are under way, or one more.
  template <int kLater>
  __device__ __forceinline__ void Wait() const {
    if (one_more) {
      CopyAsyncWait<kLater + 1>();
    } else {
      CopyAsyncWait<kLater>();
    }
  }
  // A step that has come, the lane's turn of it in `slot`. Other lanes have asked for its words;
  // behind this the slots may be filled again.
  __device__ __forceinline__ void Read(uint32_t slot, PlaneWords<kDim> (&words)[kPlanes],
                                       uint4* scales) const {
    __syncwarp();
    reader.ReadWords(slot + reader.WordsInSlot(), words);
    *scales = reader.LoadShared16(slot + reader.ScalesInSlot());
    __syncwarp();
  }
  __device__ __forceinline__ uint32_t Next(uint32_t slot) const {
    return slot == ring_last ? ring : slot + Ring::kSlotBytes;
  }

  template <bool kCut, int kHeads, typename Step>
  __device__ __forceinline__ void RunChunk(int chunk, const SketchOperand<kDim, kHeads>& operand,
                                           const Step& step, uint32_t* slot) {
    const uint32_t newest = reader.Places(chunk + kSketchWarps, end, Slots());
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) {
      const uint32_t second = Next(*slot);
      PlaneWords<kDim> words[kPlanes];
      uint4 scales;
      Wait<Ring::kLeastSlots - kStepTurns>();
      Read(reader.Turn() == 0 ? *slot : second, words, &scales);
      reader.Copy(places, j * kStepTurns, *slot);
      reader.Copy(places, j * kStepTurns + 1, second);
      *slot = Next(second);
      SketchSums<kHeads> sums;
      sums.Compute(words, operand);
      step(std::bool_constant<kCut>(), sums, scales, j,
           reader.source.tokens - chunk * kChunkTokens);
    }
    // Where it stands: the compiler would wait for the load where it begins.
    asm volatile("mov.b32 %0, %1;" : "=r"(places) : "r"(newest));
  }
};

// The tokens of a lane in a step of the row's last chunk that count.
__device__ __forceinline__ void CutStep(int j, int left, float (&scales)[8]) {
  const int row = static_cast<int>(threadIdx.x) % 32 / 4;
  CutScales(left - j * kStepTokens - row * 2 * kQuarterTokens, scales);
}

// Masses of the blocks of a stream's chunks, to shared memory, and the CTA's totals of the heads.
// kShift: the source's, or -1, for any.
template <int kShift, typename Stream, int kDim, int kHeads>
__device__ __forceinline__ void ScoreChunks(Stream& stream, int group,
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
  const int step_blocks = 16 >> shift;
  const int chunk_blocks = kChunkSteps * step_blocks;
  MassColumn<kEach> columns[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int head = Columns::Head(tile, 0);
    const int at = head * memory.stride + static_cast<int>(threadIdx.x) / 32 * chunk_blocks +
                   ((row * 2) >> shift);
    columns[tile].blocks = head < group && (shift < 2 || !odd) ? step_blocks : 0;
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
        columns[tile].Store(j * step_blocks, quarter_sum[tile][0]);
        columns[tile].Store(j * step_blocks + 1, quarter_sum[tile][1]);
      } else {
        if (shift == 2) {
#pragma unroll
          for (int i = 0; i < kEach; ++i) pair_sum[i] += __shfl_xor_sync(~0u, pair_sum[i], 4);
        }
        columns[tile].Store(j * step_blocks, pair_sum);
      }
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
      columns[tile].Advance(kSketchWarps * kChunkSteps * columns[tile].blocks);
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
