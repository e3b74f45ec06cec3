#include "tests/bench/bench_options.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/status_macros.h"
#include "server/flag_set.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;
using server::FlagSet;

constexpr int64_t kMaxContext = 1 << 20;
constexpr int64_t kMaxBatch = 256;
constexpr int64_t kMaxRows = 32768;

absl::Status ParseIntegers(absl::string_view text, int64_t min, int64_t max,
                           std::vector<int32_t>* out) {
  out->clear();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    RESA_ASSIGN_OR_RETURN(const int64_t value, server::ParseInteger(part, min, max));
    out->push_back(static_cast<int32_t>(value));
  }
  return absl::OkStatus();
}

absl::Status ParseModes(absl::string_view text, std::vector<AttentionMode>* out) {
  out->clear();
  if (text == "none") return absl::OkStatus();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    bool known = false;
    for (const AttentionMode mode :
         {AttentionMode::kDense, AttentionMode::kSparse, AttentionMode::kRectified}) {
      if (part != NameOf(mode)) continue;
      out->push_back(mode);
      known = true;
    }
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", part, "\" is none of dense, sparse and rectified (or none alone)"));
    }
  }
  return absl::OkStatus();
}

// "512" or "512@7600", several with commas.
absl::Status ParsePrefills(absl::string_view text, std::vector<PrefillCase>* out) {
  out->clear();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> halves =
        absl::StrSplit(part, absl::MaxSplits('@', 1));
    PrefillCase prefill;
    RESA_ASSIGN_OR_RETURN(const int64_t rows, server::ParseInteger(halves.first, 1, kMaxRows));
    prefill.rows = static_cast<int32_t>(rows);
    if (part.find('@') != absl::string_view::npos) {
      RESA_ASSIGN_OR_RETURN(const int64_t position,
                            server::ParseInteger(halves.second, 0, kMaxContext));
      prefill.position = static_cast<int32_t>(position);
    }
    out->push_back(prefill);
  }
  return absl::OkStatus();
}

// What is known of the selector before its parts are put together.
struct SelectorFlags {
  std::string kind = "sketch";
  std::optional<int32_t> block, planes;
  std::vector<float> refine_share;
};

absl::Status ParseShares(absl::string_view text, std::vector<float>* out) {
  out->clear();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    RESA_ASSIGN_OR_RETURN(const double share, server::ParseNumber(part));
    const double above = out->empty() ? 1.0 : out->back();
    if (!(share > 0 && share <= above)) {
      return absl::InvalidArgumentError(absl::StrCat(share, " is not above 0 and at most ", above));
    }
    out->push_back(static_cast<float>(share));
  }
  return absl::OkStatus();
}

absl::StatusOr<kernels::SelectorSpec> ResolveSelector(const SelectorFlags& flags) {
  if (flags.kind == "minmax") {
    if (flags.planes.has_value() || flags.block.value_or(16) != 16 || !flags.refine_share.empty()) {
      return absl::InvalidArgumentError(
          "--selector minmax: has blocks of 16 and no planes; drop --block, --planes and "
          "--refine-share");
    }
    return kernels::SelectorSpec{kernels::SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}};
  }
  if (flags.kind != "sketch") {
    return absl::InvalidArgumentError(
        absl::StrCat("--selector: \"", flags.kind, "\" is neither sketch nor minmax"));
  }
  kernels::SelectorSpec spec = {
      kernels::SelectorKind::kSketch, flags.block.value_or(8), flags.planes.value_or(3), {1, 1}};
  if (spec.block_tokens != 4 && spec.block_tokens != 8 && spec.block_tokens != 16) {
    return absl::InvalidArgumentError(
        absl::StrCat("--block: ", spec.block_tokens, " is none of 4, 8 and 16"));
  }
  if (spec.planes < 1 || spec.planes > 3) {
    return absl::InvalidArgumentError(
        absl::StrCat("--planes: ", spec.planes, " is not from 1 to 3"));
  }
  const int shares = static_cast<int>(flags.refine_share.size());
  if (shares > spec.planes - 1) {
    return absl::InvalidArgumentError(absl::StrCat("--refine-share: ", shares, " shares, but ",
                                                   spec.planes, " planes take at most ",
                                                   spec.planes - 1));
  }
  for (int i = 0; i < 2 && shares > 0; ++i) {
    spec.refine_share[i] = flags.refine_share[std::min(i, shares - 1)];
  }
  return spec;
}

// Flags as they are given, until Finish puts them together.
struct Raw {
  BenchOptions options;
  SelectorFlags selector;
  std::optional<int32_t> threads, sparse_from, seed, interval, min_tokens, local_tokens,
      sink_tokens;
  std::optional<double> keep_ratio, seconds;
};

