#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace dynabert {
namespace {

// Units of work a thread, so that none waits long for another at the end.
constexpr int kUnitsPerThread = 4;
constexpr int kRowsPerUnit = 16;
constexpr int kStripColumns = 32;  // transposed at a time: a cache line of bf16
constexpr int kRowsPerSum = 64;    // of LayerNorm's weight gradient
// Rows of A that meet one panel after the other before the next rows do: a quarter of a second-level cache of
// 1 MB, beside a panel of B, the next one and what is written.
constexpr int64_t kRowsBytes = 256 << 10;
// Words of the sum that weight gradients take at a time: a panel of so many is half of that cache.
constexpr int kWordsPerSum = 2048;

int64_t element_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

int largest(const std::vector<Block>& blocks) {
  int most = 0;
  for (const Block& b : blocks)
    if (b.rows > 0) most = std::max(most, b.extent);
  return most;
}

int64_t total_rows(const std::vector<Block>& blocks) {
  int64_t rows = 0;
  for (const Block& b : blocks) rows += b.rows;
  return rows;
}

/// Every block in tiles of at most 6 rows whose sizes differ by one at most.
template <class Words, class Columns>
std::vector<ProductTile> tiles_of(const std::vector<Block>& blocks, Words words, Columns columns) {
  std::vector<ProductTile> tiles;
  int64_t begin = 0;
  for (const Block& b : blocks) {
    const int64_t count = (b.rows + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = b.rows * i / count, next = b.rows * (i + 1) / count;
      tiles.push_back(
          {static_cast<int>(begin + first), static_cast<int>(next - first), words(b), columns(b)});
    }
    begin += b.rows;
  }
  return tiles;
}

/// What a loss is the mean of.
int64_t terms(const LossOp& task, int64_t rows) { return task.cross_entropy ? rows : rows * task.columns; }

/// A bias as float32, zero up to whole panels.
const float* float_bias(DType dtype, const char* bias, int count, Buffer& buffer) {
  if (!bias) return nullptr;
  float* to = reinterpret_cast<float*>(buffer.reserve(4 * round_up(count, kPanelColumns)));
  for (int i = 0; i < count; ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(to + i, bias + 4 * i, 4);
    } else {
      uint16_t narrow;
      std::memcpy(&narrow, bias + 2 * i, 2);
      const uint32_t wide = static_cast<uint32_t>(narrow) << 16;
      std::memcpy(to + i, &wide, 4);
    }
  }
  std::fill(to + count, to + round_up(count, kPanelColumns), 0.f);
  return to;
}

}  // namespace

void Ops::run(const std::function<void(int)>& work) {
  if (!parallel_ || threads_ == 1) return team_.run(work);
  struct Call {
    const std::function<void(int)>& work;
    std::atomic<int> next{0};
  } call{work};
  // The runtime may give fewer threads than it is asked for; those that come do all the work.
  parallel_(
      [](void* data) {
        Call& c = *static_cast<Call*>(data);
        c.work(c.next.fetch_add(1, std::memory_order_relaxed));
      },
      &call, static_cast<unsigned>(threads_), 0);
}

/// Deals units out in stretches, then lets threads that are done help: work(unit, thread).
template <class Work>
void Ops::deal(int64_t count, Work&& work) {
  if (count <= 1) return count > 0 ? work(0, 0) : void();
  const int threads = threads_;
  std::vector<std::atomic<int64_t>> counters(threads);
  run([&](int thread) {
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread + i) % threads;
      const int64_t begin = count * owner / threads, end = count * (owner + 1) / threads;
      for (int64_t unit; (unit = begin + counters[owner].fetch_add(1, std::memory_order_relaxed)) < end;)
        work(unit, thread);
    }
  });
}

