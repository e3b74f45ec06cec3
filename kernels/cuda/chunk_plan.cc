#include "kernels/cuda/chunk_plan.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>

#include "kernels/check.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kWhole = std::numeric_limits<int>::max();
// Of a row-independent plan. 8192 keys take about as long as 64 tiles, against which starting a
// piece and merging it are little.
constexpr int kFixedSplitKeys = 8192;
// Bounds the memory for partial results: 128 rows of 128 f32 each, so 33 MB for every 512.
constexpr int64_t kMaxPassPieces = 1024;
// What it takes to start and finish a piece of work, counted in tiles of keys.
constexpr double kPieceOverhead = 3.0;
// What the merge costs: another launch, and reading each piece's partial result.
constexpr double kMergeLaunch = 1.5;
constexpr double kMergePerPiece = 0.02;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// One tile of 128 packed rows and the keys it sees.
struct Tile {
  int32_t chunk = 0;
  int32_t packed_begin = 0;
  int32_t packed_end = 0;
  int32_t keys = 0;
};

std::vector<Tile> CutRows(const DenseChunk* chunks, int64_t num_chunks, int group) {
  std::vector<Tile> tiles;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int packed_rows = chunks[c].rows * group;
    for (int begin = 0; begin < packed_rows; begin += kChunkTileRows) {
      const int end = std::min(begin + kChunkTileRows, packed_rows);
      tiles.push_back(
          Tile{static_cast<int32_t>(c), begin, end, chunks[c].position + (end - 1) / group + 1});
    }
  }
  return tiles;
}

// How long the device takes, in tiles of keys, when each free multiprocessor takes the longest
// piece that is left.
double Makespan(const std::vector<Tile>& tiles, int split_keys, const ChunkShape& shape) {
  std::vector<int> lengths;
  bool split = false;
  for (const Tile& tile : tiles) {
    int left = tile.keys;
    split |= left > split_keys;
    for (; left > split_keys; left -= split_keys) lengths.push_back(split_keys / kChunkTileKeys);
    lengths.push_back(CeilDiv(left, kChunkTileKeys));
  }
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  std::vector<double> idle(shape.sms, 0.0);
  std::priority_queue<double, std::vector<double>, std::greater<>> free_at(std::greater<>(),
                                                                           std::move(idle));
  double end = 0;
  for (const int length : lengths) {
    for (int head = 0; head < shape.kv_heads; ++head) {
      const double done = free_at.top() + length + kPieceOverhead;
      free_at.pop();
      free_at.push(done);
      end = std::max(end, done);
    }
  }
  const double pieces = static_cast<double>(lengths.size()) * shape.kv_heads;
  return split ? end + kMergeLaunch + kMergePerPiece * pieces : end;
}

int ChooseSplit(const std::vector<Tile>& tiles, const ChunkShape& shape) {
  if (shape.fixed_splits) return kFixedSplitKeys;
  int64_t total = 0;
  int longest = 0;
  for (const Tile& tile : tiles) {
    const int length = CeilDiv(tile.keys, kChunkTileKeys);
    total += (length + static_cast<int64_t>(kPieceOverhead)) * shape.kv_heads;
    longest = std::max(longest, length);
  }
  const double even = static_cast<double>(total) / shape.sms;
  double best = Makespan(tiles, kWhole, shape);
  int best_split = kWhole;
  if (best <= 1.03 * even) return best_split;
  // Lengths that divide the longest tile's keys evenly, in so many pieces that one more would not
  // even the work further.
  for (int pieces = 2; pieces <= 256 && pieces * 4 <= longest; ++pieces) {
    if (static_cast<int64_t>(tiles.size()) * shape.kv_heads * pieces > 4 * kMaxPassPieces) break;
    const int split = CeilDiv(longest, pieces) * kChunkTileKeys;
    const double time = Makespan(tiles, split, shape);
    if (time < best * 0.995) {
      best = time;
      best_split = split;
    }
  }
  return best_split;
}

// The longest first; of equal length, tiles that read the same keys side by side.
bool RunsBefore(const ChunkWork& a, const ChunkWork& b) {
  const auto order = [](const ChunkWork& work) {
    return std::make_tuple(work.key_begin - work.key_end, work.row_begin, work.key_begin,
                           work.packed_begin);
  };
  return order(a) < order(b);
}

}  // namespace

