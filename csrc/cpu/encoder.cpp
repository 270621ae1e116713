#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "buffer.h"

namespace dynabert {

const char* const kStageNames[kStages] = {"embed", "qkv", "attention", "quantise", "out",
                                          "norm",  "up",  "down",      "pool"};

namespace {

// Rows of activations that stay in the second-level cache while the panels of a matrix go by:
// 192 x 3072 int8 are 590 KB.
constexpr int kChunkRows = 192;
// Work is dealt out in units; this many a thread keep the threads busy to the end of a phase.
constexpr int kUnitsPerThread = 4;
constexpr int kRowsPerUnit = 16;  // of LayerNorm, quantisation, embedding

/// Rows [begin, end) in tiles of at most 6 whose sizes differ by one at most.
void add_tiles(int begin, int end, int extent, std::vector<Tile>& tiles) {
  const int count = (end - begin + kTileRows - 1) / kTileRows;
  for (int i = 0; i < count; ++i) {
    const int first = begin + static_cast<int>(int64_t{end - begin} * i / count);
    const int next = begin + static_cast<int>(int64_t{end - begin} * (i + 1) / count);
    tiles.push_back({first, next - first, extent});
  }
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

struct Encoder::Workspace {
  Buffer x, y, operand, scales, qkv, context, middle, pooled;
  std::vector<Buffer> scratch;
  std::vector<int32_t> ids, token_types, positions;
  std::vector<int64_t> destination;  // of each packed row, in [B * S]
  // Beyond this many bytes, memory goes back to the system after a call.
  static constexpr int64_t kKept = int64_t{1} << 30;

  int64_t bytes() const {
    int64_t total = 0;
    for (const Buffer* b : {&x, &y, &operand, &scales, &qkv, &context, &middle, &pooled}) total += b->bytes();
    return total;
  }
};

/// One forward pass: the packed batch, and the phases that all threads walk through.
class Encoder::Pass {
 public:
  Pass(Encoder& encoder, Workspace& space, const Batch& batch, const Output& output)
      : e_(encoder), w_(space), batch_(batch), out_(output), shape_(encoder.model_.shape) {
    group();
    pack();
    plan();
    reserve();
  }

  void run() {
    e_.team_.run([this](int thread) { walk(thread); });
  }

 private:
  // Sequences [first, last) in sorted order and their rows, all of one sub-network.
  struct Group {
    const Subnet* subnet;
    int first, last, begin, end;
  };

  struct Active {
    const Group* group;
    int heads, neurons;
  };

  // What a layer computes: the groups that keep it, and their rows in tiles. Layers alike share one.
  struct LayerPlan {
    std::vector<Active> active;
    std::vector<Tile> qkv, context, neurons;
  };

  /// Sequences of one sub-network stand together; the caller's order is kept inside a group.
  void group() {
    const int count = static_cast<int>(batch_.sequences);
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return batch_.subnets[a] < batch_.subnets[b]; });
    std::lock_guard<std::mutex> lock(e_.mutex_);
    for (int i = 0; i < count; ++i) {
      const int number = batch_.subnets[order_[i]];
      if (number < 0 || number >= static_cast<int>(e_.subnets_.size()))
        refuse("sub-network " + std::to_string(number) + " is not registered");
      if (i == 0 || number != batch_.subnets[order_[i - 1]])
        groups_.push_back({&e_.subnets_[number], i, i, 0, 0});
      groups_.back().last = i + 1;
    }
  }

  int32_t checked(const char* name, int64_t value, int64_t count) {
    if (value < 0 || value >= count)
      refuse(std::string(name) + " must be in 0 to " + std::to_string(count - 1) + ", got " +
             std::to_string(value) + "; is this the checkpoint's own tokenizer?");
    return static_cast<int32_t>(value);
  }

