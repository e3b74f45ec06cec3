// Sampling, a row per task. The order of the steps is that of SampleRow in params.h; every sum runs
// in an order fixed by the vocabulary, so a row's token depends on its logits and settings alone.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sample.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/philox.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kSumChunk = 1024;  // Sums are f32 within a chunk and f64 across them.

// Calls body(first index, vector, mask of lanes that exist) over n floats.
template <class Body>
HWY_INLINE void ForVectors(const float* x, size_t n, const Body& body) {
  const DF d;
  const auto all = hn::FirstN(d, kLanes);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, hn::LoadU(d, x + i), all);
  if (i < n) {
    const auto mask = hn::FirstN(d, n - i);
    body(i, hn::MaskedLoad(mask, d, x + i), mask);
  }
}

HWY_INLINE uint32_t MaskBits(hn::Mask<DF> mask) {
  uint8_t bytes[8] = {};
  hn::StoreMaskBits(DF(), mask, bytes);
  return bytes[0] | uint32_t{bytes[1]} << 8;
}

// The largest of n logits; *usable is false when one is NaN or +infinity, or all are -infinity.
float MaxLogit(const float* x, size_t n, bool* usable) {
  const DF d;
  VF top = hn::Set(d, -kInfinity);
  VF bad = hn::Zero(d);
  ForVectors(x, n, [&](size_t, VF v, hn::Mask<DF> mask) HWY_ATTR {
    const VF value = hn::IfThenElse(mask, v, hn::Set(d, -kInfinity));
    top = hn::Max(top, value);
    // False for +infinity and for NaN.
    const auto good = hn::Lt(value, hn::Set(d, kInfinity));
    bad = hn::Or(bad, hn::IfThenZeroElse(good, hn::Set(d, 1.0f)));
  });
  const float result = Max1(top);
  *usable = Max1(bad) == 0.0f && result != -kInfinity;
  return result;
}

// log of the sum of exp(x).
double LogSumExp(const float* x, size_t n, float top) {
  const DF d;
  double total = 0;
  for (size_t begin = 0; begin < n; begin += kSumChunk) {
    VF sum = hn::Zero(d);
    ForVectors(x + begin, std::min(kSumChunk, n - begin),
               [&](size_t, VF v, hn::Mask<DF> mask) HWY_ATTR {
                 sum = hn::Add(sum, hn::IfThenElseZero(mask, Exp(hn::Sub(v, hn::Set(d, top)))));
               });
    total += Sum1(sum);
  }
  return top + std::log(total);
}

int32_t FirstEqual(const float* x, size_t n, float value) {
  const DF d;
  for (size_t i = 0; i < n; i += kLanes) {
    const size_t left = std::min(kLanes, n - i);
    const auto exists = hn::FirstN(d, left);
    const VF v = left == kLanes ? hn::LoadU(d, x + i) : hn::MaskedLoad(exists, d, x + i);
    const uint32_t bits = MaskBits(hn::And(exists, hn::Eq(v, hn::Set(d, value))));
    if (bits != 0) return static_cast<int32_t>(i) + std::countr_zero(bits);
  }
  return 0;
}

// The `count` highest logits above -infinity, by falling value, ties to the lower id.
void TopLogits(const float* x, size_t n, int32_t count, double log_sum, SampleResult* out) {
  if (count == 0) return;
  const DF d;
  float values[kMaxTopLogprobs];
  int32_t used = 0;
  float least = -kInfinity;  // Only what is above can still enter.
  ForVectors(x, n, [&](size_t i, VF v, hn::Mask<DF> mask) HWY_ATTR {
    uint32_t bits = MaskBits(hn::And(mask, hn::Gt(v, hn::Set(d, least))));
    for (; bits != 0; bits &= bits - 1) {
      const size_t id = i + static_cast<size_t>(std::countr_zero(bits));
      if (used == count && !(x[id] > values[used - 1])) continue;
      int32_t place = used < count ? used++ : used - 1;
      for (; place > 0 && x[id] > values[place - 1]; --place) {
        values[place] = values[place - 1];
        out->top_ids[static_cast<size_t>(place)] = out->top_ids[static_cast<size_t>(place - 1)];
      }
      values[place] = x[id];
      out->top_ids[static_cast<size_t>(place)] = static_cast<int32_t>(id);
      if (used == count) least = values[used - 1];
    }
  });
  out->num_top = used;
  for (int32_t i = 0; i < used; ++i) {
    out->top_logprobs[static_cast<size_t>(i)] = static_cast<float>(values[i] - log_sum);
  }
}