template <class PackPanel>
void Ops::multiply(ProductTask task, int columns, int words, const float* bias,
                   const std::vector<ProductTile>& tiles, Panels panels, PackPanel&& pack_panel) {
  const int64_t panel_count = (columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t count = static_cast<int64_t>(tiles.size());
  if (!panels.data) {
    panels.bytes = words * int64_t{kPanelRowBytes};
    char* to = shared_[2].reserve(panel_count * panels.bytes);
    deal(panel_count, [&](int64_t panel, int) {
      const int column = static_cast<int>(panel * kPanelColumns);
      pack_panel(column, std::min(columns - column, kPanelColumns), to + panel * panels.bytes);
    });
    panels.data = to;
  }
  // Units of as many tiles as stay in a core's cache while all panels pass; less where threads would wait.
  const int64_t cached = std::max<int64_t>(1, kRowsBytes / (kTileRows * std::max<int64_t>(task.a_stride, 1)));
  const int64_t shared = (kUnitsPerThread * threads_ + panel_count - 1) / panel_count;
  const int64_t chunks = std::min(std::max((count + cached - 1) / cached, shared), count);
  deal(panel_count * chunks, [&](int64_t unit, int) {
    const int64_t panel = unit % panel_count, chunk = unit / panel_count;
    ProductTask mine = task;
    mine.column = static_cast<int>(panel * kPanelColumns);
    mine.bias = bias ? bias + mine.column : nullptr;
    mine.panel = panels.data + panel * panels.bytes;
    if (panel + 1 < panel_count) mine.next = mine.panel + panels.bytes;
    const int64_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
    kernels_.product(mine, tiles.data() + first, static_cast<int>(last - first));
  });
}

int64_t Ops::packed_bytes(DType dtype, int rows, int columns, bool contracts) {
  const int depth = contracts ? rows : columns, across = contracts ? columns : rows, group = group_of(dtype);
  return int64_t{(across + kPanelColumns - 1) / kPanelColumns} * ((depth + group - 1) / group) *
         kPanelRowBytes;
}

void Ops::pack(DType dtype, View weight, int rows, int columns, bool contracts, char* to) {
  std::lock_guard<std::mutex> lock(turn_);
  const int across = contracts ? columns : rows;
  const int64_t element = element_of(dtype), panels = (across + kPanelColumns - 1) / kPanelColumns;
  if (!rows || !columns) return;
  const int64_t bytes = packed_bytes(dtype, rows, columns, contracts) / panels;
  deal(panels, [&](int64_t panel, int) {
    const int first = static_cast<int>(panel * kPanelColumns),
              count = std::min(across - first, kPanelColumns);
    if (contracts)
      kernels_.panel_from_rows(dtype, weight.data + first * element, weight.stride * element, rows, count,
                               to + panel * bytes);
    else
      kernels_.panel_from_columns(dtype, weight.data + first * weight.stride * element,
                                  weight.stride * element, columns, count, to + panel * bytes);
  });
}

void Ops::expand(DType dtype, View x, View weight, const char* bias, int depth,
                 const std::vector<Block>& blocks, Activation activation, View out, View pre, Panels panels) {
  std::lock_guard<std::mutex> lock(turn_);
  const int64_t element = element_of(dtype), rows = total_rows(blocks);
  const int group = group_of(dtype), columns = largest(blocks), words = (depth + group - 1) / group;
  if (!rows || !columns) return;
  const float* wide_bias = float_bias(dtype, bias, columns, shared_[0]);
  const char* a = x.data;
  int64_t a_stride = x.stride * element;
  if (depth % group) {  // the last word of a row would reach into the next
    a_stride = words * int64_t{kWordBytes};
    char* copy = shared_[1].reserve(rows * a_stride);
    std::memset(copy, 0, rows * a_stride);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(copy + r * a_stride, x.data + r * x.stride * element, depth * element);
    a = copy;
  }
  const auto tiles =
      tiles_of(blocks, [&](const Block&) { return words; }, [](const Block& b) { return b.extent; });
  multiply({dtype, a, a_stride, nullptr, nullptr, out.data, out.stride, pre.data, pre.stride, 0, activation,
            nullptr},
           columns, words, wide_bias, tiles, panels, [&](int column, int count, char* to) {
             kernels_.panel_from_columns(dtype, weight.data + column * weight.stride * element,
                                         weight.stride * element, depth, count, to);
           });
}

void Ops::contract(DType dtype, View x, View weight_t, const char* bias, int columns,
                   const std::vector<Block>& blocks, View out, Panels panels) {
  std::lock_guard<std::mutex> lock(turn_);
  const int64_t element = element_of(dtype), rows = total_rows(blocks);
  const int group = group_of(dtype), depth = largest(blocks), words = (depth + group - 1) / group;
  if (!rows || !columns) return;
  const float* wide_bias = float_bias(dtype, bias, columns, shared_[0]);
  const char* a = x.data;
  int64_t a_stride = x.stride * element;
  const bool odd =
      std::any_of(blocks.begin(), blocks.end(), [&](const Block& b) { return b.extent % group; });
  if (odd) {  // the last word of a prefix would reach beyond it, in x and in the weight
    panels = {};
    a_stride = words * int64_t{kWordBytes};
    char* copy = shared_[1].reserve(rows * a_stride);
    std::memset(copy, 0, rows * a_stride);
    int64_t r = 0;
    for (const Block& b : blocks)
      for (int64_t i = 0; i < b.rows; ++i, ++r)
        std::memcpy(copy + r * a_stride, x.data + r * x.stride * element, b.extent * element);
    a = copy;
  }
  const auto tiles = tiles_of(
      blocks, [&](const Block& b) { return (b.extent + group - 1) / group; },
      [&](const Block&) { return columns; });
  multiply(
      {dtype, a, a_stride, nullptr, nullptr, out.data, out.stride, nullptr, 0, 0, Activation::kNone, nullptr},
      columns, words, wide_bias, tiles, panels, [&](int column, int count, char* to) {
        kernels_.panel_from_rows(dtype, weight_t.data + column * element, weight_t.stride * element, depth,
                                 count, to);
      });
}

/// Blocks from the widest to the narrowest: the rows that reach a neuron are then a prefix of K. They come in
/// sums of at most `kWordsPerSum` words, whose operands stay in caches between being made and being used.
std::vector<Ops::Sum> Ops::sums_of(const std::vector<Block>& blocks, int group) {
  std::vector<std::pair<int64_t, Block>> sorted;
  int64_t row = 0;
  for (const Block& b : blocks) {
    if (b.rows && b.extent) sorted.emplace_back(row, b);
    row += b.rows;
  }
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& p, const auto& q) { return p.second.extent > q.second.extent; });
  std::vector<Sum> every(1);
  int64_t words = 0;
  for (auto [first, block] : sorted) {
    while (block.rows) {
      if (words == kWordsPerSum) every.emplace_back(), words = 0;
      const int64_t here = std::min<int64_t>(block.rows, (kWordsPerSum - words) * group);
      every.back().push_back({first, {here, block.extent}, words});
      words += (here + group - 1) / group;
      first += here, block.rows -= here;
    }
  }
  return every;
}

