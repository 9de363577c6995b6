#pragma once
// Work that is cut into items, shared among threads: torch's, which a binding brings, or threads of its own.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace mirasol {

// `start(n, work)` calls work() n times, on n threads if it can.  They draw items from a counter and call
// each(workspace, begin, end): items are begun in ascending order, and no thread idles while there are more.
template <class Start, class Each>
void share(const Start& start, int64_t threads, int64_t items, int64_t workspace, const Each& each) {
  static constexpr std::align_val_t alignment{64};
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const auto release = [](float* p) { ::operator delete(p, alignment); };
    std::unique_ptr<float, decltype(release)> space(
        static_cast<float*>(::operator new(workspace * sizeof(float), alignment)), release);
    for (int64_t item; (item = next++) < items;) each(space.get(), item, item + 1);
  };
  const int64_t workers = std::min(items, threads);
  if (workers == 1) work();
  else start(workers, work);
}

// `start` for where there is no torch.
struct OwnThreads {
  template <class Work>
  void operator()(int64_t n, const Work& work) const {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < n; ++i) others.emplace_back(work);
    if (n > 0) work();
    for (std::thread& other : others) other.join();
  }
};

// How many of `most` threads it pays to wake for so many multiply-adds.
inline int64_t threads_for(double multiply_adds, int64_t most) {
  constexpr double least = 1 << 19;  // for one
  return std::min(most, int64_t(multiply_adds / least) + 1);
}

}  // namespace mirasol
