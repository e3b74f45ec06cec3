#ifndef RESA_TESTS_SIM_RANDOM_H_
#define RESA_TESTS_SIM_RANDOM_H_

// The simulation's only source of chance: the same seed gives the same numbers on every machine,
// which the distributions of the standard library do not promise.

#include <cstdint>
#include <initializer_list>

namespace resa::sim {

// A strong mix of two words (the finalizer of SplitMix64 over both).
constexpr uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a + 0x9e3779b97f4a7c15ull * (b + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}

  uint64_t Next() { return Mix(seed_, count_++); }
  // Uniform in [low, high]; the bias of the remainder does not matter here.
  int32_t Between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(int32_t n) { return Next() % static_cast<uint64_t>(n) == 0; }
  template <typename T>
  T Pick(std::initializer_list<T> choices) {
    return choices.begin()[Next() % choices.size()];
  }

 private:
  const uint64_t seed_;
  uint64_t count_ = 0;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_RANDOM_H_
