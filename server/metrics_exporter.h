#ifndef RESA_SERVER_METRICS_EXPORTER_H_
#define RESA_SERVER_METRICS_EXPORTER_H_

// What the engine observes, as Prometheus series. Those that every inference server has carry the
// names and meanings that dashboards know from vLLM (`vllm:...`), each with the label model_name;
// what only this daemon has begins with `resa_`. Where a request can have several outputs, the help
// text says which of the two a series is about.

#include <memory>
#include <string>

#include "engine/metrics.h"
#include "resa/v1/inference.pb.h"

namespace resa::server {

// The observer is called on the engine's thread and allocates nothing; the other methods on any
// thread.
class MetricsExporter final : public engine::EngineObserver {
 public:
  explicit MetricsExporter(std::string model_name);
  ~MetricsExporter() override;

  void OnStep(const engine::StepReport& report) override;
  void OnRectification(int32_t rows, int32_t delay_steps) override;
  void OnSparseRow(int32_t kept, int32_t total) override;
  void OnPromptTokens(int32_t count) override;
  void OnFirstToken(absl::Duration since_arrival) override;
  void OnNextToken(absl::Duration since_last) override;
  void OnFinished(const engine::Finished& finished) override;
  void OnRequestFinished(const engine::Finished& last) override;
  void OnError(const absl::Status& status) override;

  // A Generate call was refused, with this status, before the engine took it.
  void CountRefusal(const absl::Status& status);
  // Once the model is loaded: what the labels of the two info series say. Once.
  void Describe(const resa::v1::GetModelResponse& model);
  // All series in the text format of /metrics, the gauges as `load` has them.
  std::string Render(const engine::EngineLoad& load);

 private:
  struct Series;
  std::unique_ptr<Series> series_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_METRICS_EXPORTER_H_
