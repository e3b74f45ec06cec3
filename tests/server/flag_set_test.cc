#include "server/flag_set.h"

#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Values {
  std::string name = "unset";
  std::optional<int32_t> count;
  std::optional<double> ratio;
  absl::Duration wait = absl::Seconds(7);
  bool loud = false;
};

FlagSet MakeFlags(Values* values) {
  FlagSet flags;
  flags.Add("name", "NAME", "a name", &values->name);
  flags.Add("count", "N", "a count", &values->count);
  flags.Add("keep-ratio", "SHARE", "a ratio", &values->ratio);
  flags.Add("wait", "DURATION", "a duration", &values->wait);
  flags.AddSwitch("loud", "a switch", &values->loud);
  return flags;
}

TEST(FlagSetTest, ReadsEveryKindInBothSpellings) {
  Values values;
  const FlagSet flags = MakeFlags(&values);
  const auto rest = flags.Parse({"first", "--name", "a b", "--count=-3", "--keep-ratio", "0.25",
                                 "--wait=1m30s", "--loud", "second", "--", "--name"});
  ASSERT_TRUE(rest.ok()) << rest.status();
  EXPECT_THAT(*rest, ElementsAre("first", "second", "--name"));
  EXPECT_EQ(values.name, "a b");
  EXPECT_EQ(values.count, -3);
  EXPECT_EQ(values.ratio, 0.25);
  EXPECT_EQ(values.wait, absl::Seconds(90));
  EXPECT_TRUE(values.loud);
}

TEST(FlagSetTest, AbsentFlagsLeaveTheirVariables) {
  Values values;
  ASSERT_TRUE(MakeFlags(&values).Parse({}).ok());
  EXPECT_EQ(values.name, "unset");
  EXPECT_EQ(values.count, std::nullopt);
  EXPECT_EQ(values.wait, absl::Seconds(7));
}

TEST(FlagSetTest, SwitchesCanBeTurnedOff) {
  for (const char* arg : {"--no-loud", "--loud=false"}) {
    Values values;
    values.loud = true;
    ASSERT_TRUE(MakeFlags(&values).Parse({arg}).ok()) << arg;
    EXPECT_FALSE(values.loud) << arg;
  }
}

TEST(FlagSetTest, AValueMayContainEqualsAndBeEmpty) {
  Values values;
  ASSERT_TRUE(MakeFlags(&values).Parse({"--name=a=b"}).ok());
  EXPECT_EQ(values.name, "a=b");
  ASSERT_TRUE(MakeFlags(&values).Parse({"--name="}).ok());
  EXPECT_EQ(values.name, "");
}

TEST(FlagSetTest, ErrorsNameTheFlagAndSayWhatWasExpected) {
  struct Case {
    std::vector<std::string> args;
    std::string message;
  };
  const Case cases[] = {
      {{"--nmae", "x"}, "unknown flag --nmae; did you mean --name?"},
      {{"--no-name"}, "unknown flag --no-name"},
      {{"--zzzzzz"}, "unknown flag --zzzzzz; see --help"},
      {{"--name"}, "--name needs a value: NAME"},
      {{"--name", "a", "--name", "b"}, "--name is given twice"},
      {{"--loud", "--no-loud"}, "--loud is given twice"},
      {{"--count", "3.5"}, "--count: '3.5' is not a whole number"},
      {{"--count", "99999999999"}, "--count: '99999999999' is not a whole number"},
      {{"--count="}, "--count: '' is not a whole number"},
      {{"--keep-ratio", "nan"}, "--keep-ratio: 'nan' is not a number"},
      {{"--keep-ratio", "0.1x"}, "--keep-ratio: '0.1x' is not a number"},
      {{"--wait", "30"}, "--wait: '30' is not a duration"},
      {{"--wait", "-1s"}, "--wait: '-1s' is not a duration"},
      {{"--loud=yes"}, "--loud: 'yes' is neither true nor false"},
  };
  for (const Case& c : cases) {
    Values values;
    const auto rest = MakeFlags(&values).Parse(c.args);
    ASSERT_FALSE(rest.ok()) << c.message;
    EXPECT_EQ(rest.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(rest.status().message()), HasSubstr(c.message));
  }
}

TEST(FlagSetTest, ReadsByteSizes) {
  EXPECT_EQ(ParseByteSize("1073741824").value(), int64_t{1} << 30);
  EXPECT_EQ(ParseByteSize("4GiB").value(), int64_t{4} << 30);
  EXPECT_EQ(ParseByteSize("512M").value(), int64_t{512} << 20);
  EXPECT_EQ(ParseByteSize("7B").value(), 7);
  for (const char* bad : {"", "GiB", "-1", "1.5GiB", "4 GiB", "4gib", "99999999999TiB"}) {
    EXPECT_FALSE(ParseByteSize(bad).ok()) << bad;
  }
}

TEST(FlagSetTest, HelpShowsEveryFlagWithItsValue) {
  Values values;
  const std::string help = MakeFlags(&values).Help();
  EXPECT_THAT(help, HasSubstr("--keep-ratio SHARE\n      a ratio\n"));
  EXPECT_THAT(help, HasSubstr("--loud\n      a switch\n"));
}

}  // namespace
}  // namespace resa::server