bool ChangesLogits(const SampleRow& row) {
  return row.num_bias > 0 ||
         (row.num_counts > 0 && (row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
                                 row.frequency_penalty != 0.0f));
}

void ChangeLogits(const SampleRow& row, float* x) {
  for (int64_t i = 0; i < row.num_bias; ++i) x[row.bias[i].id] += row.bias[i].bias;
  for (int64_t i = 0; i < row.num_counts; ++i) {
    const TokenCount& count = row.counts[i];
    float& logit = x[count.id];
    if (count.in_prompt || count.output_count > 0) {
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    }
    if (count.output_count > 0) {
      logit -=
          row.presence_penalty + row.frequency_penalty * static_cast<float>(count.output_count);
    }
  }
}

// A token that may be drawn.
struct Candidate {
  float logit;   // Relative to the highest, over the temperature: <= 0.
  float weight;  // exp(logit)
  int32_t id;
};
bool Better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// What the filters of one row look at.
struct Scaled {
  const float* x;  // [n] logits after bias and penalties
  size_t n;
  float top;      // Their maximum
  float inverse;  // 1 / temperature
  float cut;      // Relative logits below are gone (min_p).

  HWY_INLINE VF Relative(VF v) const {
    return hn::Mul(hn::Sub(v, hn::Set(DF(), top)), hn::Set(DF(), inverse));
  }
};

// The weight of all tokens at or above `bound`, and their number.
double WeightAbove(const Scaled& s, float bound, size_t* count) {
  const DF d;
  double total = 0;
  size_t number = 0;
  for (size_t begin = 0; begin < s.n; begin += kSumChunk) {
    VF sum = hn::Zero(d);
    ForVectors(s.x + begin, std::min(kSumChunk, s.n - begin),
               [&](size_t, VF v, hn::Mask<DF> mask) HWY_ATTR {
                 const VF logit = s.Relative(v);
                 const auto in = hn::And(mask, hn::Ge(logit, hn::Set(d, bound)));
                 number += hn::CountTrue(d, in);
                 sum = hn::Add(sum, hn::IfThenElseZero(in, Exp(logit)));
               });
    total += Sum1(sum);
  }
  *count = number;
  return total;
}

// All tokens at or above `bound`, by rising id.
size_t Gather(const Scaled& s, float bound, Candidate* to) {
  const DF d;
  size_t count = 0;
  ForVectors(s.x, s.n, [&](size_t i, VF v, hn::Mask<DF> mask) HWY_ATTR {
    const VF logit = s.Relative(v);
    uint32_t bits = MaskBits(hn::And(mask, hn::Ge(logit, hn::Set(d, bound))));
    if (bits == 0) return;
    HWY_ALIGN float logits[kLanes], weights[kLanes];
    hn::Store(logit, d, logits);
    hn::Store(Exp(logit), d, weights);
    for (; bits != 0; bits &= bits - 1) {
      const auto lane = static_cast<size_t>(std::countr_zero(bits));
      to[count++] = Candidate{logits[lane], weights[lane], static_cast<int32_t>(i + lane)};
    }
  });
  return count;
}

// The first candidate at which the running weight passes u times the whole.
int32_t Draw(const Candidate* candidates, size_t n, double u) {
  double total = 0;
  for (size_t i = 0; i < n; ++i) total += candidates[i].weight;
  double sum = 0;
  int32_t last = candidates[0].id;
  for (size_t i = 0; i < n; ++i) {
    if (candidates[i].weight <= 0) continue;
    last = candidates[i].id;
    sum += candidates[i].weight;
    if (sum > u * total) break;
  }
  return last;
}

// Draws from every token at or above s.cut, in the order of ids, without listing them all.
int32_t DrawFromAll(const Scaled& s, double u, double* chunk_weights, Candidate* room) {
  size_t count = 0, chunks = 0;
  double total = 0;
  for (size_t begin = 0; begin < s.n; begin += kSumChunk) {
    Scaled chunk = s;
    chunk.x += begin;
    chunk.n = std::min(kSumChunk, s.n - begin);
    chunk_weights[chunks] = WeightAbove(chunk, s.cut, &count);
    total += chunk_weights[chunks++];
  }
  // The chunk where the running weight passes the target; rounding may leave none, then the last
  // that has any weight.
  double before = 0;
  size_t chosen = 0;
  double chosen_before = 0;
  for (size_t c = 0; c < chunks; ++c) {
    if (chunk_weights[c] <= 0) continue;
    chosen = c;
    chosen_before = before;
    before += chunk_weights[c];
    if (before > u * total) break;
  }
  Scaled chunk = s;
  chunk.x += chosen * kSumChunk;
  chunk.n = std::min(kSumChunk, s.n - chosen * kSumChunk);
  const size_t n = Gather(chunk, s.cut, room);
  const double within = (u * total - chosen_before) / chunk_weights[chosen];
  return static_cast<int32_t>(chosen * kSumChunk) + Draw(room, n, within);
}

