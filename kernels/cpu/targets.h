#ifndef RESA_KERNELS_CPU_TARGETS_H_
#define RESA_KERNELS_CPU_TARGETS_H_

// Which instruction sets the kernels are compiled for; before any Highway header.
//
// x86-64: AVX2 (the least; CpuSupported() tells) and AVX-512; a file that defines HWY_WANT_AVX3_DL
// first also gets AVX-512 with VNNI. Arm: NEON. The scalable vectors of SVE cannot sit in arrays of
// registers, which the kernels rely on.

#if defined(__x86_64__)
#define HWY_BASELINE_TARGETS HWY_AVX2
#ifdef HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (~(HWY_AVX2 | HWY_AVX3 | HWY_AVX3_DL))
#else
#define HWY_DISABLED_TARGETS (~(HWY_AVX2 | HWY_AVX3))
#endif
#elif defined(__aarch64__)
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif

#endif  // RESA_KERNELS_CPU_TARGETS_H_