ChunkPlan PlanChunks(const DenseChunk* chunks, int64_t num_chunks, const ChunkShape& shape) {
  const std::vector<Tile> tiles = CutRows(chunks, num_chunks, shape.group);
  const int split_keys = ChooseSplit(tiles, shape);
  ChunkPlan plan;
  ChunkPass pass;
  int32_t partials = 0;
  const auto finish_pass = [&] {
    std::sort(plan.work.begin() + pass.work_begin, plan.work.end(), RunsBefore);
    pass.works = static_cast<int32_t>(plan.work.size()) - pass.work_begin;
    pass.merges = static_cast<int32_t>(plan.merge.size()) - pass.merge_begin;
    plan.partials = std::max(plan.partials, partials);
    if (pass.works > 0) plan.passes.push_back(pass);
    pass.work_begin = static_cast<int32_t>(plan.work.size());
    pass.merge_begin = static_cast<int32_t>(plan.merge.size());
    partials = 0;
  };
  for (const Tile& tile : tiles) {
    const int pieces = tile.keys <= split_keys ? 1 : CeilDiv(tile.keys, split_keys);
    if (pieces > 1) {
      const int64_t after = (static_cast<int64_t>(partials) + pieces) * shape.kv_heads;
      if (partials > 0 && after > kMaxPassPieces) finish_pass();
    }
    const DenseChunk& chunk = chunks[tile.chunk];
    ChunkWork work{chunk.row_begin, chunk.position,
                   chunk.table,     tile.packed_begin,
                   tile.packed_end, 0,
                   tile.keys,       -1};
    if (pieces == 1) {
      plan.work.push_back(work);
      continue;
    }
    plan.merge.push_back(
        ChunkMerge{chunk.row_begin, tile.packed_begin, tile.packed_end, partials, pieces});
    for (int i = 0; i < pieces; ++i) {
      work.key_begin = i * split_keys;
      work.key_end = std::min(tile.keys, (i + 1) * split_keys);
      work.partial = partials++;
      plan.work.push_back(work);
    }
  }
  finish_pass();
  return plan;
}

ChunkPlanner::~ChunkPlanner() {
  for (Stage& stage : stages_) {
    cudaFreeHost(stage.pinned);
    if (stage.copied != nullptr) cudaEventDestroy(stage.copied);
  }
}

const ChunkPlan& ChunkPlanner::Plan(const DenseChunk* chunks, int64_t num_chunks,
                                    const ChunkShape& shape, cudaStream_t stream) {
  const bool same = shape == shape_ && static_cast<int64_t>(chunks_.size()) == num_chunks &&
                    std::memcmp(chunks_.data(), chunks, num_chunks * sizeof(DenseChunk)) == 0;
  if (same) return plan_;
  plan_ = PlanChunks(chunks, num_chunks, shape);
  chunks_.assign(chunks, chunks + num_chunks);
  shape_ = shape;
  Upload(stream);
  return plan_;
}

void ChunkPlanner::Upload(cudaStream_t stream) {
  const size_t work_bytes = plan_.work.size() * sizeof(ChunkWork);
  const size_t merge_bytes = plan_.merge.size() * sizeof(ChunkMerge);
  const size_t bytes = work_bytes + merge_bytes;
  Stage& stage = stages_[next_stage_];
  next_stage_ = (next_stage_ + 1) % 4;
  if (stage.copied == nullptr) {
    RESA_CUDA_CHECK(cudaEventCreateWithFlags(&stage.copied, cudaEventDisableTiming));
  } else {
    // Four steps old: long done.
    RESA_CUDA_CHECK(cudaEventSynchronize(stage.copied));
  }
  if (stage.bytes < bytes) {
    RESA_CUDA_CHECK(cudaFreeHost(stage.pinned));
    stage.bytes = bytes + bytes / 2 + 4096;
    RESA_CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&stage.pinned), stage.bytes));
  }
  std::memcpy(stage.pinned, plan_.work.data(), work_bytes);
  std::memcpy(stage.pinned + work_bytes, plan_.merge.data(), merge_bytes);
  std::byte* device = device_.Reserve(bytes);
  RESA_CUDA_CHECK(cudaMemcpyAsync(device, stage.pinned, bytes, cudaMemcpyHostToDevice, stream));
  RESA_CUDA_CHECK(cudaEventRecord(stage.copied, stream));
  work_ = reinterpret_cast<const ChunkWork*>(device);
  merge_ = reinterpret_cast<const ChunkMerge*>(device + work_bytes);
  next_work_ = counters_.Reserve(2, stream);
}

}  // namespace resa::kernels::cuda
