#ifndef RESA_SERVER_METRICS_EXPORTER_H_
#define RESA_SERVER_METRICS_EXPORTER_H_

// What the engine observes, as Prometheus series. Those that every inference server has carry the
// names and meanings that dashboards know from vLLM (`vllm:...`), each with the label model_name;
// what only this daemon has begins with `resa_`.

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "engine/metrics.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace resa::server {

// Facts that do not change while the daemon runs.
struct MetricsLabels {
  std::string model_name;
  std::string version;
  std::string device;
  int64_t pool_pages = 0;
};

// The observer is called on the engine's thread and allocates nothing; Render on any thread.
class MetricsExporter final : public engine::EngineObserver {
 public:
  explicit MetricsExporter(const MetricsLabels& labels);
  ~MetricsExporter() override;

  void OnStep(const engine::StepReport& report) override;
  void OnRectification(int32_t rows, int32_t delay_steps) override;
  void OnSparseRow(int32_t kept, int32_t total) override;
  void OnPromptTokens(int32_t count) override;
  void OnFirstToken(absl::Duration since_arrival) override;
  void OnNextToken(absl::Duration since_last) override;
  void OnFinished(const engine::Finished& finished) override;
  void OnError(const absl::Status& status) override;
  void OnRejected(engine::RejectReason reason) override;

  // All series in the text format of /metrics, the gauges as `load` has them.
  std::string Render(const engine::EngineLoad& load);

 private:
  struct Series;
  std::unique_ptr<Series> series_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_METRICS_EXPORTER_H_
