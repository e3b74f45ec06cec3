#ifndef RESA_TESTS_SIM_COUNTS_H_
#define RESA_TESTS_SIM_COUNTS_H_

// What happened in a simulation: how one knows that it went where it should.

#include <algorithm>
#include <cstdint>

namespace resa::sim {

struct Counts {
  int64_t steps = 0;
  int64_t idle_steps = 0;
  int64_t worlds = 0;
  // Answers to Submit.
  int64_t accepted = 0;
  int64_t queue_full = 0;
  int64_t too_long = 0;
  int64_t refused_draining = 0;
  // What clients were told.
  int64_t tokens = 0;
  int64_t forced_tokens = 0;
  int64_t finished_stop = 0;
  int64_t finished_length = 0;
  int64_t cancelled = 0;
  int64_t deadlines = 0;
  int64_t slow_readers = 0;
  int64_t failed = 0;
  int64_t not_finite = 0;
  int64_t aborted = 0;
  // What the engine did.
  int64_t page_copies = 0;
  int64_t sparse_rows = 0;
  int64_t rectifications = 0;
  int64_t stalls = 0;
  int64_t preemptions = 0;
  int64_t sparse_preemptions = 0;  // Of mode SPARSE, in the middle of the output.
  int64_t stripped_siblings = 0;   // Outputs that lost their prompt's pages before they ran.
  // Maxima.
  int64_t longest_stall = 0;         // In steps.
  int64_t longest_life_percent = 0;  // A request's steps, of the work that was ahead of it.

  void Add(const Counts& other);
};

struct Counter {
  const char* name;
  int64_t Counts::*value;
};
inline constexpr Counter kSums[] = {
    {"steps", &Counts::steps},
    {"idle steps", &Counts::idle_steps},
    {"worlds", &Counts::worlds},
    {"requests accepted", &Counts::accepted},
    {"refused: queue full", &Counts::queue_full},
    {"refused: too long", &Counts::too_long},
    {"refused: draining", &Counts::refused_draining},
    {"tokens", &Counts::tokens},
    {"forced tokens", &Counts::forced_tokens},
    {"outputs ended by a stop token", &Counts::finished_stop},
    {"outputs ended by length", &Counts::finished_length},
    {"requests cancelled", &Counts::cancelled},
    {"requests past their deadline", &Counts::deadlines},
    {"slow readers", &Counts::slow_readers},
    {"requests of a failed step", &Counts::failed},
    {"requests with logits not finite", &Counts::not_finite},
    {"requests aborted", &Counts::aborted},
    {"page copies", &Counts::page_copies},
    {"sparse rows", &Counts::sparse_rows},
    {"rectifications", &Counts::rectifications},
    {"stalls", &Counts::stalls},
    {"preemptions", &Counts::preemptions},
    {"preemptions in mode SPARSE", &Counts::sparse_preemptions},
    {"waiting outputs that lost their pages", &Counts::stripped_siblings},
};
inline constexpr Counter kMaxima[] = {
    {"longest stall, steps", &Counts::longest_stall},
    {"longest life, % of the work ahead", &Counts::longest_life_percent},
};

inline void Counts::Add(const Counts& other) {
  for (const Counter& sum : kSums) this->*sum.value += other.*sum.value;
  for (const Counter& maximum : kMaxima) {
    this->*maximum.value = std::max(this->*maximum.value, other.*maximum.value);
  }
}

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_COUNTS_H_
