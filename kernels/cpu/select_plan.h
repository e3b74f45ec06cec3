#ifndef RESA_KERNELS_CPU_SELECT_PLAN_H_
#define RESA_KERNELS_CPU_SELECT_PLAN_H_

// What both selectors share: the work list of one Select call, a unit per (sparse row, KV head).

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

namespace resa::kernels::cpu {

struct SelectUnit {
  const SparseRow* row;
  size_t kv_head;
  size_t kv_len;
  size_t blocks;         // N
  const int32_t* table;  // Pages of the sequence
  int32_t* ids;          // [keep_blocks] out
  size_t first_task;     // Of a loop that cuts units in ranges
  size_t memory;         // Where the unit's floats begin in the selector's scratch
};

inline SelectUnit MakeSelectUnit(const SelectParams& p, const SparseRow& row, size_t kv_head) {
  const auto block = static_cast<size_t>(p.layout.selector.block_tokens);
  SelectUnit unit = {};
  unit.row = &row;
  unit.kv_head = kv_head;
  unit.kv_len = static_cast<size_t>(row.position) + 1;
  unit.blocks = (unit.kv_len + block - 1) / block;
  unit.table = p.tables.pages + row.table * p.tables.stride;
  unit.ids = p.ids + row.ids_begin + static_cast<int64_t>(kv_head) * row.keep_blocks;
  return unit;
}

// True when scores decide nothing: everything is kept, or sink and local blocks fill the budget.
// The ids are then written and nothing needs to be read.
inline bool KeepWithoutScores(const SelectUnit& unit) {
  const auto keep = static_cast<size_t>(unit.row->keep_blocks);
  const size_t sink = std::min(unit.blocks, static_cast<size_t>(unit.row->sink_blocks));
  const size_t local = std::min(unit.blocks - sink, static_cast<size_t>(unit.row->local_blocks));
  if (keep < unit.blocks && sink + local < keep) return false;
  size_t count = 0;
  for (size_t id = 0; id < unit.blocks && count < keep; ++id) {
    if (keep == unit.blocks || id < sink || id >= unit.blocks - local) {
      unit.ids[count++] = static_cast<int32_t>(id);
    }
  }
  return true;
}

// The descriptors of (page, KV head).
inline const std::byte* DescriptorOf(const SelectParams& p, const SelectUnit& unit,
                                     size_t page_index) {
  const auto page = static_cast<size_t>(unit.table[page_index]);
  const auto heads = static_cast<size_t>(p.layout.num_kv_heads);
  return p.kv.descriptors + (page * heads + unit.kv_head) * p.layout.DescriptorRunBytes();
}

// The queries [group, d] of a unit.
inline const float* QueriesOf(const SelectParams& p, const SelectUnit& unit) {
  const auto d = static_cast<size_t>(p.layout.head_dim);
  const auto heads = static_cast<size_t>(p.num_heads);
  const size_t group = heads / static_cast<size_t>(p.layout.num_kv_heads);
  return p.q.f32() + (static_cast<size_t>(unit.row->row) * heads + unit.kv_head * group) * d;
}

// The unit whose range a task is; units are in order of first_task.
inline const SelectUnit& UnitOfTask(const SelectUnit* units, size_t num_units, size_t task) {
  return *(std::upper_bound(units, units + num_units, task,
                            [](size_t t, const SelectUnit& unit) { return t < unit.first_task; }) -
           1);
}

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_SELECT_PLAN_H_
