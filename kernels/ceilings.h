#ifndef RESA_KERNELS_CEILINGS_H_
#define RESA_KERNELS_CEILINGS_H_

// What a machine can do at best: the other half of a roofline (kernels/roofline.h has what an op
// needs). Measured, since no data sheet knows the memory slots that are filled, the clock under
// wide vectors or the neighbours on the host.

#include "kernels/params.h"

namespace resa::kernels {

// Of one backend with all the threads it was given. Both are above 0.
struct Ceilings {
  // Bytes per second read from memory in streams, nothing written, caches of no help.
  double read_bytes_per_s = 0;
  // Floating-point operations per second, a multiply-add counted as two. Of a CPU: independent ones
  // in registers, f32 at the widest vectors that the backend's kernels were dispatched to. Of a
  // device with matrix units: a large bf16 product with f32 sums by the vendor's library, on random
  // values, so the share of it that a kernel reaches can pass 100 % by a little.
  double flops_per_s = 0;
  // What a layer's selection and sparse attention take beyond dense attention however little there
  // is to do, in seconds: a CPU's threads meet, a device's kernels start, fetch one thing after the
  // other and end. By selector. Known of the backend, not measured.
  double minmax_seconds = 4e-6;
  double sketch_seconds = 4e-6;

  double SelectionSeconds(SelectorKind kind) const {
    return kind == SelectorKind::kMinMax ? minmax_seconds : sketch_seconds;
  }
};

}  // namespace resa::kernels

#endif  // RESA_KERNELS_CEILINGS_H_
