#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace resa::testing {

using kernels::SampleRow;

Doubles ReferenceLinear(std::span<const float> x, std::span<const kernels::bf16> weight,
                        std::span<const float> bias, int64_t rows, int64_t out, int64_t in) {
  Doubles result(static_cast<size_t>(rows * out));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = bias.empty() ? 0.0 : bias[o];
      for (int64_t i = 0; i < in; ++i) {
        sum += double{x[r * in + i]} * kernels::ToFloat(weight[o * in + i]);
      }
      result[r * out + o] = sum;
    }
  }
  return result;
}

Doubles ReferenceRmsNorm(std::span<const float> x, std::span<const float> weight, float eps,
                         int64_t rows) {
  const size_t cols = weight.size();
  Doubles result(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    const std::span<const float> row = x.subspan(r * cols, cols);
    double sum = 0;
    for (float v : row) sum += double{v} * v;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(cols) + eps);
    for (size_t j = 0; j < cols; ++j) result[r * cols + j] = row[j] * scale * weight[j];
  }
  return result;
}

Doubles ReferenceNormAndRope(std::span<const float> head, std::span<const float> norm, float eps,
                             std::span<const float> cos, std::span<const float> sin) {
  Doubles x(head.begin(), head.end());
  if (!norm.empty()) x = ReferenceRmsNorm(head, norm, eps, 1);
  const size_t half = x.size() / 2;
  Doubles result(x.size());
  for (size_t j = 0; j < half; ++j) {
    result[j] = x[j] * cos[j] - x[j + half] * sin[j];
    result[j + half] = x[j + half] * cos[j] + x[j] * sin[j];
  }
  return result;
}

Doubles ReferenceAttention(std::span<const float> query, const std::vector<Doubles>& keys,
                           const std::vector<Doubles>& values) {
  const size_t d = query.size();
  Doubles scores;
  for (const Doubles& key : keys) {
    double dot = 0;
    for (size_t j = 0; j < d; ++j) dot += query[j] * key[j];
    scores.push_back(dot / std::sqrt(static_cast<double>(d)));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  Doubles out(d, 0.0);
  for (size_t t = 0; t < keys.size(); ++t) {
    const double p = std::exp(scores[t] - top);
    sum += p;
    for (size_t j = 0; j < d; ++j) out[j] += p * values[t][j];
  }
  for (double& v : out) v /= sum;
  return out;
}

namespace {

Doubles LogSoftmax(std::span<const double> x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double v : x) sum += std::exp(v - top);
  Doubles out;
  for (double v : x) out.push_back(v - top - std::log(sum));
  return out;
}

// Logits after bias and penalties.
Doubles Adjusted(std::span<const float> logits, const SampleRow& row) {
  Doubles x(logits.begin(), logits.end());
  for (int64_t i = 0; i < row.num_bias; ++i) x[row.bias[i].id] += row.bias[i].bias;
  for (int64_t i = 0; i < row.num_counts; ++i) {
    const kernels::TokenCount& count = row.counts[i];
    double& v = x[count.id];
    if (count.in_prompt || count.output_count > 0) {
      v = v > 0 ? v / row.repetition_penalty : v * row.repetition_penalty;
    }
    if (count.output_count > 0) {
      v -= row.presence_penalty;
      v -= row.frequency_penalty * count.output_count;
    }
  }
  return x;
}

}  // namespace

ReferenceSample SampleReference(std::span<const float> logits, const SampleRow& row) {
  ReferenceSample result;
  result.logprobs = LogSoftmax(Doubles(logits.begin(), logits.end()));
  Doubles x = Adjusted(logits, row);
  std::vector<int32_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  if (row.temperature == 0) {
    result.kept = {{order[0], 1.0}};
    return result;
  }
  const double top = x[order[0]];
  Doubles p(x.size());
  for (size_t i = 0; i < x.size(); ++i) p[i] = std::exp((x[i] - top) / row.temperature);
  std::erase_if(order, [&](int32_t id) { return p[id] < row.min_p || p[id] == 0; });
  if (row.top_k > 0 && order.size() > static_cast<size_t>(row.top_k)) order.resize(row.top_k);
  double whole = 0;
  for (int32_t id : order) whole += p[id];
  if (row.top_p < 1) {
    double sum = 0;
    size_t kept = 0;
    while (kept < order.size() && (kept == 0 || sum < row.top_p * whole)) sum += p[order[kept++]];
    order.resize(kept);
    whole = sum;
  }
  std::sort(order.begin(), order.end());
  for (int32_t id : order) result.kept.push_back({id, p[id] / whole});
  return result;
}

int32_t ReferenceSample::Pick(double u) const {
  double sum = 0;
  for (const Token& token : kept) {
    sum += token.probability;
    if (sum > u) return token.id;
  }
  return kept.back().id;
}

double ReferenceSample::DistanceToBoundary(double u) const {
  double sum = 0, distance = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i + 1 < kept.size(); ++i) {
    sum += kept[i].probability;
    distance = std::min(distance, std::abs(u - sum));
  }
  return distance;
}

}  // namespace resa::testing
