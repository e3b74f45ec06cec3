#include "engine/kv_pool.h"

#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

TEST(KvPoolTest, PagesForRoundsUp) {
  EXPECT_EQ(PagesFor(0), 0);
  EXPECT_EQ(PagesFor(1), 1);
  EXPECT_EQ(PagesFor(kernels::kPageTokens), 1);
  EXPECT_EQ(PagesFor(kernels::kPageTokens + 1), 2);
}

TEST(KvPoolTest, HandsOutEveryPageOnce) {
  KvPool pool(5);
  std::set<PageId> pages;
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(pool.free_pages(), 5 - i);
    const std::optional<PageId> page = pool.Allocate();
    ASSERT_TRUE(page.has_value());
    EXPECT_EQ(pool.owners(*page), 1);
    EXPECT_FALSE(pool.shared(*page));
    pages.insert(*page);
  }
  EXPECT_EQ(pages.size(), 5u);
  EXPECT_EQ(pages.begin()->value, 0);
  EXPECT_EQ(pages.rbegin()->value, 4);
  EXPECT_EQ(pool.Allocate(), std::nullopt);
  EXPECT_EQ(pool.free_pages(), 0);
}

TEST(KvPoolTest, FirstPagesHandedOutAreTheFirstOfTheMemory) {
  KvPool pool(3);
  EXPECT_EQ(pool.Allocate()->value, 0);
  EXPECT_EQ(pool.Allocate()->value, 1);
}

TEST(KvPoolTest, ReleasedPageIsHandedOutAgain) {
  KvPool pool(1);
  const PageId page = *pool.Allocate();
  pool.Release(page);
  EXPECT_EQ(pool.owners(page), 0);
  EXPECT_EQ(pool.free_pages(), 1);
  EXPECT_EQ(pool.Allocate(), page);
}

TEST(KvPoolTest, FreeingSharedPageKeepsOtherOwner) {
  KvPool pool(2);
  const PageId page = *pool.Allocate();
  pool.AddOwner(page);
  EXPECT_TRUE(pool.shared(page));
  pool.Release(page);
  EXPECT_EQ(pool.owners(page), 1);
  EXPECT_FALSE(pool.shared(page));
  EXPECT_EQ(pool.free_pages(), 1);
  pool.Release(page);
  EXPECT_EQ(pool.free_pages(), 2);
}

using KvPoolDeathTest = ::testing::Test;

TEST(KvPoolDeathTest, MisuseEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  KvPool pool(2);
  const PageId page = *pool.Allocate();
  const PageId free{1};
  EXPECT_DEATH(pool.Release(free), "page 1 is free already");
  EXPECT_DEATH(pool.AddOwner(free), "page 1 is free");
  EXPECT_DEATH(pool.owners(PageId{2}), "page 2");
  EXPECT_DEATH(pool.owners(PageId{}), "page -1");
  EXPECT_DEATH(KvPool(0), "num_pages > 0");
  pool.Release(page);
  EXPECT_DEATH(pool.Release(page), "page 0 is free already");
}

}  // namespace
}  // namespace resa::engine
