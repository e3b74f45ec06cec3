#include "tests/golden/golden_files.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "tests/support/file_builders.h"

namespace resa::testing {
namespace {

constexpr char kFolder[] = "tests/golden/models";

std::vector<float> ReadFloats(const std::string& path) {
  const std::string bytes = ReadFile(path);
  RESA_CHECK(bytes.size() % sizeof(float) == 0) << path;
  std::vector<float> floats(bytes.size() / sizeof(float));
  std::memcpy(floats.data(), bytes.data(), bytes.size());
  return floats;
}

}  // namespace

std::vector<std::string> GoldenNames() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(SourcePath(kFolder))) {
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  }
  RESA_CHECK(!names.empty()) << "no golden models in " << SourcePath(kFolder);
  std::sort(names.begin(), names.end());
  return names;
}

Golden ReadGolden(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(SourcePath(kFolder)) / name;
  const nlohmann::json json = nlohmann::json::parse(ReadFile(folder / "golden.json"));
  Golden golden;
  golden.name = name;
  golden.prompt = json.at("prompt").get<std::vector<int32_t>>();
  golden.logit_rows = json.at("logit_rows").get<std::vector<int32_t>>();
  golden.logits = ReadFloats(folder / "logits.f32");
  golden.greedy = json.at("greedy").get<std::vector<int32_t>>();
  golden.min_margin = json.at("min_margin").get<float>();
  golden.model_path = folder;
  if (json.contains("dequantised")) {
    golden.model_path = folder / "model.gguf";
    const std::vector<float> all = ReadFloats(folder / "dequantised.f32");
    size_t begin = 0;
    for (const auto& tensor : json.at("dequantised")) {
      const size_t count = tensor.at("count").get<size_t>();
      RESA_CHECK_LE(begin + count, all.size());
      golden.dequantised.emplace_back(
          tensor.at("name").get<std::string>(),
          std::vector<float>(all.begin() + begin, all.begin() + begin + count));
      begin += count;
    }
  }
  return golden;
}

}  // namespace resa::testing
