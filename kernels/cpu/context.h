#ifndef RESA_KERNELS_CPU_CONTEXT_H_
#define RESA_KERNELS_CPU_CONTEXT_H_

// What a CPU kernel works with beside its params: the threads and scratch memory that grows to the
// largest step seen and is then reused.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/check.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops.h"

namespace resa::kernels::cpu {

// 64-byte aligned memory whose contents do not survive growing.
class Scratch {
 public:
  // Starts carving anew; at least `bytes` can then be taken. Earlier pointers become invalid.
  void Reset(size_t bytes) {
    if (bytes > capacity_) {
      capacity_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, capacity_)));
      RESA_CHECK(memory_ != nullptr) << "out of memory: " << capacity_ << " bytes of scratch";
    }
    used_ = 0;
  }
  // `count` values, aligned to 64 bytes.
  template <class T>
  T* Take(size_t count) {
    T* const begin = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += BytesFor<T>(count);
    RESA_CHECK_LE(used_, capacity_) << "scratch reserved too small";
    return begin;
  }
  // What Take<T>(count) uses up: for the sum to give Reset().
  template <class T>
  static constexpr size_t BytesFor(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

struct Context {
  explicit Context(int threads) : pool(threads), of_thread(static_cast<size_t>(threads)) {}

  ThreadPool pool;
  Scratch shared;                  // For the caller: plans, packed operands.
  Scratch partials;                // A second one, when the size follows from the first.
  std::vector<Scratch> of_thread;  // [threads], for the bodies of a loop.
};

// The kernels, one family per file. Each runs its whole op, spread over context.pool.
void Embed(Context& context, const EmbedParams& params);
void RmsNorm(Context& context, const RmsNormParams& params);
void RopeTable(Context& context, const RopeTableParams& params);
void SiluMul(Context& context, const SiluMulParams& params);
void Linear(Context& context, const LinearParams& params);
void QkvPost(Context& context, const QkvPostParams& params);
void SelectMinMax(Context& context, const SelectParams& params, OpCounters* counters);
void SelectSketch(Context& context, const SelectParams& params, OpCounters* counters);
void SparseAttend(Context& context, const SparseAttendParams& params);
void ChunkAttend(Context& context, const ChunkAttendParams& params);
void GatherRows(Context& context, const GatherRowsParams& params);
void CopyPages(Context& context, const CopyPagesParams& params);
void Sample(Context& context, const SampleParams& params);

// See Ops::MeasureCeilings.
Ceilings MeasureCeilings(Context& context);

// The name of the instruction set the kernels were dispatched to.
const char* TargetName();

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_CONTEXT_H_
