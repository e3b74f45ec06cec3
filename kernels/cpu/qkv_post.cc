// Between the projections and attention: q/k norm, rotary embedding, K and V into their pages,
// descriptors. A task is the part of a run that falls in one page, so that whoever writes keys also
// rebuilds the page's descriptors, and no two tasks write the same memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/qkv_post.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/sketch_rotate-inl.h"
#include "kernels/sketch.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// One head: x = x / sqrt(mean(x^2) + eps) * norm, when there is a norm; then each (x_j, x_{j+d/2})
// turned by its angle.
HWY_INLINE void NormAndRotate(float* x, size_t d, const float* norm, float eps, const float* cos,
                              const float* sin) {
  const DF df;
  if (norm != nullptr) {
    VF sum = hn::Zero(df);
    for (size_t j = 0; j < d; j += kLanes) {
      const VF v = hn::LoadU(df, x + j);
      sum = hn::MulAdd(v, v, sum);
    }
    const VF scale = hn::Set(df, 1.0f / std::sqrt(Sum1(sum) / static_cast<float>(d) + eps));
    for (size_t j = 0; j < d; j += kLanes) {
      const VF v = hn::Mul(hn::LoadU(df, x + j), scale);
      hn::StoreU(hn::Mul(v, hn::LoadU(df, norm + j)), df, x + j);
    }
  }
  const size_t half = d / 2;
  for (size_t j = 0; j < half; j += kLanes) {
    const VF a = hn::LoadU(df, x + j), b = hn::LoadU(df, x + half + j);
    const VF c = hn::LoadU(df, cos + j), s = hn::LoadU(df, sin + j);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), df, x + j);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), df, x + half + j);
  }
}

template <class T>
HWY_INLINE void StoreHead(const float* from, size_t d, T* to) {
  for (size_t j = 0; j < d; j += kLanes) StoreNarrow(hn::LoadU(DF(), from + j), to + j);
}

// Rounds to the bf16 below (or above), so that bounds of f32 keys stay bounds; the same bits as
// FloorToBf16() and CeilToBf16().
template <bool kUp>
HWY_INLINE void StoreBound(VF value, bf16* to) {
  const DU32 du;
  const VU32 bits = hn::BitCast(du, value);
  const VU32 upper = hn::ShiftRight<16>(bits);
  const auto inexact = hn::Ne(hn::And(bits, hn::Set(du, 0xffffu)), hn::Zero(du));
  const auto negative = hn::Ne(hn::ShiftRight<31>(bits), hn::Zero(du));
  const auto away = hn::And(inexact, kUp ? hn::Not(negative) : negative);
  const VU32 moved = hn::Add(upper, hn::IfThenElseZero(away, hn::Set(du, 1u)));
  const auto nan = hn::RebindMask(du, hn::IsNaN(value));
  const VU32 narrow = hn::IfThenElse(nan, hn::Or(upper, hn::Set(du, 0x40u)), moved);
  // The upper half of an f32 that StoreNarrow need not round.
  StoreNarrow(hn::BitCast(DF(), hn::ShiftLeft<16>(narrow)), to);
}

// The element-wise bounds of a page's first `count` keys; both NaN where a key is.
template <class T>
void BuildMinMax(const T* keys, size_t count, size_t d, std::byte* descriptor) {
  auto* const lower = reinterpret_cast<bf16*>(descriptor);
  bf16* const upper = lower + d;
  for (size_t j = 0; j < d; j += kLanes) {
    VF least = LoadWide(keys + j);
    VF most = least;
    auto nan = hn::IsNaN(least);
    for (size_t t = 1; t < count; ++t) {
      const VF key = LoadWide(keys + t * d + j);
      least = hn::Min(least, key);
      most = hn::Max(most, key);
      nan = hn::Or(nan, hn::IsNaN(key));
    }
    const VF not_a_number = hn::Set(DF(), std::numeric_limits<float>::quiet_NaN());
    least = hn::IfThenElse(nan, not_a_number, least);
    most = hn::IfThenElse(nan, not_a_number, most);
    StoreBound<false>(least, lower + j);
    StoreBound<true>(most, upper + j);
  }
}

// The planes and the scale of token `t` of a page.
template <size_t kDim, class T>
void BuildSketch(const T* key, size_t t, int planes, std::byte* descriptor) {
  const DF d;
  const DI32 di;
  VF x[kDim / kLanes];
  Rotate<kDim>(key, x);
  VF squares = hn::Zero(d);
  for (const VF& v : x) squares = hn::MulAdd(v, v, squares);
  const float x_dot_x = Sum1(squares);
  const float rms = std::sqrt(x_dot_x / static_cast<float>(kDim));
  const VF inv_step = hn::Set(d, 1.0f / (kSketchStep * rms));

  HWY_ALIGN uint8_t codes[kDim];
  VF products = hn::Zero(d);
  const auto level_bias = hn::Set(di, (1 << planes) - 1);
  for (size_t i = 0; i < kDim / kLanes; ++i) {
    VF cell = hn::Add(hn::Floor(hn::Mul(x[i], inv_step)), hn::Set(d, 4.0f));
    cell = hn::Min(hn::Max(cell, hn::Zero(d)), hn::Set(d, 7.0f));
    const auto code = hn::ConvertTo(di, cell);
    const hn::Rebind<uint8_t, DI32> d8;
    hn::StoreU(hn::DemoteTo(d8, code), d8, codes + i * kLanes);
    const auto kept = hn::ShiftRightSame(code, kSketchMaxPlanes - planes);
    const auto level = hn::Sub(hn::Add(kept, kept), level_bias);
    products = hn::MulAdd(x[i], hn::ConvertTo(d, level), products);
  }
  const float scale = SketchScale(x_dot_x, Sum1(products));

  constexpr size_t kWords = kDim / 32;
  auto* const words = reinterpret_cast<uint32_t*>(descriptor);
  const hn::CappedTag<uint8_t, kDim> d8;
  for (int plane = 0; plane < planes; ++plane) {
    const auto bit = hn::Set(d8, static_cast<uint8_t>(4 >> plane));
    uint8_t bits[kDim / 8];
    for (size_t j = 0; j < kDim; j += hn::Lanes(d8)) {
      hn::StoreMaskBits(d8, hn::TestBit(hn::Load(d8, codes + j), bit), bits + j / 8);
    }
    for (size_t w = 0; w < kWords; ++w) {
      uint32_t* const to = words + (static_cast<size_t>(plane) * kWords + w) * kPageTokens + t;
      std::memcpy(to, bits + 4 * w, sizeof(*to));
    }
  }
  auto* const scales =
      reinterpret_cast<bf16*>(words + static_cast<size_t>(planes) * kWords * kPageTokens);
  scales[t] = RoundToBf16(scale);
}

