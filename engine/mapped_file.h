#ifndef RESA_ENGINE_MAPPED_FILE_H_
#define RESA_ENGINE_MAPPED_FILE_H_

// Reading files: big ones by memory map, small ones into a string.

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace resa::engine {

// A regular file mapped read-only. Immutable and safe to read from any thread; the map lives as
// long as the object. The file must not be truncated meanwhile: reading past its new end raises
// SIGBUS, as with every memory map. (Replacing it by rename, as downloaders do, is harmless.)
class MappedFile {
 public:
  // Errors: NOT_FOUND, PERMISSION_DENIED or INVALID_ARGUMENT (not a regular file, or empty); the
  // message names the file.
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(std::string path, const std::byte* data, size_t size)
      : path_(std::move(path)), data_(data), size_(size) {}

  const std::string path_;
  const std::byte* const data_;
  const size_t size_;
};

// The whole of a file of at most `max_bytes`; larger is INVALID_ARGUMENT, other errors as above.
// An empty file is an empty string.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t max_bytes);

}  // namespace resa::engine

#endif  // RESA_ENGINE_MAPPED_FILE_H_
