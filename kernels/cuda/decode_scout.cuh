#ifndef RESA_KERNELS_CUDA_DECODE_SCOUT_CUH_
#define RESA_KERNELS_CUDA_DECODE_SCOUT_CUH_

// The scout of a decode attention CTA: one warp that takes items from the queue, finds their rows,
// walks ids and page tables, and tells the consumers where their next units lie, well before they
// are through with the current ones.

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "kernels/cuda/decode_shared.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {

// An item as the scout sees it, the same in all lanes.
struct DecodeWork {
  Item item;
  int position = 0;  // Of the row.
  const int32_t* table = nullptr;
  const int32_t* ids = nullptr;  // Of this split; null: all blocks.
  int first_run = 0;             // Of this split, in the row's list.
  int runs = 0;
  bool valid = false;
};

// Finds the rows of items. The rows of a small batch stay in registers, one a lane.
template <int kRuns>
class DecodeRows {
 public:
  __device__ explicit DecodeRows(const DecodeArgs& args) : args_(args), lane_(threadIdx.x % 32) {
    total_ = __ldg(args.item_begin + args.num_rows);
    cached_ = args.num_rows <= 32;
    if (cached_ && lane_ < args.num_rows) {
      begin_ = __ldg(args.item_begin + lane_);
      row_ = args.rows[lane_];
    }
  }
  __device__ int total() const { return total_; }

  __device__ DecodeWork Find(int index) const {
    int low = 0;
    int count = args_.num_rows;
    while (count > 32) {
      const int step = (count + 31) / 32;
      const int at = lane_ * step;
      const int begin = at < count ? __ldg(args_.item_begin + low + at) : INT_MAX;
      const int taken = (__popc(__ballot_sync(kDecodeLanes, begin <= index)) - 1) * step;
      low += taken;
      count = min(step, count - taken);
    }
    int begin = begin_;
    if (!cached_) begin = lane_ < count ? __ldg(args_.item_begin + low + lane_) : INT_MAX;
    const int lane = __popc(__ballot_sync(kDecodeLanes, begin <= index)) - 1;
    const int r = low + lane;
    int end = __shfl_sync(kDecodeLanes, begin, (lane + 1) % 32);
    if (r + 1 == args_.num_rows) {
      end = total_;
    } else if (lane + 1 == count || lane == 31) {
      end = __ldg(args_.item_begin + r + 1);
    }
    begin = __shfl_sync(kDecodeLanes, begin, lane);
    return Split(Row(r), begin, end, index);
  }

 private:
  __device__ SparseRow Row(int r) const {
    if (!cached_) return args_.rows[r];
    SparseRow row;
    row.row = __shfl_sync(kDecodeLanes, row_.row, r);
    row.position = __shfl_sync(kDecodeLanes, row_.position, r);
    row.table = __shfl_sync(kDecodeLanes, row_.table, r);
    row.keep_blocks = __shfl_sync(kDecodeLanes, row_.keep_blocks, r);
    row.ids_begin = __shfl_sync(kDecodeLanes, row_.ids_begin, r);
    return row;
  }

  __device__ DecodeWork Split(const SparseRow& row, int begin, int end, int index) const {
    constexpr int kTokens = kPageTokens / kRuns;
    DecodeWork work;
    work.valid = true;
    const int local = index - begin;
    work.item.row = row.row;
    work.item.begin = begin;
    work.item.splits = (end - begin) / args_.kv_heads;
    work.item.split = local / args_.kv_heads;
    work.item.kv_head = local - work.item.split * args_.kv_heads;
    work.position = row.position;
    work.table = args_.pages + row.table * args_.page_stride;
    const int row_runs =
        args_.ids != nullptr ? row.keep_blocks : (row.position + kTokens) / kTokens;
    const int split_runs = DecodeSplitTokens(int64_t{row_runs} * kTokens) / kTokens;
    work.first_run = work.item.split * split_runs;
    work.runs = max(0, min(split_runs, row_runs - work.first_run));
    work.item.units = (work.runs + kRuns - 1) / kRuns;
    if (args_.ids != nullptr) {
      work.ids =
          args_.ids + row.ids_begin + int64_t{work.item.kv_head} * row.keep_blocks + work.first_run;
    }
    return work;
  }

