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
constexpr double kQueryLevels = 127;

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

double LogSumExp(const std::vector<Interval>& logits, double Interval::*which) {
  double top = -std::numeric_limits<double>::infinity();
  for (const Interval& logit : logits) top = std::max(top, logit.*which);
  double sum = 0;
  for (const Interval& logit : logits) sum += std::exp(logit.*which - top);
  return top + std::log(sum);
}

// estimates: [head][token].
std::vector<Interval> MassOfBlocks(const std::vector<std::vector<Interval>>& estimates,
                                   int block_tokens) {
  const size_t tokens = estimates.front().size();
  std::vector<Interval> mass((tokens + block_tokens - 1) / block_tokens);
  for (const std::vector<Interval>& head : estimates) {
    const double low = LogSumExp(head, &Interval::low);
    const double value = LogSumExp(head, &Interval::value);
    const double high = LogSumExp(head, &Interval::high);
    for (size_t t = 0; t < tokens; ++t) {
      Interval& block = mass[t / block_tokens];
      block.low += std::exp(head[t].low - high);
      block.value += std::exp(head[t].value - value);
      block.high += std::exp(head[t].high - low);
    }
  }
  return mass;
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
  for (double component : x) top = std::max(top, std::abs(component));
  const double slack = tolerance.vector * std::sqrt(SquaredNorm(x));
  QuerySketch sketch;
  sketch.scale = {(top - slack) / kQueryLevels, top / kQueryLevels, (top + slack) / kQueryLevels};
  for (double component : x) {
    if (top == 0) {
      sketch.low.push_back(0), sketch.value.push_back(0), sketch.high.push_back(0);
      continue;
    }
    // Both the component and the maximum may move, the latter by the same slack, scaled down.
    const double width = slack * (1 + std::abs(component) / top);
    const auto round = [&](double value) {
      const double clamped = std::clamp(value / top, -1.0, 1.0) * kQueryLevels;
      return static_cast<int>(std::nearbyint(clamped));
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
  const bool whole = std::all_of(spec.refine_share.begin(),
                                 spec.refine_share.begin() + std::max(0, spec.planes - 1),
                                 [](float share) { return share >= 1.0f; });
  std::vector<std::vector<Interval>> estimates(heads.size(), std::vector<Interval>(keys.size()));
  for (size_t h = 0; h < heads.size(); ++h) {
    for (size_t t = 0; t < keys.size(); ++t) {
      estimates[h][t] =
          EstimateLogit(heads[h], keys[t], whole ? spec.planes : 1, spec.planes, tolerance);
    }
  }
  std::vector<Interval> scores = MassOfBlocks(estimates, spec.block_tokens);
  if (whole) return scores;
  for (int read = 2; read <= spec.planes; ++read) {
    const double share = spec.refine_share[read - 2];
    const size_t count = std::max<size_t>(
        budget.keep, static_cast<size_t>(std::ceil(share * static_cast<double>(scores.size()))));
    const std::vector<Membership> membership = MembershipOfBest(scores, count);
    std::vector<bool> best(scores.size(), false);
    const std::vector<int> order = ByFallingValue(scores);
    for (size_t i = 0; i < std::min(count, order.size()); ++i) best[order[i]] = true;
    for (size_t h = 0; h < heads.size(); ++h) {
      for (size_t t = 0; t < keys.size(); ++t) {
        const size_t block = t / spec.block_tokens;
        if (membership[block] == Membership::kOut) continue;
        const Interval coarse = estimates[h][t];
        Interval fine = EstimateLogit(heads[h], keys[t], read, spec.planes, tolerance);
        if (membership[block] == Membership::kMaybe) {
          fine.low = std::min(fine.low, coarse.low);
          fine.high = std::max(fine.high, coarse.high);
          if (!best[block]) fine.value = coarse.value;
        }
        estimates[h][t] = fine;
      }
    }
    scores = MassOfBlocks(estimates, spec.block_tokens);
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
