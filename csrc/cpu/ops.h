// The ops of dynabert_fast.ops on ordinary tensors: pointers in, pointers out, one thread team.
// Letters as in model.h; k is an extent. A row block is `rows` rows with one extent (the staircase).
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "thread_team.h"

namespace dynabert {

struct Block {
  int64_t rows;
  int extent;
};

/// A weight that `Ops::pack` has rearranged: `bytes` a panel. Without data, panels are packed in each call.
struct Panels {
  const char* data = nullptr;
  int64_t bytes = 0;
};

/// GOMP_parallel of an OpenMP runtime: runs a function on some threads and returns when all have.
typedef void (*OpenMpParallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

class Ops {
 public:
  /// Threads are those of the OpenMP runtime that torch uses, or the class's own where `parallel` is null.
  /// Two teams on the same cores get in each other's way: torch's threads wait awake for milliseconds.
  Ops(int threads, const Kernels& kernels, OpenMpParallel parallel)
      : kernels_(kernels),
        threads_(threads),
        parallel_(parallel),
        team_(parallel && threads > 0 ? 1 : threads),  // refuses fewer than one
        scratch_(threads) {}

  int threads() const { return threads_; }

  /// The panels of weight [rows, columns], as expand reads it or as contract does (`contracts`), into
  /// `packed_bytes` on a boundary of 64.
  void pack(DType dtype, View weight, int rows, int columns, bool contracts, char* to);
  static int64_t packed_bytes(DType dtype, int rows, int columns, bool contracts);

  /// out[r, c] = act(sum_i x[r, i] weight[c, i] + bias[c]) for c below r's extent: x [T, D], weight [K, D],
  /// bias [K] or null, out and pre (the sums; null, or where there is an activation) [T, >= max k].
  void expand(DType dtype, View x, View weight, const char* bias, int depth, const std::vector<Block>& blocks,
              Activation activation, View out, View pre, Panels panels = {});

  /// out[r, c] = sum over i below r's extent of x[r, i] weight_t[i, c] + bias[c]: x [T, >= max k],
  /// weight_t [K, D], bias [D] or null, out [T, D].
  void contract(DType dtype, View x, View weight_t, const char* bias, int columns,
                const std::vector<Block>& blocks, View out, Panels panels = {});

  /// out[i, c] = sum over rows r whose extent is above i of left[r, i] right[r, c], zero from the largest
  /// extent up to `rows`: left [T, >= max k], right [T, D], out [rows, D]. Also `sums` [rows], unless null:
  /// of left's columns, as far as rows reach.
  void weight_gradient(DType dtype, View left, View right, int columns, const std::vector<Block>& blocks,
                       int rows, View out, float* sums = nullptr);

  /// The gradients of expand, from that of its output: grad_x [T, D] as contract's output, grad_weight [rows,
  /// D] and sums [rows] (the bias's) as weight_gradient's, of grad * activation'(pre), which is never whole
  /// in memory. grad_x, or grad_weight and sums, may be null.
  void expand_backward(DType dtype, Activation activation, View grad, View pre, View x, View weight,
                       int columns, const std::vector<Block>& blocks, int rows, View grad_x, View grad_weight,
                       float* sums, Panels panels = {});

  /// sums[i] = sum over rows whose extent is above i of x[r, i], zero from the largest extent up to
  /// `columns`.
  void column_sums(DType dtype, View x, const std::vector<Block>& blocks, int columns, float* sums);

  /// Attention of packed sequences, forward, or backward where `task.grad` is set. Block i has `rows`
  /// sequences of `extent` heads; sequence s is the rows offsets[s] to offsets[s + 1].
  void attention(const AttentionOp& task, const std::vector<int64_t>& offsets,
                 const std::vector<Block>& blocks);

  void norm(const NormOp& task, int64_t rows);
  /// Also writes the gradients of weight and bias, `hidden` values of the op's type each.
  void norm_backward(const NormOp& task, int64_t rows, char* grad_weight, char* grad_bias);
  /// table[ids[r]] += grad[r]: grad [T, D], table [*, D].
  void scatter(DType dtype, View grad, const int64_t* ids, int64_t rows, char* table, int columns);

  /// The mean over rows (cross entropy) or over values (squared error).
  double loss(const LossOp& task, int64_t rows);
  /// The student's gradient; `task.scale` is the loss's, and becomes the mean's here.
  void loss_backward(LossOp task, int64_t rows);

 private:
  template <class Work>
  void deal(int64_t count, Work&& work);

  void run(const std::function<void(int)>& work);

  /// The product of `task` with every panel of B: `panels`, or what pack_panel(column, count, to) makes
  /// first.
  template <class PackPanel>
  void multiply(ProductTask task, int columns, int words, const float* bias,
                const std::vector<ProductTile>& tiles, Panels panels, PackPanel&& pack_panel);

  /// Rows of one extent, in a sum of a weight's gradient.
  struct Part {
    int64_t row;
    Block block;
    int64_t word;  // first within its sum; an odd block of bf16 ends with a zero
  };
  using Sum = std::vector<Part>;
  static std::vector<Sum> sums_of(const std::vector<Block>& blocks, int group);

  /// weight_gradient, where left(sum) gives for each part of a sum where its rows of `left` are.
  template <class Left>
  void add_up(DType dtype, View right, int columns, const std::vector<Block>& blocks, int rows, View out,
              float* sums, Left&& left);

  const Kernels& kernels_;
  const int threads_;
  const OpenMpParallel parallel_;
  ThreadTeam team_;
  std::vector<Buffer> scratch_;  // of each thread
  Buffer shared_[5];
  std::mutex turn_;  // one op at a time
};

}  // namespace dynabert
