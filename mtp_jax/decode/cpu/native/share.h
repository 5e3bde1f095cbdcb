// Work in parts, for whichever thread of XLA's pool is free.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

// part(i) for i = 0 .. parts - 1, by this thread and up to `threads` - 1 others.
template <typename Part>
void Share(xla::ffi::ThreadPool pool, int64_t threads, int64_t parts, Part part) {
  struct Work {
    const Part part;
    const int64_t parts;
    std::atomic<int64_t> taken{0}, done{0};

    Work(Part part, int64_t parts) : part(part), parts(parts) {}

    void Do() {
      for (int64_t now; (now = taken++) < parts; ++done) part(now);
    }
  };
  // A thread that comes late finds no part left, so it must own what it looks at.
  const auto work = std::make_shared<Work>(part, parts);
  const int64_t helpers = std::min({pool.num_threads(), parts, threads}) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Do(); });
  work->Do();
  while (work->done < work->parts) std::this_thread::yield();
}
