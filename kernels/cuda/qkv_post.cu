// QkvPost: optional q/k RMS norm per head, rotary embedding, K and V into their pages, descriptors.
//
//   q [T, Hq d] in place; k, v [T, Hk d] -> pool pages [Hk][16][d]; cos, sin [T, d / 2]
//
// A CTA takes one page that is written (PageWrite) and one KV head of it: the key and the value of
// every row written there, and the group's query heads of the same rows. A head is a warp's work:
// a lane holds d / 64 neighbours of each half, so that a rotary pair never leaves its lane. When
// all heads are done, the CTA rebuilds the descriptor from shared memory:
// - minmax: the bounds of the page's keys [0, slot_begin + slots), the old ones read back;
// - sketch: the planes and the scale of each token written, from that token's stored key alone.
// So a descriptor's bits do not depend on how its tokens were cut into chunks.
//
// A decode row is a single wave of (row, KV head) CTAs, one warp per head: its latency counts, 1.2
// us with min/max and 1.9 us with a sketch at 1 row, 2.0 and 2.4 us at 32 (28 / 4 heads). A prefill
// chunk reads and writes each value once: 2.6 to 3.0 TB/s at 8192 rows (56 to 65 % of the reads'
// ceiling), where instructions and memory take about as long.

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/sketch.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMinWarps = 4;
constexpr int kMaxWarps = kMaxGroup + 2;
constexpr int kQueryHeads = 4;  // That a warp takes at a time when there is more than one row.

struct QkvPostArgs {
  __nv_bfloat16* q;        // [T, Hk * group * d]
  const __nv_bfloat16* k;  // [T, Hk * d]
  const __nv_bfloat16* v;  // [T, Hk * d]
  const float* q_norm;     // [d] or null
  const float* k_norm;     // [d] or null
  float eps;
  const float* cos;  // [T, d / 2]
  const float* sin;  // [T, d / 2]
  const PageWrite* writes;
  int kv_heads;
  int group;
  __nv_bfloat16* k_pool;   // [pages][Hk][16][d]
  __nv_bfloat16* v_pool;   // same
  std::byte* descriptors;  // [pages][Hk][descriptor_bytes]
  int64_t descriptor_bytes;
  int planes;
};

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// One head over the lanes of a warp: x[h][e] is component h * d / 2 + lane * kEach + e.
template <int kDim>
struct Head {
  static constexpr int kHalf = kDim / 2;
  static constexpr int kEach = kDim / 64;  // Neighbours of one half in a lane.
  using Packed = std::conditional_t<kEach == 2, uint32_t, uint16_t>;
  float x[2][kEach];

  __device__ __forceinline__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  __device__ __forceinline__ void Load(const __nv_bfloat16* from) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t bits = reinterpret_cast<const Packed*>(from + h * kHalf)[Lane()];
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[h][e] = __uint_as_float((bits >> (16 * e)) << 16);
    }
  }
  // Rounds to bf16, which is what x holds then, and stores.
  __device__ __forceinline__ void Store(__nv_bfloat16* to) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t bits = 0;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const uint32_t narrow = __bfloat16_as_ushort(__float2bfloat16_rn(x[h][e]));
        x[h][e] = __uint_as_float(narrow << 16);
        bits |= narrow << (16 * e);
      }
      reinterpret_cast<Packed*>(to + h * kHalf)[Lane()] = static_cast<Packed>(bits);
    }
  }

  __device__ __forceinline__ float SumOfSquares() const {
    float sum = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum = fmaf(x[h][e], x[h][e], sum);
    }
    return WarpSum(sum);
  }

  // The lane's part of half a head's f32 factors: cosines, sines, half the weight of a norm.
  struct alignas(4 * kEach) Factors {
    float at[kEach];
  };
  __device__ __forceinline__ static Factors Fetch(const float* from) {
    return reinterpret_cast<const Factors*>(from)[Lane()];
  }
  struct NormWeight {
    Factors half[2];
    __device__ __forceinline__ explicit NormWeight(const float* from) {
      half[0] = Fetch(from);
      half[1] = Fetch(from + kHalf);
    }
  };
  __device__ __forceinline__ void Norm(const NormWeight& weight, float eps) {
    const float scale = rsqrtf(SumOfSquares() / static_cast<float>(kDim) + eps);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[h][e] = x[h][e] * scale * weight.half[h].at[e];
    }
  }
  __device__ __forceinline__ void Rotate(const Factors& cos, const Factors& sin) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float a = x[0][e], b = x[1][e];
      x[0][e] = fmaf(-b, sin.at[e], __fmul_rn(a, cos.at[e]));
      x[1][e] = fmaf(a, sin.at[e], __fmul_rn(b, cos.at[e]));
    }
  }

  // x = H S x / sqrt(d) (kernels/sketch.h), the bits of a component's index from the lowest up.
  __device__ __forceinline__ void Hadamard() {
    constexpr float kInverseRoot = kDim == 64 ? 0.125f : 0.088388347648318440550f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      constexpr uint64_t kLow = kSketchSignBits[0], kHigh = kSketchSignBits[1];
      const uint64_t signs = (h * kHalf < 64 ? kLow >> (h * kHalf) : kHigh) >> (Lane() * kEach);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        x[h][e] *= ((signs >> e) & 1) != 0 ? -kInverseRoot : kInverseRoot;
      }
      if constexpr (kEach == 2) {
        const float a = x[h][0], b = x[h][1];
        x[h][0] = a + b;
        x[h][1] = a - b;
      }
    }