// Applies top_k and top_p; returns how many of `candidates` are left, by rising id.
size_t Filter(const Scaled& s, const SampleRow& row, Candidate* candidates) {
  size_t all = 0;
  const double total = WeightAbove(s, s.cut, &all);
  const size_t top_k = row.top_k > 0 ? std::min(all, static_cast<size_t>(row.top_k)) : 0;
  // Few tokens hold nearly all the weight: list those near the top, further down only if the
  // filters reach past them.
  size_t n = 0;
  for (const float bound : {-8.0f, -16.0f, -kInfinity}) {
    const float lower = std::max(bound, s.cut);
    const double weight = WeightAbove(s, lower, &n);
    const bool enough = top_k > 0 ? n >= top_k : weight >= row.top_p * total;
    if (!enough && lower > s.cut) continue;
    n = Gather(s, lower, candidates);
    break;
  }
  double whole = total;
  if (top_k > 0 && top_k < n) {
    std::nth_element(candidates, candidates + top_k, candidates + n, Better);
    n = top_k;
  }
  if (row.top_p < 1.0f) {
    std::sort(candidates, candidates + n, Better);
    if (top_k > 0) {
      whole = 0;
      for (size_t i = 0; i < n; ++i) whole += candidates[i].weight;
    }
    double sum = 0;
    size_t kept = 0;
    while (kept < n && (kept == 0 || sum < row.top_p * whole)) sum += candidates[kept++].weight;
    n = kept;
  }
  std::sort(candidates, candidates + n,
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  return n;
}

size_t ScratchBytes(size_t n) {
  return Scratch::BytesFor<float>(n) + Scratch::BytesFor<Candidate>(std::max(n, kSumChunk)) +
         Scratch::BytesFor<double>(n / kSumChunk + 1);
}

// The token of a row whose raw logits are usable; false when bias and penalties leave none.
bool ChooseToken(const SampleRow& row, const float* raw, size_t n, float raw_top, Scratch* scratch,
                 int32_t* token) {
  scratch->Reset(ScratchBytes(n));
  Scaled s = {.x = raw, .n = n, .top = raw_top, .inverse = 1.0f, .cut = -kInfinity};
  float* const changed = scratch->Take<float>(n);
  if (ChangesLogits(row)) {
    std::memcpy(changed, raw, n * sizeof(float));
    ChangeLogits(row, changed);
    bool usable = false;
    s.x = changed;
    s.top = MaxLogit(changed, n, &usable);
    if (!usable) return false;
  }
  s.inverse = 1.0f / row.temperature;
  if (row.temperature == 0.0f || !std::isfinite(s.inverse)) {
    *token = FirstEqual(s.x, n, s.top);
    return true;
  }
  if (row.min_p > 0.0f) s.cut = std::log(row.min_p);
  Candidate* const candidates = scratch->Take<Candidate>(std::max(n, kSumChunk));
  const double u = PhiloxUniform(row.seed, row.draw_index);
  if (row.top_k == 0 && row.top_p >= 1.0f) {
    *token = DrawFromAll(s, u, scratch->Take<double>(n / kSumChunk + 1), candidates);
  } else {
    const size_t left = Filter(s, row, candidates);
    *token = Draw(candidates, left, u);
  }
  return true;
}

void SampleImpl(Context& context, const SampleParams& p) {
  const auto n = static_cast<size_t>(p.logits.cols);
  const float* const logits = p.logits.f32();
  context.pool.For(p.num_rows, [&](int64_t task, int thread) {
    const SampleRow& row = p.rows[task];
    SampleResult& out = p.out[task];
    out = SampleResult{};
    const float* const x = logits + static_cast<size_t>(row.row) * n;
    const float top = MaxLogit(x, n, &out.finite);
    if (!out.finite) return;
    const double log_sum = LogSumExp(x, n, top);
    if (row.forced_token >= 0) {
      out.token = row.forced_token;
    } else if (!ChooseToken(row, x, n, top, &context.of_thread[static_cast<size_t>(thread)],
                            &out.token)) {
      out.finite = false;
      return;
    }
    out.logprob = static_cast<float>(x[out.token] - log_sum);
    TopLogits(x, n, row.top_logprobs, log_sum, &out);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {

HWY_EXPORT(SampleImpl);

void Sample(Context& context, const SampleParams& params) {
  HWY_DYNAMIC_DISPATCH(SampleImpl)(context, params);
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
