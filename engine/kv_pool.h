#ifndef RESA_ENGINE_KV_POOL_H_
#define RESA_ENGINE_KV_POOL_H_

// Who owns which page of the KV pool. Bookkeeping only: the memory itself is engine/kv_memory.h,
// behind the executor, and a page's descriptors live and die with it there.
//
// Pages are reference-counted, because outputs of one request share the pages of its prompt. A page
// with more than one owner is never written: whoever must write it takes a copy first.
//
// Thread: the engine's. A full pool is a scheduling outcome, not an error.

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/ids.h"
#include "kernels/params.h"

namespace resa::engine {

// Pages that hold `tokens` tokens.
constexpr int32_t PagesFor(int32_t tokens) {
  return (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens;
}

class KvPool {
 public:
  explicit KvPool(int32_t num_pages);

  int32_t num_pages() const { return static_cast<int32_t>(owners_.size()); }
  int32_t free_pages() const { return static_cast<int32_t>(free_.size()); }

  // A page with one owner, or nothing when all are taken.
  std::optional<PageId> Allocate();
  // One more owner. REQUIRES that the page has one.
  void AddOwner(PageId page);
  // One owner less; with the last one the page is free again. REQUIRES that the page has one.
  void Release(PageId page);

  int32_t owners(PageId page) const;
  bool shared(PageId page) const { return owners(page) > 1; }

 private:
  std::vector<int32_t> owners_;  // [num_pages], 0: free.
  std::vector<int32_t> free_;    // Taken from the back.
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_KV_POOL_H_
