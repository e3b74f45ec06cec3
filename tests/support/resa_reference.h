#ifndef RESA_TESTS_SUPPORT_RESA_REFERENCE_H_
#define RESA_TESTS_SUPPORT_RESA_REFERENCE_H_

// A decoder-only transformer with Rectified Sparse Attention (arXiv 2506.04108), written a second
// time: float64, one token at a time, plain vectors, no sharing of code with the engine. Tests hold
// the engine against it. Slow on purpose; for models of some 100K parameters.
//
// The schedule (which position is decoded sparsely, which windows are fed again) is the caller's:
// see reference_schedule.h.

#include <functional>
#include <span>
#include <vector>

#include "kernels/params.h"
#include "tests/support/reference_selection.h"

namespace resa::testing {

// Row-major [rows, cols].
struct DenseMatrix {
  int rows = 0;
  int cols = 0;
  Vector data;
};

struct ReferenceLayer {
  Vector attention_norm;       // [D]
  DenseMatrix wq, wk, wv;      // [Hq d, D], [Hk d, D], [Hk d, D]
  Vector bq, bk, bv;           // Empty: no bias.
  Vector q_norm, k_norm;       // [d]; empty: none.
  DenseMatrix wo;              // [D, Hq d]
  Vector mlp_norm;             // [D]
  DenseMatrix gate, up, down;  // [F, D], [F, D], [D, F]
};

struct ReferenceModel {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  double rms_eps = 1e-6;
  Vector inv_freq;         // [d / 2]
  double rope_factor = 1;  // Of cosine and sine.
  DenseMatrix embedding;   // [V, D]
  std::vector<ReferenceLayer> layers;
  Vector final_norm;   // [D]
  DenseMatrix output;  // [V, D]; empty: the embedding.
};

// What the contract rounds, beyond float64.
struct ReferenceOptions {
  kernels::SelectorSpec selector;
  std::vector<int> signs;      // [d], the sketch's sign flips; unused by minmax.
  bool kv_in_bf16 = false;     // K and V are rounded when stored; descriptors see the stored keys.
  bool angles_in_f32 = false;  // position * inv_freq is rounded to f32 before cosine and sine.
  SelectionTolerance tolerance;
};

class ReferenceDecoder {
 public:
  // Called for every layer and KV head of a sparse step. Returns the ids to attend to, ascending.
  using Chooser =
      std::function<std::vector<int>(int layer, int kv_head, std::span<const Interval> scores)>;

  // `model` must outlive the decoder.
  ReferenceDecoder(const ReferenceModel* model, ReferenceOptions options);

  // Feeds tokens at position, position + 1, ...: each attends to everything up to itself, and its
  // K/V replace what is there. Returns the logits after the last. Positions past the last one are
  // forgotten. REQUIRES position <= length().
  Vector Dense(std::span<const int> tokens, int position);

  // Feeds one token at length() and attends to `budget` blocks, by the selector's scores or, when
  // `choose` is given, whatever it returns.
  Vector Sparse(int token, const Budget& budget, const Chooser& choose = nullptr);

  int length() const { return length_; }
  // The stored (rounded) K or V at a position.
  const Vector& key(int layer, int kv_head, int position) const;
  const Vector& value(int layer, int kv_head, int position) const;
  // The rotated queries of the last token fed: [layer][head].
  const std::vector<std::vector<Vector>>& last_queries() const { return queries_; }

 private:
  struct HeadCache {
    std::vector<Vector> keys, values;  // By position.
    std::vector<KeySketch> sketches;   // By position; sketch only.
  };

  Vector Feed(int token, int position, const Budget* budget, const Chooser& choose);
  void Project(int layer, const Vector& normed, int position);
  void Store(HeadCache* cache, int position, Vector key, Vector value);
  Vector Attend(int layer, const Budget* budget, const Chooser& choose) const;
  std::vector<Interval> Scores(int layer, int kv_head, const Budget& budget) const;
  Vector Rotary(const Vector& x, int position) const;

  const ReferenceModel& model_;
  const ReferenceOptions options_;
  const int group_;
  int length_ = 0;
  std::vector<std::vector<HeadCache>> cache_;  // [layer][kv_head]
  std::vector<std::vector<Vector>> queries_;   // [layer][head]
};

// The index of the largest element, ties to the lower one.
int ArgMax(const Vector& x);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_RESA_REFERENCE_H_
