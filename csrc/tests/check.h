// Tests without a framework: cases register themselves, a failed check is printed and the case goes on.
// A program runs all of its cases, or those whose names contain its first argument.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

// Checks may be made by many threads at once.
inline std::atomic<long> checks{0}, failures{0};
inline std::mutex printing;

/// What a failure's message starts with, one entry for each `Where` that is alive in this thread.
inline std::vector<std::string>& places() {
  thread_local std::vector<std::string> stack;
  return stack;
}

/// Names what is being tried for as long as it lives: "avx2", "hidden 67".
class Where {
 public:
  explicit Where(std::string what) { places().push_back(std::move(what)); }
  ~Where() { places().pop_back(); }
  Where(const Where&) = delete;
  Where& operator=(const Where&) = delete;
};

inline bool report(bool good, const char* file, int line, const std::string& message) {
  constexpr long kPrinted = 20;  // one broken kernel fails thousands of checks
  ++checks;
  if (good) return true;
  if (++failures > kPrinted) return false;
  const std::lock_guard<std::mutex> lock(printing);
  std::printf("%s:%d: ", file, line);
  for (const std::string& place : places()) std::printf("%s: ", place.c_str());
  std::printf("%s\n", message.c_str());
  return false;
}

inline int run_all(const char* part) {
  int run = 0, bad = 0;
  for (const Case& test : cases()) {
    if (part && !std::strstr(test.name, part)) continue;
    ++run;
    const long checks_before = checks, failures_before = failures;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
    } catch (const std::exception& error) {
      report(false, test.name, 0, std::string("threw ") + error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const long done = checks - checks_before, failed = failures - failures_before;
    const bool good = failed == 0 && done > 0;  // a case that checks nothing is a mistake
    bad += !good;
    std::printf("%s %s: %ld checks, %ld failed, %.2f s\n", good ? "ok  " : "FAIL", test.name, done, failed,
                seconds);
    std::fflush(stdout);
  }
  if (run == 0) std::printf("no case has %s in its name\n", part ? part : "anything");
  return run == 0 || bad > 0;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) check::report((condition), __FILE__, __LINE__, "not so: " #condition)

/// For a function that returns what is wrong, or nothing.
#define CHECK_GOOD(expression)                                                    \
  do {                                                                            \
    const std::string wrong_ = (expression);                                      \
    check::report(wrong_.empty(), __FILE__, __LINE__, #expression ": " + wrong_); \
  } while (false)

/// The expression throws std::invalid_argument, whose message contains the text.
#define CHECK_REFUSES(text, expression)                                                                      \
  do {                                                                                                       \
    std::string said_ = "nothing was thrown";                                                                \
    bool good_ = false;                                                                                      \
    try {                                                                                                    \
      expression;                                                                                            \
    } catch (const std::invalid_argument& error_) {                                                          \
      said_ = error_.what();                                                                                 \
      good_ = said_.find(text) != std::string::npos;                                                         \
    }                                                                                                        \
    check::report(good_, __FILE__, __LINE__, #expression " must say '" + std::string(text) + "': " + said_); \
  } while (false)

int main(int count, char** arguments) { return check::run_all(count > 1 ? arguments[1] : nullptr); }
