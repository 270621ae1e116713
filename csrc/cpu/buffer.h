// Scratch memory.
#pragma once

#include <cstdlib>
#include <new>

#include "model.h"

namespace dynabert {

/// Memory aligned for vectors, which grows and is not initialised.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      // The vectors of a last row may end behind it.
      data_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64) + 256));
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return data_;
  }
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// Bytes between rows: whole lines, and not a multiple of 4096, where the rows of a block would all
/// fall into one set of the first-level cache.
inline int64_t row_bytes(int64_t bytes) {
  const int64_t lines = round_up(bytes, 64);
  return lines % 4096 == 0 ? lines + 64 : lines;
}

}  // namespace dynabert
