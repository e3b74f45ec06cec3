#ifndef RESA_KERNELS_CHECK_H_
#define RESA_KERNELS_CHECK_H_

// RESA_CHECK(condition) << "what went wrong": ends the process with file, line, condition and
// message when the condition is false. For programmer errors only, and on in every build; what a
// client or the environment can cause is an absl::Status.

#include <cstdlib>
#include <iostream>
#include <sstream>

namespace resa {
namespace internal {

// Collects the message of a failed check and aborts when it goes out of scope.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) {
    stream_ << file << ":" << line << ": check failed: " << condition << " ";
  }
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;
  [[noreturn]] ~CheckFailure() {
    std::cerr << stream_.str() << std::endl;
    std::abort();
  }
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

// Turns the stream expression into void, so that both arms of the conditional agree.
struct Voidify {
  void operator&(std::ostream&) const {}
};

}  // namespace internal
}  // namespace resa

#define RESA_CHECK(condition)          \
  (__builtin_expect(!!(condition), 1)) \
      ? (void)0                        \
      : ::resa::internal::Voidify() &  \
            ::resa::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()

#define RESA_CHECK_EQ(a, b) RESA_CHECK((a) == (b)) << (a) << " vs " << (b) << " "
#define RESA_CHECK_LE(a, b) RESA_CHECK((a) <= (b)) << (a) << " vs " << (b) << " "
#define RESA_CHECK_LT(a, b) RESA_CHECK((a) < (b)) << (a) << " vs " << (b) << " "
#define RESA_CHECK_GE(a, b) RESA_CHECK((a) >= (b)) << (a) << " vs " << (b) << " "
#define RESA_CHECK_GT(a, b) RESA_CHECK((a) > (b)) << (a) << " vs " << (b) << " "

#endif  // RESA_KERNELS_CHECK_H_
