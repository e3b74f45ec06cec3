#ifndef RESA_TESTS_BENCH_BENCH_CLOCK_H_
#define RESA_TESTS_BENCH_BENCH_CLOCK_H_

#include <time.h>

namespace resa::bench {

// Seconds on a clock for measuring `threads` threads. For one it is the processor time of the
// process, which other load on the machine disturbs less than the time of day.
inline double Now(int threads) {
  timespec time = {};
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_CLOCK_H_