template <class Left>
void Ops::add_up(DType dtype, View right, int columns, const std::vector<Block>& blocks, int rows, View out,
                 float* sums, Left&& left) {
  const int64_t element = element_of(dtype);
  const int group = group_of(dtype), most = largest(blocks);
  if (sums) std::fill_n(sums, rows, 0.f);
  deal((rows - most + kRowsPerUnit - 1) / kRowsPerUnit, [&](int64_t unit, int) {
    const int64_t first = most + unit * kRowsPerUnit, last = std::min<int64_t>(first + kRowsPerUnit, rows);
    for (int64_t r = first; r < last; ++r)
      std::memset(out.data + r * out.stride * element, 0, columns * element);
  });
  if (!most || !columns) return;
  const std::vector<Sum> every = sums_of(blocks, group);
  const auto words_of = [&](const Part& p) { return (p.block.rows + group - 1) / group; };
  const auto depth_of = [&](const Sum& sum) { return sum.back().word + words_of(sum.back()); };
  const bool one = every.size() == 1;  // else the first is as long as any
  const int64_t a_stride = row_bytes(depth_of(every.front()) * kWordBytes);
  char* a = shared_[0].reserve(round_up(most, kPanelColumns) * a_stride);
  const int64_t total_stride = round_up(columns, kPanelColumns);
  float* total = one ? nullptr : reinterpret_cast<float*>(shared_[3].reserve(most * total_stride * 4));
  for (const Sum& parts : every) {
    const std::vector<View> lefts = left(parts);
    // A: the transpose of `left`, zero where a row does not reach.
    deal((most + kStripColumns - 1) / kStripColumns, [&](int64_t strip, int) {
      const int first = static_cast<int>(strip * kStripColumns);
      const int here = std::min(most - first, kStripColumns);
      for (size_t i = 0; i < parts.size(); ++i) {
        const Part& p = parts[i];
        const int reached = std::clamp(p.block.extent - first, 0, here);
        const int count = static_cast<int>(p.block.rows);
        const char* from = lefts[i].data + first * element;
        const int64_t stride = lefts[i].stride * element;
        char* to = a + first * a_stride + p.word * kWordBytes;
        if (reached) kernels_.rows_from_columns(dtype, from, stride, count, reached, to, a_stride);
        if (reached && sums) kernels_.add_rows(dtype, from, stride, count, reached, sums + first);
        for (int c = reached; c < here; ++c) std::memset(to + c * a_stride, 0, words_of(p) * kWordBytes);
      }
    });
    std::vector<ProductTile> tiles;
    const int64_t count = (most + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < count; ++i) {
      const int first = static_cast<int>(most * i / count), next = static_cast<int>(most * (i + 1) / count);
      int64_t reach = 0;
      for (const Part& p : parts)
        if (p.block.extent > first) reach = p.word + words_of(p);
      if (reach) tiles.push_back({first, next - first, static_cast<int>(reach), columns});
    }
    ProductTask task{dtype,      a,       a_stride, nullptr, nullptr,           out.data,
                     out.stride, nullptr, 0,        0,       Activation::kNone, nullptr};
    task.sums = total, task.sums_stride = total_stride, task.add = &parts != &every.front();
    multiply(task, columns, static_cast<int>(depth_of(parts)), nullptr, tiles, {},
             [&](int column, int count_, char* to) {
               for (const Part& p : parts)
                 kernels_.panel_from_rows(dtype, right.data + (p.row * right.stride + column) * element,
                                          right.stride * element, static_cast<int>(p.block.rows), count_,
                                          to + p.word * int64_t{kPanelRowBytes});
             });
  }
  if (one) return;
  deal((most + kRowsPerUnit - 1) / kRowsPerUnit, [&](int64_t unit, int) {
    const int64_t first = unit * kRowsPerUnit, last = std::min<int64_t>(first + kRowsPerUnit, most);
    for (int64_t r = first; r < last; ++r)
      kernels_.narrow(dtype, total + r * total_stride, out.data + r * out.stride * element, columns);
  });
}