// The descriptors of (page, KV head) after its tokens [first, end) were written.
template <class T>
void BuildDescriptor(const KvLayout& layout, const T* keys, size_t first, size_t end,
                     std::byte* descriptor) {
  const auto d = static_cast<size_t>(layout.head_dim);
  if (layout.selector.kind == SelectorKind::kMinMax) return BuildMinMax(keys, end, d, descriptor);
  for (size_t t = first; t < end; ++t) {
    if (d == 64) {
      BuildSketch<64>(keys + t * d, t, layout.selector.planes, descriptor);
    } else {
      BuildSketch<128>(keys + t * d, t, layout.selector.planes, descriptor);
    }
  }
}

// The part of `run` that lies in the page of index `page_index` in its table.
template <class T>
void PostPage(const QkvPostParams& p, const KvRun& run, size_t page_index) {
  const auto d = static_cast<size_t>(p.layout.head_dim);
  const auto kv_heads = static_cast<size_t>(p.layout.num_kv_heads);
  const size_t heads = static_cast<size_t>(p.q.cols) / d;
  const auto run_begin = static_cast<size_t>(run.position);
  const size_t run_end = run_begin + static_cast<size_t>(run.rows);
  const size_t page_begin = page_index * kPageTokens;
  const size_t begin = std::max(run_begin, page_begin);
  const size_t end = std::min(run_end, page_begin + kPageTokens);
  const auto page = static_cast<size_t>(
      p.tables.pages[run.table * p.tables.stride + static_cast<int64_t>(page_index)]);
  T* const k_page = reinterpret_cast<T*>(p.kv.k) + page * kv_heads * kPageTokens * d;
  T* const v_page = reinterpret_cast<T*>(p.kv.v) + page * kv_heads * kPageTokens * d;
  for (size_t position = begin; position < end; ++position) {
    const size_t row = static_cast<size_t>(run.row_begin) + position - run_begin;
    const float* const cos = p.cos + row * (d / 2);
    const float* const sin = p.sin + row * (d / 2);
    float* const q = p.q.f32() + row * heads * d;
    for (size_t h = 0; h < heads; ++h) NormAndRotate(q + h * d, d, p.q_norm, p.eps, cos, sin);
    float* const k = p.k.f32() + row * kv_heads * d;
    const float* const v = p.v.f32() + row * kv_heads * d;
    for (size_t h = 0; h < kv_heads; ++h) {
      const size_t slot = (h * kPageTokens + position - page_begin) * d;
      NormAndRotate(k + h * d, d, p.k_norm, p.eps, cos, sin);
      StoreHead(k + h * d, d, k_page + slot);
      StoreHead(v + h * d, d, v_page + slot);
    }
  }
  for (size_t h = 0; h < kv_heads; ++h) {
    BuildDescriptor(p.layout, k_page + h * kPageTokens * d, begin - page_begin, end - page_begin,
                    p.kv.descriptors + (page * kv_heads + h) * p.layout.DescriptorRunBytes());
  }
}

void QkvPostImpl(Context& context, const QkvPostParams& p) {
  // first_task[i]: the pages of the runs before run i.
  const auto runs = static_cast<size_t>(p.num_runs);
  context.shared.Reset(Scratch::BytesFor<int64_t>(runs + 1));
  int64_t* const first_task = context.shared.Take<int64_t>(runs + 1);
  first_task[0] = 0;
  for (size_t i = 0; i < runs; ++i) {
    const KvRun& run = p.runs[i];
    const int64_t first_page = run.position / kPageTokens;
    const int64_t last_page = (int64_t{run.position} + run.rows - 1) / kPageTokens;
    first_task[i + 1] = first_task[i] + last_page - first_page + 1;
  }
  context.pool.For(first_task[runs], [&](int64_t task, int) {
    const auto i = static_cast<size_t>(std::upper_bound(first_task, first_task + runs + 1, task) -
                                       first_task - 1);
    const KvRun& run = p.runs[i];
    const size_t page_index =
        static_cast<size_t>(run.position / kPageTokens + task - first_task[i]);
    if (p.layout.kv_dtype == DType::kBF16) {
      PostPage<bf16>(p, run, page_index);
    } else {
      PostPage<float>(p, run, page_index);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(QkvPostImpl);

void QkvPost(Context& context, const QkvPostParams& params) {
  HWY_DYNAMIC_DISPATCH(QkvPostImpl)(context, params);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
