#include "tests/support/reference_selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>

#include "kernels/check.h"

namespace resa::testing {
namespace {

constexpr int kBf16SignificantBits = 8;
constexpr double kCodeStep = 0.6;  // Width of a code's cell, in rms of the rotated key.
constexpr size_t kQueryRun = 8;    // Components whose magnitudes together span the query's range.
constexpr double kQueryRange = 123;

// x in units of the last place of a bf16 of its magnitude, and that unit.
double ScaleToBf16Units(double x, double* unit) {
  int exponent = 0;
  std::frexp(x, &exponent);
  *unit = std::ldexp(1.0, exponent - kBf16SignificantBits);
  return x / *unit;
}

double SquaredNorm(const Vector& x) {
  return std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
}

// The least and the greatest of a set of candidates.
struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void Add(double x) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
};

Interval Product(const Interval& a, const Interval& b) {
  Range range;
  for (double x : {a.low, a.high}) {
    for (double y : {b.low, b.high}) range.Add(x * y);
  }
  return {range.low, a.value * b.value, range.high};
}

int CodeOf(double x, double rms) {
  if (rms == 0) return 4;
  return std::clamp(static_cast<int>(std::floor(x / (kCodeStep * rms))) + 4, 0, 7);
}

// max(q a, q b) for a <= b, over all q, a, b of the intervals.
Interval UpperBoundTerm(const Interval& q, const Interval& a, const Interval& b) {
  Range range;
  if (q.low <= 0 && q.high >= 0) range.Add(0);  // The minimum may lie inside, where q = 0.
  for (double x : {q.low, q.high}) {
    for (double lower : {a.low, a.high}) {
      for (double upper : {b.low, b.high}) range.Add(std::max(x * lower, x * upper));
    }
  }
  return {range.low, std::max(q.value * a.value, q.value * b.value), range.high};
}

// Ids by falling value, ties to the lower id.
std::vector<int> ByFallingValue(std::span<const Interval> scores) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return scores[a].value > scores[b].value; });
  return order;
}

bool IsForced(int id, int blocks, const Budget& budget) {
  return id < budget.sink || id >= blocks - budget.local;
}

enum class Membership { kOut, kMaybe, kIn };

// For each block whether it is among the `count` best: surely, surely not, or within the tolerance.
std::vector<Membership> MembershipOfBest(std::span<const Interval> scores, size_t count) {
  std::vector<Membership> membership(scores.size(), Membership::kIn);
  if (count >= scores.size()) return membership;
  std::vector<double> lows, highs;
  for (const Interval& score : scores) {
    lows.push_back(score.low);
    highs.push_back(score.high);
  }
  std::sort(lows.begin(), lows.end(), std::greater<>());
  std::sort(highs.begin(), highs.end(), std::greater<>());
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i].low > highs[count]) {
      membership[i] = Membership::kIn;  // At most count - 1 others can reach it.
    } else if (scores[i].high < lows[count - 1]) {
      membership[i] = Membership::kOut;  // At least `count` others are above it.
    } else {
      membership[i] = Membership::kMaybe;
    }
  }
  return membership;
}

// The attention mass of an estimated logit, divided by 2^octaves: exp by straight lines between the
// powers of two.
double MassOf(double logit, double octaves) {
  const double x = logit / std::log(2.0) - octaves;
  return std::exp2(std::floor(x)) * (1 + x - std::floor(x));
}

// The blocks that one pass of progressive reading scores.
struct Survivors {
  explicit Survivors(size_t blocks) : membership(blocks, Membership::kIn), best(blocks, true) {}

  // Goes on with the `count` best by their scores, sink and local blocks before all others.
  void KeepBest(std::vector<Interval> scores, const Budget& budget, size_t count) {
    const double most = std::numeric_limits<double>::infinity();
    const int blocks = static_cast<int>(scores.size());
    for (int id = 0; id < blocks; ++id) {
      if (IsForced(id, blocks, budget)) scores[id] = {most, most, most};
    }
    const std::vector<Membership> among = MembershipOfBest(scores, count);
    const std::vector<int> order = ByFallingValue(scores);
    best.assign(scores.size(), false);
    for (size_t i = 0; i < count; ++i) best[order[i]] = true;
    for (size_t i = 0; i < scores.size(); ++i) membership[i] = std::min(membership[i], among[i]);
  }

  std::vector<Membership> membership;
  std::vector<bool> best;  // By exact arithmetic.
};