  /// Real tokens one behind the other, in the sorted order.
  void pack() {
    const int64_t length = batch_.length;
    w_.ids.clear();
    w_.token_types.clear();
    w_.positions.clear();
    w_.destination.clear();
    offsets_.assign(1, 0);
    for (int sequence : order_) {
      int64_t real = 0;  // tokens that are not padding so far, for RoBERTa's positions
      for (int64_t s = 0; s < length; ++s) {
        const int64_t at = sequence * length + s;
        const int64_t id = batch_.ids[at];
        const bool counted = id != shape_.padding_id;
        real += counted;
        if (batch_.mask && !batch_.mask[at]) continue;
        w_.ids.push_back(checked("token ids", id, shape_.vocabulary));
        w_.token_types.push_back(
            batch_.token_types ? checked("token_type_ids", batch_.token_types[at], shape_.token_types) : 0);
        const int64_t position = batch_.positions             ? batch_.positions[at]
                                 : shape_.first_position == 0 ? s
                                 : counted                    ? shape_.padding_id + real
                                                              : shape_.padding_id;
        w_.positions.push_back(checked("position_ids", position, shape_.positions));
        w_.destination.push_back(at);
      }
      if (static_cast<int64_t>(w_.ids.size()) == offsets_.back())
        refuse("attention_mask leaves no token in row " + std::to_string(sequence) + "; drop the row");
      if (w_.ids.size() > (size_t{1} << 30)) refuse("a call may have 2^30 tokens at most; split the batch");
      offsets_.push_back(static_cast<int>(w_.ids.size()));
      longest_ = std::max(longest_, offsets_.back() - offsets_[offsets_.size() - 2]);
    }
    for (Group& g : groups_) {
      g.begin = offsets_[g.first];
      g.end = offsets_[g.last];
    }
  }

  /// Threads only read what is laid out here, so that none of them can run out of memory.
  void plan() {
    const int d = shape_.head_size;
    for (const Group& g : groups_) add_tiles(g.begin, g.end, 0, rows_);
    add_tiles(0, static_cast<int>(batch_.sequences), shape_.hidden, pool_tiles_);
    plans_.reserve(shape_.layers());  // layer_plans_ points into it
    for (int layer = 0; layer < shape_.layers(); ++layer) {
      LayerPlan plan;
      for (const Group& g : groups_) {
        const auto& layers = g.subnet->layers;
        const auto at = std::lower_bound(layers.begin(), layers.end(), layer);
        if (at == layers.end() || *at != layer) continue;
        const size_t i = at - layers.begin();
        plan.active.push_back({&g, g.subnet->heads[i], g.subnet->neurons[i]});
      }
      const auto same = std::find_if(plans_.begin(), plans_.end(), [&](const LayerPlan& other) {
        return std::equal(plan.active.begin(), plan.active.end(), other.active.begin(), other.active.end(),
                          [](const Active& a, const Active& b) {
                            return a.group == b.group && a.heads == b.heads && a.neurons == b.neurons;
                          });
      });
      if (same != plans_.end()) {
        layer_plans_.push_back(&*same);
        continue;
      }
      for (const Active& a : plan.active) {
        add_tiles(a.group->begin, a.group->end, 3 * a.heads * d, plan.qkv);
        add_tiles(a.group->begin, a.group->end, a.heads * d, plan.context);
        add_tiles(a.group->begin, a.group->end, a.neurons, plan.neurons);
      }
      plans_.push_back(std::move(plan));
      layer_plans_.push_back(&plans_.back());
    }
  }

