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

// Floats for the time of a call, 64-byte aligned, not initialised.  malloc gives pages of pieces of this size back to
// the system, and each page of the next call would be a fault: so a thread keeps what it has had, up to KEPT bytes.
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    auto best = kept.end();
    for (auto i = kept.begin(); i != kept.end(); ++i)
      if (i->floats >= n && (best == kept.end() || i->floats < best->floats)) best = i;
    if (best == kept.end()) {
      piece = {n, Memory(static_cast<float*>(::operator new(n * sizeof(float), alignment)))};
    } else {
      piece = std::move(*best);
      kept.erase(best);
    }
  }
  ~Scratch() {
    if (piece.floats) kept.push_back(std::move(piece));
    int64_t floats = 0;
    for (const Piece& each : kept) floats += each.floats;
    for (; floats * int64_t(sizeof(float)) > KEPT; kept.erase(kept.begin())) floats -= kept.front().floats;
  }
  Scratch(const Scratch&) = delete;
  float* get() const { return piece.at.get(); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t KEPT = 0;  // a piece larger than asked for would hide who writes behind its end
#else
  static constexpr int64_t KEPT = 16 << 20;
#endif
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(float* at) const { ::operator delete(at, alignment); }
  };
  using Memory = std::unique_ptr<float, Free>;
  struct Piece {
    int64_t floats = 0;
    Memory at;
  };
  static inline thread_local std::vector<Piece> kept;  // the first was given back longest ago
  Piece piece;
};

// `start(n, work)` calls work() n times, on n threads if it can.  They draw items from a counter and call
// each(workspace, begin, end): items are begun in ascending order, and no thread idles while there are more.
template <class Start, class Each>
void share(const Start& start, int64_t threads, int64_t items, int64_t workspace, const Each& each) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const Scratch space(workspace);
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
