#include "kernels/cuda/chunk_plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>

#include "kernels/check.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kWhole = std::numeric_limits<int>::max();
// Of a row-independent plan, rounded up to whole tiles: so many keys take long against starting a
// piece and merging it.
constexpr int kFixedSplitKeys = 8192;
// Bounds the memory for partial results: 128 rows of 128 f32 each, so 33 MB for every 512.
constexpr int64_t kMaxPassPieces = 1024;
// How far the search for even work goes.
constexpr int64_t kMaxFullRounds = 8;
constexpr int64_t kMaxCutRounds = 6;
constexpr int kShorterSteps = 8;
constexpr int kShorterShare = 16;  // Down to one sixteenth less.
// By how much over perfectly even work a cut is worth looking for, and a better one counts.
constexpr double kCutWorth = 1.03;
constexpr double kShorterWorth = 1.01;
constexpr double kBetter = 0.995;
// What it takes to start and finish a piece of work, counted in tiles of keys.
constexpr double kPieceOverhead = 3.0;
// What merging costs: waiting for all parts, and reading each piece's partial result.
constexpr double kMergeWait = 1.5;
constexpr double kMergePerPiece = 0.02;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// One tile of 128 packed rows and the keys it sees.
struct Tile {
  int32_t chunk = 0;
  int32_t packed_begin = 0;
  int32_t packed_end = 0;
  int32_t keys = 0;
  int32_t length = 0;  // Tiles of keys.
};

std::vector<Tile> CutRows(const DenseChunk* chunks, int64_t num_chunks, const ChunkShape& shape) {
  std::vector<Tile> tiles;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int packed_rows = chunks[c].rows * shape.group;
    for (int begin = 0; begin < packed_rows; begin += kChunkTileRows) {
      const int end = std::min(begin + kChunkTileRows, packed_rows);
      const int keys = chunks[c].position + (end - 1) / shape.group + 1;
      tiles.push_back(
          Tile{static_cast<int32_t>(c), begin, end, keys, CeilDiv(keys, shape.tile_keys)});
    }
  }
  // The longest first; of equal length in order.
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.keys > b.keys; });
  return tiles;
}

// Into how many pieces a tile is cut: the first `whole` ones are not.
struct Cut {
  int whole = 0;
  int split_keys = kWhole;

  int Pieces(const Tile& tile, int index) const {
    return index < whole || tile.keys <= split_keys ? 1 : CeilDiv(tile.keys, split_keys);
  }
};

// How long the device takes, in tiles of keys, when each free multiprocessor takes the longest
// piece that is left. What takes at least `limit` need not be known exactly.
double Makespan(const std::vector<Tile>& tiles, const Cut& cut, const ChunkShape& shape,
                double limit) {
  std::vector<int> lengths;
  const int split = cut.split_keys / shape.tile_keys;
  double even = 0;
  for (int i = 0; i < static_cast<int>(tiles.size()); ++i) {
    even += tiles[i].length;
    int left = tiles[i].length;
    for (int pieces = cut.Pieces(tiles[i], i); pieces > 1; --pieces, left -= split) {
      lengths.push_back(split);
    }
    lengths.push_back(left);
  }
  const auto pieces = static_cast<double>(lengths.size());
  const double merge = lengths.size() == tiles.size()
                           ? 0
                           : kMergeWait + kMergePerPiece * (pieces - cut.whole) * shape.kv_heads;
  even = (even + pieces * kPieceOverhead) * shape.kv_heads / shape.sms;
  if (even + merge >= limit) return limit;
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  std::priority_queue<double, std::vector<double>, std::greater<>> free_at(
      std::greater<>(), std::vector<double>(shape.sms, 0.0));
  double end = 0;
  for (const int length : lengths) {
    for (int head = 0; head < shape.kv_heads; ++head) {
      const double done = free_at.top() + length + kPieceOverhead;
      if (done + merge >= limit) return limit;
      free_at.pop();
      free_at.push(done);
      end = std::max(end, done);
    }
  }
  return end + merge;
}

