#include "tests/bench/gpu_device.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

#if RESA_HAVE_CUDA
#include "kernels/cuda/cuda_ops.h"
#endif

namespace resa::bench {

absl::StatusOr<std::unique_ptr<kernels::Ops>> MakeGpuOps(absl::string_view name) {
  absl::string_view rest = name;
  int index = 0;
  if (!absl::ConsumePrefix(&rest, "cuda") ||
      (!rest.empty() && !(absl::ConsumePrefix(&rest, ":") && absl::SimpleAtoi(rest, &index)))) {
    return absl::InvalidArgumentError(
        absl::StrCat("--device ", name, ": it is neither cpu nor cuda:N"));
  }
#if RESA_HAVE_CUDA
  std::string why_not;
  std::unique_ptr<kernels::Ops> ops = kernels::CreateCudaOps({.device = index}, &why_not);
  if (ops == nullptr) return absl::UnavailableError(absl::StrCat("--device ", name, ": ", why_not));
  return ops;
#else
  return absl::UnavailableError(
      absl::StrCat("--device ", name, ": this was built without the CUDA backend"));
#endif
}

}  // namespace resa::bench
