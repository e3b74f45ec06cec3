#ifndef RESA_SERVER_SERVING_STACK_H_
#define RESA_SERVER_SERVING_STACK_H_

// Everything below the listeners, put together from a configuration: model, tokenizer, executor,
// engine and its thread, metrics.

#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/model_executor.h"
#include "engine/model_files.h"
#include "engine/tokenizer.h"
#include "kernels/ops.h"
#include "server/attention_choice.h"
#include "server/config.h"
#include "server/served_model.h"
#include "spdlog/logger.h"

namespace resa::server {

inline constexpr char kServerVersion[] = "0.1.0";

class ServingStack {
 public:
  // Reads the model and allocates the pool; the engine does not run yet. Says to `logger` what was
  // loaded and where the memory went. Errors say what to do. `observer` may be null, and must
  // outlive the stack.
  static absl::StatusOr<std::unique_ptr<ServingStack>> Load(const Config& config,
                                                            std::unique_ptr<kernels::Ops> ops,
                                                            engine::EngineObserver* observer,
                                                            spdlog::logger* logger);
  // Stops the engine; what is left of requests ends with UNAVAILABLE.
  ~ServingStack();

  // Starts the engine's thread. Once.
  void Start();
  // Ends the engine's thread after its current step. Idempotent.
  void Stop();

  engine::Engine* engine() { return engine_.get(); }
  const ServedModel& model() const { return served_; }

 private:
  ServingStack() = default;

  absl::Status LoadModelFiles(const Config& config, spdlog::logger* logger);
  absl::Status CreateEngine(const Config& config, engine::EngineObserver* observer,
                            spdlog::logger* logger);
  absl::StatusOr<int64_t> PoolPages(const Config& config, int32_t max_context,
                                    spdlog::logger* logger) const;
  void Describe(const Config& config, const kernels::KvLayout& layout,
                const AttentionChoice& attention);
  void LogLimits(const Config& config, const kernels::KvLayout& layout,
                 const AttentionChoice& attention, spdlog::logger* logger) const;

  // In the order of use; destroyed from the bottom.
  std::unique_ptr<kernels::Ops> ops_;
  engine::LoadedModel loaded_;
  std::unique_ptr<const engine::Tokenizer> tokenizer_;
  ServedModel served_;
  std::unique_ptr<engine::ModelExecutor> executor_;
  engine::RealClock clock_;
  std::unique_ptr<engine::Engine> engine_;
  std::thread thread_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_SERVING_STACK_H_