  void reserve() {
    const bool f32 = shape_.dtype == DType::kF32;
    const int64_t tokens = offsets_.back(), sequences = batch_.sequences;
    int heads = 0, neurons = 0;
    for (const Group& g : groups_) {
      heads = std::max(heads, *std::max_element(g.subnet->heads.begin(), g.subnet->heads.end()));
      neurons = std::max(neurons, *std::max_element(g.subnet->neurons.begin(), g.subnet->neurons.end()));
    }
    const int64_t element = f32 ? 4 : 2;
    const int64_t d = shape_.head_size;
    x_stride_ = row_bytes(4 * round_up(shape_.hidden, kPanelColumns)) / 4;
    qkv_stride_ = row_bytes(element * round_up(3 * heads * d, kPanelColumns)) / element;
    context_stride_ = row_bytes(element * round_up(heads * d, kPanelColumns)) / element;
    middle_stride_ = row_bytes(element * round_up(neurons, kPanelColumns)) / element;
    // int8 reads whole blocks of K.
    const int64_t widest = round_up(std::max<int64_t>({shape_.hidden, heads * d, neurons}), 256) + d;
    operand_stride_ = row_bytes(widest * (shape_.dtype == DType::kS8 ? 1 : 2));
    x_ = reinterpret_cast<float*>(w_.x.reserve(tokens * x_stride_ * 4));
    y_ = reinterpret_cast<float*>(w_.y.reserve(tokens * x_stride_ * 4));
    qkv_ = w_.qkv.reserve(tokens * qkv_stride_ * element);
    context_ = w_.context.reserve(tokens * context_stride_ * element);
    middle_ = w_.middle.reserve(tokens * middle_stride_ * element);
    if (!f32) operand_.data = w_.operand.reserve(tokens * operand_stride_);
    operand_.stride = operand_stride_;
    operand_.scale = reinterpret_cast<float*>(w_.scales.reserve(tokens * 4));
    first_ = reinterpret_cast<float*>(w_.pooled.reserve(2 * sequences * x_stride_ * 4));
    pooled_ = first_ + sequences * x_stride_;
    if (static_cast<int>(w_.scratch.size()) < e_.team_.size())
      w_.scratch = std::vector<Buffer>(e_.team_.size());
    for (Buffer& b : w_.scratch) b.reserve(attention_scratch(longest_, shape_.head_size));
    // For each thread and each phase: at most 10 in a layer, and a few around the layers.
    counters_ = std::vector<std::atomic<int>>((shape_.layers() * 10 + 8) * e_.team_.size());
  }

  // ---- phases ----

  /// Deals `count` units out to the threads and waits for all: a phase. Each thread has a stretch of
  /// its own, in order, so that it knows what comes next; then it helps the others with theirs.
  template <class Work>
  void phase(int thread, int& number, Stage stage, int count, Work&& work) {
    const auto start = std::chrono::steady_clock::now();
    const int threads = e_.team_.size();
    auto* counters = counters_.data() + int64_t{number++} * threads;
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread + i) % threads;
      const int begin = static_cast<int>(int64_t{count} * owner / threads);
      const int end = static_cast<int>(int64_t{count} * (owner + 1) / threads);
      for (int unit; (unit = begin + counters[owner].fetch_add(1, std::memory_order_relaxed)) < end;)
        work(unit, unit + 1 < end);
    }
    e_.team_.barrier();
    if (thread == 0 && out_.seconds)
      out_.seconds[stage] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  template <class Work>
  void rows_phase(int thread, int& number, Stage stage, const std::vector<Tile>& tiles, Work&& work) {
    const int step = (kRowsPerUnit + kTileRows - 1) / kTileRows;
    const int count = static_cast<int>(tiles.size() + step - 1) / step;
    phase(thread, number, stage, count, [&](int unit, bool) {
      const int last = std::min<int>((unit + 1) * step, static_cast<int>(tiles.size()));
      for (int t = unit * step; t < last; ++t) work(tiles[t]);
    });
  }

  /// How a product is cut: every panel that a tile reaches, for each chunk of the rows.
  struct Cut {
    int panels, chunks;
  };

  Cut cut(const Matrix& m, const std::vector<Tile>& tiles) const {
    int columns = m.columns;
    if (!m.contracts) {
      columns = 0;
      for (const Tile& tile : tiles) columns = std::max(columns, tile.extent);
    }
    const int panels = (columns + kPanelColumns - 1) / kPanelColumns;
    const int count = static_cast<int>(tiles.size()), threads = e_.team_.size();
    const int whole = (count * kTileRows + kChunkRows - 1) / kChunkRows;
    const int wanted = threads > 1 ? (kUnitsPerThread * threads + panels - 1) / panels : 1;
    return {panels, std::min(std::max(whole, wanted), count)};
  }

  /// `next` and its tiles are the product after this one, whose first panel is fetched at the end.
  void linear_phase(int thread, int& number, Stage stage, const LinearTask& task,
                    const std::vector<Tile>& tiles, const Matrix* next, const std::vector<Tile>& next_tiles) {
    const Matrix& m = *task.matrix;
    const auto [panels, chunks] = cut(m, tiles);
    const char* after = nullptr;
    if (next) {
      const Cut then = cut(*next, next_tiles);
      const int first = static_cast<int>(int64_t{then.panels} * then.chunks * thread / e_.team_.size());
      after = next->panels + first % then.panels * next->panel_bytes;
    }
    const int count = static_cast<int>(tiles.size());
    phase(thread, number, stage, chunks * panels, [&, panels = panels, chunks = chunks](int unit, bool more) {
      const int chunk = unit / panels, panel = unit % panels;
      const int begin = static_cast<int>(int64_t{count} * chunk / chunks);
      const int end = static_cast<int>(int64_t{count} * (chunk + 1) / chunks);
      const char* fetched = !more ? after : m.panels + (panel + 1) % panels * m.panel_bytes;
      e_.kernels_.linear(task, tiles.data() + begin, end - begin, panel, fetched);
    });
  }