// Per head the share of each survivor's tokens in the mass of all survivors', summed over heads;
// kNotScored for blocks that are none. estimates: [head][token].
constexpr double kNotScored = -1;
std::vector<Interval> MassOfBlocks(const std::vector<std::vector<Interval>>& estimates,
                                   int block_tokens, const Survivors& survivors) {
  const std::vector<Membership>& membership = survivors.membership;
  std::vector<Interval> mass(membership.size());
  for (const std::vector<Interval>& head : estimates) {
    // Shares do not change when all masses are divided by the same power of two.
    double top = -std::numeric_limits<double>::infinity();
    for (size_t t = 0; t < head.size(); ++t) {
      if (membership[t / block_tokens] != Membership::kOut) top = std::max(top, head[t].high);
    }
    const double octaves = std::ceil(top / std::log(2.0));
    Interval sum;
    for (size_t t = 0; t < head.size(); ++t) {
      const size_t block = t / block_tokens;
      // Blocks that may take part make the others' shares smaller, at the most by this much.
      if (membership[block] == Membership::kIn) sum.low += MassOf(head[t].low, octaves);
      if (membership[block] != Membership::kOut) sum.high += MassOf(head[t].high, octaves);
      if (survivors.best[block]) sum.value += MassOf(head[t].value, octaves);
    }
    for (size_t t = 0; t < head.size(); ++t) {
      Interval& block = mass[t / block_tokens];
      block.low += MassOf(head[t].low, octaves) / sum.high;
      block.value += MassOf(head[t].value, octaves) / sum.value;
      block.high += MassOf(head[t].high, octaves) / sum.low;
    }
  }
  for (size_t i = 0; i < mass.size(); ++i) {
    if (membership[i] != Membership::kIn) mass[i].low = kNotScored;
    if (membership[i] == Membership::kOut) mass[i].high = kNotScored;
    if (!survivors.best[i]) mass[i].value = kNotScored;
  }
  return mass;
}

}  // namespace

double RoundToBf16(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  double unit = 0;
  const double units = ScaleToBf16Units(x, &unit);
  return std::nearbyint(units) * unit;  // The default rounding mode is ties to even.
}

double FloorToBf16(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  double unit = 0;
  const double units = ScaleToBf16Units(x, &unit);
  return std::floor(units) * unit;
}

double CeilToBf16(double x) { return -FloorToBf16(-x); }

Vector Rotate(const Vector& x, std::span<const int> signs) {
  const size_t d = x.size();
  RESA_CHECK(std::has_single_bit(d)) << d;
  RESA_CHECK_EQ(signs.size(), d);
  Vector out(d, 0.0);
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < d; ++j) {
      const double term = signs[j] * x[j];
      out[i] += std::popcount(i & j) % 2 == 0 ? term : -term;
    }
    out[i] /= std::sqrt(static_cast<double>(d));
  }
  return out;
}

int LevelOf(int code, int planes) { return 2 * (code >> (3 - planes)) - ((1 << planes) - 1); }

double GaussianScale(int planes) {
  // E[x level(x)] = 2 sum_k level_k (phi(t_k) - phi(t_k+1)) over the positive cells [t_k, t_k+1),
  // since the integral of x phi(x) is -phi(x).
  const auto phi = [](double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); };
  double expectation = 0;
  for (int code = 4; code <= 7; ++code) {
    const double from = kCodeStep * (code - 4);
    const double to_density = code == 7 ? 0.0 : phi(kCodeStep * (code - 3));
    expectation += 2 * LevelOf(code, planes) * (phi(from) - to_density);
  }
  return 1 / expectation;
}

KeySketch MakeKeySketch(const Vector& key, std::span<const int> signs, int planes,
                        const SelectionTolerance& tolerance) {
  const Vector x = Rotate(key, signs);
  const double squared_norm = SquaredNorm(x);
  const double rms = std::sqrt(squared_norm / static_cast<double>(x.size()));
  // A rotation keeps the norm, so no rotated component moves by more than the whole error. The rms
  // moves by the same relative amount, which shifts the farthest boundary (1.8 rms) by 1.8 of it.
  const double slack = tolerance.vector * (std::sqrt(squared_norm) + 3 * kCodeStep * rms);
  KeySketch sketch;
  Interval projection;  // <x, level>
  for (double component : x) {
    sketch.code_low.push_back(CodeOf(component - slack, rms));
    sketch.code.push_back(CodeOf(component, rms));
    sketch.code_high.push_back(CodeOf(component + slack, rms));
    Range range;
    for (int code = sketch.code_low.back(); code <= sketch.code_high.back(); ++code) {
      range.Add(component * LevelOf(code, planes));
    }
    projection.low += range.low;
    projection.value += component * LevelOf(sketch.code.back(), planes);
    projection.high += range.high;
  }
  if (squared_norm == 0) return sketch;
  // <x,x> / <x,level> moves by at most three times the relative error of x: two from the numerator
  // and one from the denominator, whose cosine with x is not far from 1.
  const double relative = 4 * tolerance.vector;
  sketch.scale = {RoundToBf16(squared_norm / projection.high * (1 - relative)),
                  RoundToBf16(squared_norm / projection.value),
                  RoundToBf16(squared_norm / projection.low * (1 + relative))};
  return sketch;
}