  const DecodeArgs& args_;
  int lane_;
  int total_ = 0;
  bool cached_ = false;
  int begin_ = INT_MAX;
  SparseRow row_;
};

// 32 runs of an item or what is left of it, one a lane, on their way from ids to pages.
template <int kRuns>
struct DecodeBatch {
  static constexpr int kTokens = kPageTokens / kRuns;

  DecodeWork work;
  int first = 0;  // Lane 0's run, of the work's.
  int id = 0;
  int page = 0;

  __device__ bool Has(int lane) const { return first + lane < work.runs; }
  __device__ bool IsLast() const { return first + 32 >= work.runs; }
  __device__ int Units() const { return (min(32, work.runs - first) + kRuns - 1) / kRuns; }
  __device__ void LoadId(int lane) {
    id = work.first_run + first + lane;
    if (work.ids != nullptr && Has(lane)) id = __ldcg(work.ids + first + lane);
  }
  __device__ void LoadPage(int lane) {
    page = Has(lane) ? __ldg(work.table + id * kTokens / kPageTokens) : 0;
  }
  __device__ void LoadPages(int lane) {
    LoadId(lane);
    LoadPage(lane);
  }
};

template <int kHeadDim, int kHeadTiles, int kRuns>
class DecodeScout {
 public:
  using S = DecodeShared<kHeadDim, kHeadTiles, kRuns>;
  using Batch = DecodeBatch<kRuns>;
  static constexpr int kTokens = kPageTokens / kRuns;

  __device__ DecodeScout(S& shared, const DecodeArgs& args, const DecodeRows<kRuns>& rows)
      : s_(shared), args_(args), rows_(rows), lane_(threadIdx.x % 32) {
    first_items_ = min(2 * static_cast<int>(gridDim.x), rows.total());
  }

  __device__ void Run() {
    const bool dense = args_.ids == nullptr;
    // What comes before the wait needs nothing of the kernel before this one: rows and tables were
    // copied before the step began. The ids and the queue are that kernel's until it has ended.
    Batch now = Of(static_cast<int>(blockIdx.x));
    if (dense) now.LoadPages(lane_);
    Batch next = After(now);
    if (dense) next.LoadPages(lane_);
    if (dense || !now.work.valid) PublishAll(now, next.work.valid);
    WaitForPrevious();
    TakeNext();
    if (!dense) {
      now.LoadId(lane_);
      next.LoadId(lane_);
      now.LoadPage(lane_);
    }
    for (bool published = dense; now.work.valid; published = false) {
      if (now.first == 0) Announce(now.work.item);
      if (!published) PublishAll(now, next.work.valid);
      // A batch's ids, its pages and its octets take a turn each. Publishing waits for the
      // consumers, which then have work for longer than loads take.
      if (!dense) next.LoadPage(lane_);
      Batch later = After(next);
      if (dense) {
        later.LoadPages(lane_);
      } else {
        later.LoadId(lane_);
      }
      now = next;
      next = later;
    }
    Item end;
    end.units = -1;
    Announce(end);
  }

 private:
  // Each CTA's first two items follow from its index, so that short work waits for no queue. Then
  // each asks the queue until it is told that there is no further item. The requests are as many as
  // the items past the first two and the CTAs, and the queue wraps to zero.
  __device__ void TakeNext() {
    if (first_items_ == rows_.total()) return;
    if (lane_ == 0) taken_ = atomicInc(args_.queue, rows_.total() - first_items_ + gridDim.x - 1);
  }

  __device__ Batch Of(int index) const {
    Batch batch;
    if (index < rows_.total()) batch.work = rows_.Find(index);
    return batch;
  }