void Ops::weight_gradient(DType dtype, View left, View right, int columns, const std::vector<Block>& blocks,
                          int rows, View out, float* sums) {
  std::lock_guard<std::mutex> lock(turn_);
  add_up(dtype, right, columns, blocks, rows, out, sums, [&](const Sum& parts) {
    std::vector<View> lefts;
    for (const Part& p : parts)
      lefts.push_back({left.data + p.row * left.stride * element_of(dtype), left.stride});
    return lefts;
  });
}

void Ops::expand_backward(DType dtype, Activation activation, View grad, View pre, View x, View weight,
                          int columns, const std::vector<Block>& blocks, int rows, View grad_x,
                          View grad_weight, float* sums, Panels panels) {
  std::lock_guard<std::mutex> lock(turn_);
  const int64_t element = element_of(dtype);
  const int group = group_of(dtype), most = largest(blocks);
  const bool odd =
      std::any_of(blocks.begin(), blocks.end(), [&](const Block& b) { return b.extent % group; });
  const bool curved = activation != Activation::kNone, made = curved || odd;
  if (odd) panels = {};
  const int64_t stride = made ? row_bytes(most * element) / element : grad.stride;
  /// Of each part of a sum, grad * activation'(pre), with a zero behind an odd extent; grad_x in passing.
  auto inner = [&](const Sum& parts) {
    std::vector<View> lefts;
    std::vector<ProductTile> tiles;
    struct Unit {
      int part, begin, end;
    };
    std::vector<Unit> units;
    const Part& last = parts.back();
    const int64_t room = last.word * group + last.block.rows;
    char* scratch = made ? shared_[4].reserve(room * stride * element) : nullptr;
    int64_t at = 0;  // rows of scratch
    for (size_t i = 0; i < parts.size(); ++i) {
      const Part& p = parts[i];
      lefts.push_back(
          {made ? scratch + at * stride * element : grad.data + p.row * stride * element, stride});
      const int64_t first = made ? at : p.row, count = (p.block.rows + kTileRows - 1) / kTileRows;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t begin = p.block.rows * t / count, end = p.block.rows * (t + 1) / count;
        tiles.push_back({static_cast<int>(first + begin), static_cast<int>(end - begin),
                         (p.block.extent + group - 1) / group, columns, static_cast<int>(p.row - first)});
      }
      for (int64_t r = 0; made && r < p.block.rows; r += kRowsPerUnit)
        units.push_back({static_cast<int>(i), static_cast<int>(r),
                         static_cast<int>(std::min<int64_t>(r + kRowsPerUnit, p.block.rows))});
      at += p.block.rows;
    }
    deal(static_cast<int64_t>(units.size()), [&](int64_t unit, int) {
      const Unit& u = units[unit];
      const Part& p = parts[u.part];
      const int extent = p.block.extent;
      const char* from = grad.data + p.row * grad.stride * element;
      char* to = lefts[u.part].data;
      if (curved) {
        const char* before = pre.data + p.row * pre.stride * element;
        kernels_.slope({dtype, activation, from, before, to, grad.stride, pre.stride, stride, extent},
                       u.begin, u.end);
      }
      for (int r = u.begin; r < u.end; ++r) {
        if (!curved)
          std::memcpy(to + r * stride * element, from + r * grad.stride * element, extent * element);
        if (extent % group) std::memset(to + (r * stride + extent) * element, 0, element);
      }
    });
    if (grad_x.data) {
      const char* a = made ? scratch : grad.data;
      const int words = (most + group - 1) / group;
      multiply({dtype, a, stride * element, nullptr, nullptr, grad_x.data, grad_x.stride, nullptr, 0, 0,
                Activation::kNone, nullptr},
               columns, words, nullptr, tiles, panels, [&](int column, int count, char* to) {
                 kernels_.panel_from_rows(dtype, weight.data + column * element, weight.stride * element,
                                          most, count, to);
               });
    }
    return lefts;
  };
  if (grad_weight.data) {
    add_up(dtype, x, columns, blocks, rows, grad_weight, sums, inner);
  } else if (most && columns) {
    for (const Sum& parts : sums_of(blocks, group)) inner(parts);
  }
}

