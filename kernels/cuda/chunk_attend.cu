// Exact causal attention of runs of consecutive rows over the paged pool.
//
//   out[r, h] = sum_t softmax_t(q[r, h] . k[t, h / G] / sqrt(d)) v[t, h / G],  t <= position of r
//
// q, out [T, Hq * d] bf16; K and V [page][Hk][16][d] bf16. A CTA of 8 warps owns 128 packed rows
// (row p / G, head p % G) of one KV head over a range of keys; a warp 16 of them. Bound: the tensor
// cores, 4 * d FLOP per row, head and key.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/chunk_plan.h"
#include "kernels/cuda/kernels.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileKeys = 64;

struct AttendArgs {
  const __nv_bfloat16* q = nullptr;
  __nv_bfloat16* out = nullptr;
  const __nv_bfloat16* k = nullptr;
  const __nv_bfloat16* v = nullptr;
  const int32_t* pages = nullptr;
  int64_t page_stride = 0;
  const ChunkWork* work = nullptr;
  float* partials = nullptr;     // [partials * Hk][128][d]
  float2* partial_ml = nullptr;  // [partials * Hk][128]
  int group = 0;
  int kv_heads = 0;
  float scale_log2 = 0;  // log2(e) / sqrt(d)
};

__device__ __forceinline__ void Mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t Pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int kHeadDim>
struct Shared {
  __nv_bfloat16 k[kTileKeys][kHeadDim + 8];
  __nv_bfloat16 v[kTileKeys][kHeadDim + 8];
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) ChunkAttendKernel(const AttendArgs args) {
  __shared__ Shared<kHeadDim> shared;
  const ChunkWork work = args.work[blockIdx.x];
  const int head = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int q_stride = args.kv_heads * args.group * kHeadDim;
  constexpr int kDimSteps = kHeadDim / 16;

  // The two rows of this thread.
  int row[2], own[2];
  int64_t offset[2];
  for (int i = 0; i < 2; ++i) {
    row[i] = warp * 16 + lane / 4 + 8 * i;
    const int packed = min(work.packed_begin + row[i], work.packed_end - 1);
    const int r = packed / args.group;
    own[i] = work.position + r;
    offset[i] = static_cast<int64_t>(work.row_begin + r) * q_stride +
                (head * args.group + packed % args.group) * kHeadDim;
  }
  uint32_t q[kDimSteps][4];
  for (int s = 0; s < kDimSteps; ++s) {
    for (int i = 0; i < 4; ++i) {
      q[s][i] = *reinterpret_cast<const uint32_t*>(args.q + offset[i % 2] + s * 16 + i / 2 * 8 +
                                                   lane % 4 * 2);
    }
  }
  float o[kHeadDim / 8][4] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
  for (int key0 = work.key_begin; key0 < work.key_end; key0 += kTileKeys) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTileKeys * kHeadDim / 8; i += kThreads) {
      const int t = i / (kHeadDim / 8), c = i % (kHeadDim / 8) * 8;
      uint4 kv = {}, vv = {};
      if (key0 + t < work.key_end) {
        const int64_t page = args.pages[work.table * args.page_stride + (key0 + t) / kPageTokens];
        const int64_t at =
            ((page * args.kv_heads + head) * kPageTokens + (key0 + t) % kPageTokens) * kHeadDim + c;
        kv = *reinterpret_cast<const uint4*>(args.k + at);
        vv = *reinterpret_cast<const uint4*>(args.v + at);
      }
      *reinterpret_cast<uint4*>(&shared.k[t][c]) = kv;
      *reinterpret_cast<uint4*>(&shared.v[t][c]) = vv;
    }
    __syncthreads();
    float s[kTileKeys / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        const __nv_bfloat16* b = &shared.k[n * 8 + lane / 4][step * 16 + lane % 4 * 2];
        Mma16816(s[n], q[step], *reinterpret_cast<const uint32_t*>(b),
                 *reinterpret_cast<const uint32_t*>(b + 8));
      }
    }
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        for (int j = 0; j < 2; ++j) {
          float& x = s[n][i * 2 + j];
          const int key = key0 + n * 8 + lane % 4 * 2 + j;
          x = key <= own[i] && key < work.key_end ? x * args.scale_log2 : -INFINITY;
          top = fmaxf(top, x);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;
      const float shrink = exp2f(m[i] - base);
      m[i] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        for (int j = 0; j < 2; ++j) {
          s[n][i * 2 + j] = exp2f(s[n][i * 2 + j] - base);
          sum += s[n][i * 2 + j];
        }
      }
      l[i] = l[i] * shrink + sum;
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c) {
        o[c][i * 2] *= shrink;
        o[c][i * 2 + 1] *= shrink;
      }
    }
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step) {
      const uint32_t p[4] = {Pack(s[2 * step][0], s[2 * step][1]),
                             Pack(s[2 * step][2], s[2 * step][3]),
                             Pack(s[2 * step + 1][0], s[2 * step + 1][1]),
                             Pack(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c) {
        uint32_t b0, b1;
        const uint32_t at = static_cast<uint32_t>(
            __cvta_generic_to_shared(&shared.v[step * 16 + lane % 16][c * 8]));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b0), "=r"(b1)
                     : "r"(at));
        Mma16816(o[c], p, b0, b1);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    l[i] += __shfl_xor_sync(~0u, l[i], 1);
    l[i] += __shfl_xor_sync(~0u, l[i], 2);
    if (work.packed_begin + row[i] >= work.packed_end) continue;
    if (work.partial < 0) {
      const float inverse = 1.0f / l[i];
      for (int c = 0; c < kHeadDim / 8; ++c) {
        *reinterpret_cast<uint32_t*>(args.out + offset[i] + c * 8 + lane % 4 * 2) =
            Pack(o[c][i * 2] * inverse, o[c][i * 2 + 1] * inverse);
      }
    } else {
      const int64_t slot = static_cast<int64_t>(work.partial) * args.kv_heads + head;
      const int64_t at = slot * kChunkTileRows + row[i];
      for (int c = 0; c < kHeadDim / 8; ++c) {
        *reinterpret_cast<float2*>(args.partials + at * kHeadDim + c * 8 + lane % 4 * 2) =
            make_float2(o[c][i * 2], o[c][i * 2 + 1]);
      }
      if (lane % 4 == 0) args.partial_ml[at] = make_float2(m[i], l[i]);
    }
  }
}

