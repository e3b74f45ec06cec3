#include "engine/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace resa::engine {
namespace {

// Closes its descriptor when it goes out of scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

struct OpenFile {
  Descriptor descriptor;
  size_t size;
};

absl::StatusOr<OpenFile> OpenRegular(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  Descriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  struct stat info;
  if (fstat(fd.get(), &info) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("cannot stat ", path));
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  }
  return OpenFile{std::move(fd), static_cast<size_t>(info.st_size)};
}

}  // namespace

absl::StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(const std::string& path) {
  absl::StatusOr<OpenFile> file = OpenRegular(path);
  if (!file.ok()) return file.status();
  if (file->size == 0) return absl::InvalidArgumentError(absl::StrCat(path, " is empty"));
  void* data = mmap(nullptr, file->size, PROT_READ, MAP_SHARED, file->descriptor.get(), 0);
  if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, absl::StrCat("cannot map ", path));
  // Start reading ahead: loading touches the file front to back, then serving touches all of it.
  // Advice only, so its failure changes nothing.
  (void)madvise(data, file->size, MADV_WILLNEED);
  return std::shared_ptr<const MappedFile>(
      new MappedFile(path, static_cast<const std::byte*>(data), file->size));
}

MappedFile::~MappedFile() { munmap(const_cast<std::byte*>(data_), size_); }

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t max_bytes) {
  absl::StatusOr<OpenFile> file = OpenRegular(path);
  if (!file.ok()) return file.status();
  if (file->size > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, " has ", file->size, " bytes; at most ",
                                                   max_bytes,
                                                   " are accepted for this kind of file"));
  }
  std::string text(file->size, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = read(file->descriptor.get(), text.data() + done, text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
    if (got == 0) {
      return absl::InvalidArgumentError(absl::StrCat(path, " became shorter while it was read"));
    }
    done += static_cast<size_t>(got);
  }
  return text;
}

}  // namespace resa::engine
