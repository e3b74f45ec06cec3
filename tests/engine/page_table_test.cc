#include "engine/page_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace resa::engine {
namespace {

using ::testing::ElementsAre;

TEST(PageTableTest, KeepsItsIdAsLongAsItOnlyGrows) {
  PageTable table;
  PageTable other;
  EXPECT_GT(table.id(), 0u);
  EXPECT_NE(table.id(), other.id());
  const uint64_t id = table.id();
  table.push_back(4);
  table.push_back(2);
  EXPECT_EQ(table.id(), id);
  EXPECT_THAT(absl::MakeConstSpan(table), ElementsAre(4, 2));
}

TEST(PageTableTest, TakesANewIdWhenAnEntryChangesOrGoes) {
  PageTable table;
  std::vector<uint64_t> ids = {table.id()};
  const auto expect_new_id = [&] {
    for (uint64_t id : ids) EXPECT_NE(table.id(), id);
    ids.push_back(table.id());
  };
  table.Assign({1, 2, 3});
  expect_new_id();
  table.Replace(1, 7);
  expect_new_id();
  EXPECT_THAT(absl::MakeConstSpan(table), ElementsAre(1, 7, 3));
  table.clear();
  expect_new_id();
  EXPECT_TRUE(table.empty());
}

}  // namespace
}  // namespace resa::engine
