#ifndef RESA_TESTS_SUPPORT_REFERENCE_SELECTION_H_
#define RESA_TESTS_SUPPORT_REFERENCE_SELECTION_H_

// Block selection, written a second time: float64, one loop per formula, no sharing of code with
// any backend. It follows arXiv 2506.04108 (min/max) and the contract of kernels/params.h (sketch).
//
// Scores come as intervals. The implementation under test computes in f32, so its keys and queries
// differ from ours by rounding, and a rounded quantity (a sketch code, a query in s8, a bound in
// bf16) that lies next to a rounding boundary can land on the other side. `low` and `high` enclose
// every score that such an implementation may compute, given the bounds of `SelectionTolerance`;
// `value` is the score of exact arithmetic. With a zero tolerance the three are equal.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace resa::testing {

using Vector = std::vector<double>;

// How far the implementation under test may be from exact arithmetic.
struct SelectionTolerance {
  double vector = 0;  // Keys and queries: |error|_2 <= vector * |x|_2.
  double score = 0;   // Sketch: absolute error of an estimated logit, beyond that of its inputs.
                      // Min/max: error of a score relative to the sum of its terms' magnitudes.
};

// A number and what it may be elsewhere: low <= value <= high.
struct Interval {
  double low = 0;
  double value = 0;
  double high = 0;
};

struct Budget {
  int keep = 0;   // All blocks kept, local and sink ones included.
  int local = 0;  // The last ones.
  int sink = 0;   // The first ones.
};

// ---- rounding -----------------------------------------------------------------------------------

double RoundToBf16(double x);  // To nearest, ties to even.
double FloorToBf16(double x);
double CeilToBf16(double x);

// ---- sketch: the code of one key ----------------------------------------------------------------

// H diag(signs) x / sqrt(d), H the Hadamard matrix in natural order: H_ij = (-1)^popcount(i & j).
// REQUIRES d = x.size() a power of two.
Vector Rotate(const Vector& x, std::span<const int> signs);

// The level that component code `code` (0 .. 7) stands for when read with `planes` planes.
int LevelOf(int code, int planes);

// The scale of `planes` planes in units of the rms, for Gaussian components: 1 / E[x level(x)].
double GaussianScale(int planes);

// One key's code. The low and high codes differ only where the component lies within the tolerance
// of a boundary.
struct KeySketch {
  std::vector<int> code_low, code, code_high;  // [d], 0 .. 7
  Interval scale;                              // Of the finest level, rounded to bf16.
};
KeySketch MakeKeySketch(const Vector& key, std::span<const int> signs, int planes,
                        const SelectionTolerance& tolerance);

// ---- scores -------------------------------------------------------------------------------------

// The paper's: q = mean of the group's queries; s_i = sum_j max(q_j kmin_ij, q_j kmax_ij) over the
// first `kv_len` keys in blocks of `block_tokens`. The bounds are bf16, rounded outwards.
std::vector<Interval> ScoreMinMax(std::span<const Vector> queries, std::span<const Vector> keys,
                                  int block_tokens, const SelectionTolerance& tolerance);

// The estimated logit of one key for one query, with the first `read` of the sketch's `planes`.
// The query is rotated and rounded to s8: q8_j = round(q_j / scale), halves to even, the scale
// being the largest sum of |q_j| over components 8 i .. 8 i + 7, over 123.
struct QuerySketch {
  std::vector<int> low, value, high;  // [d], -127 .. 127
  Interval scale;
};
QuerySketch MakeQuerySketch(const Vector& query, std::span<const int> signs,
                            const SelectionTolerance& tolerance);
Interval EstimateLogit(const QuerySketch& query, const KeySketch& key, int read, int planes,
                       const SelectionTolerance& tolerance);

// Approximate attention mass: per head the share of a block's tokens in the mass of all tokens of
// the blocks that the last pass scored, summed over the group's heads; an estimate e has the mass
// exp(e) with straight lines between the powers of two. Progressive
// reading as in SelectorSpec: a block that did not survive to the last pass scores -1.
std::vector<Interval> ScoreSketch(std::span<const Vector> queries, std::span<const KeySketch> keys,
                                  const kernels::SelectorSpec& spec, const Budget& budget,
                                  std::span<const int> signs, const SelectionTolerance& tolerance);

// ---- the choice ---------------------------------------------------------------------------------

// Ascending ids of the kept blocks: sink and local ones, then the highest `value`s, ties to the
// lower id. REQUIRES 1 <= keep <= scores.size() and sink + local <= keep.
std::vector<int> TopBlocks(std::span<const Interval> scores, const Budget& budget);

// Empty when `ids` is a choice that an implementation within the tolerance may have made; else what
// is wrong with it. Every kept block must possibly score at least as high as every block left out.
std::string ExplainChoice(std::span<const Interval> scores, const Budget& budget,
                          std::span<const int> ids);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_REFERENCE_SELECTION_H_