#pragma unroll
    for (int bit = 1; bit < kWarp; bit *= 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const float other = __shfl_xor_sync(~0u, x[h][e], bit);
          x[h][e] = (Lane() & bit) != 0 ? other - x[h][e] : x[h][e] + other;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float a = x[0][e], b = x[1][e];
      x[0][e] = a + b;
      x[1][e] = a - b;
    }
  }
};

// Bit i of the lower 16 goes to bit 2 i.
__device__ __forceinline__ uint32_t SpreadBits(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0fu;
  x = (x | x << 2) & 0x33333333u;
  return (x | x << 1) & 0x55555555u;
}

// What the CTA gathers for the descriptor of its page and KV head.
template <int kDim>
struct SketchShared {
  uint32_t words[kSketchMaxPlanes * kDim / 32][kPageTokens];
  __nv_bfloat16 scale[kPageTokens];
};
template <int kDim>
struct MinMaxShared {
  alignas(16) __nv_bfloat16 keys[kPageTokens][kDim];
};

// The planes and the scale of the stored key `head` of token `slot`.
template <int kDim>
__device__ __forceinline__ void BuildSketch(Head<kDim> head, int planes, int slot,
                                            SketchShared<kDim>* shared) {
  constexpr int kEach = Head<kDim>::kEach;
  constexpr int kWords = kDim / 32;
  const int lane = Head<kDim>::Lane();
  // The rotation keeps the sum of squares, which then need not wait for it.
  const float x_dot_x = head.SumOfSquares();
  const float inv_step = rsqrtf(x_dot_x / static_cast<float>(kDim)) / kSketchStep;
  head.Hadamard();
  float x_dot_level = 0;
  // Lane p * kWords + w writes the word w of plane p: it keeps the ballots of that word's half.
  const int my_plane = lane / kWords;
  const int my_word = lane % kWords;
  uint32_t mine[kEach] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float x = head.x[h][e];
      // fmaxf drops a NaN: code 0.
      const float cell = fminf(fmaxf(floorf(x * inv_step) + 4.0f, 0.0f), 7.0f);
      const int code = static_cast<int>(cell);
      const int level = 2 * (code >> (kSketchMaxPlanes - planes)) - ((1 << planes) - 1);
      x_dot_level = fmaf(x, static_cast<float>(level), x_dot_level);
#pragma unroll
      for (int p = 0; p < kSketchMaxPlanes; ++p) {
        const uint32_t ballot = __ballot_sync(~0u, (code & (4 >> p)) != 0);
        if (my_plane == p && my_word / (kWords / 2) == h) mine[e] = ballot;
      }
    }
  }
  x_dot_level = WarpSum(x_dot_level);
  if (lane < planes * kWords) {
    uint32_t word = mine[0];
    if constexpr (kEach == 2) {
      const int shift = my_word % 2 * 16;  // A word holds 16 lanes' pairs.
      word = SpreadBits((mine[0] >> shift) & 0xffffu) |
             SpreadBits((mine[kEach - 1] >> shift) & 0xffffu) << 1;
    }
    shared->words[lane][slot] = word;
  }
  if (lane == kWarp - 1) {
    shared->scale[slot] = __float2bfloat16_rn(x_dot_x == 0.0f ? 0.0f : x_dot_x / x_dot_level);
  }
}

