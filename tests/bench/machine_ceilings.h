#ifndef RESA_TESTS_BENCH_MACHINE_CEILINGS_H_
#define RESA_TESTS_BENCH_MACHINE_CEILINGS_H_

// What this machine can do at best, measured with plain loops on `threads` threads: the ceilings
// that kernels are compared with. Each takes about a second.

namespace resa::bench {

// Seconds on a clock for measuring `threads` threads. For one it is the processor time of the
// process, which other load on the machine disturbs less than the time of day.
double Now(int threads);

// Bytes per second read from memory, each thread streaming through a part of 512 MiB.
double MeasureReadBandwidth(int threads);

// Floating-point operations per second of independent f32 multiply-adds in registers, at the widest
// vectors that the kernels are dispatched to.
double MeasurePeakFlops(int threads);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_MACHINE_CEILINGS_H_