  /// Everything, as one thread of the team.
  void walk(int thread) {
    const DType dtype = shape_.dtype;
    const bool f32 = dtype == DType::kF32;
    int number = 0;
    const EmbedTask embed{dtype, &e_.model_, w_.ids.data(), w_.token_types.data(), w_.positions.data(),
                          x_,    x_stride_,  operand_};
    rows_phase(thread, number, kEmbed, rows_,
               [&](const Tile& t) { e_.kernels_.embed(embed, t.row, t.row + t.rows); });
    const bool all_hidden = out_.hidden.size() > 1;
    auto first = [&](const Group&) { return out_.hidden[0]; };
    if (all_hidden) write_hidden(thread, number, first);
    for (int layer = 0; layer < shape_.layers(); ++layer) {
      if (layer_plans_[layer]->active.empty()) continue;
      const Layer* layers = e_.model_.layers.data();
      run_layer(thread, number, layers[layer], *layer_plans_[layer],
                layer + 1 < shape_.layers() ? &layers[layer + 1] : nullptr);
      if (all_hidden) write_hidden(thread, number, [&](const Group& g) { return state_after(layer, g); });
    }
    if (out_.hidden.size() == 1) write_hidden(thread, number, first);
    if (thread == 0 && (out_.pooled || out_.logits)) pool(f32);
  }

  /// `next` is the layer after it, null for the last (one that a sub-network skips costs a wrong guess).
  void run_layer(int thread, int& number, const Layer& layer, const LayerPlan& plan, const Layer* next) {
    const DType dtype = shape_.dtype;
    const bool f32 = dtype == DType::kF32, s8 = dtype == DType::kS8;
    const int d = shape_.head_size;
    const auto& active = plan.active;
    const Operand x = f32 ? Operand{reinterpret_cast<char*>(x_), x_stride_ * 4, nullptr} : operand_;

    LinearTask qkv{dtype, &layer.qkv, x};
    set_output(qkv, qkv_, qkv_stride_);
    linear_phase(thread, number, kQkv, qkv, plan.qkv, &layer.out, plan.context);

    const AttentionTask attention{!f32, qkv_, qkv_stride_, context_, context_stride_, d};
    // A unit is one head of one sequence; of few long ones, some of the queries.
    int units = 0;
    for (const Active& a : active) units += (a.group->last - a.group->first) * a.heads;
    const int parts = std::max(1, std::min(kUnitsPerThread * e_.team_.size() / units, longest_ / 48));
    phase(thread, number, kAttention, units * parts, [&](int unit, bool) {
      const int part = unit % parts;
      int rest = unit / parts;
      for (const Active& a : active) {
        const int here = (a.group->last - a.group->first) * a.heads;
        if (rest >= here) {
          rest -= here;
          continue;
        }
        const int sequence = a.group->first + rest / a.heads, head = rest % a.heads;
        const int begin = offsets_[sequence], end = offsets_[sequence + 1];
        const int tiles_here = (end - begin + kTileRows - 1) / kTileRows;
        const int from = std::min(tiles_here * part / parts * kTileRows, end - begin);
        const int to = std::min(tiles_here * (part + 1) / parts * kTileRows, end - begin);
        if (from < to)
          e_.kernels_.attention(attention, head, begin, end, from, to, w_.scratch[thread].reserve(0));
        return;
      }
    });

    Operand context{context_, context_stride_ * (f32 ? 4 : 2), nullptr};
    if (s8) {
      quantise_phase(thread, number, context_, context_stride_, layer.out, plan.context);
      context = operand_;
    } else if (!f32 && d % 2) {  // the last word of an odd prefix
      rows_phase(thread, number, kQuantise, plan.context, [&](const Tile& t) {
        for (int r = t.row; r < t.row + t.rows; ++r)
          if (t.extent % 2) std::memset(context_ + (r * context_stride_ + t.extent) * 2, 0, 2);
      });
    }
    LinearTask out{dtype, &layer.out, context};
    out.out_f32 = y_;
    out.out_stride = x_stride_;
    linear_phase(thread, number, kOut, out, plan.context, &layer.up, plan.neurons);
    norm_phase(thread, number, layer.attention_norm, plan.context);

    LinearTask up{dtype, &layer.up, x};
    up.activation = shape_.activation;
    set_output(up, middle_, middle_stride_);
    linear_phase(thread, number, kUp, up, plan.neurons, &layer.down, plan.neurons);

    Operand middle{middle_, middle_stride_ * (f32 ? 4 : 2), nullptr};
    if (s8) {
      quantise_phase(thread, number, middle_, middle_stride_, layer.down, plan.neurons);
      middle = operand_;
    }
    LinearTask down{dtype, &layer.down, middle};
    down.out_f32 = y_;
    down.out_stride = x_stride_;
    linear_phase(thread, number, kDown, down, plan.neurons, next ? &next->qkv : nullptr, plan.qkv);
    norm_phase(thread, number, layer.ffn_norm, plan.neurons);
  }