struct MergeArgs {
  const ChunkMerge* merge = nullptr;
  const float* partials = nullptr;
  const float2* partial_ml = nullptr;
  __nv_bfloat16* out = nullptr;
  int group = 0;
  int kv_heads = 0;
};

// One warp per packed row: the partial results in the order of their keys. Grid: merges x KV heads
// x 128 / 8 rows.
template <int kHeadDim>
__global__ void __launch_bounds__(256) ChunkMergeKernel(const MergeArgs args) {
  constexpr int kPer = kHeadDim / 32;
  const ChunkMerge merge = args.merge[blockIdx.x];
  const int head = blockIdx.y;
  const int row = blockIdx.z * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int packed = merge.packed_begin + row;
  if (packed >= merge.packed_end) return;
  const auto at = [&](int i) {
    return (static_cast<int64_t>(merge.partial_begin + i) * args.kv_heads + head) * kChunkTileRows +
           row;
  };
  float m = -INFINITY;
  for (int i = lane; i < merge.partials; i += 32) m = fmaxf(m, args.partial_ml[at(i)].x);
  for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
  float o[kPer] = {};
  float l = 0;
#pragma unroll 4
  for (int i = 0; i < merge.partials; ++i) {
    const float2 ml = args.partial_ml[at(i)];
    const float weight = exp2f(ml.x - m);
    l += weight * ml.y;
    const float* from = args.partials + at(i) * kHeadDim + lane * kPer;
    if constexpr (kPer == 4) {
      const float4 x = *reinterpret_cast<const float4*>(from);
      o[0] += weight * x.x;
      o[1] += weight * x.y;
      o[2] += weight * x.z;
      o[3] += weight * x.w;
    } else {
      const float2 x = *reinterpret_cast<const float2*>(from);
      o[0] += weight * x.x;
      o[1] += weight * x.y;
    }
  }
  const float inverse = 1.0f / l;
  __nv_bfloat16* to =
      args.out +
      (static_cast<int64_t>(merge.row_begin + packed / args.group) * args.kv_heads * args.group +
       head * args.group + packed % args.group) *
          kHeadDim +
      lane * kPer;
#pragma unroll
  for (int j = 0; j < kPer; j += 2) {
    *reinterpret_cast<uint32_t*>(to + j) = Pack(o[j] * inverse, o[j + 1] * inverse);
  }
}

