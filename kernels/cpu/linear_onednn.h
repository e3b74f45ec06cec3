#ifndef RESA_KERNELS_CPU_LINEAR_ONEDNN_H_
#define RESA_KERNELS_CPU_LINEAR_ONEDNN_H_

// Linear by oneDNN, for CPUs that multiply bf16 in hardware (AVX-512 BF16, AMX): bf16 x bf16 with
// f32 sums, where gemm.cc widens to f32 first.
//
// Rows are rounded to bf16 (nearest, ties to even), as a GPU backend does: up to 2^-8 of each
// element, which gemm.cc does not lose. Denormal products count as zero.
//
// Weights stay as they lie in memory. oneDNN brings the panel at hand into the order its kernel
// wants, in scratch memory, on every use. A packed copy would save that, a pass over 64 columns in
// the cache, but double the memory of the weights and make a mapped file private.
//
// A row's bits depend on that row and the weight alone. Work is cut in tiles of fixed numbers of
// rows (the last one padded with zeros) by panels of 64 columns, one oneDNN primitive for each tile
// size and number of inputs. The first time a shape is seen, product_check.h tries each: a tile
// size whose bits differ from those of 16 rows is not used, and a shape at which 16 rows contradict
// themselves or the exact product is left to gemm.cc for good.
//
// Threads: each primitive runs on the one thread that executes it; the panels are spread over the
// backend's own pool. Distributions build oneDNN with OpenMP, which is kept at one thread and
// starts none.
//
// Its speed on such a CPU has not been measured: the tests run it where oneDNN emulates the
// instructions (any AVX-512), which is far slower than gemm.cc.

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cpu/context.h"

namespace resa::kernels::cpu {

class OneDnnLinear {
 public:
  // Null when this CPU has no bf16 instructions that oneDNN would use, `reason` then empty, or when
  // oneDNN cannot be trusted with a first usual shape, or is missing, `reason` then saying why.
  // `emulated`: also take a CPU that lacks the instructions but has AVX-512 (for tests).
  // `threads`: of the pool in the context that Run() is given.
  static std::unique_ptr<OneDnnLinear> Create(int threads, bool emulated, std::string* reason);
  virtual ~OneDnnLinear() = default;

  // Computes the op, or returns false without having touched `params.out` when this shape is not
  // oneDNN's. The answer for a shape never changes. Allocates on the first use of a shape only
  // (what oneDNN itself takes and frees during a call aside). From one thread at a time.
  virtual bool Run(Context& context, const LinearParams& params) = 0;

  // "oneDNN bf16", and which shapes it was refused so far, and why. Not during Run().
  virtual std::string Description() const = 0;
};

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_LINEAR_ONEDNN_H_
