// Exact top-k of block scores, ids ascending. Compiled once per instruction set.

#if defined(RESA_KERNELS_CPU_TOPK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef RESA_KERNELS_CPU_TOPK_INL_H_
#undef RESA_KERNELS_CPU_TOPK_INL_H_
#else
#define RESA_KERNELS_CPU_TOPK_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

// Scores and keys are padded to a multiple of this; the padding of scores need not be set.
constexpr size_t kTopKPadding = 32;
inline size_t PadTopK(size_t n) { return (n + kTopKPadding - 1) / kTopKPadding * kTopKPadding; }

// keys[i] rises with scores[i]: +0 and -0 alike, NaN lowest of all. Padding gets 0.
inline void MakeKeys(const float* scores, size_t n, uint32_t* keys) {
  const DF df;
  const DU32 du;
  for (size_t i = 0; i < n; i += kLanes) {
    const VF score = hn::Add(hn::LoadU(df, scores + i), hn::Zero(df));  // -0 + 0 = +0
    const VU32 bits = hn::BitCast(du, score);
    const VU32 negative = hn::BitCast(du, hn::ShiftRight<31>(hn::BitCast(DI32(), score)));
    const VU32 key = hn::Xor(bits, hn::Or(negative, hn::Set(du, 0x80000000u)));
    hn::StoreU(hn::IfThenZeroElse(hn::RebindMask(du, hn::IsNaN(score)), key), du, keys + i);
  }
  std::fill(keys + n, keys + PadTopK(n), 0u);
}

// Keys are padded (MakeKeys); the bound is above 0, which the padding holds.
inline size_t CountAtLeast(const uint32_t* keys, size_t n, uint32_t bound) {
  const DU32 du;
  const VU32 limit = hn::Set(du, bound);
  // Each lane counts the keys below the bound: a mask is minus one.
  VU32 below0 = hn::Zero(du), below1 = hn::Zero(du);
  for (size_t i = 0; i < n; i += 2 * kLanes) {
    below0 = hn::Sub(below0, hn::VecFromMask(du, hn::Lt(hn::LoadU(du, keys + i), limit)));
    below1 = hn::Sub(below1, hn::VecFromMask(du, hn::Lt(hn::LoadU(du, keys + i + kLanes), limit)));
  }
  const size_t total = (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  return total - hn::GetLane(hn::SumOfLanes(du, hn::Add(below0, below1)));
}

// The least key among the k largest of keys[0, n), or a bound that parts them from all others;
// 1 <= k <= n. Found bit by bit from the top: a pass over the keys costs little next to scoring.
inline uint32_t KthLargest(const uint32_t* keys, size_t n, size_t k) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t bound = found | (uint32_t{1} << bit);
    const size_t count = CountAtLeast(keys, n, bound);
    if (count >= k) found = bound;
    if (count == k) break;
  }
  return found;
}

// The ids of the k largest keys, ties to the lower id, ascending. Keys are padded (MakeKeys).
inline void LargestIds(const uint32_t* keys, size_t n, size_t k, int32_t* ids) {
  const DU32 du;
  const uint32_t threshold = KthLargest(keys, n, k);
  const size_t above = threshold == UINT32_MAX ? 0 : CountAtLeast(keys, n, threshold + 1);
  size_t ties = k - above;
  size_t count = 0;
  const VU32 limit = hn::Set(du, threshold);
  for (size_t i = 0; i < n && count < k; i += kLanes) {
    const VU32 key = hn::LoadU(du, keys + i);
    uint8_t bytes[8] = {};
    hn::StoreMaskBits(du, hn::Not(hn::Lt(key, limit)), bytes);
    uint32_t bits = bytes[0] | uint32_t{bytes[1]} << 8;
    for (; bits != 0; bits &= bits - 1) {
      const size_t id = i + static_cast<size_t>(std::countr_zero(bits));
      if (keys[id] == threshold) {
        if (ties == 0) continue;
        --ties;
      }
      ids[count++] = static_cast<int32_t>(id);
      if (count == k) break;
    }
  }
}

// The kept blocks of a row: the first `sink`, the last `local`, and the best of the rest.
// keys: [PadTopK(n)], overwritten.
inline void KeepBlocks(const float* scores, size_t n, size_t keep, size_t sink, size_t local,
                       uint32_t* keys, int32_t* ids) {
  MakeKeys(scores, n, keys);
  std::fill_n(keys, std::min(sink, n), UINT32_MAX);
  std::fill_n(keys + n - std::min(local, n), std::min(local, n), UINT32_MAX);
  LargestIds(keys, n, keep, ids);
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // RESA_KERNELS_CPU_TOPK_INL_H_