std::vector<Interval> ScoreMinMax(std::span<const Vector> queries, std::span<const Vector> keys,
                                  int block_tokens, const SelectionTolerance& tolerance) {
  const size_t d = queries.front().size();
  Vector mean(d, 0.0);
  double query_slack = 0;
  for (const Vector& query : queries) {
    for (size_t j = 0; j < d; ++j) mean[j] += query[j] / static_cast<double>(queries.size());
    query_slack +=
        tolerance.vector * std::sqrt(SquaredNorm(query)) / static_cast<double>(queries.size());
  }
  std::vector<Interval> scores;
  for (size_t begin = 0; begin < keys.size(); begin += block_tokens) {
    const std::span<const Vector> block =
        keys.subspan(begin, std::min<size_t>(block_tokens, keys.size() - begin));
    double key_slack = 0;
    for (const Vector& key : block) {
      key_slack = std::max(key_slack, tolerance.vector * std::sqrt(SquaredNorm(key)));
    }
    Interval score;
    double magnitude = 0;
    for (size_t j = 0; j < d; ++j) {
      Range bounds;
      for (const Vector& key : block) bounds.Add(key[j]);
      const Interval kmin = {FloorToBf16(bounds.low - key_slack), FloorToBf16(bounds.low),
                             FloorToBf16(bounds.low + key_slack)};
      const Interval kmax = {CeilToBf16(bounds.high - key_slack), CeilToBf16(bounds.high),
                             CeilToBf16(bounds.high + key_slack)};
      const Interval q = {mean[j] - query_slack, mean[j], mean[j] + query_slack};
      const Interval term = UpperBoundTerm(q, kmin, kmax);
      score.low += term.low;
      score.value += term.value;
      score.high += term.high;
      magnitude += std::abs(term.value);
    }
    score.low -= tolerance.score * magnitude;
    score.high += tolerance.score * magnitude;
    scores.push_back(score);
  }
  return scores;
}

QuerySketch MakeQuerySketch(const Vector& query, std::span<const int> signs,
                            const SelectionTolerance& tolerance) {
  const Vector x = Rotate(query, signs);
  double top = 0;
  for (size_t begin = 0; begin < x.size(); begin += kQueryRun) {
    double sum = 0;
    for (size_t j = begin; j < begin + kQueryRun; ++j) sum += std::abs(x[j]);
    top = std::max(top, sum);
  }
  const double slack = tolerance.vector * std::sqrt(SquaredNorm(x));
  // A sum of eight magnitudes moves by sqrt(8) times what the vector of the eight moves.
  const double top_slack = std::sqrt(double(kQueryRun)) * slack;
  QuerySketch sketch;
  sketch.scale = {(top - top_slack) / kQueryRange, top / kQueryRange,
                  (top + top_slack) / kQueryRange};
  for (double component : x) {
    if (top == 0) {
      sketch.low.push_back(0), sketch.value.push_back(0), sketch.high.push_back(0);
      continue;
    }
    // Both the component and the scale may move, the latter's part in proportion.
    const double width = slack + top_slack * std::abs(component) / top;
    const auto round = [&](double value) {
      return static_cast<int>(std::nearbyint(value / top * kQueryRange));
    };
    sketch.low.push_back(round(component - width));
    sketch.value.push_back(round(component));
    sketch.high.push_back(round(component + width));
  }
  return sketch;
}