template <int kDim>
__device__ __forceinline__ void StoreSketch(const SketchShared<kDim>& shared, int planes, int begin,
                                            int end, std::byte* descriptor) {
  const int words = planes * kDim / 32 * kPageTokens;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) {
    const int slot = i % kPageTokens;
    if (slot < begin || slot >= end) continue;
    reinterpret_cast<uint32_t*>(descriptor)[i] = shared.words[i / kPageTokens][slot];
  }
  const int slot = static_cast<int>(threadIdx.x);
  if (slot >= begin && slot < end) {
    reinterpret_cast<__nv_bfloat16*>(descriptor + words * 4)[slot] = shared.scale[slot];
  }
}

// Element-wise bounds of the page's first `end` keys; both NaN where a key is.
template <int kDim>
__device__ __forceinline__ void StoreMinMax(const MinMaxShared<kDim>& shared, int end,
                                            std::byte* descriptor) {
  const int pair = static_cast<int>(threadIdx.x);
  if (pair >= kDim / 2) return;
  const auto key = [&](int t) {
    return reinterpret_cast<const __nv_bfloat162*>(shared.keys[t])[pair];
  };
  __nv_bfloat162 least = key(0);
  __nv_bfloat162 most = least;
#pragma unroll
  for (int t = 1; t < kPageTokens; ++t) {
    if (t >= end) break;
    least = __hmin2_nan(least, key(t));
    most = __hmax2_nan(most, key(t));
  }
  auto* const to = reinterpret_cast<__nv_bfloat162*>(descriptor);
  to[pair] = least;
  to[kDim / 2 + pair] = most;
}

// Query heads side by side in memory, in place.
template <int kDim, int kCount>
__device__ __forceinline__ void TurnQueries(__nv_bfloat16* q, const QkvPostArgs& args,
                                            const typename Head<kDim>::Factors& cos,
                                            const typename Head<kDim>::Factors& sin) {
  Head<kDim> head[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) head[i].Load(q + i * kDim);
  if (args.q_norm != nullptr) {
    const typename Head<kDim>::NormWeight norm(args.q_norm);
#pragma unroll
    for (int i = 0; i < kCount; ++i) head[i].Norm(norm, args.eps);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    head[i].Rotate(cos, sin);
    head[i].Store(q + i * kDim);
  }
}

// Grid: writes x KV heads, the heads of a page side by side.
template <int kDim, SelectorKind kKind>
__global__ void __launch_bounds__(kMaxWarps* kWarp) QkvPostKernel(const QkvPostArgs args) {
  using Shared =
      std::conditional_t<kKind == SelectorKind::kSketch, SketchShared<kDim>, MinMaxShared<kDim>>;
  __shared__ Shared shared;
  LetNextStart();
  // The list came to the device before any kernel of the step was launched.
  const int kv_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.kv_heads));
  const PageWrite write = args.writes[blockIdx.x / static_cast<unsigned>(args.kv_heads)];
  const int slots = write.slots;
  WaitForPrevious();
  if (slots <= 0) return;
  const int64_t run = (int64_t{write.page} * args.kv_heads + kv_head);
  __nv_bfloat16* const k_page = args.k_pool + run * kPageTokens * kDim;
  __nv_bfloat16* const v_page = args.v_pool + run * kPageTokens * kDim;

  if constexpr (kKind == SelectorKind::kMinMax) {  // The keys that were there before.
    const int vectors = write.slot_begin * kDim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < vectors; i += static_cast<int>(blockDim.x)) {
      reinterpret_cast<uint4*>(shared.keys)[i] = reinterpret_cast<const uint4*>(k_page)[i];
    }
  }

  // Keys first, since they take longest, then values, then query heads: one to a warp where there
  // is a single row, else several at a time, which share their angles.
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int q_heads = slots == 1 ? 1 : kQueryHeads;
  const int tasks = slots * (2 + (args.group + q_heads - 1) / q_heads);
  for (int task = static_cast<int>(threadIdx.x) / kWarp; task < tasks; task += warps) {
    const int role = task / slots;
    const int offset = task - role * slots;
    const int slot = write.slot_begin + offset;
    const int64_t row = write.row_begin + offset;
    const int64_t kv_row = row * args.kv_heads + kv_head;
    if (role == 1) {
      Head<kDim> head;
      head.Load(args.v + kv_row * kDim);
      head.Store(v_page + slot * kDim);
      continue;
    }
    const auto cos = Head<kDim>::Fetch(args.cos + row * (kDim / 2));
    const auto sin = Head<kDim>::Fetch(args.sin + row * (kDim / 2));
    if (role == 0) {
      Head<kDim> head;
      head.Load(args.k + kv_row * kDim);
      if (args.k_norm != nullptr) {
        head.Norm(typename Head<kDim>::NormWeight(args.k_norm), args.eps);
      }
      head.Rotate(cos, sin);
      head.Store(k_page + slot * kDim);
      if constexpr (kKind == SelectorKind::kSketch) {
        BuildSketch<kDim>(head, args.planes, slot, &shared);
      } else {
        head.Store(shared.keys[slot]);
      }
      continue;
    }
    const int first = (role - 2) * q_heads;
    const int count = min(q_heads, args.group - first);
    __nv_bfloat16* const q = args.q + (kv_row * args.group + first) * kDim;
    if (count == kQueryHeads) {
      TurnQueries<kDim, kQueryHeads>(q, args, cos, sin);
    } else {
      for (int i = 0; i < count; ++i) TurnQueries<kDim, 1>(q + i * kDim, args, cos, sin);
    }
  }
  __syncthreads();
  std::byte* const descriptor = args.descriptors + run * args.descriptor_bytes;
  const int end = write.slot_begin + slots;
  if constexpr (kKind == SelectorKind::kSketch) {
    StoreSketch<kDim>(shared, args.planes, write.slot_begin, end, descriptor);
  } else {
    StoreMinMax<kDim>(shared, end, descriptor);
  }
}

}  // namespace

