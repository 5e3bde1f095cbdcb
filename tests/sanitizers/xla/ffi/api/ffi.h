// XLA's pool of threads, as far as the kernels use it, with threads of its own: for a
// program without XLA, whose every thread a sanitizer sees.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace xla::ffi {

// Threads that wait for tasks until the pool ends.
class Threads {
 public:
  explicit Threads(int64_t count) {
    for (int64_t i = 0; i < count; ++i) threads_.emplace_back([this] { Run(); });
  }

  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ++scheduled;
    changed_.notify_one();
  }

  int64_t count() const { return threads_.size(); }

  std::atomic<int64_t> scheduled{0};  // tasks so far

 private:
  void Run() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return ends_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool ends_ = false;
  std::vector<std::thread> threads_;
};

class ThreadPool {
 public:
  explicit ThreadPool(Threads& threads) : threads_(&threads) {}

  int64_t num_threads() const { return threads_->count(); }

  void Schedule(std::function<void()> task) { threads_->Schedule(std::move(task)); }

 private:
  Threads* threads_;
};

}  // namespace xla::ffi
