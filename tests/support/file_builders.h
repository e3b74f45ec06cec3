#ifndef RESA_TESTS_SUPPORT_FILE_BUILDERS_H_
#define RESA_TESTS_SUPPORT_FILE_BUILDERS_H_

// Bytes of model files, put together by hand so that tests can break them in every way.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/bf16.h"

namespace resa::testing {

// The little-endian bytes of a value.
template <typename T>
std::string BytesOfValue(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}
template <typename T>
std::string BytesOfValues(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}
inline std::span<const std::byte> AsBytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// A safetensors file of any header and data, well-formed or not.
std::string SafetensorsBytes(const std::string& header, const std::string& data);

// Tensors in the order added, packed without holes; the header is padded to 8 bytes, as writers do.
class SafetensorsBuilder {
 public:
  void Add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           const std::string& data);
  std::string Build() const;

 private:
  std::string entries_;
  std::string data_;
};

// A GGUF file. Offsets, counts and types can be overridden to be wrong.
class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;    // Of the data; written as metadata only by the caller.
  int64_t extra_tensors = 0;  // Added to the count in the header.
  int64_t extra_metadata = 0;

  // `type` and the value's bytes, as the format has them.
  void AddRaw(const std::string& key, uint32_t type, const std::string& value);
  void AddUint32(const std::string& key, uint32_t value) { AddRaw(key, 4, BytesOfValue(value)); }
  void AddFloat(const std::string& key, float value) { AddRaw(key, 6, BytesOfValue(value)); }
  void AddString(const std::string& key, const std::string& value) {
    AddRaw(key, 8, StringBytes(value));
  }
  void AddStrings(const std::string& key, const std::vector<std::string>& values);
  // Dimensions as the file has them, the contiguous one first. Places the data after what is there.
  void AddTensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                 const std::string& data);
  // The same, at an offset of the caller's choice and without data.
  void AddTensorAt(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                   uint64_t offset);
  std::string Build() const;

  static std::string StringBytes(const std::string& text) {
    return BytesOfValue<uint64_t>(text.size()) + text;
  }

 private:
  uint64_t num_tensors_ = 0;
  uint64_t num_metadata_ = 0;
  std::string metadata_;
  std::string tensors_;
  std::string data_;
};

// A folder that is removed, with all it holds, at the end of the test.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string Path(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }
  // Returns the path.
  std::string Write(const std::string& name, const std::string& content) const;

 private:
  std::filesystem::path path_;
};

// A file of the repository; `path` relative to its root (RESA_SOURCE_DIR, set by ctest, or the
// working directory).
std::string SourcePath(const std::string& path);
// Its content; the test fails when it cannot be read.
std::string ReadFile(const std::string& path);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_FILE_BUILDERS_H_
