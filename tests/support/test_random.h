#ifndef RESA_TESTS_SUPPORT_TEST_RANDOM_H_
#define RESA_TESTS_SUPPORT_TEST_RANDOM_H_

// Random numbers for tests of float64 code, from a seed that is printed.

#include <cstdint>
#include <iostream>
#include <random>
#include <vector>

namespace resa::testing {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) { std::cout << "seed " << seed << "\n"; }
  double Normal() { return normal_(engine_); }
  int Below(int n) { return static_cast<int>(engine_() % static_cast<uint32_t>(n)); }
  std::vector<double> Normals(size_t n, double scale = 1) {
    std::vector<double> out(n);
    for (double& x : out) x = scale * Normal();
    return out;
  }
  std::vector<int> Signs(size_t n) {
    std::vector<int> out(n);
    for (int& s : out) s = Below(2) == 0 ? 1 : -1;
    return out;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_TEST_RANDOM_H_
