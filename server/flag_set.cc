#include "server/flag_set.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/invalid.h"
#include "kernels/check.h"

namespace resa::server {
namespace {

using engine::Invalid;

// Insertions, deletions and replacements that turn one into the other (Levenshtein).
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

template <typename T, typename Parse>
FlagSet::Setter Store(T* out, Parse parse) {
  return [out, parse](absl::string_view text) {
    auto value = parse(text);
    if (!value.ok()) return value.status();
    *out = *value;
    return absl::OkStatus();
  };
}

}  // namespace

absl::StatusOr<int64_t> ParseInteger(absl::string_view text, int64_t min, int64_t max) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < min || value > max) {
    return Invalid("'", text, "' is not a whole number from ", min, " to ", max);
  }
  return value;
}

absl::StatusOr<double> ParseNumber(absl::string_view text) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
    return Invalid("'", text, "' is not a number");
  }
  return value;
}

absl::StatusOr<bool> ParseSwitch(absl::string_view text) {
  if (text == "true") return true;
  if (text == "false") return false;
  return Invalid("'", text, "' is neither true nor false");
}

absl::StatusOr<absl::Duration> ParseDuration(absl::string_view text) {
  absl::Duration value;
  if (!absl::ParseDuration(text, &value) || value < absl::ZeroDuration() ||
      value == absl::InfiniteDuration()) {
    return Invalid("'", text, "' is not a duration such as 30s, 500ms or 1m30s");
  }
  return value;
}

absl::StatusOr<int64_t> ParseByteSize(absl::string_view text) {
  struct Unit {
    absl::string_view name;
    int shift;
  };
  static constexpr Unit kUnits[] = {{"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}, {"K", 10},
                                    {"M", 20},   {"G", 30},   {"T", 40},   {"B", 0},    {"", 0}};
  const size_t digits =
      std::find_if_not(text.begin(), text.end(), absl::ascii_isdigit) - text.begin();
  int64_t count = 0;
  if (digits > 0 && absl::SimpleAtoi(text.substr(0, digits), &count)) {
    for (const Unit& unit : kUnits) {
      if (text.substr(digits) != unit.name) continue;
      if (count > std::numeric_limits<int64_t>::max() >> unit.shift) break;
      return count << unit.shift;
    }
  }
  return Invalid("'", text, "' is not a size such as 4GiB, 512MiB or 1073741824");
}

void FlagSet::Insert(absl::string_view name, Flag flag) {
  const bool inserted = flags_.emplace(name, std::move(flag)).second;
  RESA_CHECK(inserted) << "flag " << std::string(name) << " is added twice";
  order_.emplace_back(name);
}

void FlagSet::Add(absl::string_view name, absl::string_view value, absl::string_view help,
                  Setter set) {
  Insert(name, {std::string(value), std::string(help), std::move(set)});
}

void FlagSet::AddRepeated(absl::string_view name, absl::string_view value, absl::string_view help,
                          Setter set) {
  Insert(name, {std::string(value), std::string(help), std::move(set), false, true});
}

void FlagSet::AddSwitch(absl::string_view name, absl::string_view help, Setter set) {
  Insert(name, {"", std::string(help), std::move(set), /*is_switch=*/true});
}

void FlagSet::Add(absl::string_view name, absl::string_view value, absl::string_view help,
                  std::string* out) {
  Add(name, value, help, [out](absl::string_view text) {
    *out = std::string(text);
    return absl::OkStatus();
  });
}

void FlagSet::Add(absl::string_view name, absl::string_view value, absl::string_view help,
                  std::optional<int32_t>* out) {
  Add(name, value, help, Store(out, [](absl::string_view text) {
        return ParseInteger(text, std::numeric_limits<int32_t>::min(),
                            std::numeric_limits<int32_t>::max());
      }));
}

void FlagSet::Add(absl::string_view name, absl::string_view value, absl::string_view help,
                  std::optional<double>* out) {
  Add(name, value, help, Store(out, &ParseNumber));
}

void FlagSet::Add(absl::string_view name, absl::string_view value, absl::string_view help,
                  absl::Duration* out) {
  Add(name, value, help, Store(out, &ParseDuration));
}

void FlagSet::AddSwitch(absl::string_view name, absl::string_view help, bool* out) {
  AddSwitch(name, help, Store(out, &ParseSwitch));
}

absl::Status FlagSet::UnknownFlag(absl::string_view name) const {
  constexpr size_t kFarthest = 3;
  size_t best = kFarthest;
  std::string closest;
  for (const std::string& known : order_) {
    const size_t distance = EditDistance(name, known);
    if (distance < best) {
      best = distance;
      closest = known;
    }
  }
  if (closest.empty()) return Invalid("unknown flag --", name, "; see --help");
  return Invalid("unknown flag --", name, "; did you mean --", closest, "?");
}

absl::StatusOr<std::vector<std::string>> FlagSet::Parse(absl::Span<const std::string> args) const {
  std::vector<std::string> rest;
  std::set<std::string> seen;
  for (size_t i = 0; i < args.size(); ++i) {
    absl::string_view arg = args[i];
    if (arg == "--") {
      rest.insert(rest.end(), args.begin() + i + 1, args.end());
      break;
    }
    if (!absl::ConsumePrefix(&arg, "--")) {
      rest.emplace_back(arg);
      continue;
    }
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(arg, absl::MaxSplits('=', 1));
    const bool has_value = absl::StrContains(arg, '=');
    absl::string_view name = parts.first;
    std::string value(parts.second);

    auto flag = flags_.find(name);
    bool negated = false;
    if (flag == flags_.end() && absl::ConsumePrefix(&name, "no-")) {
      flag = flags_.find(name);
      negated = flag != flags_.end() && flag->second.is_switch && !has_value;
      if (!negated) flag = flags_.end();
    }
    if (flag == flags_.end()) return UnknownFlag(parts.first);
    if (!seen.insert(flag->first).second && !flag->second.repeated) {
      return Invalid("--", flag->first, " is given twice");
    }

    if (!has_value) {
      if (flag->second.is_switch) {
        value = negated ? "false" : "true";
      } else if (i + 1 < args.size()) {
        value = args[++i];
      } else {
        return Invalid("--", flag->first, " needs a value: ", flag->second.value);
      }
    }
    if (absl::Status status = flag->second.set(value); !status.ok()) {
      return Invalid("--", flag->first, ": ", status.message());
    }
  }
  return rest;
}

std::string FlagSet::Help() const {
  std::string help;
  for (const std::string& name : order_) {
    const Flag& flag = flags_.at(name);
    absl::StrAppend(&help, "  --", name, flag.value.empty() ? "" : " ", flag.value, "\n      ",
                    flag.help, "\n");
  }
  return help;
}

}  // namespace resa::server
