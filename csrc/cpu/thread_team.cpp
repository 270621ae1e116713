#include "thread_team.h"

#include <chrono>

namespace dynabert {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A phase takes microseconds; a thread that waits longer shares its core with another program.
constexpr int kSpinsBeforeYield = 4000;
// How long a worker waits for the next call awake: waking a sleeping one takes 5 to 50 microseconds.
constexpr std::chrono::microseconds kAwake{200};

}  // namespace

ThreadTeam::ThreadTeam(int size) : size_(size) {
  try {
    for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // no thread to be had: those that started must end before the members go
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    throw;
  }
}

ThreadTeam::~ThreadTeam() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadTeam::run(const std::function<void(int)>& f) {
  if (size_ > 1) {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &f;
    generation_.fetch_add(1, std::memory_order_release);
    if (sleeping_) wake_.notify_all();
  }
  f(0);
  barrier();
}

void ThreadTeam::barrier() {
  if (size_ == 1) return;
  const uint64_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpinsBeforeYield) pause();
    else std::this_thread::yield();
  }
}

void ThreadTeam::work(int index) {
  uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kAwake;
    for (int spins = 1; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      pause();
      if (spins % 256 == 0 && std::chrono::steady_clock::now() > until) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return stop_ || generation_.load(std::memory_order_acquire) != seen; });
        --sleeping_;
        break;
      }
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
    }
    seen = generation_.load(std::memory_order_acquire);
    (*job_)(index);
    barrier();
  }
}

}  // namespace dynabert