void Ops::column_sums(DType dtype, View x, const std::vector<Block>& blocks, int columns, float* sums) {
  std::lock_guard<std::mutex> lock(turn_);
  const int64_t element = element_of(dtype);
  std::fill_n(sums, columns, 0.f);
  const int most = largest(blocks);
  deal((most + kPanelColumns - 1) / kPanelColumns, [&](int64_t unit, int) {
    const int first = static_cast<int>(unit * kPanelColumns);
    int64_t row = 0;
    for (const Block& b : blocks) {
      const int reached = std::min(b.extent - first, kPanelColumns);
      if (reached > 0 && b.rows > 0)
        kernels_.add_rows(dtype, x.data + (row * x.stride + first) * element, x.stride * element,
                          static_cast<int>(b.rows), reached, sums + first);
      row += b.rows;
    }
  });
}

void Ops::attention(const AttentionOp& task, const std::vector<int64_t>& offsets,
                    const std::vector<Block>& blocks) {
  std::lock_guard<std::mutex> lock(turn_);
  struct Unit {
    int sequence, head;
    int64_t mask_row;
  };
  std::vector<Unit> units;
  int sequence = 0, longest = 0;
  for (const Block& b : blocks) {
    const int64_t first = offsets[sequence];
    for (int64_t i = 0; i < b.rows; ++i, ++sequence) {
      const int length = static_cast<int>(offsets[sequence + 1] - offsets[sequence]);
      longest = std::max(longest, length);
      for (int head = 0; length && head < b.extent; ++head)
        units.push_back({sequence, head, offsets[sequence] - first});
    }
  }
  const int64_t bytes = task.grad.data ? attention_backward_scratch(longest, task.head_size)
                                       : attention_scratch(longest, task.head_size);
  for (Buffer& b : scratch_) b.reserve(bytes);
  deal(static_cast<int64_t>(units.size()), [&](int64_t unit, int thread) {
    const Unit& u = units[unit];
    kernels_.attention_op(task, u.head, static_cast<int>(offsets[u.sequence]),
                          static_cast<int>(offsets[u.sequence + 1]), u.mask_row, scratch_[thread].data());
  });
}

