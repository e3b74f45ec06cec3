#include "tests/support/resa_reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/check.h"

namespace resa::testing {
namespace {

double Dot(const double* a, const double* b, size_t n) {
  return std::inner_product(a, a + n, b, 0.0);
}

Vector Multiply(const DenseMatrix& matrix, const Vector& x, const Vector& bias) {
  RESA_CHECK_EQ(static_cast<size_t>(matrix.cols), x.size());
  Vector out(matrix.rows);
  for (int i = 0; i < matrix.rows; ++i) {
    out[i] = Dot(&matrix.data[static_cast<size_t>(i) * matrix.cols], x.data(), x.size());
    if (!bias.empty()) out[i] += bias[i];
  }
  return out;
}

Vector RmsNorm(const Vector& x, const Vector& weight, double eps) {
  const double mean_square = Dot(x.data(), x.data(), x.size()) / static_cast<double>(x.size());
  const double factor = 1 / std::sqrt(mean_square + eps);
  Vector out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * factor * weight[i];
  return out;
}

void AddTo(Vector* x, const Vector& y) {
  for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
}

Vector Slice(const Vector& x, int index, int size) {
  const auto begin = x.begin() + static_cast<ptrdiff_t>(index) * size;
  return Vector(begin, begin + size);
}

Vector SwiGlu(const ReferenceLayer& layer, const Vector& x) {
  Vector gate = Multiply(layer.gate, x, {});
  const Vector up = Multiply(layer.up, x, {});
  for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return Multiply(layer.down, gate, {});
}

}  // namespace

ReferenceDecoder::ReferenceDecoder(const ReferenceModel* model, ReferenceOptions options)
    : model_(*model),
      options_(std::move(options)),
      group_(model->heads / model->kv_heads),
      cache_(model->layers.size(), std::vector<HeadCache>(model->kv_heads)),
      queries_(model->layers.size(), std::vector<Vector>(model->heads)) {
  RESA_CHECK_EQ(model->heads % model->kv_heads, 0);
}

Vector ReferenceDecoder::Dense(std::span<const int> tokens, int position) {
  RESA_CHECK_LE(position, length_);
  RESA_CHECK(!tokens.empty());
  Vector logits;
  for (int token : tokens) logits = Feed(token, position++, nullptr, nullptr);
  return logits;
}

Vector ReferenceDecoder::Sparse(int token, const Budget& budget, const Chooser& choose) {
  return Feed(token, length_, &budget, choose);
}

const Vector& ReferenceDecoder::key(int layer, int kv_head, int position) const {
  return cache_[layer][kv_head].keys.at(position);
}

const Vector& ReferenceDecoder::value(int layer, int kv_head, int position) const {
  return cache_[layer][kv_head].values.at(position);
}

Vector ReferenceDecoder::Feed(int token, int position, const Budget* budget,
                              const Chooser& choose) {
  length_ = position + 1;
  Vector x = Slice(model_.embedding.data, token, model_.embedding.cols);
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    const ReferenceLayer& layer = model_.layers[i];
    Project(static_cast<int>(i), RmsNorm(x, layer.attention_norm, model_.rms_eps), position);
    AddTo(&x, Multiply(layer.wo, Attend(static_cast<int>(i), budget, choose), {}));
    AddTo(&x, SwiGlu(layer, RmsNorm(x, layer.mlp_norm, model_.rms_eps)));
  }
  const DenseMatrix& output = model_.output.data.empty() ? model_.embedding : model_.output;
  return Multiply(output, RmsNorm(x, model_.final_norm, model_.rms_eps), {});
}

