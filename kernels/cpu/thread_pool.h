#ifndef RESA_KERNELS_CPU_THREAD_POOL_H_
#define RESA_KERNELS_CPU_THREAD_POOL_H_

// A fixed team of threads for loops of microseconds: the caller is one of the team, the others spin
// briefly for the next loop and then sleep. Nothing is allocated or created after construction.

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace resa::kernels::cpu {

class ThreadPool {
 public:
  // `threads` in total, the caller included; at least 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) once for each task in [0, tasks), thread in [0, threads()), and
  // returns when all have returned. Tasks start in rising order, each on whichever thread is free,
  // so a task's result must not depend on its thread. From one thread at a time, never from a body.
  template <class Body>
  void For(int64_t tasks, const Body& body) {
    Run(
        tasks,
        [](const void* opaque, int64_t task, int thread) {
          (*static_cast<const Body*>(opaque))(task, thread);
        },
        &body);
  }

 private:
  using Function = void (*)(const void* body, int64_t task, int thread);
  static constexpr uint32_t kOpen = uint32_t{1} << 31;

  void Run(int64_t tasks, Function function, const void* body);
  void Work(int thread);
  bool Enter();
  void WorkerLoop(int thread);

  // The current loop; written by the caller while the gate is shut and nobody is inside, published
  // by gate_.
  Function function_ = nullptr;
  const void* body_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<bool> stop_{false};

  alignas(64) std::atomic<int64_t> next_{0};    // The next task to claim.
  alignas(64) std::atomic<uint32_t> epoch_{0};  // Rises by one for each loop: wakes the workers.
  // kOpen while the current loop takes workers in, plus how many are inside. A worker that wakes
  // late finds the gate shut and is not waited for: on a busy machine that can be a time slice.
  alignas(64) std::atomic<uint32_t> gate_{0};
  std::vector<std::thread> workers_;
};

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_THREAD_POOL_H_
