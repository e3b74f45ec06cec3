// Embedding, RMS norm, SiLU times up, and the rotary table: one pass over rows, bound by memory.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pointwise.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// Rows are handed out in runs of about this many values.
constexpr int64_t kValuesPerTask = 16384;

inline int64_t RowsPerTask(int64_t cols) {
  return std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, cols));
}

// Calls body(row) for every row, in tasks of several.
template <class Body>
void ForRows(ThreadPool& pool, int64_t rows, int64_t cols, const Body& body) {
  const int64_t per_task = RowsPerTask(cols);
  pool.For((rows + per_task - 1) / per_task, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) body(row);
  });
}

void EmbedImpl(Context& context, const EmbedParams& p) {
  const auto cols = static_cast<size_t>(p.table.cols);
  const bf16* const table = p.table.b16();
  float* const out = p.out.f32();
  ForRows(context.pool, p.out.rows, p.out.cols, [&](int64_t row) {
    const bf16* const from = table + static_cast<size_t>(p.ids[row]) * cols;
    float* const to = out + static_cast<size_t>(row) * cols;
    size_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) hn::StoreU(LoadWide(from + j), DF(), to + j);
    for (; j < cols; ++j) to[j] = ToFloat(from[j]);
  });
}

// The sum of squares in four interleaved partial sums, then the tail; fixed by the length.
inline float SumOfSquares(const float* x, size_t n) {
  const DF d;
  VF sum0 = hn::Zero(d), sum1 = hn::Zero(d), sum2 = hn::Zero(d), sum3 = hn::Zero(d);
  size_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    const VF a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + kLanes);
    const VF c = hn::LoadU(d, x + j + 2 * kLanes), e = hn::LoadU(d, x + j + 3 * kLanes);
    sum0 = hn::MulAdd(a, a, sum0);
    sum1 = hn::MulAdd(b, b, sum1);
    sum2 = hn::MulAdd(c, c, sum2);
    sum3 = hn::MulAdd(e, e, sum3);
  }
  for (; j < n; j += kLanes) {
    const VF a =
        n - j >= kLanes ? hn::LoadU(d, x + j) : hn::MaskedLoad(hn::FirstN(d, n - j), d, x + j);
    sum0 = hn::MulAdd(a, a, sum0);
  }
  return Sum1(hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3)));
}

void RmsNormImpl(Context& context, const RmsNormParams& p) {
  const auto cols = static_cast<size_t>(p.x.cols);
  const float* const x = p.x.f32();
  float* const out = p.out.f32();
  ForRows(context.pool, p.x.rows, p.x.cols, [&](int64_t row) {
    const float* const from = x + static_cast<size_t>(row) * cols;
    float* const to = out + static_cast<size_t>(row) * cols;
    const float mean = SumOfSquares(from, cols) / static_cast<float>(cols);
    const VF scale = hn::Set(DF(), 1.0f / std::sqrt(mean + p.eps));
    size_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      const VF scaled = hn::Mul(hn::LoadU(DF(), from + j), scale);
      hn::StoreU(hn::Mul(scaled, hn::LoadU(DF(), p.weight + j)), DF(), to + j);
    }
    for (; j < cols; ++j) to[j] = from[j] * hn::GetLane(scale) * p.weight[j];
  });
}

HWY_INLINE VF Silu(VF x) {
  const VF one = hn::Set(DF(), 1.0f);
  return hn::Div(x, hn::Add(one, Exp(hn::Neg(x))));
}