template <int kHeadDim>
void Launch(Context& context, const ChunkAttendParams& params, const ChunkPlan& plan) {
  const int kv_heads = params.layout.num_kv_heads;
  const size_t slots = static_cast<size_t>(plan.partials) * kv_heads * kChunkTileRows;
  std::byte* partials =
      context.chunk_partials.Reserve(slots * (kHeadDim * sizeof(float) + sizeof(float2)));
  AttendArgs args;
  args.q = reinterpret_cast<const __nv_bfloat16*>(params.q.b16());
  args.out = reinterpret_cast<__nv_bfloat16*>(params.out.b16());
  args.k = reinterpret_cast<const __nv_bfloat16*>(params.kv.k);
  args.v = reinterpret_cast<const __nv_bfloat16*>(params.kv.v);
  args.pages = params.tables.pages;
  args.page_stride = params.tables.stride;
  args.partials = reinterpret_cast<float*>(partials);
  args.partial_ml = reinterpret_cast<float2*>(partials + slots * kHeadDim * sizeof(float));
  args.group = params.num_heads / kv_heads;
  args.kv_heads = kv_heads;
  args.scale_log2 = 1.44269504088896f / sqrtf(static_cast<float>(kHeadDim));
  MergeArgs merge;
  merge.partials = args.partials;
  merge.partial_ml = args.partial_ml;
  merge.out = args.out;
  merge.group = args.group;
  merge.kv_heads = kv_heads;
  for (const ChunkPass& pass : plan.passes) {
    args.work = context.chunk_planner->work() + pass.work_begin;
    ChunkAttendKernel<kHeadDim><<<dim3(pass.works, kv_heads), kThreads, 0, context.stream>>>(args);
    RESA_CUDA_CHECK(cudaGetLastError());
    if (pass.merges == 0) continue;
    merge.merge = context.chunk_planner->merge() + pass.merge_begin;
    ChunkMergeKernel<kHeadDim>
        <<<dim3(pass.merges, kv_heads, kChunkTileRows / 8), 256, 0, context.stream>>>(merge);
    RESA_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace

void ChunkAttend(Context& context, const ChunkAttendParams& params, const DenseChunk* host_chunks) {
  if (params.num_chunks == 0) return;
  const KvLayout& layout = params.layout;
  RESA_CHECK(layout.kv_dtype == DType::kBF16) << "K and V are " << NameOf(layout.kv_dtype);
  RESA_CHECK(params.num_heads % layout.num_kv_heads == 0);
  if (context.chunk_planner == nullptr) context.chunk_planner = std::make_shared<ChunkPlanner>();
  const ChunkShape shape{params.num_heads / layout.num_kv_heads, layout.num_kv_heads,
                         context.device.sms, context.deterministic};
  const ChunkPlan& plan =
      context.chunk_planner->Plan(host_chunks, params.num_chunks, shape, context.stream);
  switch (layout.head_dim) {
    case 64:
      return Launch<64>(context, params, plan);
    case 128:
      return Launch<128>(context, params, plan);
    default:
      RESA_CHECK(false) << "head size " << layout.head_dim << " is neither 64 nor 128";
  }
}

}  // namespace resa::kernels::cuda
