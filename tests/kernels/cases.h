#ifndef RESA_TESTS_KERNELS_CASES_H_
#define RESA_TESTS_KERNELS_CASES_H_

// The shapes that every attention and selection test and the benchmark run over: head sizes,
// groups, KV types, and lengths around every boundary of page, tile and split.

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace resa::testing {

struct HeadCase {
  int kv_heads;
  int group;
  int head_dim;
  kernels::DType kv;

  int heads() const { return kv_heads * group; }
  std::string Name() const {
    return std::to_string(heads()) + "q" + std::to_string(kv_heads) + "kv_d" +
           std::to_string(head_dim) + "_" + kernels::NameOf(kv);
  }
};
inline void PrintTo(const HeadCase& c, std::ostream* out) { *out << c.Name(); }

// Every supported group size once with each head size, the KV types alternating.
inline const std::vector<HeadCase> kHeadCases = {
    {2, 1, 64, kernels::DType::kF32},   {3, 3, 64, kernels::DType::kBF16},
    {2, 4, 64, kernels::DType::kBF16},  {1, 7, 64, kernels::DType::kF32},
    {1, 16, 64, kernels::DType::kBF16}, {2, 1, 128, kernels::DType::kBF16},
    {1, 3, 128, kernels::DType::kF32},  {2, 4, 128, kernels::DType::kBF16},
    {2, 7, 128, kernels::DType::kBF16}, {1, 16, 128, kernels::DType::kF32},
};

// Tokens in the cache.
inline const std::vector<int> kLengths = {1,  2,  15,  16,  17,  31,  33,  63,   64,
                                          65, 79, 127, 511, 512, 513, 777, 1025, 1537};

// Selectors: the paper's, and sketches of every width, block and way of reading.
inline const std::vector<kernels::SelectorSpec> kSelectors = {
    {kernels::SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}},
    {kernels::SelectorKind::kSketch, 16, 1, {1.0f, 1.0f}},
    {kernels::SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}},
    {kernels::SelectorKind::kSketch, 4, 3, {1.0f, 1.0f}},
    {kernels::SelectorKind::kSketch, 8, 2, {0.25f, 0.12f}},
    {kernels::SelectorKind::kSketch, 8, 3, {0.25f, 0.12f}},
    {kernels::SelectorKind::kSketch, 4, 3, {1.0f, 0.2f}},
    {kernels::SelectorKind::kSketch, 16, 3, {0.4f, 0.4f}},
};

// [out, in] of a projection: multiples of nothing in particular among them.
struct LinearCase {
  int64_t out;
  int64_t in;
};
inline const std::vector<LinearCase> kLinearCases = {
    {1, 1},  {3, 7},    {4, 32},    {33, 31},   {32, 64},    {65, 576},
    {7, 33}, {96, 384}, {37, 1024}, {50, 1025}, {130, 1536}, {64, 2100},
};

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_CASES_H_
