#ifndef RESA_TESTS_SUPPORT_COUNT_ALLOCATIONS_H_
#define RESA_TESTS_SUPPORT_COUNT_ALLOCATIONS_H_

// Linking resa_count_allocations replaces operator new and delete of the whole binary.

#include <cstdint>

namespace resa::testing {

// Calls of any operator new since the program began, in all threads.
int64_t CountAllocations();

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_COUNT_ALLOCATIONS_H_
