#include "model.h"

#include <algorithm>
#include <stdexcept>

namespace dynabert {
namespace {

constexpr int64_t kAlignment = 64;
// Rows of K under one sum of an FFN-out matrix: 4 bytes a column for 256 bytes of weights.
constexpr int kNeuronBlock = 256;
constexpr int kLargest = 1 << 24;  // of any dimension: products of two fit 64 bits with room

// Walks the model once; the visitor says what a section is: an entry of the layout, or a pointer.
template <class Visit>
void walk(Model& model, Visit&& visit) {
  const Shape& s = model.shape;
  const char element = s.dtype == DType::kF32 ? 'f' : s.dtype == DType::kBf16 ? 'h' : 'b';
  const bool s8 = s.dtype == DType::kS8;
  auto vector = [&](const std::string& name, const float*& target, std::vector<int64_t> shape) {
    target = reinterpret_cast<const float*>(visit(name, 'f', std::move(shape), 0));
  };
  auto table = [&](const std::string& name, Table& t, int64_t rows) {
    t.data = visit(name + ".rows", element, {rows, s.hidden}, 0);
    if (s8) vector(name + ".scale", t.scale, {rows});
  };
  auto norm = [&](const std::string& name, Norm& n) {
    vector(name + ".weight", n.weight, {s.hidden});
    vector(name + ".bias", n.bias, {s.hidden});
  };
  auto matrix = [&](const std::string& name, Matrix& m, int columns, int rows, int block) {
    const int group = group_of(s.dtype);
    m.columns = columns;
    m.rows = rows;
    m.contracts = block > 0;
    m.block = m.contracts ? block : static_cast<int>(round_up(rows, group));
    m.panel_bytes = (rows + group - 1) / group * int64_t{kPanelRowBytes};
    vector(name + ".bias", m.bias, {m.padded_columns()});
    if (s8) {
      vector(name + ".scale", m.scale, {m.padded_columns()});
      m.compensation = reinterpret_cast<const int32_t*>(
          visit(name + ".compensation", 'i', {(rows + m.block - 1) / m.block, m.padded_columns()}, m.block));
    }
    m.panels = visit(name + ".panels", element,
                     {m.panel_count(), (rows + group - 1) / group, kPanelColumns, group}, 0);
  };

  table("word", model.word, s.vocabulary);
  table("position", model.position, s.positions);
  table("token_type", model.token_type, s.token_types);
  norm("embedding_norm", model.embedding_norm);
  model.layers.resize(s.heads.size());
  for (int i = 0; i < s.layers(); ++i) {
    Layer& layer = model.layers[i];
    const std::string name = "layer." + std::to_string(i) + ".";
    const int head_rows = s.heads[i] * s.head_size;
    matrix(name + "qkv", layer.qkv, 3 * head_rows, s.hidden, 0);
    matrix(name + "out", layer.out, s.hidden, head_rows, std::max(s.head_size, 4) / 4 * 4);
    norm(name + "attention_norm", layer.attention_norm);
    matrix(name + "up", layer.up, s.neurons[i], s.hidden, 0);
    matrix(name + "down", layer.down, s.hidden, s.neurons[i], kNeuronBlock);
    norm(name + "ffn_norm", layer.ffn_norm);
  }
  matrix("pooler", model.pooler, s.hidden, s.hidden, 0);
  if (s.labels > 0) {
    vector("classifier.weight", model.classifier_weight, {s.labels, s.hidden});
    vector("classifier.bias", model.classifier_bias, {s.labels});
  }
}

}  // namespace

void Shape::check() const {
  auto in = [](const char* name, int value, int low, int high) {
    if (value < low || value > high)
      throw std::invalid_argument(std::string(name) + " must be in " + std::to_string(low) + " to " +
                                  std::to_string(high) + ", got " + std::to_string(value));
  };
  in("vocab_size", vocabulary, 1, kLargest);
  in("max_position_embeddings", positions, 1, kLargest);
  in("type_vocab_size", token_types, 1, kLargest);
  in("hidden_size", hidden, 1, 1 << 16);
  in("head_size", head_size, 1, 1 << 12);
  in("num_labels", labels, 0, 1 << 20);
  in("first_position", first_position, 0, positions);
  in("num_hidden_layers", layers(), 1, 1 << 12);
  if (heads.size() != neurons.size())
    throw std::invalid_argument("heads and neurons must be given for each layer");
  for (int value : heads) in("heads of a layer", value, 1, 1 << 12);
  for (int value : neurons) in("neurons of a layer", value, 1, 1 << 20);
  for (int value : heads) in("heads times head_size", value * head_size, 1, 1 << 20);
  if (!(eps >= 0 && eps < 1)) throw std::invalid_argument("layer_norm_eps must be in 0 to 1");
}

std::vector<Section> layout(const Shape& shape) {
  shape.check();
  Model model;
  model.shape = shape;
  std::vector<Section> sections;
  int64_t end = 0;
  walk(model, [&](const std::string& name, char type, std::vector<int64_t> dims, int block) -> const char* {
    int64_t bytes = type == 'b' ? 1 : type == 'h' ? 2 : 4;
    for (int64_t n : dims) bytes *= n;
    sections.push_back({name, type, std::move(dims), block, end, bytes});
    end = round_up(end + bytes, kAlignment);
    return nullptr;
  });
  return sections;
}

int64_t packed_bytes(const Shape& shape) {
  const auto sections = layout(shape);
  return sections.back().offset + sections.back().bytes;
}

Model view(const Shape& shape, const char* buffer) {
  const auto sections = layout(shape);
  Model model;
  model.shape = shape;
  size_t next = 0;
  walk(model,
       [&](const std::string&, char, std::vector<int64_t>, int) { return buffer + sections[next++].offset; });
  return model;
}

}  // namespace dynabert
