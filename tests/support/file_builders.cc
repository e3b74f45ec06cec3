#include "tests/support/file_builders.h"

#include <stdlib.h>

#include <fstream>
#include <iterator>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace resa::testing {

namespace fs = std::filesystem;

std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  return BytesOfValue<uint64_t>(header.size()) + header + data;
}

void SafetensorsBuilder::Add(const std::string& name, const std::string& dtype,
                             const std::vector<int64_t>& shape, const std::string& data) {
  absl::StrAppend(&entries_, entries_.empty() ? "" : ",", "\"", name, "\":{\"dtype\":\"", dtype,
                  "\",\"shape\":[", absl::StrJoin(shape, ","), "],\"data_offsets\":[", data_.size(),
                  ",", data_.size() + data.size(), "]}");
  data_ += data;
}

std::string SafetensorsBuilder::Build() const {
  std::string header = "{" + entries_ + "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return SafetensorsBytes(header, data_);
}

void GgufBuilder::AddRaw(const std::string& key, uint32_t type, const std::string& value) {
  metadata_ += StringBytes(key) + BytesOfValue(type) + value;
  ++num_metadata_;
}

void GgufBuilder::AddStrings(const std::string& key, const std::vector<std::string>& values) {
  std::string bytes = BytesOfValue<uint32_t>(8) + BytesOfValue<uint64_t>(values.size());
  for (const std::string& value : values) bytes += StringBytes(value);
  AddRaw(key, 9, bytes);
}

void GgufBuilder::AddTensor(const std::string& name, const std::vector<uint64_t>& dims,
                            uint32_t type, const std::string& data) {
  data_.resize((data_.size() + alignment - 1) / alignment * alignment, '\0');
  AddTensorAt(name, dims, type, data_.size());
  data_ += data;
}

void GgufBuilder::AddTensorAt(const std::string& name, const std::vector<uint64_t>& dims,
                              uint32_t type, uint64_t offset) {
  tensors_ += StringBytes(name) + BytesOfValue<uint32_t>(dims.size());
  for (uint64_t dim : dims) tensors_ += BytesOfValue(dim);
  tensors_ += BytesOfValue(type) + BytesOfValue(offset);
  ++num_tensors_;
}

std::string GgufBuilder::Build() const {
  std::string bytes = "GGUF" + BytesOfValue(version) +
                      BytesOfValue<uint64_t>(num_tensors_ + extra_tensors) +
                      BytesOfValue<uint64_t>(num_metadata_ + extra_metadata) + metadata_ + tensors_;
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment, '\0');
  return bytes + data_;
}

TempFolder::TempFolder() {
  std::string name = (fs::temp_directory_path() / "resa_test_XXXXXX").string();
  RESA_CHECK(mkdtemp(name.data()) != nullptr) << "cannot make a temporary folder " << name;
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::string TempFolder::Write(const std::string& name, const std::string& content) const {
  const std::string path = Path(name);
  std::ofstream file(path, std::ios::binary);
  file << content;
  RESA_CHECK(file.good()) << "cannot write " << path;
  return path;
}

std::string SourcePath(const std::string& path) {
  const char* root = getenv("RESA_SOURCE_DIR");
  return (fs::path(root != nullptr ? root : ".") / path).string();
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  RESA_CHECK(file.good()) << "cannot read " << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace resa::testing
