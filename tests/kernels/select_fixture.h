#ifndef RESA_TESTS_KERNELS_SELECT_FIXTURE_H_
#define RESA_TESTS_KERNELS_SELECT_FIXTURE_H_

// Runs Select over sequences of given keys, and what the tests of both selectors ask of it.

#include <algorithm>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "tests/kernels/ops_fixture.h"
#include "tests/support/reference_selection.h"

namespace resa::testing {

class SelectTest : public OpsTest {
 protected:
  struct World {
    HeadCase heads;
    kernels::SelectorSpec selector;
    std::vector<int> lengths;
    std::unique_ptr<TestPool> pool;
    std::vector<float> q;  // [sequences, heads * d]: the last token's queries
  };

  World MakeWorld(kernels::Ops& ops, const HeadCase& heads, const kernels::SelectorSpec& selector,
                  std::vector<int> lengths, const std::vector<float>& keys, std::vector<float> q) {
    World world{heads, selector, lengths, nullptr, std::move(q)};
    world.pool = std::make_unique<TestPool>(heads, selector, lengths, rng());
    FillPool(ops, *world.pool, heads, lengths, keys, keys);
    return world;
  }

  World MakeRandomWorld(kernels::Ops& ops, const HeadCase& heads,
                        const kernels::SelectorSpec& selector, const std::vector<int>& lengths) {
    const auto tokens = static_cast<size_t>(std::accumulate(lengths.begin(), lengths.end(), 0));
    return MakeWorld(
        ops, heads, selector, lengths,
        Activations(tokens * static_cast<size_t>(heads.kv_heads * heads.head_dim)),
        Activations(lengths.size() * static_cast<size_t>(heads.heads() * heads.head_dim)));
  }

  // A row per sequence with this budget, cut to what the sequence has.
  static std::vector<kernels::SparseRow> Rows(const World& world, double keep_share, int local,
                                              int sink) {
    std::vector<kernels::SparseRow> rows;
    int64_t ids = 0;
    for (size_t s = 0; s < world.lengths.size(); ++s) {
      const int block = world.selector.block_tokens;
      const int blocks = (world.lengths[s] + block - 1) / block;
      const int wanted = static_cast<int>(keep_share * blocks) + local + sink + 1;
      const int keep = std::min(blocks, wanted);
      const auto at = static_cast<int32_t>(s);
      rows.push_back({.row = at,
                      .position = world.lengths[s] - 1,
                      .table = at,
                      .keep_blocks = keep,
                      .local_blocks = std::min(local, keep),
                      .sink_blocks = std::min(sink, keep - std::min(local, keep)),
                      .ids_begin = ids});
      ids += int64_t{keep} * world.heads.kv_heads;
    }
    return rows;
  }

  // The ids of all rows, as Select lays them out; -7 where it wrote nothing.
  static std::vector<int32_t> Select(kernels::Ops& ops, World& world,
                                     const std::vector<kernels::SparseRow>& rows) {
    int64_t ids_end = 0;
    for (const auto& row : rows) {
      ids_end = std::max(ids_end, row.ids_begin + int64_t{row.keep_blocks} * world.heads.kv_heads);
    }
    std::vector<int32_t> ids(static_cast<size_t>(ids_end), -7);
    const auto q_rows = static_cast<int64_t>(world.lengths.size());
    ops.Select({.q = AsMatrix(world.q, q_rows, int64_t{world.heads.heads()} * world.heads.head_dim),
                .num_heads = world.heads.heads(),
                .rows = rows.data(),
                .num_rows = static_cast<int64_t>(rows.size()),
                .tables = world.pool->tables(),
                .layout = world.pool->layout(),
                .kv = world.pool->layer(),
                .ids = ids.data(),
                .num_ids = ids_end});
    return ids;
  }

  static std::vector<int> IdsOf(const std::vector<int32_t>& ids, const kernels::SparseRow& row,
                                int kv_head) {
    const auto begin = ids.begin() + row.ids_begin + int64_t{kv_head} * row.keep_blocks;
    return std::vector<int>(begin, begin + row.keep_blocks);
  }

  // Keys as stored and queries of one row and KV head, for the reference.
  static std::vector<Vector> KeysOf(const World& world, int sequence, int kv_head) {
    std::vector<Vector> keys;
    for (int t = 0; t < world.lengths[static_cast<size_t>(sequence)]; ++t) {
      keys.push_back(world.pool->Key(sequence, t, kv_head));
    }
    return keys;
  }
  static std::vector<Vector> QueriesOf(const World& world, int sequence, int kv_head) {
    std::vector<Vector> queries;
    const auto d = static_cast<size_t>(world.heads.head_dim);
    for (int g = 0; g < world.heads.group; ++g) {
      const size_t head =
          static_cast<size_t>(sequence * world.heads.heads() + kv_head * world.heads.group + g);
      queries.emplace_back(world.q.begin() + static_cast<int64_t>(head * d),
                           world.q.begin() + static_cast<int64_t>((head + 1) * d));
    }
    return queries;
  }

  static Budget BudgetOf(const kernels::SparseRow& row) {
    return {.keep = row.keep_blocks, .local = row.local_blocks, .sink = row.sink_blocks};
  }
};

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_SELECT_FIXTURE_H_