  void set_output(LinearTask& task, char* out, int64_t stride) {
    if (shape_.dtype == DType::kF32) task.out_f32 = reinterpret_cast<float*>(out);
    else task.out_bf16 = reinterpret_cast<uint16_t*>(out);
    task.out_stride = stride;
  }

  void quantise_phase(int thread, int& number, const char* in, int64_t stride, const Matrix& next,
                      const std::vector<Tile>& tiles) {
    rows_phase(thread, number, kQuantise, tiles, [&](const Tile& t) {
      const int padded = static_cast<int>(round_up(t.extent, next.block));
      e_.kernels_.quantise(reinterpret_cast<const uint16_t*>(in), stride, operand_, t.extent, padded, t.row,
                           t.row + t.rows);
    });
  }

  void norm_phase(int thread, int& number, const Norm& norm, const std::vector<Tile>& tiles) {
    const NormTask task{shape_.dtype, &norm, shape_.hidden, shape_.eps, y_, x_, x_stride_, operand_};
    rows_phase(thread, number, kNorm, tiles,
               [&](const Tile& t) { e_.kernels_.residual_norm(task, t.row, t.row + t.rows); });
  }

  /// Where the state of a group goes after a layer; null where its sub-network skips the layer.
  float* state_after(int layer, const Group& group) const {
    const auto& layers = group.subnet->layers;
    const auto at = std::lower_bound(layers.begin(), layers.end(), layer);
    const size_t state = at - layers.begin() + 1;
    return at != layers.end() && *at == layer && state < out_.hidden.size() ? out_.hidden[state] : nullptr;
  }

  /// Copies x to target(group), for the rows of each group for which that is not null.
  template <class Target>
  void write_hidden(int thread, int& number, Target&& target) {
    const int tokens = offsets_.back();
    const int count = (tokens + kRowsPerUnit - 1) / kRowsPerUnit;
    phase(thread, number, kPool, count, [&](int unit, bool) {
      const int begin = unit * kRowsPerUnit, end = std::min(begin + kRowsPerUnit, tokens);
      for (const Group& g : groups_) {
        const int from = std::max(begin, g.begin), to = std::min(end, g.end);
        float* state = from < to ? target(g) : nullptr;
        for (int row = from; state && row < to; ++row)
          std::memcpy(state + w_.destination[row] * shape_.hidden, x_ + row * x_stride_, 4 * shape_.hidden);
      }
    });
  }

