// The team of threads that walks through a pass.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../cpu/thread_team.h"
#include "check.h"

using namespace dynabert;

namespace {

constexpr int kSizes[] = {1, 2, 3, 5};

TEST(each_thread_runs_once) {
  for (int size : kSizes) {
    const check::Where where(std::to_string(size) + " threads");
    ThreadTeam team(size);
    CHECK(team.size() == size);
    // Not atomic: `run` returns when all have come, and what they wrote is seen.
    std::vector<int> runs(size, 0);
    const auto caller = std::this_thread::get_id();
    bool first_is_caller = true;
    constexpr int repeats = 500;
    for (int i = 0; i < repeats; ++i) {
      team.run([&](int thread) {
        ++runs[thread];
        if (thread == 0 && std::this_thread::get_id() != caller) first_is_caller = false;
      });
      bool all = true;
      for (int n : runs) all = all && n == i + 1;
      CHECK(all);
    }
    CHECK(first_is_caller);
  }
}

TEST(a_team_has_a_thread) {
  CHECK_REFUSES("at least 1, got 0", ThreadTeam(0));
  CHECK_REFUSES("at least 1, got -3", ThreadTeam(-3));
}

TEST(nobody_passes_a_barrier_early) {
  for (int size : kSizes) {
    const check::Where where(std::to_string(size) + " threads");
    ThreadTeam team(size);
    constexpr int phases = 300;
    std::vector<int> done(size, 0);  // plain: the barrier alone orders them
    std::atomic<int> early{0};
    for (int run = 0; run < 3; ++run) {
      done.assign(size, 0);
      team.run([&](int thread) {
        for (int phase = 1; phase <= phases; ++phase) {
          done[thread] = phase;
          team.barrier();
          for (int n : done)
            if (n != phase) ++early;
          team.barrier();
        }
      });
      CHECK(early == 0);
    }
  }
}

TEST(workers_wake_up_after_they_slept) {
  ThreadTeam team(3);
  std::atomic<int> runs{0};
  for (int i = 1; i <= 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // they stay awake for 200 microseconds
    team.run([&](int) { ++runs; });
    CHECK(runs == 3 * i);
  }
}

TEST(teams_come_and_go) {
  std::atomic<int> runs{0};
  int expected = 0;
  for (int i = 0; i < 60; ++i) {
    const int size = kSizes[i % 4];
    ThreadTeam team(size);
    // Some end before their workers have started, some after a run, some when the workers sleep.
    if (i % 3) {
      team.run([&](int) { ++runs; });
      expected += size;
    }
    if (i % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(runs == expected);
  }
}

TEST(two_teams_work_side_by_side) {
  std::atomic<int> runs{0};
  auto work = [&] {
    ThreadTeam team(2);
    for (int i = 0; i < 200; ++i)
      team.run([&](int) {
        ++runs;
        team.barrier();
      });
  };
  std::thread other(work);
  work();
  other.join();
  CHECK(runs == 800);
}

}  // namespace
