#include "tests/sim/world.h"

#include <algorithm>
#include <limits>

#include "tests/sim/toy_model.h"

namespace resa::sim {
namespace {

using engine::AttentionMode;

int32_t MaxSequenceTokens(const World& world) {
  return static_cast<int32_t>(
      std::min<int64_t>(world.options.limits.max_context, world.options.limits.pool_tokens));
}

engine::AttentionPolicy MakePolicy(const World& world, Random& random) {
  engine::AttentionPolicy policy;
  policy.mode = random.Pick({AttentionMode::kRectified, AttentionMode::kRectified,
                             AttentionMode::kSparse, AttentionMode::kDense});
  if (world.long_windows && !random.OneIn(4)) policy.mode = AttentionMode::kRectified;
  policy.keep_ratio = random.Pick({0.03125, 0.0625, 0.0625, 0.125, 0.125, 0.25, 0.5, 0.875, 1.0});
  policy.min_tokens = random.Between(1, 48);
  policy.local_tokens = random.Between(1, 24);
  policy.sink_tokens = random.Between(0, 16);
  policy.rectify_interval =
      world.long_windows ? 8 * random.Pick({random.Between(12, 32), random.Between(12, 32), 1})
                         : 8 * random.Pick({1, 2, 4, random.Between(1, 8), random.Between(1, 32)});
  return policy;
}

engine::SamplingParams MakeSampling(int32_t vocab_size, Random& random) {
  engine::SamplingParams sampling;
  sampling.seed = random.Next();
  sampling.temperature = random.Pick({0.0f, 0.7f, 1.0f});
  if (random.OneIn(8)) sampling.repetition_penalty = 1.1f;
  if (random.OneIn(8)) sampling.presence_penalty = 0.5f;
  if (random.OneIn(16)) sampling.min_p = kFickleMinP;
  if (random.OneIn(8)) {
    sampling.logit_bias.emplace_back(random.Between(0, vocab_size / 2),
                                     -std::numeric_limits<float>::infinity());
    sampling.logit_bias.emplace_back(random.Between(vocab_size / 2 + 1, vocab_size - 1), 2.0f);
  }
  return sampling;
}

std::vector<int32_t> MakeTokens(int32_t count, int32_t vocab_size, Random& random) {
  // Many prompts begin alike, as they do in life: another request's stale page is then not told
  // apart by its tokens, only by the rules.
  std::vector<int32_t> tokens(count, 7 % vocab_size);
  if (random.OneIn(4)) return tokens;
  for (int32_t& token : tokens) token = random.Between(0, vocab_size - 1);
  return tokens;
}

}  // namespace

World MakeWorld(Random& random) {
  World world;
  engine::EngineOptions& options = world.options;
  engine::SchedulerLimits& limits = options.scheduler;
  limits.max_sequences = random.Between(1, 16);
  limits.min_chunk_tokens = random.Pick({1, 8, 32, 64});
  limits.max_step_tokens = limits.max_sequences + engine::kMaxRectifyInterval +
                           limits.min_chunk_tokens + random.Pick({0, 0, 64, 512});
  limits.sparse_from = random.Pick({0, 0, 32, 100});
  limits.selector.block_tokens = random.Pick({4, 8, 16});

  options.num_pages = random.Pick({random.Between(4, 16), random.Between(8, 40), 128, 300});
  options.limits.max_context = random.Pick({64, 256, 600, 600});
  options.limits.vocab_size = random.Pick({16, 64, 512, 4096});
  options.eos_ids = {1, 2};
  options.max_waiting = random.Pick({1, 4, 16});

  world.steps = random.Between(100, 4000);
  world.ending = random.Pick({Ending::kDrain, Ending::kDrain, Ending::kAbort, Ending::kDestroy});
  world.arrival = random.Pick({2, 4, 10, 30, 200});
  world.cancel = random.Pick({20, 100, 1000});
  world.failed_step = random.Pick({100, 1000, 10000});
  world.deadline = random.Pick({2, 10, 100});
  world.slow_reader = random.Pick({10, 50});
  world.max_prompt = random.Pick({8, 60, 400});
  world.max_output = random.Pick({8, 60, 400, 600});
  world.long_windows = random.OneIn(4);
  if (world.long_windows) {
    limits.max_sequences = random.Between(6, 16);
    limits.min_chunk_tokens = random.Pick({32, 64, 128});
    limits.max_step_tokens =
        limits.max_sequences + engine::kMaxRectifyInterval + limits.min_chunk_tokens;
    options.num_pages = random.Between(60, 600);
    options.limits.max_context = random.Pick({600, 1200});
    options.limits.vocab_size = 4096;
    world.arrival = random.Pick({5, 20});
    world.cancel = 1000;
    world.failed_step = 10000;
    world.deadline = 100;
    world.slow_reader = 50;
    world.max_prompt = random.Pick({100, 600});
    world.max_output = options.limits.max_context;
  }
  options.limits.pool_tokens = int64_t{options.num_pages} * kernels::kPageTokens;
  return world;
}

std::unique_ptr<engine::Request> MakeRequest(const World& world, absl::Time now, Random& random) {
  const int32_t vocab = world.options.limits.vocab_size;
  const int32_t most = MaxSequenceTokens(world);
  auto request = std::make_unique<engine::Request>();
  const bool too_long = random.OneIn(100);
  const int32_t prompt = too_long ? most + random.Between(0, 20)
                                  : std::min(random.Between(1, world.max_prompt), most - 1);
  request->prompt = MakeTokens(prompt, vocab, random);
  const int32_t room = std::max(1, most - prompt);
  engine::StopCriteria& stop = request->stop;
  if (!random.OneIn(8)) stop.max_tokens = std::min(random.Between(1, world.max_output), room);
  const int32_t max_output = stop.max_tokens.value_or(room);
  if (random.OneIn(4)) stop.min_tokens = random.Between(0, max_output);
  if (random.OneIn(4)) stop.token_ids = {random.Between(3, vocab - 1)};
  stop.ignore_eos = random.OneIn(world.long_windows ? 1 : 3);
  request->sampling = MakeSampling(vocab, random);
  request->attention = MakePolicy(world, random);
  if (random.OneIn(8)) {
    request->forced_tokens = MakeTokens(random.Between(1, max_output), vocab, random);
  }
  request->output.logprobs = random.OneIn(8);
  if (request->output.logprobs) request->output.top_logprobs = random.Between(0, 3);
  request->output.echo = random.OneIn(16);
  // Outputs of one request keep step with each other, so their windows are due together.
  if (random.OneIn(world.long_windows ? 2 : 4)) request->n = random.Between(2, 10);
  if (random.OneIn(4)) request->priority = random.Between(-2, 2);
  if (random.OneIn(world.deadline)) {
    request->deadline = now + absl::Milliseconds(random.Between(-10, 3000));
  }
  return request;
}

bool FitsWorld(const World& world, const engine::Request& request) {
  return static_cast<int32_t>(request.prompt.size()) < MaxSequenceTokens(world);
}

}  // namespace resa::sim
