// The sketch selector: an estimated logit for every token from its few-bit code, a block's score
// the attention mass that the estimates give it (params.h), and the exact top-k of select_topk.cuh.
//
//   q [T, Hq * d] bf16; descriptors [page][Hk]{u32 words[planes][d / 32][16], bf16 scale[16]},
//   pages through the page table; ids [row][KV head][keep] out.
//
// A team of CTAs (select_team.cuh) has one (row, KV head), each CTA a contiguous range of chunks of
// 128 tokens, each of its warps a chunk at a time, copied to a ring in shared memory ahead of time.
// The masses of a block, one per head, stay in shared memory until the team knows every head's
// total; then they become one score per block. When a CTA's part does not fit they wait in global
// scratch. Teams are as large as their row is long, so that all CTAs have about the same to do;
// with more rows and KV heads than multiprocessors, a CTA does one after the other alone.
//
// Progressive reading is a loop of such passes: the ids that one pass keeps are a list in global
// scratch, which the next one cuts anew among the CTAs and reads with one plane more.
//
// A row's choice does not depend on the batch, although the number of CTAs does: masses are
// relative to a base that the row's own tokens at fixed places give, chunks are cut at fixed
// places, and totals over chunks are sums of integers.
//
// Bound: the bytes of the planes read at the device's read bandwidth, plus 4 us. Measured: 69 % of
// it at 8 x 256K with two planes (28 heads on 4), 49 % at 4 x 128K; LOG.md says where the time
// goes.
//
// select_sketch_launch.cuh has the kernel, _unit what a CTA does, _scan the way of the words from
// memory to masses, _score the arithmetic.

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/select_sketch_launch.cuh"

namespace resa::kernels::cuda {

// In files of their own, which take minutes to compile.
extern template void LaunchSketch<64>(Context&, const SketchArgs&, const SelectorSpec&);
extern template void LaunchSketch<128>(Context&, const SketchArgs&, const SelectorSpec&);

void SelectSketch(Context& context, const SelectParams& params) {
  if (params.num_rows == 0) return;
  const KvLayout& layout = params.layout;
  const SelectorSpec& spec = layout.selector;
  SketchArgs args = {};
  args.q = reinterpret_cast<const uint16_t*>(params.q.b16());
  args.rows = params.rows;
  args.num_rows = static_cast<int>(params.num_rows);
  args.tables = params.tables;
  args.descriptors = params.kv.descriptors;
  args.ids = params.ids;
  args.num_kv_heads = layout.num_kv_heads;
  args.group = params.num_heads / layout.num_kv_heads;
  args.block_tokens = spec.block_tokens;
  args.run_bytes = static_cast<int>(layout.DescriptorRunBytes());
  args.scales_at = args.run_bytes - kPageTokens * 2;
  for (int p = 1; p <= spec.planes; ++p) args.ratio[p] = SketchScaleRatio(spec.planes, p);
  std::copy(spec.refine_share.begin(), spec.refine_share.end(), args.refine_share);
  RESA_CHECK(args.group >= 1 && args.group <= kMaxGroup) << "SelectSketch: group " << args.group;
  switch (layout.head_dim) {
    case 64:
      return LaunchSketch<64>(context, args, spec);
    case 128:
      return LaunchSketch<128>(context, args, spec);
    default:
      RESA_CHECK(false) << "SelectSketch: head size " << layout.head_dim;
  }
}

}  // namespace resa::kernels::cuda
