#include "kernels/cpu/thread_pool.h"

#include "kernels/check.h"

namespace resa::kernels::cpu {
namespace {

// About 30 to 60 microseconds of polling: longer than the gaps between the ops of a step, shorter
// than anyone would notice between steps.
constexpr int kSpins = 1000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`.
void AwaitChange(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (value.load(std::memory_order_acquire) == old) {
    value.wait(old, std::memory_order_acquire);
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  RESA_CHECK_GE(threads, 1) << "a thread pool needs its caller";
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Work(int thread) {
  const Function function = function_;
  const void* const body = body_;
  const int64_t tasks = tasks_;
  for (;;) {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks) return;
    function(body, task, thread);
  }
}

void ThreadPool::Run(int64_t tasks, Function function, const void* body) {
  if (workers_.empty() || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) function(body, task, 0);
    return;
  }
  function_ = function;
  body_ = body;
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<uint32_t>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  Work(0);
  // Every worker passes through every loop, so none can still look at this one's fields later.
  for (;;) {
    const uint32_t left = running_.load(std::memory_order_acquire);
    if (left == 0) return;
    AwaitChange(running_, left);
  }
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    AwaitChange(epoch_, seen);
    ++seen;
    if (stop_) return;
    Work(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

}  // namespace resa::kernels::cpu
