#include "thread_team.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

std::atomic<uint64_t> forks{0};

/// How many forks lie between the first process and this one.
uint64_t count_forks() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

}  // namespace

/// The workers, and what they and the caller tell each other.
class ThreadTeam::Crew {
 public:
  explicit Crew(int size);
  ~Crew();
  void run(const std::function<void(int)>& f);
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

ThreadTeam::ThreadTeam(int size)
    : size_(size), forks_(count_forks()), crew_(size > 1 ? std::make_unique<Crew>(size) : nullptr) {
  if (size < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(size));
}

ThreadTeam::~ThreadTeam() {
  if (forks_ != count_forks()) crew_.release();  // its threads are not here to be waited for
}

void ThreadTeam::run(const std::function<void(int)>& f) {
  if (size_ == 1) return f(0);
  if (forks_ != count_forks()) {
    auto crew = std::make_unique<Crew>(size_);
    crew_.release();
    crew_ = std::move(crew);
    forks_ = count_forks();
  }
  crew_->run(f);
}

void ThreadTeam::barrier() {
  if (size_ > 1) crew_->barrier();
}

ThreadTeam::Crew::Crew(int size) : size_(size) {
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

ThreadTeam::Crew::~Crew() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadTeam::Crew::run(const std::function<void(int)>& f) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &f;
    generation_.fetch_add(1, std::memory_order_release);
    if (sleeping_) wake_.notify_all();
  }
  f(0);
  barrier();
}

void ThreadTeam::Crew::barrier() {
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

void ThreadTeam::Crew::work(int index) {
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
