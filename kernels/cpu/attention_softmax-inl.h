// The running softmax of a block of rows: a tile's scores enter it, splits are merged. Compiled
// once per instruction set.

#if defined(RESA_KERNELS_CPU_ATTENTION_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_ATTENTION_SOFTMAX_INL_H_
#undef RESA_KERNELS_CPU_ATTENTION_SOFTMAX_INL_H_
#else
#define RESA_KERNELS_CPU_ATTENTION_SOFTMAX_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// The running softmax of a block of rows over some tokens.
struct Softmax {
  float* m;  // [rows] maximum of the scores; -infinity before the first
  float* l;  // [rows] sum of exp(score - m)
  float* o;  // [rows, d] sum of exp(score - m) v, components in the order of LoadPair
};
constexpr size_t SoftmaxFloats(size_t rows, size_t d) { return rows * (d + 2); }
inline Softmax SoftmaxAt(float* memory, size_t rows, size_t d) {
  return Softmax{memory + rows * d, memory + rows * (d + 1), memory};
}

// Turns N <= 4 rows' scores of a tile into exp(score - m), row r over its first counts[r] > 0
// tokens, moves m and l on, and rescales o. Rows go together because each is a chain of short
// reductions.
template <size_t N>
HWY_INLINE void SoftmaxRows(float* scores, const size_t* counts, size_t d, float* m, float* l,
                            float* o) {
  const DF df;
  const D4 d4;
  const VF none = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF tops[4] = {none, none, none, none};
  for (size_t r = 0; r < N; ++r) {
    float* const row = scores + r * kTile;
    for (size_t j = 0; j < counts[r]; j += kLanes) {
      VF s = hn::Load(df, row + j);
      if (j + kLanes > counts[r]) {
        s = hn::IfThenElse(hn::FirstN(df, counts[r] - j), s, none);
        hn::Store(s, df, row + j);
      }
      tops[r] = hn::Max(tops[r], s);
    }
  }
  HWY_ALIGN float before[4] = {}, after[4], factors[kLanes] = {}, totals[4];
  std::copy_n(m, N, before);
  const auto m_before = hn::Load(d4, before);
  const auto m_after = hn::Max(m_before, Max4(tops[0], tops[1], tops[2], tops[3]));
  hn::Store(m_after, d4, after);
  // exp(0) is 1, exactly; -infinity is the m of a row that has seen nothing.
  hn::Store(hn::Sub(m_before, m_after), d4, factors);
  hn::Store(Exp(hn::Load(df, factors)), df, factors);

  VF sums[4] = {hn::Zero(df), hn::Zero(df), hn::Zero(df), hn::Zero(df)};
  for (size_t r = 0; r < N; ++r) {
    float* const row = scores + r * kTile;
    const VF shift = hn::Set(df, after[r]);
    for (size_t j = 0; j < counts[r]; j += kLanes) {
      const VF p = Exp(hn::Sub(hn::Load(df, row + j), shift));
      hn::Store(p, df, row + j);
      sums[r] = hn::Add(sums[r], p);
    }
  }
  hn::Store(Sum4(sums[0], sums[1], sums[2], sums[3]), d4, totals);
  for (size_t r = 0; r < N; ++r) {
    m[r] = after[r];
    l[r] = l[r] * factors[r] + totals[r];
    if (factors[r] == 1.0f) continue;
    const VF factor = hn::Set(df, factors[r]);
    for (size_t j = r * d; j < (r + 1) * d; j += kLanes) {
      hn::StoreU(hn::Mul(hn::LoadU(df, o + j), factor), df, o + j);
    }
  }
}

// The same for rows [begin, end).
inline void SoftmaxTile(float* scores, const size_t* counts, size_t begin, size_t end, size_t d,
                        const Softmax& state) {
  const auto rows = [&](size_t r, auto n) HWY_ATTR {
    SoftmaxRows<decltype(n)::value>(scores + r * kTile, counts + r, d, state.m + r, state.l + r,
                                    state.o + r * d);
  };
  size_t r = begin;
  for (; r + 4 <= end; r += 4) rows(r, std::integral_constant<size_t, 4>());
  if (end - r == 3) rows(r, std::integral_constant<size_t, 3>());
  if (end - r == 2) rows(r, std::integral_constant<size_t, 2>());
  if (end - r == 1) rows(r, std::integral_constant<size_t, 1>());
}

inline void ResetSoftmax(size_t rows, size_t d, const Softmax& state) {
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.o, rows * d, 0.0f);
}

// Merges the next split of row r into `total`, whose earlier splits it follows.
HWY_INLINE void MergeSoftmaxRow(size_t r, size_t d, const Softmax& split, const Softmax& total) {
  const DF df;
  const float m = std::max(total.m[r], split.m[r]);
  const float keep = Exp1(total.m[r] - m);
  const float add = Exp1(split.m[r] - m);
  total.m[r] = m;
  total.l[r] = total.l[r] * keep + split.l[r] * add;
  float* const to = total.o + r * d;
  const float* const from = split.o + r * d;
  for (size_t j = 0; j < d; j += kLanes) {
    const VF kept = hn::Mul(hn::LoadU(df, to + j), hn::Set(df, keep));
    hn::StoreU(hn::MulAdd(hn::LoadU(df, from + j), hn::Set(df, add), kept), df, to + j);
  }
}

// Writes o / l of one row, in the order of components.
template <class T>
HWY_INLINE void StoreSoftmaxRow(size_t r, size_t d, const Softmax& total, float* out) {
  const DF df;
  const T* const type = nullptr;
  const VF l = hn::Set(df, total.l[r]);
  for (size_t j = 0; j < d; j += 2 * kLanes) {
    const float* const o = total.o + r * d + j;
    StorePair(hn::Div(hn::LoadU(df, o), l), hn::Div(hn::LoadU(df, o + kLanes), l), out + j, type);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_ATTENTION_SOFTMAX_INL_H_
