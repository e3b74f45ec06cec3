// Runs a fuzz target without libFuzzer: over every file of a corpus folder, over the empty input,
// and over mutations of the files drawn from a fixed seed. A crash, a failed check or a sanitizer
// report fails the test; the line printed last names the input that was running.
//
//   NAME_replay CORPUS_FOLDER_OR_FILE [MUTATIONS [SEED]]

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

void RunOne(const Bytes& input) {
  // An exact-size heap copy lets AddressSanitizer see a read one byte past the end.
  const Bytes copy(input.begin(), input.end());
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

// Applies one to four random edits: flips, overwrites, deletions, duplications, splices.
Bytes Mutate(Bytes input, const std::vector<Bytes>& corpus, std::mt19937_64& rng) {
  const auto below = [&rng](size_t bound) { return bound == 0 ? 0 : rng() % bound; };
  static constexpr uint8_t kInteresting[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '"', '{', '[',
                                             '}',  ']',  '-',  '9',  '\\', ':', ',', ' '};
  const size_t edits = 1 + below(4);
  for (size_t edit = 0; edit < edits; ++edit) {
    const size_t at = below(input.size());
    const size_t length = std::min(input.size() - at, size_t{1} << below(8));
    switch (below(7)) {
      case 0:
        if (!input.empty()) input[at] ^= uint8_t(1u << below(8));
        break;
      case 1:
        if (!input.empty()) input[at] = kInteresting[below(std::size(kInteresting))];
        break;
      case 2:
        input.erase(input.begin() + at, input.begin() + at + length);
        break;
      case 3: {
        const Bytes piece(input.begin() + at, input.begin() + at + length);
        input.insert(input.begin() + below(input.size() + 1), piece.begin(), piece.end());
        break;
      }
      case 4: {
        const Bytes& other = corpus[below(corpus.size())];
        const size_t from = below(other.size());
        const size_t count = std::min(other.size() - from, size_t{1} << below(10));
        input.insert(input.begin() + at, other.begin() + from, other.begin() + from + count);
        break;
      }
      case 5:
        input.resize(at);
        break;
      default:
        for (size_t i = 0; i < length && i < 8; ++i) input[at + i] = uint8_t(rng());
        break;
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER_OR_FILE [MUTATIONS [SEED]]\n", argv[0]);
    return 2;
  }
  const size_t mutations = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;

  std::vector<std::filesystem::path> paths;
  if (std::filesystem::is_directory(argv[1])) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
  } else {
    paths.emplace_back(argv[1]);
  }
  std::vector<Bytes> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", path.c_str());
      return 2;
    }
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    std::printf("file %s (%zu bytes)\n", path.c_str(), corpus.back().size());
    std::fflush(stdout);
    RunOne(corpus.back());
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "%s holds no file\n", argv[1]);
    return 2;
  }
  RunOne({});

  // Each mutation has its own generator, so "SEED + index" alone reproduces it.
  for (size_t i = 0; i < mutations; ++i) {
    std::mt19937_64 rng(seed + i);
    const Bytes input = Mutate(corpus[rng() % corpus.size()], corpus, rng);
    if (i % 500 == 0) {
      std::printf("mutations from seed %llu\n", static_cast<unsigned long long>(seed + i));
      std::fflush(stdout);
    }
    RunOne(input);
  }
  std::printf("%zu files and %zu mutations replayed\n", corpus.size(), mutations);
  return 0;
}
