#ifndef RESA_KERNELS_CPU_CPU_OPS_H_
#define RESA_KERNELS_CPU_CPU_OPS_H_

// The CPU backend: Highway kernels for AVX2 and AVX-512 on x86-64 and for NEON on Arm, chosen once
// per process by CPUID.
//
// Activations are f32; K and V are bf16 or f32; weights stay bf16 where they are (a file mapping is
// fine, 2-byte alignment suffices) and are widened in registers, or multiplied as bf16 by oneDNN
// (Bf16Linear). A row's result is bitwise independent of the other rows, their number, chunk
// boundaries and the number of threads; it may differ between vector widths.

#include <cstdint>
#include <memory>

#include "kernels/ops.h"

namespace resa::kernels {

// Whether Linear uses a CPU's bf16 instructions (AVX-512 BF16, AMX) through oneDNN. It is faster
// there but rounds the rows to bf16, 2^-8 of each element; kernels/cpu/linear_onednn.h tells more.
enum class Bf16Linear : uint8_t {
  kOff,    // Rows stay f32: what agrees with an f32 reference to 2e-3 on any machine.
  kAuto,   // Where the CPU has the instructions and oneDNN passes its check.
  kForce,  // Also emulated, slowly, on AVX-512 without them: for tests.
};

struct CpuOptions {
  int threads = 0;  // The calling thread included; 0: AvailableCores().
  Bf16Linear bf16_linear = Bf16Linear::kOff;
};

// The cores this process may use: its affinity mask and its cgroup quota (v2 and v1), at least 1.
int AvailableCores();

// True when this CPU has what the kernels are compiled for (x86-64: AVX2, FMA, F16C, BMI2).
bool CpuSupported();

// REQUIRES CpuSupported(). The threads live as long as the Ops.
std::unique_ptr<Ops> CreateCpuOps(const CpuOptions& options);

}  // namespace resa::kernels

#endif  // RESA_KERNELS_CPU_CPU_OPS_H_