  // The batch after this one.
  __device__ Batch After(const Batch& batch) {
    Batch next;
    if (!batch.work.valid) return next;
    if (!batch.IsLast()) {
      next.work = batch.work;
      next.first = batch.first + 32;
      return next;
    }
    if (!second_) {
      second_ = true;
      return Of(static_cast<int>(blockIdx.x + gridDim.x));
    }
    const int index = first_items_ + static_cast<int>(__shfl_sync(kDecodeLanes, taken_, 0));
    if (index >= rows_.total()) return next;
    TakeNext();
    return Of(index);
  }

  // The item's queries go along; its barrier completes when they are there.
  __device__ void Announce(const Item& item) {
    const int slot = items_ % S::kItemSlots;
    BarrierWait(&s_.item_empty[slot], (items_ / S::kItemSlots + 1) & 1);
    if (lane_ == 0) {
      s_.items[slot] = item;
      if (item.units < 0) {
        BarrierArrive(&s_.item_full[slot]);
      } else {
        const uint32_t bytes = args_.group * kHeadDim * 2;
        BarrierArriveExpect(&s_.item_full[slot], bytes);
        CopyBulk(
            s_.q[slot],
            args_.q + (int64_t{item.row} * args_.num_heads + item.kv_head * args_.group) * kHeadDim,
            bytes, &s_.item_full[slot]);
      }
    }
    ++items_;
  }

  // The octets of a batch, and the end, should no other batch follow.
  __device__ void PublishAll(const Batch& batch, bool more) {
#pragma unroll 1
    for (int unit = 0; batch.work.valid && unit < batch.Units(); unit += kConsumers) {
      Publish(batch, unit);
    }
    if (more) return;
    BarrierWait(&s_.octet_empty[octet_ % kOctets], (octet_ / kOctets + 1) & 1);
    if (lane_ == 0) s_.octets[octet_ % kOctets].end = true;
    BarrierArrive(&s_.octet_full[octet_ % kOctets]);
  }

  // The octet that begins with `unit` of the batch.
  __device__ void Publish(const Batch& batch, int unit) {
    const int slot = lane_ % kRuns;
    const int position = batch.id * kTokens;
    // How many of the run's tokens are attended to, and with its neighbours: which of the unit's.
    const int tokens = batch.Has(lane_) ? min(kTokens, batch.work.position + 1 - position) : 0;
    uint32_t mask = ((1u << max(tokens, 0)) - 1) << (slot * kTokens);
    int run = (batch.page * args_.kv_heads + batch.work.item.kv_head) * kPageTokens +
              position % kPageTokens;
#pragma unroll
    for (int step = 1; step < kRuns; step *= 2) {
      mask |= __shfl_xor_sync(kDecodeLanes, mask, step);
    }
    // A unit's missing runs are read from where its first is, and masked.
    const int first_run = __shfl_sync(kDecodeLanes, run, lane_ - slot);
    if (!batch.Has(lane_)) run = first_run;

    Octet<kRuns>& octet = s_.octets[octet_ % kOctets];
    BarrierWait(&s_.octet_empty[octet_ % kOctets], (octet_ / kOctets + 1) & 1);
    const int warp = lane_ / kRuns - unit;
    if (warp >= 0 && warp < kConsumers) {
      octet.run[warp][slot] = run;
      if (slot == 0) octet.tokens[warp] = mask;
    }
    if (lane_ == 0) {
      octet.end = false;
      octet.first = batch.first == 0 && unit == 0;
      octet.last = batch.IsLast() && unit + kConsumers >= batch.Units();
    }
    BarrierArrive(&s_.octet_full[octet_ % kOctets]);
    ++octet_;
  }

  S& s_;
  const DecodeArgs& args_;
  const DecodeRows<kRuns>& rows_;
  const int lane_;
  int first_items_;
  uint32_t taken_ = 0;   // Lane 0's.
  bool second_ = false;  // The second item has been taken.
  int items_ = 0;
  int octet_ = 0;
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_DECODE_SCOUT_CUH_
