// A team of threads that walks through the phases of one forward pass together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dynabert {

/// `run(f)` calls f(0) on the caller and f(1) .. f(size - 1) on workers, and returns when all have.
/// Workers spin for a while after a run, so that the next one starts at once, and then sleep.
class ThreadTeam {
 public:
  explicit ThreadTeam(int size);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }
  /// One run at a time; f must not throw.
  void run(const std::function<void(int)>& f);
  /// Inside a run: returns when every thread of the team has come here.
  void barrier();

 private:
  void work(int index);

  const int size_;
  const std::function<void(int)>* job_ = nullptr;
  // Each on a cache line of its own: they are written by different threads all the time.
  alignas(64) std::atomic<uint64_t> generation_{0};  // runs started
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> phase_{0};  // barriers passed
  std::mutex mutex_;
  std::condition_variable wake_;
  int sleeping_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace dynabert
