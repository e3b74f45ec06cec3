// Vector helpers of the CPU kernels, compiled once per instruction set: include after
// hwy/highway.h inside the usual toggled guard.

#if defined(RESA_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_SIMD_INL_H_
#undef RESA_KERNELS_CPU_SIMD_INL_H_
#else
#define RESA_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/bf16.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr size_t kLanes = HWY_MAX_BYTES / sizeof(float);  // 4, 8 or 16
using DF = hn::ScalableTag<float>;
using DU32 = hn::ScalableTag<uint32_t>;
using DI32 = hn::ScalableTag<int32_t>;
using DU16 = hn::ScalableTag<uint16_t>;
using DU16Half = hn::Rebind<uint16_t, DF>;
using D4 = hn::CappedTag<float, 4>;
using VF = hn::Vec<DF>;
using VU32 = hn::Vec<DU32>;

// kLanes consecutive values as f32; 2-byte alignment suffices for bf16.
HWY_INLINE VF LoadWide(const float* from) { return hn::LoadU(DF(), from); }
HWY_INLINE VF LoadWide(const bf16* from) {
  const auto half = hn::LoadU(DU16Half(), reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU32(), half)));
}

// The even and odd ones of 2 kLanes consecutive bf16 (as kLanes words), widened.
HWY_INLINE VF WidenEven(VU32 pairs) { return hn::BitCast(DF(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE VF WidenOdd(VU32 pairs) {
  return hn::BitCast(DF(), hn::And(pairs, hn::Set(DU32(), 0xffff0000u)));
}

// kLanes values to nearest bf16, ties to even; the same bits as RoundToBf16().
HWY_INLINE void StoreNarrow(VF value, float* to) { hn::StoreU(value, DF(), to); }
HWY_INLINE void StoreNarrow(VF value, bf16* to) {
  const DU32 du;
  const VU32 bits = hn::BitCast(du, value);
  const VU32 upper = hn::ShiftRight<16>(bits);
  const VU32 odd = hn::And(upper, hn::Set(du, 1u));
  const VU32 rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd));
  const VU32 quiet = hn::Or(upper, hn::Set(du, 0x40u));
  const auto nan = hn::RebindMask(du, hn::IsNaN(value));
  const VU32 narrow = hn::IfThenElse(nan, quiet, rounded);
  const hn::Rebind<int32_t, DF> di;
  // Demotion saturates, so the 16 bits go through as a signed value.
  const auto as_signed = hn::ShiftRight<16>(hn::ShiftLeft<16>(hn::BitCast(di, narrow)));
  const hn::Rebind<int16_t, DF> di16;
  hn::StoreU(hn::DemoteTo(di16, as_signed), di16, reinterpret_cast<int16_t*>(to));
}

// exp(x) by 2^k p(r), r = x - k ln 2 in [-0.347, 0.347], p of degree 6 fitted to a relative error
// of 4e-9; together with rounding below 2.5 ulp (2e-7 relative). Below -87 the result is 0, x above
// 88 counts as 88, NaN stays NaN.
HWY_INLINE VF Exp(VF x) {
  const DF d;
  const DI32 di;
  const VF clamped = hn::Min(hn::Set(d, 88.0f), x);  // The operand order lets NaN through.
  const VF k = hn::Round(hn::Mul(clamped, hn::Set(d, 1.44269504088896341f)));
  VF r = hn::NegMulAdd(k, hn::Set(d, 0.693359375f), clamped);
  r = hn::NegMulAdd(k, hn::Set(d, -2.12194440054713768e-4f), r);
  VF p = hn::Set(d, 0.0013751279f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.0083689522f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.0416695401f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.1666651815f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.4999998808f));
  p = hn::MulAdd(p, hn::Mul(r, r), r);
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, k), hn::Set(di, 127)));
  const VF scale = hn::BitCast(d, exponent);
  const VF result = hn::MulAdd(p, scale, scale);
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), result);
}
HWY_INLINE float Exp1(float x) { return hn::GetLane(Exp(hn::Set(DF(), x))); }

// Holds a value in a register: the compiler would load it again for each use, and there are fewer
// loads than multiply-adds in a cycle.
HWY_INLINE VF Pin(VF value) {
#if defined(__x86_64__)
  asm("" : "+v"(value.raw));
#endif
  return value;
}

// In each 128-bit block of the result, `op` over that block of each of four vectors, as four lanes.
template <class Op>
HWY_INLINE VF FoldBlocks4(VF a, VF b, VF c, VF e, const Op& op) {
  const DF d;
  const hn::RepartitionToWide<DF> d2;
  const auto ab = hn::BitCast(d2, op(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce = hn::BitCast(d2, op(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  return op(hn::BitCast(d, hn::InterleaveLower(d2, ab, ce)),
            hn::BitCast(d, hn::InterleaveUpper(d2, ab, ce)));
}
// `op` over all lanes of each of four vectors, as four lanes. The order is fixed by kLanes.
template <class Op>
HWY_INLINE hn::Vec<D4> Fold4(VF a, VF b, VF c, VF e, const Op& op) {
  const VF blocks = FoldBlocks4(a, b, c, e, op);
#if HWY_MAX_BYTES == 64
  const hn::Half<DF> dh;
  const auto half = op(hn::LowerHalf(dh, blocks), hn::UpperHalf(dh, blocks));
  return op(hn::LowerHalf(D4(), half), hn::UpperHalf(D4(), half));
#elif HWY_MAX_BYTES == 32
  return op(hn::LowerHalf(D4(), blocks), hn::UpperHalf(D4(), blocks));
#else
  return blocks;
#endif
}
struct AddOp {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};
struct MaxOp {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};
HWY_INLINE VF SumBlocksOf4(VF a, VF b, VF c, VF e) { return FoldBlocks4(a, b, c, e, AddOp()); }
HWY_INLINE hn::Vec<D4> Sum4(VF a, VF b, VF c, VF e) { return Fold4(a, b, c, e, AddOp()); }
HWY_INLINE hn::Vec<D4> Max4(VF a, VF b, VF c, VF e) { return Fold4(a, b, c, e, MaxOp()); }
HWY_INLINE float Sum1(VF a) { return hn::GetLane(hn::SumOfLanes(DF(), a)); }
HWY_INLINE float Max1(VF a) { return hn::GetLane(hn::MaxOfLanes(DF(), a)); }

// Calls body(std::integral_constant<size_t, n>()), 1 <= n <= kMost: what is n long can then sit in
// registers.
template <size_t kMost, class Body>
HWY_INLINE void WithConstant(size_t n, const Body& body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return WithConstant<kMost - 1>(n, body);
  }
  body(std::integral_constant<size_t, kMost>());
}

// Cuts [0, n) into as few parts of at most kMost as will do, of nearly equal size: 9 of at most 6
// are 5 + 4, not 6 + 3. Calls body(begin, std::integral_constant<size_t, size>()) for each.
template <size_t kMost, class Body>
HWY_INLINE void ForParts(size_t n, const Body& body) {
  size_t begin = 0;
  for (size_t parts = (n + kMost - 1) / kMost; parts > 0; --parts) {
    const size_t size = (n - begin + parts - 1) / parts;
    WithConstant<kMost>(size, [&](auto constant) HWY_ATTR { body(begin, constant); });
    begin += size;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_SIMD_INL_H_