void QkvPost(Context& context, const QkvPostParams& params, const RowPlace* /*places*/,
             const PageWrite* writes, int64_t num_writes) {
  if (num_writes == 0) return;
  const KvLayout& layout = params.layout;
  RESA_CHECK(layout.kv_dtype == DType::kBF16) << "QkvPost: K and V in " << NameOf(layout.kv_dtype);
  const int heads = static_cast<int>(params.q.cols / layout.head_dim);
  const QkvPostArgs args = {
      .q = reinterpret_cast<__nv_bfloat16*>(params.q.b16()),
      .k = reinterpret_cast<const __nv_bfloat16*>(params.k.b16()),
      .v = reinterpret_cast<const __nv_bfloat16*>(params.v.b16()),
      .q_norm = params.q_norm,
      .k_norm = params.k_norm,
      .eps = params.eps,
      .cos = params.cos,
      .sin = params.sin,
      .writes = writes,
      .kv_heads = layout.num_kv_heads,
      .group = heads / layout.num_kv_heads,
      .k_pool = reinterpret_cast<__nv_bfloat16*>(params.kv.k),
      .v_pool = reinterpret_cast<__nv_bfloat16*>(params.kv.v),
      .descriptors = params.kv.descriptors,
      .descriptor_bytes = static_cast<int64_t>(layout.DescriptorRunBytes()),
      .planes = layout.selector.planes,
  };
  RESA_CHECK(args.group >= 1 && args.group <= kMaxGroup) << "QkvPost: a group of " << args.group;
  for (const float* factors : {params.cos, params.sin, params.q_norm, params.k_norm}) {
    RESA_CHECK(reinterpret_cast<uintptr_t>(factors) % 8 == 0)
        << "QkvPost: factors not aligned to 8";
  }
  const int warps = std::max(kMinWarps, args.group + 2);
  const auto launch = [&](auto kernel) {
    LaunchOverlapped(context.stream, kernel, static_cast<unsigned>(num_writes * args.kv_heads),
                     static_cast<unsigned>(warps * kWarp), 0, 1, args);
  };
  const bool sketch = layout.selector.kind == SelectorKind::kSketch;
  if (layout.head_dim == 64) {
    launch(sketch ? QkvPostKernel<64, SelectorKind::kSketch>
                  : QkvPostKernel<64, SelectorKind::kMinMax>);
  } else {
    RESA_CHECK_EQ(layout.head_dim, 128) << "QkvPost: head size";
    launch(sketch ? QkvPostKernel<128, SelectorKind::kSketch>
                  : QkvPostKernel<128, SelectorKind::kMinMax>);
  }
}

}  // namespace resa::kernels::cuda
