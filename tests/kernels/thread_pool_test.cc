#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

namespace resa::kernels::cpu {
namespace {

TEST(ThreadPoolTest, RunsEveryTaskOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      pool.For(tasks, [&](int64_t task, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        ++runs[static_cast<size_t>(task)];
      });
      for (const std::atomic<int>& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

// What a loop wrote is there for the next one and for the caller; plain memory, so that
// ThreadSanitizer sees a missing edge.
TEST(ThreadPoolTest, LoopsSeeWhatEarlierLoopsWrote) {
  ThreadPool pool(4);
  std::vector<int64_t> values(64, 0);
  for (int round = 0; round < 3000; ++round) {
    pool.For(64, [&](int64_t task, int) {
      const auto i = static_cast<size_t>(task);
      values[i] += 1;
    });
    pool.For(63, [&](int64_t task, int) {
      const auto i = static_cast<size_t>(task);
      if (values[i] != round + 1) std::abort();
    });
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), int64_t{0}), 64 * (round + 1));
  }
}

TEST(ThreadPoolTest, WakesAfterSleeping) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int64_t> sum = 0;
    pool.For(100, [&](int64_t task, int) { sum += task; });
    EXPECT_EQ(sum, 4950);
  }
}

// While one thread is busy with a long task, the others take the rest.
TEST(ThreadPoolTest, TasksGoToWhoeverIsFree) {
  ThreadPool pool(2);
  std::atomic<int> short_tasks = 0;
  pool.For(50, [&](int64_t task, int) {
    if (task > 0) {
      ++short_tasks;
      return;
    }
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (short_tasks < 49 && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(short_tasks, 49);
}

}  // namespace
}  // namespace resa::kernels::cpu