void AddFlags(Raw* raw, FlagSet* flags) {
  BenchOptions& o = raw->options;
  flags->Add("shape", "NAME", "Random weights of this shape, \"NAME-4l\" cut to 4 layers (0.5b).",
             &o.shape);
  flags->Add("model", "PATH", "A Hugging Face directory or GGUF file in place of a shape.",
             &o.model);
  flags->Add("device", "NAME", "What to run on: cpu or cuda:N (cpu).", &o.device);
  flags->Add("threads", "N", "Threads; 0 takes all cores given (0).", &raw->threads);
  flags->Add("target", "NAME", "Instruction sets up to AVX2, AVX3 (AVX-512) or AVX3_DL (all).",
             &o.target);
  flags->AddSwitch("cpu-bf16", "Use a CPU's bf16 instructions where it has them (true).",
                   &o.cpu_bf16);
  flags->Add(
      "context", "N,...", "Tokens a decoded token attends to (1024).",
      [&o](absl::string_view text) { return ParseIntegers(text, 1, kMaxContext, &o.contexts); });
  flags->Add("batch", "B,...", "Sequences decoded together (1).", [&o](absl::string_view text) {
    return ParseIntegers(text, 1, kMaxBatch, &o.batches);
  });
  flags->Add("mode", "MODE,...",
             "Of dense, sparse and rectified; none to measure prefill alone (all three).",
             [&o](absl::string_view text) { return ParseModes(text, &o.modes); });
  flags->Add("prefill", "ROWS[@POSITION],...", "Chunks of prompt tokens after a context (none).",
             [&o](absl::string_view text) { return ParsePrefills(text, &o.prefills); });
  flags->Add("selector", "NAME", "sketch or minmax (sketch).", &raw->selector.kind);
  flags->Add("block", "N", "Tokens of a sketch block: 4, 8 or 16 (8).", &raw->selector.block);
  flags->Add("planes", "N", "Bits per component of a sketch, 1 to 3 (3).", &raw->selector.planes);
  flags->Add(
      "refine-share", "S,...", "Shares of the blocks scored with further planes (1).",
      [raw](absl::string_view text) { return ParseShares(text, &raw->selector.refine_share); });
  flags->Add("keep-ratio", "R", "Share of the blocks attended to (0.1).", &raw->keep_ratio);
  flags->Add("min-tokens", "N", "Tokens attended to at least (64).", &raw->min_tokens);
  flags->Add("local-tokens", "N", "Newest tokens, always kept (32).", &raw->local_tokens);
  flags->Add("sink-tokens", "N", "First tokens, always kept (16).", &raw->sink_tokens);
  flags->Add("interval", "F", "Tokens from one rectification to the next (32).", &raw->interval);
  flags->Add("sparse-from", "N", "Shorter contexts take the dense path (0).", &raw->sparse_from);
  flags->Add("seconds", "S", "To measure each context for, at least (5).", &raw->seconds);
  flags->Add("seed", "N", "Of weights and cache (1).", &raw->seed);
  flags->Add("json", "FILE", "Write the figures there too; - is standard output.", &o.json);
}

absl::StatusOr<BenchOptions> Finish(Raw raw) {
  BenchOptions& o = raw.options;
  engine::AttentionOverrides overrides;
  overrides.keep_ratio = raw.keep_ratio;
  overrides.min_tokens = raw.min_tokens;
  overrides.local_tokens = raw.local_tokens;
  overrides.sink_tokens = raw.sink_tokens;
  overrides.rectify_interval = raw.interval;
  RESA_ASSIGN_OR_RETURN(o.policy, engine::ResolvePolicy(o.policy, overrides));
  RESA_ASSIGN_OR_RETURN(o.selector, ResolveSelector(raw.selector));
  o.threads = raw.threads.value_or(o.threads);
  o.sparse_from = raw.sparse_from.value_or(o.sparse_from);
  o.seconds = raw.seconds.value_or(o.seconds);
  o.seed = static_cast<uint64_t>(raw.seed.value_or(static_cast<int32_t>(o.seed)));
  if (o.threads < 0 || o.threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("--threads: ", o.threads, " is not from 0 to 1024"));
  }
  if (!(o.seconds > 0 && o.seconds <= 3600)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--seconds: ", o.seconds, " is not above 0 and at most 3600"));
  }
  if (o.modes.empty() && o.prefills.empty()) {
    return absl::InvalidArgumentError("--mode none: nothing to measure; give --prefill");
  }
  return std::move(o);
}

}  // namespace

absl::StatusOr<BenchOptions> ParseBenchOptions(absl::Span<const std::string> args) {
  Raw raw;
  FlagSet flags;
  AddFlags(&raw, &flags);
  RESA_ASSIGN_OR_RETURN(const std::vector<std::string> rest, flags.Parse(args));
  if (!rest.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", rest[0], "\" is not a flag; all arguments are"));
  }
  return Finish(std::move(raw));
}

std::string BenchHelp() {
  Raw raw;
  FlagSet flags;
  AddFlags(&raw, &flags);
  return absl::StrCat(
      "resa_bench: times the decoder's steps on this machine and shows how near they are to its\n"
      "ceilings, which it measures first. No network, no files but a model's.\n\n",
      flags.Help());
}

}  // namespace resa::bench
