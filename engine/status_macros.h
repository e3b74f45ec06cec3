#ifndef RESA_ENGINE_STATUS_MACROS_H_
#define RESA_ENGINE_STATUS_MACROS_H_

// Leaving a function on the first error, in one line each.

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// The variable's name must be no one else's: RESA_RETURN_IF_ERROR(status_) is to look at a member.
#define RESA_RETURN_IF_ERROR(expression)                                                          \
  do {                                                                                            \
    if (absl::Status resa_status_of_expression = (expression); !resa_status_of_expression.ok()) { \
      return resa_status_of_expression;                                                           \
    }                                                                                             \
  } while (false)

// RESA_ASSIGN_OR_RETURN(const int x, Function()): declares or assigns the left side.
#define RESA_ASSIGN_OR_RETURN(left, ...) \
  RESA_ASSIGN_OR_RETURN_(RESA_CONCAT_(status_or_, __LINE__), left, __VA_ARGS__)
#define RESA_ASSIGN_OR_RETURN_(result, left, ...) \
  auto result = (__VA_ARGS__);                    \
  if (!result.ok()) return result.status();       \
  left = *std::move(result)
#define RESA_CONCAT_(a, b) RESA_CONCAT_INNER_(a, b)
#define RESA_CONCAT_INNER_(a, b) a##b

#endif  // RESA_ENGINE_STATUS_MACROS_H_
