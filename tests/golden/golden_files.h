#ifndef RESA_TESTS_GOLDEN_GOLDEN_FILES_H_
#define RESA_TESTS_GOLDEN_GOLDEN_FILES_H_

// The golden models of tests/golden/models, made by make_models.py.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace resa::testing {

struct Golden {
  std::string name;
  std::string model_path;  // What LoadModel takes: the folder, or model.gguf inside it.
  std::vector<int32_t> prompt;
  std::vector<int32_t> logit_rows;  // Positions of the prompt.
  std::vector<float> logits;        // [logit_rows.size(), vocab_size]
  std::vector<int32_t> greedy;      // What follows the prompt.
  float min_margin = 0;             // Between the best and the second logit, over `greedy`.
  // GGUF only: the first elements of each tensor in the file's order, as the gguf package decodes
  // them.
  std::vector<std::pair<std::string, std::vector<float>>> dequantised;

  bool is_gguf() const { return !dequantised.empty(); }
};

// The folders under tests/golden/models, sorted. Never empty: the test ends when there are none.
std::vector<std::string> GoldenNames();
Golden ReadGolden(const std::string& name);

}  // namespace resa::testing

#endif  // RESA_TESTS_GOLDEN_GOLDEN_FILES_H_