// The shortest splits with which the tiles that are cut make at most `limit` pieces.
Cut CutInto(const std::vector<Tile>& tiles, int whole, int64_t limit, int tile_keys) {
  int low = 1;
  int high = tiles[whole].length;
  while (low < high) {
    const int middle = (low + high) / 2;
    int64_t pieces = 0;
    for (size_t i = whole; i < tiles.size(); ++i) pieces += CeilDiv(tiles[i].length, middle);
    if (pieces <= limit) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return Cut{whole, low * tile_keys};
}

// A cut, and how long the device takes with it.
struct Choice {
  Cut cut;
  double time = std::numeric_limits<double>::infinity();

  void Try(const std::vector<Tile>& tiles, const Cut& other, const ChunkShape& shape,
           double worth = 1.0) {
    const double limit = worth * time;
    const double other_time = Makespan(tiles, other, shape, limit);
    if (other_time < limit) *this = Choice{other, other_time};
  }
};

// Few tiles over many keys leave multiprocessors idle, and so does the last round of equal tiles.
// Keeps the tiles of some full rounds whole and cuts the others into as many pieces as fill one
// round more, two, ...
void TryFullRounds(const std::vector<Tile>& tiles, const ChunkShape& shape, double even,
                   Choice* best) {
  const int64_t items = static_cast<int64_t>(tiles.size()) * shape.kv_heads;
  const int64_t most = items / shape.sms;
  const int64_t least = std::max<int64_t>(most - kMaxFullRounds, 0);
  for (int64_t full = most; full >= least && best->time > kCutWorth * even; --full) {
    const auto whole = static_cast<int>(full * shape.sms / shape.kv_heads);
    for (int64_t rounds = 1; rounds <= kMaxCutRounds; ++rounds) {
      const int64_t limit = rounds * shape.sms / shape.kv_heads;
      const auto cut_tiles = static_cast<int64_t>(tiles.size()) - whole;
      if (cut_tiles == 0 || limit < cut_tiles || limit * shape.kv_heads > kMaxPassPieces) continue;
      best->Try(tiles, CutInto(tiles, whole, limit, shape.tile_keys), shape, kBetter);
    }
  }
}

// Pieces that divide tiles and rounds evenly still leave the multiprocessors idle that are beyond a
// multiple of the heads. Slightly shorter ones leave a rest of every tile to those.
void TryShorterPieces(const std::vector<Tile>& tiles, const ChunkShape& shape, double even,
                      Choice* best) {
  const int whole = best->cut.whole;
  const int longest =
      best->cut.split_keys == kWhole ? tiles[whole].length : best->cut.split_keys / shape.tile_keys;
  const int step = CeilDiv(longest, kShorterSteps * kShorterShare);
  for (int i = 1; i <= kShorterSteps && best->time > kShorterWorth * even; ++i) {
    const Cut cut{whole, (longest - i * step) * shape.tile_keys};
    if (cut.split_keys <= 0) return;
    int64_t pieces = 0;
    for (int t = whole; t < static_cast<int>(tiles.size()); ++t) pieces += cut.Pieces(tiles[t], t);
    if (pieces * shape.kv_heads > kMaxPassPieces) return;
    best->Try(tiles, cut, shape);
  }
}

Cut ChooseCut(const std::vector<Tile>& tiles, const ChunkShape& shape) {
  if (shape.fixed_splits)
    return Cut{0, CeilDiv(kFixedSplitKeys, shape.tile_keys) * shape.tile_keys};
  double even = 0;
  for (const Tile& tile : tiles) even += tile.length + kPieceOverhead;
  even *= static_cast<double>(shape.kv_heads) / shape.sms;
  Choice best;
  best.Try(tiles, Cut{}, shape);
  TryFullRounds(tiles, shape, even, &best);
  TryShorterPieces(tiles, shape, even, &best);
  return best.cut;
}

// The longest first; of equal length, tiles that read the same keys side by side.
bool RunsBefore(const ChunkWork& a, const ChunkWork& b) {
  const auto order = [](const ChunkWork& work) {
    return std::make_tuple(work.key_begin - work.key_end, work.row_begin, work.key_begin,
                           work.packed_begin);
  };
  return order(a) < order(b);
}

int32_t Capacity(size_t count) { return static_cast<int32_t>(std::bit_ceil(count)); }

}  // namespace

ChunkPlan PlanChunks(const DenseChunk* chunks, int64_t num_chunks, const ChunkShape& shape) {
  const std::vector<Tile> tiles = CutRows(chunks, num_chunks, shape);
  const Cut cut = ChooseCut(tiles, shape);
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
  for (int t = 0; t < static_cast<int>(tiles.size()); ++t) {
    const Tile& tile = tiles[t];
    const int pieces = cut.Pieces(tile, t);
    if (pieces > 1) {
      const int64_t after = (static_cast<int64_t>(partials) + pieces) * shape.kv_heads;
      if (partials > 0 && after > kMaxPassPieces) finish_pass();
    }
    const DenseChunk& chunk = chunks[tile.chunk];
    ChunkWork work;
    work.row_begin = chunk.row_begin;
    work.position = chunk.position;
    work.table = chunk.table;
    work.packed_begin = tile.packed_begin;
    work.packed_end = tile.packed_end;
    work.key_end = tile.keys;
    if (pieces == 1) {
      plan.work.push_back(work);
      continue;
    }
    work.merge = static_cast<int32_t>(plan.merge.size()) - pass.merge_begin;
    plan.merge.push_back(
        ChunkMerge{chunk.row_begin, tile.packed_begin, tile.packed_end, partials, pieces});
    for (int i = 0; i < pieces; ++i) {
      work.key_begin = i * cut.split_keys;
      work.key_end = std::min(tile.keys, (i + 1) * cut.split_keys);
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
  capacity_ = {.passes = static_cast<int32_t>(plan_.passes.size()),
               .works = Capacity(plan_.work.size()),
               .merges = Capacity(plan_.merge.size()),
               .partials = Capacity(plan_.partials)};
  const size_t merge_at = capacity_.works * sizeof(ChunkWork);
  const size_t bytes = merge_at + capacity_.merges * sizeof(ChunkMerge);
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
  std::memset(stage.pinned, 0, bytes);
  std::memcpy(stage.pinned, plan_.work.data(), plan_.work.size() * sizeof(ChunkWork));
  std::memcpy(stage.pinned + merge_at, plan_.merge.data(), plan_.merge.size() * sizeof(ChunkMerge));
  std::byte* device = device_.Reserve(bytes);
  RESA_CUDA_CHECK(cudaMemcpyAsync(device, stage.pinned, bytes, cudaMemcpyHostToDevice, stream));
  RESA_CUDA_CHECK(cudaEventRecord(stage.copied, stream));
  work_ = reinterpret_cast<const ChunkWork*>(device);
  merge_ = reinterpret_cast<const ChunkMerge*>(device + merge_at);
  zeros_ = counters_.Reserve(2 + static_cast<size_t>(capacity_.merges) * shape_.kv_heads, stream);
}

}  // namespace resa::kernels::cuda
