#include "server/serving_stack.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "engine/activations.h"
#include "engine/kv_memory.h"
#include "engine/ragged_batch.h"
#include "engine/status_macros.h"
#include "kernels/check.h"
#include "server/resources.h"
#include "server/validate.h"

namespace resa::server {
namespace {

using ::resa::engine::ModelConfig;

std::string Describe(const kernels::SelectorSpec& selector) {
  if (selector.kind == kernels::SelectorKind::kMinMax) {
    return absl::StrFormat("minmax, blocks of %d", selector.block_tokens);
  }
  std::string text =
      absl::StrFormat("sketch, %d planes, blocks of %d", selector.planes, selector.block_tokens);
  for (int plane = 1; plane < selector.planes; ++plane) {
    absl::StrAppendFormat(&text, ", plane %d for %.0f%%", plane + 1,
                          100.0 * selector.refine_share[plane - 1]);
  }
  return text;
}

std::string Describe(const engine::AttentionPolicy& policy, int32_t sparse_from) {
  return absl::StrFormat(
      "%s, keep %g, at least %d tokens, %d local, %d sink, rectified every %d, sparse from %d",
      engine::NameOf(policy.mode), policy.keep_ratio, policy.min_tokens, policy.local_tokens,
      policy.sink_tokens, policy.rectify_interval, sparse_from);
}

engine::SchedulerLimits SchedulerLimitsFor(const Config& config, const AttentionChoice& attention) {
  engine::SchedulerLimits limits;
  limits.max_step_tokens = config.limits.max_step_tokens;
  limits.max_sequences = config.limits.max_sequences;
  limits.sparse_from = attention.sparse_from;
  limits.sparse_step_tokens = attention.sparse_step_tokens;
  limits.selector = config.pool.selector;
  return limits;
}

engine::BatchLimits BatchLimitsFor(const Config& config, int32_t pages_per_sequence) {
  engine::BatchLimits batch;
  batch.max_rows = config.limits.max_step_tokens;
  batch.max_segments = config.limits.max_sequences;
  batch.max_pages_per_sequence = pages_per_sequence;
  return batch;
}

absl::StatusOr<int32_t> MaxContext(const Config& config, const ModelConfig& model) {
  const int32_t wanted = config.limits.max_context.value_or(model.max_position);
  if (wanted <= model.max_position) return wanted;
  return absl::InvalidArgumentError(absl::StrCat("--max-context: the model was made for ",
                                                 model.max_position, " tokens, not for ", wanted));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServingStack>> ServingStack::Load(const Config& config,
                                                                 std::unique_ptr<kernels::Ops> ops,
                                                                 engine::EngineObserver* observer,
                                                                 spdlog::logger* logger) {
  std::unique_ptr<ServingStack> stack(new ServingStack);
  stack->ops_ = std::move(ops);
  RESA_RETURN_IF_ERROR(stack->LoadModelFiles(config, logger));
  RESA_RETURN_IF_ERROR(stack->CreateEngine(config, observer, logger));
  return stack;
}

ServingStack::~ServingStack() { Stop(); }

void ServingStack::Start() {
  RESA_CHECK(!thread_.joinable());
  thread_ = std::thread([this] { engine_->Run(); });
}

void ServingStack::Stop() {
  if (!thread_.joinable()) return;
  engine_->Stop();
  thread_.join();
}

absl::Status ServingStack::LoadModelFiles(const Config& config, spdlog::logger* logger) {
  const absl::Time start = absl::Now();
  RESA_ASSIGN_OR_RETURN(loaded_, engine::LoadModel(config.model.path));
  if (loaded_.gguf_vocab.has_value()) {
    RESA_ASSIGN_OR_RETURN(tokenizer_, engine::Tokenizer::FromGguf(*loaded_.gguf_vocab));
    loaded_.gguf_vocab.reset();
  } else {
    RESA_ASSIGN_OR_RETURN(tokenizer_, engine::Tokenizer::FromDirectory(config.model.path));
  }
  const ModelConfig& model = loaded_.config;
  if (tokenizer_->vocab_size() > model.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        config.model.path, ": the tokenizer has token ids up to ", tokenizer_->vocab_size() - 1,
        ", but the model has only ", model.vocab_size, "; they do not belong together"));
  }
  logger->info(
      "model {}: {}, {} layers, {} query and {} KV heads of {}, vocabulary {}, "
      "trained for {} tokens",
      config.model.path, model.model_type, model.num_layers, model.num_heads, model.num_kv_heads,
      model.head_dim, model.vocab_size, model.max_position);
  logger->info("weights: {} mapped, {} converted, in {}",
               FormatBytes(static_cast<int64_t>(loaded_.weights.mapped_bytes)),
               FormatBytes(static_cast<int64_t>(loaded_.weights.converted_bytes)),
               absl::FormatDuration(absl::Trunc(absl::Now() - start, absl::Milliseconds(1))));
  return absl::OkStatus();
}

absl::StatusOr<int64_t> ServingStack::PoolPages(const Config& config, int32_t max_context,
                                                spdlog::logger* logger) const {
  const kernels::KvLayout page =
      engine::LayoutFor(loaded_.config, config.pool.selector, config.pool.kv_dtype, 1);
  const engine::BatchLimits batch = BatchLimitsFor(config, engine::PagesFor(max_context));
  PoolDemand demand;
  demand.max_context = max_context;
  demand.max_sequences = config.limits.max_sequences;
  demand.activation_bytes = static_cast<int64_t>(engine::ActivationMemory::BytesNeeded(
      loaded_.config, batch, engine::RaggedBatch::MaxBlockIds(batch, page),
      ops_->activation_dtype()));
  int64_t available = 0;
  if (const std::optional<int64_t> device_memory = ops_->DeviceMemoryFree()) {
    available = *device_memory;
    demand.share = kDevicePoolShare;
    demand.weight_bytes =
        static_cast<int64_t>(loaded_.weights.mapped_bytes + loaded_.weights.converted_bytes);
  } else {
    RESA_ASSIGN_OR_RETURN(available, MemoryAvailable());
    demand.weight_bytes = static_cast<int64_t>(loaded_.weights.mapped_bytes);
  }
  if (!config.pool.bytes.has_value()) return DefaultPoolPages(page, demand, available);
  const int64_t left = available - demand.activation_bytes - demand.weight_bytes;
  if (*config.pool.bytes > left) {
    logger->warn(
        "--pool-memory: {} is more than the {} that weights and activations leave: it may not be "
        "had, push out weights, or have this process killed",
        FormatBytes(*config.pool.bytes), FormatBytes(std::max<int64_t>(0, left)));
  }
  return PoolPagesFor(page, *config.pool.bytes);
}

absl::Status ServingStack::CreateEngine(const Config& config, engine::EngineObserver* observer,
                                        spdlog::logger* logger) {
  const ModelConfig& model = loaded_.config;
  RESA_ASSIGN_OR_RETURN(const int32_t max_context, MaxContext(config, model));
  RESA_ASSIGN_OR_RETURN(const int64_t pages, PoolPages(config, max_context, logger));
  const kernels::KvLayout layout =
      engine::LayoutFor(model, config.pool.selector, config.pool.kv_dtype, pages);
  const bool on_gpu = ops_->DeviceMemoryFree().has_value();
  const AttentionChoice attention = ChooseAttention(
      config.attention, {.on_gpu = on_gpu, .deterministic = !on_gpu || config.device.deterministic},
      model, layout,
      static_cast<int32_t>(std::min<int64_t>(max_context, pages * kernels::kPageTokens)),
      ops_.get());

  engine::EngineOptions options;
  options.num_pages = static_cast<int32_t>(pages);
  options.limits.vocab_size = model.vocab_size;
  options.limits.max_context = max_context;
  options.limits.pool_tokens = pages * kernels::kPageTokens;
  options.eos_ids = model.eos_ids;
  options.scheduler = SchedulerLimitsFor(config, attention);
  options.max_waiting = config.limits.max_waiting;

  const engine::BatchLimits batch =
      BatchLimitsFor(config, std::min(engine::PagesFor(max_context), options.num_pages));
  RESA_ASSIGN_OR_RETURN(
      executor_, engine::ModelExecutor::Create(model, loaded_.weights, layout, batch, ops_.get()));
  engine_ = std::make_unique<engine::Engine>(options, tokenizer_.get(), executor_.get(), &clock_,
                                             observer);
  served_.tokenizer = tokenizer_.get();
  served_.limits = options.limits;
  served_.default_attention = attention.default_policy;
  Describe(config, layout, attention);
  LogLimits(config, layout, attention, logger);
  return absl::OkStatus();
}

void ServingStack::LogLimits(const Config& config, const kernels::KvLayout& layout,
                             const AttentionChoice& attention, spdlog::logger* logger) const {
  const int64_t kv_bytes = static_cast<int64_t>(2 * layout.num_layers * layout.LayerKvBytes());
  const int64_t descriptor_bytes =
      static_cast<int64_t>(layout.num_layers * layout.LayerDescriptorBytes());
  logger->info("pool: {} tokens in {} pages: {} of {} keys and values, {} of descriptors",
               served_.limits.pool_tokens, layout.num_pages, FormatBytes(kv_bytes),
               kernels::NameOf(layout.kv_dtype), FormatBytes(descriptor_bytes));
  logger->info("limits: {} tokens of context, {} sequences, {} rows a step, {} waiting",
               served_.limits.max_context, config.limits.max_sequences,
               config.limits.max_step_tokens, config.limits.max_waiting);
  logger->info("attention: {}", server::Describe(attention.default_policy, attention.sparse_from));
  logger->info("attention chosen: {}", attention.description.reason());
  logger->info("selector: {}", server::Describe(config.pool.selector));
  logger->info("chat prompts: {}", served_.chat_format.has_value()
                                       ? std::string(engine::NameOf(*served_.chat_format))
                                       : absl::StrCat("refused, ", served_.chat_refusal));
  logger->info("device: {}", ops_->Description());
}

void ServingStack::Describe(const Config& config, const kernels::KvLayout& layout,
                            const AttentionChoice& attention) {
  const ModelConfig& model = loaded_.config;
  if (tokenizer_->chat_template().empty()) {
    served_.chat_refusal = "the model has no chat template";
  } else if (auto format = engine::RecogniseChatTemplate(tokenizer_->chat_template());
             format.ok()) {
    served_.chat_format = *format;
  } else {
    served_.chat_refusal = std::string(format.status().message());
  }

  resa::v1::GetModelResponse& out = served_.description;
  out.set_name(config.model.served_name);
  out.set_architecture(model.model_type);
  out.set_vocab_size(model.vocab_size);
  out.set_max_context_tokens(served_.limits.max_context);
  out.set_pool_tokens(served_.limits.pool_tokens);
  out.set_max_sequences(config.limits.max_sequences);
  out.set_max_waiting(config.limits.max_waiting);
  out.mutable_eos_token_ids()->Add(model.eos_ids.begin(), model.eos_ids.end());
  if (tokenizer_->bos_id().has_value()) out.set_bos_token_id(*tokenizer_->bos_id());
  if (served_.chat_format.has_value())
    out.set_chat_format(std::string(engine::NameOf(*served_.chat_format)));
  *out.mutable_default_attention() = ToProto(served_.default_attention);
  const kernels::SelectorSpec& selector = config.pool.selector;
  const bool sketch = selector.kind == kernels::SelectorKind::kSketch;
  out.mutable_selector()->set_kind(sketch ? "sketch" : "minmax");
  out.mutable_selector()->set_block_tokens(selector.block_tokens);
  out.mutable_selector()->set_planes(selector.planes);
  for (int plane = 1; plane < selector.planes; ++plane) {
    out.mutable_selector()->add_refine_share(selector.refine_share[plane - 1]);
  }
  out.set_sparse_from_tokens(attention.sparse_from);
  out.set_sparse_step_tokens(attention.sparse_step_tokens);
  *out.mutable_attention_choice() = attention.description;
  out.set_num_layers(model.num_layers);
  out.set_num_attention_heads(model.num_heads);
  out.set_num_kv_heads(model.num_kv_heads);
  out.set_head_dim(model.head_dim);
  out.set_kv_dtype(kernels::NameOf(layout.kv_dtype));
  out.set_device(ops_->Description());
  out.set_server_version(kServerVersion);
}

}  // namespace resa::server
