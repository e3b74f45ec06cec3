#include "engine/mapped_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/file_builders.h"

namespace resa::engine {
namespace {

using ::resa::testing::TempFolder;
using ::testing::HasSubstr;

TEST(MappedFileTest, MapsTheWholeFileAndOutlivesItsName) {
  TempFolder folder;
  const std::string path = folder.Write("f", "content");
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(unlink(path.c_str()), 0);
  const auto bytes = (*file)->bytes();
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), "content");
  EXPECT_EQ((*file)->path(), path);
}

TEST(MappedFileTest, RefusesWhatIsNotAFileWithItsName) {
  TempFolder folder;
  const auto missing = MappedFile::Open(folder.Path("missing")).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr(folder.Path("missing")));
  EXPECT_THAT(std::string(MappedFile::Open(folder.path()).status().message()),
              HasSubstr("is not a regular file"));
  EXPECT_THAT(std::string(MappedFile::Open(folder.Write("empty", "")).status().message()),
              HasSubstr("is empty"));
  // Opening a FIFO that nobody writes to would otherwise wait for ever.
  ASSERT_EQ(mkfifo(folder.Path("fifo").c_str(), 0600), 0);
  EXPECT_THAT(std::string(MappedFile::Open(folder.Path("fifo")).status().message()),
              HasSubstr("is not a regular file"));
}

TEST(MappedFileTest, SmallFilesAreBounded) {
  TempFolder folder;
  const std::string path = folder.Write("f", "12345");
  EXPECT_EQ(*ReadSmallFile(path, 5), "12345");
  EXPECT_THAT(std::string(ReadSmallFile(path, 4).status().message()),
              HasSubstr("has 5 bytes; at most 4 are accepted"));
  EXPECT_EQ(*ReadSmallFile(folder.Write("empty", ""), 5), "");
  EXPECT_EQ(ReadSmallFile(folder.Path("missing"), 5).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace resa::engine
