// A team of threads that walks through the phases of one forward pass together.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace dynabert {

/// `run(f)` calls f(0) on the caller and f(1) .. f(size - 1) on workers, and returns when all have.
/// Workers spin for a while after a run, so that the next one starts at once, and then sleep. A forked
/// process has none of its parent's threads: its first run starts new ones.
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
  class Crew;

  const int size_;
  uint64_t forks_;  // of this process and its ancestors when the crew was hired
  std::unique_ptr<Crew> crew_;
};

}  // namespace dynabert
