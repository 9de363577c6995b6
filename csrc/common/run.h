#pragma once
// Work that is cut into items, shared among threads.  No header of torch: who calls brings its threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace mirasol {

// `start(n, work)` calls work() n times, on n threads if it can.  They draw items from a counter and call
// each(workspace, begin, end): items are begun in ascending order, and no thread idles while there are more.
template <class Start, class Each>
void share(const Start& start, int64_t threads, int64_t items, int64_t workspace, const Each& each) {
  static constexpr std::align_val_t alignment{64};
  std::atomic<int64_t> next{0};
  start(std::min(items, threads), [&] {
    const auto release = [](float* p) { ::operator delete(p, alignment); };
    std::unique_ptr<float, decltype(release)> space(
        static_cast<float*>(::operator new(workspace * sizeof(float), alignment)), release);
    for (int64_t item; (item = next++) < items;) each(space.get(), item, item + 1);
  });
}

}  // namespace mirasol
