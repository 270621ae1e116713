// Where the parts of a packed model lie.
#include <algorithm>
#include <set>

#include "model.h"

using namespace dynabert;

namespace {

Shape bert_base(DType dtype) {
  Shape s;
  s.dtype = dtype;
  s.vocabulary = 30522;
  s.positions = 512;
  s.token_types = 2;
  s.hidden = 768;
  s.head_size = 64;
  s.labels = 2;
  s.eps = 1e-12f;
  s.heads.assign(12, 12);
  s.neurons.assign(12, 3072);
  return s;
}

Shape odd(DType dtype) {
  Shape s = bert_base(dtype);
  s.vocabulary = 37;
  s.positions = 19;
  s.token_types = 1;
  s.hidden = 67;
  s.head_size = 7;
  s.labels = 0;
  s.heads = {5, 1, 3};
  s.neurons = {259, 1, 64};
  return s;
}

Shape least(DType dtype) {
  Shape s = odd(dtype);
  s.vocabulary = s.positions = s.hidden = s.head_size = 1;
  s.heads = s.neurons = {1};
  return s;
}

TEST(sections_stand_one_behind_the_other) {
  for (auto family : {bert_base, odd, least})
    for (DType dtype : kDTypes) {
      const check::Where where(name_of(dtype));
      const Shape shape = family(dtype);
      const auto sections = layout(shape);
      std::set<std::string> names;
      int64_t end = 0;
      for (const Section& s : sections) {
        const check::Where section(s.name);
        CHECK(names.insert(s.name).second);
        CHECK(s.offset >= end && s.offset - end < 64 && s.offset % 64 == 0);
        CHECK(s.type == 'f' || s.type == 'i' || s.type == (dtype == DType::kBf16 ? 'h' : 'b'));
        int64_t bytes = s.type == 'b' ? 1 : s.type == 'h' ? 2 : 4;
        for (int64_t n : s.shape) bytes *= n;
        CHECK(bytes == s.bytes && bytes > 0);
        end = s.offset + s.bytes;
      }
      CHECK(packed_bytes(shape) == end);
    }
}

TEST(a_view_points_at_its_sections) {
  for (auto family : {bert_base, odd, least})
    for (DType dtype : kDTypes) {
      const Shape shape = family(dtype);
      // Never read: any aligned address will do.
      const char* base = reinterpret_cast<const char*>(uintptr_t{1} << 20);
      std::map<std::string, Section> sections;
      for (const Section& s : layout(shape)) sections[s.name] = s;
      const Model model = view(shape, base);
      size_t found = 0;
      auto at = [&](const std::string& name, const void* pointer, std::vector<int64_t> dims) {
        const check::Where where(name);
        const auto s = sections.find(name);
        if (!CHECK(s != sections.end())) return;
        ++found;
        CHECK(static_cast<const char*>(pointer) == base + s->second.offset);
        CHECK(s->second.shape == dims);
      };
      const bool s8 = dtype == DType::kS8;
      const int group = group_of(dtype), hidden = shape.hidden;
      auto table = [&](const std::string& name, const Table& t, int rows) {
        at(name + ".rows", t.data, {rows, hidden});
        if (s8) at(name + ".scale", t.scale, {rows});
      };
      auto norm = [&](const std::string& name, const Norm& n) {
        at(name + ".weight", n.weight, {hidden});
        at(name + ".bias", n.bias, {hidden});
      };
      auto matrix = [&](const std::string& name, const Matrix& m, int columns, int rows, bool contracts) {
        const int panels = (columns + 63) / 64, words = (rows + group - 1) / group;
        CHECK(m.columns == columns && m.rows == rows && m.contracts == contracts);
        CHECK(m.panel_count() == panels && m.padded_columns() == panels * 64);
        CHECK(m.panel_bytes == int64_t{words} * 256);
        CHECK(m.block > 0 && m.block % group == 0 && (contracts || m.block >= rows));
        at(name + ".bias", m.bias, {panels * 64});
        at(name + ".panels", m.panels, {panels, words, 64, group});
        if (!s8) return;
        at(name + ".scale", m.scale, {panels * 64});
        at(name + ".compensation", m.compensation, {(rows + m.block - 1) / m.block, panels * 64});
        CHECK(sections.at(name + ".compensation").block == m.block);
      };
      table("word", model.word, shape.vocabulary);
      table("position", model.position, shape.positions);
      table("token_type", model.token_type, shape.token_types);
      norm("embedding_norm", model.embedding_norm);
      for (int i = 0; i < shape.layers(); ++i) {
        const std::string name = "layer." + std::to_string(i) + ".";
        const int width = shape.heads[i] * shape.head_size;
        matrix(name + "qkv", model.layers[i].qkv, 3 * width, hidden, false);
        matrix(name + "out", model.layers[i].out, hidden, width, true);
        matrix(name + "up", model.layers[i].up, shape.neurons[i], hidden, false);
        matrix(name + "down", model.layers[i].down, hidden, shape.neurons[i], true);
        norm(name + "attention_norm", model.layers[i].attention_norm);
        norm(name + "ffn_norm", model.layers[i].ffn_norm);
      }
      matrix("pooler", model.pooler, hidden, hidden, false);
      if (shape.labels) {
        at("classifier.weight", model.classifier_weight, {shape.labels, hidden});
        at("classifier.bias", model.classifier_bias, {shape.labels});
      }
      CHECK(found == sections.size());
    }
}

TEST(packing_costs_little) {
  for (DType dtype : kDTypes) {
    const check::Where where(name_of(dtype));
    const Shape s = bert_base(dtype);
    const int64_t d = s.hidden, n = s.neurons[0], layers = s.layers();
    const int64_t tables = (s.vocabulary + s.positions + s.token_types) * d;
    const int64_t matrices = layers * (4 * d * d + 2 * n * d) + d * d;
    const int64_t vectors = 2 * d + layers * (4 * d + n + d + 4 * d) + d + s.labels * (d + 1);
    const int64_t raw = (tables + matrices) * size_of(dtype) + vectors * 4;
    const double ratio = static_cast<double>(packed_bytes(s)) / static_cast<double>(raw);
    CHECK(ratio >= 1 && ratio <= (dtype == DType::kS8 ? 1.02 : 1.001));
  }
}

TEST(bad_shapes_are_refused) {
  auto refused = [](const char* says, auto change) {
    Shape s = odd(DType::kS8);
    change(s);
    CHECK_REFUSES(says, s.check());
    CHECK_REFUSES(says, layout(s));
  };
  odd(DType::kS8).check();
  refused("vocab_size", [](Shape& s) { s.vocabulary = 0; });
  refused("max_position_embeddings", [](Shape& s) { s.positions = -1; });
  refused("type_vocab_size", [](Shape& s) { s.token_types = 0; });
  refused("hidden_size", [](Shape& s) { s.hidden = 1 << 17; });
  refused("head_size", [](Shape& s) { s.head_size = 0; });
  refused("num_labels", [](Shape& s) { s.labels = -1; });
  refused("first_position", [](Shape& s) { s.first_position = s.positions + 1; });
  refused("num_hidden_layers", [](Shape& s) { s.heads = s.neurons = {}; });
  refused("for each layer", [](Shape& s) { s.neurons.pop_back(); });
  refused("heads of a layer", [](Shape& s) { s.heads[1] = 0; });
  refused("neurons of a layer", [](Shape& s) { s.neurons[2] = 1 << 24; });
  refused("heads times head_size", [](Shape& s) { s.heads[0] = s.head_size = 1 << 12; });
  refused("layer_norm_eps", [](Shape& s) { s.eps = -1; });
  refused("layer_norm_eps", [](Shape& s) { s.eps = NAN; });
}

}  // namespace
