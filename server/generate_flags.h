#ifndef RESA_SERVER_GENERATE_FLAGS_H_
#define RESA_SERVER_GENERATE_FLAGS_H_

// The flags of resactl that describe one request.

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "resa/v1/inference.pb.h"
#include "server/flag_set.h"

namespace resa::server {

class GenerateFlags {
 public:
  GenerateFlags();

  // Adds the flags of sampling, stops, output and attention, which fill in the request. This object
  // must outlive the parse.
  void AddTo(FlagSet* flags);
  // Adds --file, --prompt-ids, --chat and --system: where the prompt comes from.
  void AddPromptTo(FlagSet* flags);

  // The request that the flags describe, with the prompt of SetPrompt.
  const resa::v1::GenerateRequest& request() const { return request_; }
  // --file or --prompt-ids is among the flags.
  bool HasPromptFlags() const { return !file_.empty() || !prompt_ids_.empty(); }
  // `words` are the arguments that are no flags, joined by spaces; without any and without --file
  // or --prompt-ids the prompt is all of standard input. INVALID_ARGUMENT when there is none, or
  // more than one source.
  absl::Status SetPrompt(const std::vector<std::string>& words);

 private:
  resa::v1::GenerateRequest request_;
  std::string file_;
  std::string system_;
  std::vector<int32_t> prompt_ids_;
  bool chat_ = false;
};

}  // namespace resa::server

#endif  // RESA_SERVER_GENERATE_FLAGS_H_
