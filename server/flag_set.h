#ifndef RESA_SERVER_FLAG_SET_H_
#define RESA_SERVER_FLAG_SET_H_

// Command-line flags as values of one object: no globals, names with dashes, and errors that say
// what was expected. Accepts `--name value`, `--name=value`, and for switches `--name`,
// `--no-name`, `--name=true|false`. `--` ends the flags.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace resa::server {

// Values as flags and configuration files spell them. The error says what was expected.
absl::StatusOr<int64_t> ParseInteger(absl::string_view text, int64_t min, int64_t max);
absl::StatusOr<double> ParseNumber(absl::string_view text);
absl::StatusOr<bool> ParseSwitch(absl::string_view text);
absl::StatusOr<absl::Duration> ParseDuration(absl::string_view text);  // "30s", "1m30s", >= 0
absl::StatusOr<int64_t> ParseByteSize(absl::string_view text);  // "4GiB", "512M", "1073741824"

class FlagSet {
 public:
  // Takes the text after the flag; its error's message is put behind the flag's name.
  using Setter = std::function<absl::Status(absl::string_view)>;

  // `name` without dashes in front; `value` is how the help shows the value ("DIR").
  // REQUIRES that the name is new.
  void Add(absl::string_view name, absl::string_view value, absl::string_view help, Setter set);
  // The same for a flag that may be given several times; the setter is called for each.
  void AddRepeated(absl::string_view name, absl::string_view value, absl::string_view help,
                   Setter set);
  // A switch: its setter gets "true" or "false".
  void AddSwitch(absl::string_view name, absl::string_view help, Setter set);

  // The same for variables, which must outlive Parse and keep their value when the flag is absent.
  void Add(absl::string_view name, absl::string_view value, absl::string_view help,
           std::string* out);
  void Add(absl::string_view name, absl::string_view value, absl::string_view help,
           std::optional<int32_t>* out);
  void Add(absl::string_view name, absl::string_view value, absl::string_view help,
           std::optional<double>* out);
  void Add(absl::string_view name, absl::string_view value, absl::string_view help,
           absl::Duration* out);
  void AddSwitch(absl::string_view name, absl::string_view help, bool* out);

  // Calls the setters in the order of the arguments (without the program's name) and returns what
  // is not a flag. INVALID_ARGUMENT for an unknown flag (with the closest known one), a missing or
  // bad value, or a flag given twice.
  absl::StatusOr<std::vector<std::string>> Parse(absl::Span<const std::string> args) const;

  // One paragraph per flag, in the order they were added.
  std::string Help() const;
  std::vector<std::string> names() const { return order_; }

 private:
  struct Flag {
    std::string value;
    std::string help;
    Setter set;
    bool is_switch = false;
    bool repeated = false;
  };

  void Insert(absl::string_view name, Flag flag);
  absl::Status UnknownFlag(absl::string_view name) const;

  absl::btree_map<std::string, Flag> flags_;
  std::vector<std::string> order_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_FLAG_SET_H_
