#include "engine/page_table.h"

#include <atomic>

namespace resa::engine {

uint64_t PageTable::NewId() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace resa::engine