void Ops::norm(const NormOp& task, int64_t rows) {
  std::lock_guard<std::mutex> lock(turn_);
  for (Buffer& b : scratch_) b.reserve(4 * round_up(task.hidden, kPanelColumns));
  deal((rows + kRowsPerUnit - 1) / kRowsPerUnit, [&](int64_t unit, int thread) {
    kernels_.norm_op(task, static_cast<int>(unit * kRowsPerUnit),
                     static_cast<int>(std::min(rows, (unit + 1) * kRowsPerUnit)),
                     reinterpret_cast<float*>(scratch_[thread].data()));
  });
}

void Ops::norm_backward(const NormOp& task, int64_t rows, char* grad_weight, char* grad_bias) {
  std::lock_guard<std::mutex> lock(turn_);
  // Sums over fixed parts of the rows, added in order: the same bits for any number of threads.
  const int64_t width = round_up(task.hidden, kPanelColumns);
  const int64_t parts = std::max<int64_t>(1, (rows + kRowsPerSum - 1) / kRowsPerSum);
  float* sums = reinterpret_cast<float*>(shared_[0].reserve(parts * 2 * width * 4));
  std::memset(sums, 0, parts * 2 * width * 4);
  deal(parts, [&](int64_t part, int) {
    float* mine = sums + part * 2 * width;
    kernels_.norm_backward_op(task, static_cast<int>(part * kRowsPerSum),
                              static_cast<int>(std::min(rows, (part + 1) * kRowsPerSum)), mine, mine + width);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < 2 * width; ++i) sums[i] += sums[part * 2 * width + i];
  kernels_.narrow(task.dtype, sums, grad_weight, task.hidden);
  kernels_.narrow(task.dtype, sums + width, grad_bias, task.hidden);
}

void Ops::scatter(DType dtype, View grad, const int64_t* ids, int64_t rows, char* table, int columns) {
  std::lock_guard<std::mutex> lock(turn_);
  // Columns are dealt out, not rows: two tokens may be the same word.
  deal((columns + kPanelColumns - 1) / kPanelColumns, [&](int64_t unit, int) {
    const int begin = static_cast<int>(unit * kPanelColumns);
    kernels_.scatter(dtype, grad.data, grad.stride, ids, rows, table, columns, begin,
                     std::min(begin + kPanelColumns, columns));
  });
}

double Ops::loss(const LossOp& task, int64_t rows) {
  std::lock_guard<std::mutex> lock(turn_);
  const int64_t parts = (rows + kRowsPerSum - 1) / kRowsPerSum;
  std::vector<double> sums(parts);
  deal(parts, [&](int64_t part, int) {
    sums[part] = kernels_.loss(task, part * kRowsPerSum, std::min(rows, (part + 1) * kRowsPerSum));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total / static_cast<double>(terms(task, rows));
}

void Ops::loss_backward(LossOp task, int64_t rows) {
  std::lock_guard<std::mutex> lock(turn_);
  task.scale /= static_cast<float>(terms(task, rows));
  deal((rows + kRowsPerSum - 1) / kRowsPerSum, [&](int64_t part, int) {
    kernels_.loss_backward(task, part * kRowsPerSum, std::min(rows, (part + 1) * kRowsPerSum));
  });
}

}  // namespace dynabert