void ReferenceDecoder::Project(int layer_index, const Vector& normed, int position) {
  const ReferenceLayer& layer = model_.layers[layer_index];
  const int d = model_.head_dim;
  const auto head_of = [&](const Vector& all, int head, const Vector& norm) {
    Vector x = Slice(all, head, d);
    return norm.empty() ? x : RmsNorm(x, norm, model_.rms_eps);
  };
  const Vector q = Multiply(layer.wq, normed, layer.bq);
  const Vector k = Multiply(layer.wk, normed, layer.bk);
  const Vector v = Multiply(layer.wv, normed, layer.bv);
  for (int h = 0; h < model_.heads; ++h) {
    queries_[layer_index][h] = Rotary(head_of(q, h, layer.q_norm), position);
  }
  for (int h = 0; h < model_.kv_heads; ++h) {
    Store(&cache_[layer_index][h], position, Rotary(head_of(k, h, layer.k_norm), position),
          Slice(v, h, d));
  }
}

void ReferenceDecoder::Store(HeadCache* cache, int position, Vector key, Vector value) {
  if (options_.kv_in_bf16) {
    for (double& x : key) x = RoundToBf16(x);
    for (double& x : value) x = RoundToBf16(x);
  }
  cache->keys.resize(position);
  cache->values.resize(position);
  if (options_.selector.kind == kernels::SelectorKind::kSketch) {
    cache->sketches.resize(position);
    cache->sketches.push_back(
        MakeKeySketch(key, options_.signs, options_.selector.planes, options_.tolerance));
  }
  cache->keys.push_back(std::move(key));
  cache->values.push_back(std::move(value));
}

Vector ReferenceDecoder::Attend(int layer, const Budget* budget, const Chooser& choose) const {
  const int d = model_.head_dim;
  const int block = options_.selector.block_tokens;
  Vector out;
  for (int kv_head = 0; kv_head < model_.kv_heads; ++kv_head) {
    const HeadCache& cache = cache_[layer][kv_head];
    std::vector<int> positions;
    if (budget == nullptr) {
      positions.resize(length_);
      std::iota(positions.begin(), positions.end(), 0);
    } else {
      const std::vector<Interval> scores = Scores(layer, kv_head, *budget);
      const std::vector<int> ids =
          choose == nullptr ? TopBlocks(scores, *budget) : choose(layer, kv_head, scores);
      for (int id : ids) {
        for (int p = id * block; p < std::min((id + 1) * block, length_); ++p) {
          positions.push_back(p);
        }
      }
    }
    for (int head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      const Vector& query = queries_[layer][head];
      Vector weights;
      for (int p : positions) {
        weights.push_back(Dot(query.data(), cache.keys[p].data(), d) / std::sqrt(double(d)));
      }
      const double top = *std::max_element(weights.begin(), weights.end());
      double sum = 0;
      for (double& weight : weights) sum += weight = std::exp(weight - top);
      Vector mixed(d, 0.0);
      for (size_t i = 0; i < positions.size(); ++i) {
        for (int j = 0; j < d; ++j) mixed[j] += weights[i] / sum * cache.values[positions[i]][j];
      }
      out.insert(out.end(), mixed.begin(), mixed.end());
    }
  }
  return out;
}

std::vector<Interval> ReferenceDecoder::Scores(int layer, int kv_head, const Budget& budget) const {
  const HeadCache& cache = cache_[layer][kv_head];
  const std::span<const Vector> queries(&queries_[layer][kv_head * group_], group_);
  if (options_.selector.kind == kernels::SelectorKind::kMinMax) {
    return ScoreMinMax(queries, cache.keys, options_.selector.block_tokens, options_.tolerance);
  }
  return ScoreSketch(queries, cache.sketches, options_.selector, budget, options_.signs,
                     options_.tolerance);
}

Vector ReferenceDecoder::Rotary(const Vector& x, int position) const {
  const size_t half = x.size() / 2;
  Vector out(x.size());
  for (size_t j = 0; j < half; ++j) {
    double angle = position * model_.inv_freq[j];
    if (options_.angles_in_f32) angle = static_cast<float>(angle);
    const double c = model_.rope_factor * std::cos(angle);
    const double s = model_.rope_factor * std::sin(angle);
    out[j] = x[j] * c - x[j + half] * s;
    out[j + half] = x[j + half] * c + x[j] * s;
  }
  return out;
}

int ArgMax(const Vector& x) {
  return static_cast<int>(std::max_element(x.begin(), x.end()) - x.begin());
}

}  // namespace resa::testing
