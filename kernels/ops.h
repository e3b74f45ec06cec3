#ifndef RESA_KERNELS_OPS_H_
#define RESA_KERNELS_OPS_H_

// The interface between the engine and a backend (kernels/cpu, kernels/cuda).
//
// Public methods check their parameters (a violated shape is a programmer error and ends the
// process) and call the private virtual that runs. Ops run in the order they are called. A device
// backend may return before the work is done; Sample() and Download() wait for it.
//
// Thread: one at a time (the engine's). Ownership: parameters are looked at during the call only;
// a device backend copies the small host lists (rows, chunks, tables) it needs.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "kernels/ceilings.h"
#include "kernels/params.h"

namespace resa::kernels {

// What has been done since start, summed over all calls: how a test or a benchmark proves which
// path ran. Counts are exact, not estimates.
struct OpCounters {
  int64_t linear_rows = 0;            // Rows through Linear, summed over calls.
  int64_t linear_flops = 0;           // 2 * rows * in * out.
  int64_t weight_bytes = 0;           // Weight bytes, once per call.
  int64_t dense_rows = 0;             // Rows through ChunkAttend.
  int64_t dense_tokens_attended = 0;  // Sum over those rows and KV heads of position + 1.
  int64_t sparse_rows = 0;            // Rows through SparseAttend.
  int64_t sparse_blocks_read = 0;     // Sum over those rows and KV heads of blocks attended.
  // What Select read: blocks over rows, KV heads and planes, each plane of a block once, and their
  // descriptor bytes. Nothing where nothing is to be chosen (all blocks are kept, or sink and local
  // ones fill the budget).
  int64_t blocks_scored = 0;
  int64_t descriptor_bytes = 0;
  // Steps that RunStep recorded, and those it replayed from a recording. 0 where nothing records.
  int64_t steps_recorded = 0;
  int64_t steps_replayed = 0;
  // Linears, replayed ones left out, whose norm and gate were part of the products' one launch.
  int64_t linears_fused = 0;
  // Entries of page tables that a step compared with what the device has, or copied there.
  int64_t page_ids_staged = 0;
};

// Memory of the backend, freed on destruction. 64-byte aligned, contents undefined.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual std::byte* data() = 0;
  virtual size_t bytes() const = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;
  Ops() = default;
  Ops(const Ops&) = delete;
  Ops& operator=(const Ops&) = delete;

  // For logs: "cpu, AVX2, 2 threads".
  virtual std::string Description() const = 0;
  // The type of activations: every Matrix that is neither a weight nor logits.
  virtual DType activation_dtype() const = 0;
  // True when the pool may hold K and V in this type.
  virtual bool SupportsKvDtype(DType dtype) const = 0;

  // Measures what this backend can do at best, with all its threads, in about half a second. The
  // CPU needs twice the size of its last-level cache in memory meanwhile, 128 to 512 MiB; a GPU
  // 384 MiB of its own.
  virtual Ceilings MeasureCeilings() = 0;

  // Bytes that Allocate and ImportWeights can still give from the device's own memory. Nothing
  // where that is the host's, and weights stay where they are.
  virtual std::optional<int64_t> DeviceMemoryFree() const { return std::nullopt; }

  // Null when the memory cannot be had.
  virtual std::unique_ptr<Buffer> Allocate(size_t bytes) = 0;
  // Makes weights in host memory usable by Linear and Embed. The CPU returns `host` itself, which
  // must then outlive the Ops; a device returns its own copy, which it owns.
  virtual const std::byte* ImportWeights(const std::byte* host, size_t bytes) = 0;
  virtual void Upload(std::byte* to, const void* from_host, size_t bytes) = 0;
  virtual void Download(void* to_host, const std::byte* from, size_t bytes) = 0;

  void Embed(const EmbedParams& params);
  void RmsNorm(const RmsNormParams& params);
  void Linear(const LinearParams& params);
  // Products of the same x, the norm before them and the gate behind them, which a device runs as
  // one where that is faster.
  void Linears(const LinearsParams& params);
  void RopeTable(const RopeTableParams& params);
  void QkvPost(const QkvPostParams& params);
  void Select(const SelectParams& params);
  void SparseAttend(const SparseAttendParams& params);
  void ChunkAttend(const ChunkAttendParams& params);
  void SiluMul(const SiluMulParams& params);
  void GatherRows(const GatherRowsParams& params);
  void CopyPages(const CopyPagesParams& params);
  void Sample(const SampleParams& params);

  // Runs one step: `issue` calls its ops. What a step of the same owner and counts ran before may
  // be replayed from a recording of the device; `issue` is called all the same, for its checks and
  // counters. So it must call the same ops on the same memory whenever owner and counts of `lists`
  // are the same, and look at no result. When RunStep returns, `lists.results` are there, and
  // without samples the step may still run. Page copies go before.
  // `meanwhile` is called once: when a device has the step and before its results are waited for;
  // on the CPU first of all.
  void RunStep(
      const StepLists& lists, absl::FunctionRef<void()> issue,
      absl::FunctionRef<void()> meanwhile = [] {});

  const OpCounters& counters() const { return counters_; }

 protected:
  OpCounters counters_;  // Backends add what only they know (blocks_scored, descriptor_bytes).

 private:
  virtual void DoEmbed(const EmbedParams& params) = 0;
  virtual void DoRmsNorm(const RmsNormParams& params) = 0;
  virtual void DoLinear(const LinearParams& params) = 0;
  virtual void DoLinears(const LinearsParams& params);  // Here: one op after the other.
  virtual void DoRopeTable(const RopeTableParams& params) = 0;
  virtual void DoQkvPost(const QkvPostParams& params) = 0;
  virtual void DoSelect(const SelectParams& params) = 0;
  virtual void DoSparseAttend(const SparseAttendParams& params) = 0;
  virtual void DoChunkAttend(const ChunkAttendParams& params) = 0;
  virtual void DoSiluMul(const SiluMulParams& params) = 0;
  virtual void DoGatherRows(const GatherRowsParams& params) = 0;
  virtual void DoCopyPages(const CopyPagesParams& params) = 0;
  virtual void DoSample(const SampleParams& params) = 0;
  virtual void DoRunStep(const StepLists&, absl::FunctionRef<void()> issue,
                         absl::FunctionRef<void()> meanwhile) {
    meanwhile();
    issue();
  }

  void CheckRmsNorm(const RmsNormParams& params);
  bool CheckLinear(const LinearParams& params);  // And counts; false when there is nothing to do.
};

}  // namespace resa::kernels

#endif  // RESA_KERNELS_OPS_H_