Interval EstimateLogit(const QuerySketch& query, const KeySketch& key, int read, int planes,
                       const SelectionTolerance& tolerance) {
  const size_t d = query.value.size();
  Interval dot;
  for (size_t j = 0; j < d; ++j) {
    const int low = LevelOf(key.code_low[j], read);
    const int high = LevelOf(key.code_high[j], read);
    const Interval term =
        Product({double(query.low[j]), double(query.value[j]), double(query.high[j])},
                {double(low), double(LevelOf(key.code[j], read)), double(high)});
    dot.low += term.low;
    dot.value += term.value;
    dot.high += term.high;
  }
  const Interval scaled = Product(dot, Product(query.scale, key.scale));
  const double factor =
      GaussianScale(read) / GaussianScale(planes) / std::sqrt(static_cast<double>(d));
  return {scaled.low * factor - tolerance.score, scaled.value * factor,
          scaled.high * factor + tolerance.score};
}

std::vector<Interval> ScoreSketch(std::span<const Vector> queries, std::span<const KeySketch> keys,
                                  const kernels::SelectorSpec& spec, const Budget& budget,
                                  std::span<const int> signs, const SelectionTolerance& tolerance) {
  std::vector<QuerySketch> heads;
  for (const Vector& query : queries) heads.push_back(MakeQuerySketch(query, signs, tolerance));
  const size_t blocks = (keys.size() + spec.block_tokens - 1) / spec.block_tokens;
  const auto survivors_of = [&](int read) {
    const double wanted = std::ceil(double(spec.refine_share[read - 2]) * double(blocks));
    return std::min(blocks, std::max(static_cast<size_t>(budget.keep), size_t(wanted)));
  };
  Survivors survivors(blocks);
  std::vector<Interval> scores;
  std::vector<std::vector<Interval>> estimates(heads.size(), std::vector<Interval>(keys.size()));
  for (int read = 1; read <= spec.planes; ++read) {
    if (!scores.empty()) survivors.KeepBest(scores, budget, survivors_of(read));
    if (read < spec.planes && survivors_of(read + 1) == blocks)
      continue;  // All are read with more.
    for (size_t h = 0; h < heads.size(); ++h) {
      for (size_t t = 0; t < keys.size(); ++t) {
        if (survivors.membership[t / spec.block_tokens] == Membership::kOut) continue;
        estimates[h][t] = EstimateLogit(heads[h], keys[t], read, spec.planes, tolerance);
      }
    }
    scores = MassOfBlocks(estimates, spec.block_tokens, survivors);
  }
  return scores;
}

std::vector<int> TopBlocks(std::span<const Interval> scores, const Budget& budget) {
  const int blocks = static_cast<int>(scores.size());
  RESA_CHECK(budget.keep >= 1 && budget.keep <= blocks) << budget.keep << " of " << blocks;
  RESA_CHECK_LE(budget.sink + budget.local, budget.keep);
  std::vector<int> ids;
  for (int id = 0; id < blocks; ++id) {
    if (IsForced(id, blocks, budget)) ids.push_back(id);
  }
  for (int id : ByFallingValue(scores)) {
    if (static_cast<int>(ids.size()) == budget.keep) break;
    if (!IsForced(id, blocks, budget)) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::string ExplainChoice(std::span<const Interval> scores, const Budget& budget,
                          std::span<const int> ids) {
  const int blocks = static_cast<int>(scores.size());
  std::ostringstream out;
  if (static_cast<int>(ids.size()) != budget.keep) {
    out << ids.size() << " blocks kept, the budget is " << budget.keep;
    return out.str();
  }
  std::vector<bool> kept(scores.size(), false);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= blocks || (i > 0 && ids[i] <= ids[i - 1])) {
      out << "ids are not ascending in [0, " << blocks << "): " << ids[i] << " at " << i;
      return out.str();
    }
    kept[ids[i]] = true;
  }
  int worst_kept = -1;
  int best_left = -1;
  for (int id = 0; id < blocks; ++id) {
    if (IsForced(id, blocks, budget)) {
      if (kept[id]) continue;
      out << "local or sink block " << id << " of " << blocks << " is not kept";
      return out.str();
    }
    if (kept[id]) {
      if (worst_kept < 0 || scores[id].high < scores[worst_kept].high) worst_kept = id;
    } else if (best_left < 0 || scores[id].low > scores[best_left].low) {
      best_left = id;
    }
  }
  if (worst_kept >= 0 && best_left >= 0 && scores[worst_kept].high < scores[best_left].low) {
    out << "block " << worst_kept << " is kept with a score of at most " << scores[worst_kept].high
        << ", but block " << best_left << " scores at least " << scores[best_left].low;
  }
  return out.str();
}

}  // namespace resa::testing