void SiluMulImpl(Context& context, const SiluMulParams& p) {
  const int64_t total = p.out.rows * p.out.cols;
  const float* const gate = p.gate.f32();
  const float* const up = p.up.f32();
  float* const out = p.out.f32();
  context.pool.For((total + kValuesPerTask - 1) / kValuesPerTask, [&](int64_t task, int) {
    const DF d;
    const auto end = static_cast<size_t>(std::min(total, (task + 1) * kValuesPerTask));
    size_t i = static_cast<size_t>(task * kValuesPerTask);
    for (; i + kLanes <= end; i += kLanes) {
      hn::StoreU(hn::Mul(Silu(hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d, out + i);
    }
    for (; i < end; ++i) {  // The last few of the whole matrix.
      out[i] = hn::GetLane(Silu(hn::Set(d, gate[i]))) * up[i];
    }
  });
}

// sin and cos of |x| < 2^24 within 1e-9: the quarter turns are removed in double precision, then
// Taylor polynomials on [-pi/4, pi/4].
template <class V, class D = hn::DFromV<V>>
HWY_INLINE void SinCos(V x, V* sin_out, V* cos_out) {
  const D d;
  const V turns = hn::Round(hn::Mul(x, hn::Set(d, 0.63661977236758134308)));
  V r = hn::NegMulAdd(turns, hn::Set(d, 1.57079632679489655800), x);
  r = hn::NegMulAdd(turns, hn::Set(d, 6.12323399573676603587e-17), r);
  const V r2 = hn::Mul(r, r);
  V s = hn::Set(d, 2.7557319223985893e-06);
  s = hn::MulAdd(s, r2, hn::Set(d, -1.9841269841269841e-04));
  s = hn::MulAdd(s, r2, hn::Set(d, 8.3333333333333333e-03));
  s = hn::MulAdd(s, r2, hn::Set(d, -1.6666666666666666e-01));
  s = hn::MulAdd(hn::Mul(s, r2), r, r);
  V c = hn::Set(d, -2.7557319223985888e-07);
  c = hn::MulAdd(c, r2, hn::Set(d, 2.4801587301587302e-05));
  c = hn::MulAdd(c, r2, hn::Set(d, -1.3888888888888889e-03));
  c = hn::MulAdd(c, r2, hn::Set(d, 4.1666666666666664e-02));
  c = hn::MulAdd(c, r2, hn::Set(d, -0.5));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0));
  // quarter = turns mod 4 decides which is which, and the signs.
  const V quarter =
      hn::NegMulAdd(hn::Floor(hn::Mul(turns, hn::Set(d, 0.25))), hn::Set(d, 4.0), turns);
  const auto is1 = hn::Eq(quarter, hn::Set(d, 1.0));
  const auto is2 = hn::Eq(quarter, hn::Set(d, 2.0));
  const auto is3 = hn::Eq(quarter, hn::Set(d, 3.0));
  const V sin_abs = hn::IfThenElse(hn::Or(is1, is3), c, s);
  const V cos_abs = hn::IfThenElse(hn::Or(is1, is3), s, c);
  *sin_out = hn::IfThenElse(hn::Or(is2, is3), hn::Neg(sin_abs), sin_abs);
  *cos_out = hn::IfThenElse(hn::Or(is1, is2), hn::Neg(cos_abs), cos_abs);
}

void RopeTableImpl(Context& context, const RopeTableParams& p) {
  const auto half = static_cast<size_t>(p.head_dim / 2);
  ForRows(context.pool, p.rows, p.head_dim * 8, [&](int64_t row) {
    const hn::ScalableTag<double> d64;
    const hn::Rebind<float, decltype(d64)> d32;
    const auto position = hn::Set(d32, static_cast<float>(p.positions[row]));
    const auto factor = hn::Set(d32, p.factor);
    float* const cos = p.cos + static_cast<size_t>(row) * half;
    float* const sin = p.sin + static_cast<size_t>(row) * half;
    for (size_t j = 0; j < half; j += hn::Lanes(d64)) {
      // The angle is rounded to f32, as in the reference implementations the models come from.
      const auto angle = hn::Mul(position, hn::LoadU(d32, p.inv_freq + j));
      auto s = hn::Zero(d64), c = hn::Zero(d64);
      SinCos(hn::PromoteTo(d64, angle), &s, &c);
      hn::StoreU(hn::Mul(hn::DemoteTo(d32, c), factor), d32, cos + j);
      hn::StoreU(hn::Mul(hn::DemoteTo(d32, s), factor), d32, sin + j);
    }
  });
}

const char* TargetNameImpl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/cpu_ops.h"

namespace resa::kernels {
namespace cpu {

HWY_EXPORT(EmbedImpl);
HWY_EXPORT(RmsNormImpl);
HWY_EXPORT(SiluMulImpl);
HWY_EXPORT(RopeTableImpl);
HWY_EXPORT(TargetNameImpl);

void Embed(Context& context, const EmbedParams& params) {
  HWY_DYNAMIC_DISPATCH(EmbedImpl)(context, params);
}
void RmsNorm(Context& context, const RmsNormParams& params) {
  HWY_DYNAMIC_DISPATCH(RmsNormImpl)(context, params);
}
void SiluMul(Context& context, const SiluMulParams& params) {
  HWY_DYNAMIC_DISPATCH(SiluMulImpl)(context, params);
}
void RopeTable(Context& context, const RopeTableParams& params) {
  HWY_DYNAMIC_DISPATCH(RopeTableImpl)(context, params);
}
const char* TargetName() { return HWY_DYNAMIC_DISPATCH(TargetNameImpl)(); }

}  // namespace cpu

bool CpuSupported() { return (hwy::SupportedTargets() & HWY_TARGETS) != 0; }

}  // namespace resa::kernels
#endif  // HWY_ONCE
