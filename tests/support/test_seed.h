#ifndef RESA_TESTS_SUPPORT_TEST_SEED_H_
#define RESA_TESTS_SUPPORT_TEST_SEED_H_

// The seed of a random test: a new one each run, or RESA_TEST_SEED from the environment to repeat
// one. Print it with every failure: SCOPED_TRACE(::testing::Message() << "RESA_TEST_SEED=" <<
// seed).

#include <cstdint>
#include <cstdlib>
#include <random>

namespace resa::testing {

inline uint64_t TestSeed() {
  if (const char* given = std::getenv("RESA_TEST_SEED")) return std::strtoull(given, nullptr, 10);
  return std::random_device{}();
}

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_TEST_SEED_H_