  /// tanh(dense(first token)), and the head, on one thread: B rows of work.
  void pool(bool f32) {
    const auto start = std::chrono::steady_clock::now();
    const int sequences = static_cast<int>(batch_.sequences), hidden = shape_.hidden;
    for (int i = 0; i < sequences; ++i)
      std::memcpy(first_ + i * x_stride_, x_ + offsets_[i] * x_stride_, 4 * hidden);
    Operand in{reinterpret_cast<char*>(first_), x_stride_ * 4, nullptr};
    if (!f32) {
      in = operand_;
      e_.kernels_.convert(shape_.dtype, first_, x_stride_, in, hidden, sequences);
    }
    LinearTask dense{shape_.dtype, &e_.model_.pooler, in};
    dense.out_f32 = pooled_;
    dense.out_stride = x_stride_;
    for (int p = 0; p < e_.model_.pooler.panel_count(); ++p)
      e_.kernels_.linear(dense, pool_tiles_.data(), static_cast<int>(pool_tiles_.size()), p, nullptr);
    e_.kernels_.tanh(pooled_, sequences * x_stride_);
    for (int i = 0; i < sequences; ++i) {
      const float* row = pooled_ + i * x_stride_;
      if (out_.pooled) std::memcpy(out_.pooled + order_[i] * int64_t{hidden}, row, 4 * hidden);
      for (int c = 0; out_.logits && c < shape_.labels; ++c) {
        const float* weight = e_.model_.classifier_weight + int64_t{c} * hidden;
        // Eight sums in a fixed order: the compiler may not reorder one.
        float sums[8] = {};
        for (int j = 0; j < hidden; ++j) sums[j % 8] += row[j] * weight[j];
        out_.logits[order_[i] * int64_t{shape_.labels} + c] = e_.model_.classifier_bias[c] +
                                                              ((sums[0] + sums[4]) + (sums[2] + sums[6])) +
                                                              ((sums[1] + sums[5]) + (sums[3] + sums[7]));
      }
    }
    if (out_.seconds)
      out_.seconds[kPool] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  Encoder& e_;
  Workspace& w_;
  const Batch& batch_;
  const Output& out_;
  const Shape& shape_;
  std::vector<int> order_, offsets_;
  std::vector<Group> groups_;
  std::vector<Tile> rows_, pool_tiles_;
  std::vector<LayerPlan> plans_;
  std::vector<const LayerPlan*> layer_plans_;
  std::vector<std::atomic<int>> counters_;
  int longest_ = 0;
  int64_t x_stride_ = 0, qkv_stride_ = 0, context_stride_ = 0, middle_stride_ = 0, operand_stride_ = 0;
  float *x_ = nullptr, *y_ = nullptr, *first_ = nullptr, *pooled_ = nullptr;
  char *qkv_ = nullptr, *context_ = nullptr, *middle_ = nullptr;
  Operand operand_;
};

Encoder::Encoder(const Shape& shape, const char* buffer, int threads, const Kernels& kernels)
    : model_(view(shape, buffer)), kernels_(kernels), team_(threads) {}

Encoder::~Encoder() = default;

int Encoder::add_subnet(Subnet subnet) {
  const Shape& s = model_.shape;
  if (subnet.layers.empty() || subnet.layers.size() != subnet.heads.size() ||
      subnet.layers.size() != subnet.neurons.size())
    refuse("a sub-network needs one layer or more, and heads and neurons for each");
  int last = -1;
  for (size_t i = 0; i < subnet.layers.size(); ++i) {
    const int layer = subnet.layers[i];
    if (layer <= last || layer >= s.layers())
      refuse("layers must be ascending and below " + std::to_string(s.layers()));
    if (subnet.heads[i] < 1 || subnet.heads[i] > s.heads[layer] || subnet.neurons[i] < 1 ||
        subnet.neurons[i] > s.neurons[layer])
      refuse("heads or neurons of layer " + std::to_string(layer) + " do not fit the model");
    last = layer;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  subnets_.push_back(std::move(subnet));
  return static_cast<int>(subnets_.size()) - 1;
}

std::unique_ptr<Encoder::Workspace> Encoder::take_workspace() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) return std::make_unique<Workspace>();
  auto workspace = std::move(free_.back());
  free_.pop_back();
  return workspace;
}

void Encoder::give_back(std::unique_ptr<Workspace> workspace) {
  if (workspace->bytes() > Workspace::kKept) return;
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(workspace));
}

void Encoder::run(const Batch& batch, const Output& output) {
  if (batch.sequences == 0) return;
  auto workspace = take_workspace();
  {
    Pass pass(*this, *workspace, batch, output);
    std::unique_lock<std::mutex> lock(turn_, std::defer_lock);
    if (team_.size() > 1) lock.lock();
    pass.run();
  }
  give_back(std::move(workspace));
}

}  // namespace dynabert
