// Shows ThreadSanitizer the distribution's absl::Mutex.
//
// The distribution's abseil is built without the sanitizer, so its locks order nothing in the
// sanitizer's eyes and every guarded field looks like a race. These definitions take the place of
// the library's in the binary they are linked into: they call the library's own and say what it
// orders. No race is hidden: only what a lock really orders is.
//
// Linked into every test of a ThreadSanitizer build; no other build has it.

#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <string>
#include <typeinfo>

#include "absl/synchronization/mutex.h"
#include "kernels/check.h"

namespace {

// The library's own member function. The mangled class name carries abseil's inline namespace,
// which differs between distributions: "N4absl7debian35MutexE" and "4LockEv" make
// "_ZN4absl7debian35Mutex4LockEv".
void* Original(const char* member) {
  std::string symbol = typeid(absl::Mutex).name();
  symbol.pop_back();
  symbol = "_Z" + symbol + member;
  void* function = dlsym(RTLD_NEXT, symbol.c_str());
  RESA_CHECK(function != nullptr) << symbol;
  return function;
}

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static const auto lock = reinterpret_cast<void (*)(Mutex*)>(Original("4LockEv"));
  lock(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static const auto unlock = reinterpret_cast<void (*)(Mutex*)>(Original("6UnlockEv"));
  __tsan_release(this);
  unlock(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static const auto await = reinterpret_cast<bool (*)(Mutex*, const Condition&, Duration)>(
      Original("16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  __tsan_release(this);
  const bool met = await(this, condition, timeout);
  __tsan_acquire(this);
  return met;
}

ABSL_NAMESPACE_END
}  // namespace absl
