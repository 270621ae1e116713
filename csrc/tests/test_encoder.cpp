// The whole encoder on small random models.
#include <numeric>
#include <thread>

#include "model.h"

using namespace dynabert;

namespace {

// ---- models ----

/// BERT, with layers of different sizes, none a multiple of a panel.
Shape bert(DType dtype) {
  Shape s;
  s.dtype = dtype;
  s.activation = Activation::kGelu;
  s.vocabulary = 31;
  s.positions = 400;
  s.token_types = 2;
  s.hidden = 40;
  s.head_size = 8;
  s.labels = 3;
  s.eps = 1e-12f;
  s.heads = {5, 3, 4};
  s.neurons = {70, 33, 130};
  return s;
}

/// RoBERTa without a classifier; odd sizes, and heads that end inside a word.
Shape roberta(DType dtype) {
  Shape s;
  s.dtype = dtype;
  s.activation = Activation::kGeluTanh;
  s.vocabulary = 29;
  s.positions = 140;
  s.token_types = 1;
  s.hidden = 67;
  s.head_size = 3;
  s.first_position = 2;
  s.padding_id = 1;
  s.eps = 1e-5f;
  s.heads = {6, 5};
  s.neurons = {37, 300};
  return s;
}

/// Heads and neurons in whole panels and blocks, as real models have them.
Shape regular(DType dtype) {
  Shape s = bert(dtype);
  s.activation = Activation::kRelu;
  s.hidden = 128;
  s.head_size = 64;
  s.labels = 2;
  s.heads = {2, 2};
  s.neurons = {512, 256};
  return s;
}

/// As deep as BERT-base.
Shape deep(DType dtype) {
  Shape s = bert(dtype);
  s.hidden = 16;
  s.head_size = 5;
  s.heads.assign(12, 3);
  s.neurons.assign(12, 21);
  return s;
}

/// The whole model; one head and one neuron; about half of all; half of the layers.
std::vector<Subnet> subnets_of(const Shape& s) {
  Subnet full, least, half, shallow;
  for (int i = 0; i < s.layers(); ++i) {
    full.layers.push_back(i);
    full.heads.push_back(s.heads[i]);
    full.neurons.push_back(s.neurons[i]);
    half.heads.push_back((s.heads[i] + 1) / 2);
    half.neurons.push_back(std::max(1, s.neurons[i] / 2 - i));
    if (i % 2) {
      shallow.layers.push_back(i);
      shallow.heads.push_back(s.heads[i]);
      shallow.neurons.push_back(std::max(1, s.neurons[i] - 5));
    }
  }
  least.layers = half.layers = full.layers;
  least.heads.assign(s.layers(), 1);
  least.neurons.assign(s.layers(), 1);
  return {full, least, half, shallow};
}

std::vector<Sequence> random_sequences(const Shape& s, Random& random, const std::vector<int>& lengths) {
  std::vector<Sequence> sequences;
  for (int length : lengths) {
    Sequence q;
    int real = 0;
    for (int t = 0; t < length; ++t) {
      q.ids.push_back(random.below(s.vocabulary));
      q.token_types.push_back(random.below(s.token_types));
      if (s.padding_id < 0) q.positions.push_back(t);
      else  // Hugging Face's rule: tokens that are not padding count from padding_id + 1
        q.positions.push_back(q.ids.back() == s.padding_id ? s.padding_id : s.padding_id + ++real);
    }
    sequences.push_back(q);
  }
  return sequences;
}

// ---- calls ----

struct Model {
  Parameters parameters;
  std::unique_ptr<Memory> packed;

  explicit Model(const Shape& shape, uint64_t seed = 31)
      : parameters(random_parameters(shape, seed)), packed(pack(parameters)) {}
  const Shape& shape() const { return parameters.shape; }
};

/// How a call lays out its batch; results do not depend on it.
struct Style {
  int extra = 0;           // columns of padding behind the longest sequence
  int shift = 0;           // columns of padding in front of every sequence
  bool positions = false;  // explicit; needed with a shift
  int states = 0;          // hidden states, 0 for none, 1 for the last one
};

/// One call. `subnets` are numbers that the encoder gave.
std::vector<Result<float>> call(Encoder& encoder, const std::vector<Sequence>& sequences,
                                const std::vector<int32_t>& subnets, const Style& style = {}) {
  const Shape& shape = encoder.shape();
  int longest = 0;
  for (const Sequence& q : sequences) longest = std::max(longest, q.length());
  const int64_t count = static_cast<int64_t>(sequences.size()), length = longest + style.extra + style.shift;
  // Nothing may be read where the mask is 0.
  std::vector<int64_t> ids(count * length, int64_t{1} << 40), types(ids.size(), -7),
      positions(ids.size(), -9);
  std::vector<uint8_t> mask(ids.size(), 0);
  for (int64_t b = 0; b < count; ++b)
    for (int t = 0; t < sequences[b].length(); ++t) {
      const int64_t at = b * length + style.shift + t;
      ids[at] = sequences[b].ids[t];
      types[at] = sequences[b].token_types[t];
      positions[at] = sequences[b].positions[t];
      mask[at] = 1;
    }
  const bool padded = std::find(mask.begin(), mask.end(), 0) != mask.end();
  const Batch batch{count,         length,
                    ids.data(),    padded ? mask.data() : nullptr,
                    types.data(),  style.positions ? positions.data() : nullptr,
                    subnets.data()};
  std::vector<float> pooled(count * shape.hidden, NAN), logits(count * shape.labels, NAN);
  std::vector<std::vector<float>> states(style.states, std::vector<float>(count * length * shape.hidden, 0));
  Output output;
  output.pooled = pooled.data();
  output.logits = shape.labels ? logits.data() : nullptr;
  for (auto& s : states) output.hidden.push_back(s.data());
  encoder.run(batch, output);
  std::vector<Result<float>> results(count);
  for (int64_t b = 0; b < count; ++b) {
    results[b].pooled.assign(&pooled[b * shape.hidden], &pooled[b * shape.hidden] + shape.hidden);
    results[b].logits.assign(logits.begin() + b * shape.labels, logits.begin() + (b + 1) * shape.labels);
    for (auto& s : states) {
      const auto first = s.begin() + (b * length + style.shift) * shape.hidden;
      const auto last = first + int64_t{sequences[b].length()} * shape.hidden;
      results[b].states.emplace_back(first, last);
      std::fill(first, last, 0.f);  // what is left is padding
    }
  }
  for (const auto& s : states) CHECK(std::all_of(s.begin(), s.end(), [](float v) { return v == 0; }));
  return results;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

bool same(const Result<float>& a, const Result<float>& b) {
  return same(a.pooled, b.pooled) && same(a.logits, b.logits);
}

std::vector<int32_t> add_all(Encoder& encoder) {
  std::vector<int32_t> numbers;
  for (const Subnet& s : subnets_of(encoder.shape())) numbers.push_back(encoder.add_subnet(s));
  return numbers;
}

/// A batch of sequences that go through all sub-networks by turns.
struct Mix {
  std::vector<Sequence> sequences;
  std::vector<int32_t> subnets;

  Mix(const Shape& shape, const std::vector<int>& lengths, uint64_t seed = 32) {
    Random random(seed);
    sequences = random_sequences(shape, random, lengths);
    for (size_t i = 0; i < lengths.size(); ++i) subnets.push_back(static_cast<int32_t>(i % 4));
  }
};

/// Each sequence alone, on one thread: what every other call must repeat.
std::vector<Result<float>> alone(const Model& model, const Kernels& kernels, const Mix& mix) {
  Encoder encoder(model.shape(), model.packed->data(), 1, kernels);
  add_all(encoder);
  std::vector<Result<float>> results;
  for (size_t i = 0; i < mix.sequences.size(); ++i)
    results.push_back(call(encoder, {mix.sequences[i]}, {mix.subnets[i]})[0]);
  return results;
}

std::string describe(const Kernels& kernels, const Shape& shape) {
  return std::string(kernels.name) + " " + name_of(shape.dtype) + " hidden " + std::to_string(shape.hidden);
}

const std::vector<int> kLengths = {1, 2, 9, 3, 20, 7, 67, 13};

// ---- cases ----

TEST(agrees_with_plain_loops) {
  for (auto family : {bert, roberta, regular, deep})
    for (DType dtype : kDTypes) {
      const Model model(family(dtype));
      const Shape& shape = model.shape();
      const Mix mix(shape, kLengths);
      const auto subnets = subnets_of(shape);
      std::vector<Result<float>> plain;
      std::vector<Result<double>> truth;
      for (size_t i = 0; i < mix.sequences.size(); ++i) {
        plain.push_back(Forward<float>(model.parameters).run(subnets[mix.subnets[i]], mix.sequences[i]));
        truth.push_back(Forward<double>(model.parameters).run(subnets[mix.subnets[i]], mix.sequences[i]));
      }
      for (const Kernels* kernels : available_kernels()) {
        const check::Where where(describe(*kernels, shape));
        Encoder encoder(shape, model.packed->data(), 2, *kernels);
        add_all(encoder);
        const auto got = call(encoder, mix.sequences, mix.subnets, {0, 0, false, shape.layers() + 1});
        const double eps = dtype == DType::kF32 ? kFloatEps : kBf16Eps;
        Judge states(eps), pooled(eps), logits(eps);
        for (size_t b = 0; b < got.size(); ++b) {
          for (size_t k = 0; k < truth[b].states.size(); ++k)
            for (size_t i = 0; i < truth[b].states[k].size(); ++i)
              states.add(got[b].states[k][i], plain[b].states[k][i], truth[b].states[k][i]);
          for (size_t i = 0; i < truth[b].pooled.size(); ++i)
            pooled.add(got[b].pooled[i], plain[b].pooled[i], truth[b].pooled[i]);
          for (size_t i = 0; i < truth[b].logits.size(); ++i)
            logits.add(got[b].logits[i], plain[b].logits[i], truth[b].logits[i]);
          // States beyond the layers of a sub-network are left as they are.
          for (size_t k = truth[b].states.size(); k < got[b].states.size(); ++k)
            CHECK(std::all_of(got[b].states[k].begin(), got[b].states[k].end(),
                              [](float v) { return v == 0; }));
        }
        CHECK_GOOD(states.verdict());
        CHECK_GOOD(pooled.verdict());
        if (shape.labels) CHECK_GOOD(logits.verdict());
      }
    }
}

TEST(sub_networks_differ) {
  for (DType dtype : kDTypes) {
    const Model model(bert(dtype));
    Encoder encoder(model.shape(), model.packed->data(), 1, *available_kernels()[0]);
    const auto numbers = add_all(encoder);
    const Mix mix(model.shape(), {9});
    std::vector<Result<float>> results;
    for (int32_t n : numbers) results.push_back(call(encoder, mix.sequences, {n})[0]);
    for (size_t i = 0; i < results.size(); ++i)
      for (size_t j = 0; j < i; ++j) CHECK(!same(results[i], results[j]));
  }
}

TEST(bits_do_not_depend_on_the_call) {
  // Batch-mates, order, padding, thread count.
  for (auto family : {bert, roberta, regular})
    for (DType dtype : kDTypes) {
      const Model model(family(dtype));
      const Mix mix(model.shape(), kLengths);
      const auto kernels_here = available_kernels();
      for (const Kernels* kernels : kernels_here) {
        const auto expected = alone(model, *kernels, mix);
        for (int threads : {1, 2, 3, 5}) {
          if (kernels != kernels_here[0] && threads != 3) continue;
          const check::Where where(describe(*kernels, model.shape()) + " threads " + std::to_string(threads));
          Encoder encoder(model.shape(), model.packed->data(), threads, *kernels);
          add_all(encoder);
          const int count = static_cast<int>(expected.size());
          auto check_order = [&](const std::vector<int>& order, const Style& style) {
            std::vector<Sequence> sequences;
            std::vector<int32_t> subnets;
            for (int i : order) {
              sequences.push_back(mix.sequences[i]);
              subnets.push_back(mix.subnets[i]);
            }
            const auto got = call(encoder, sequences, subnets, style);
            for (size_t i = 0; i < order.size(); ++i) CHECK(same(got[i], expected[order[i]]));
          };
          std::vector<int> order(count);
          std::iota(order.begin(), order.end(), 0);
          check_order(order, {});
          check_order({order[4]}, {});
          std::reverse(order.begin(), order.end());
          check_order(order, {5, 0, false, 0});
          check_order({order[1], order[1], order[6]}, {0, 0, false, 0});
          std::swap(order[0], order[3]);
          check_order(order, {2, 3, true, 0});
        }
      }
    }
}

TEST(padding_inside_a_sequence) {
  // A token's position is its column (BERT) or counts the tokens before it that are not padding (RoBERTa).
  for (auto family : {bert, roberta})
    for (DType dtype : kDTypes) {
      const Model model(family(dtype));
      const Shape& shape = model.shape();
      const check::Where where(describe(*available_kernels()[0], shape));
      Encoder encoder(shape, model.packed->data(), 1, *available_kernels()[0]);
      const int32_t whole = add_all(encoder)[0];
      const int64_t pad = std::max(shape.padding_id, 0);
      const std::vector<int64_t> ids = {pad, 5, pad, pad, 9, 11, pad};
      const std::vector<uint8_t> mask = {0, 1, 0, 0, 1, 1, 0};
      const bool counts = shape.padding_id >= 0;
      const Sequence real{
          {5, 9, 11}, {0, 0, 0}, counts ? std::vector<int>{2, 3, 4} : std::vector<int>{1, 4, 5}};
      std::vector<float> pooled(shape.hidden, NAN);
      Output output;
      output.pooled = pooled.data();
      encoder.run({1, 7, ids.data(), mask.data(), nullptr, nullptr, &whole}, output);
      CHECK(same(pooled, call(encoder, {real}, {whole}, {0, 0, true, 0})[0].pooled));
    }
}

TEST(bits_of_a_long_sequence_and_of_many_rows) {
  // More rows than one chunk of a product, and a sequence whose queries are dealt out in parts.
  for (DType dtype : kDTypes) {
    const Model model(bert(dtype));
    std::vector<int> lengths(30, 11);
    lengths.push_back(263);
    const Mix mix(model.shape(), lengths);
    const Kernels& kernels = *available_kernels()[0];
    const auto expected = alone(model, kernels, mix);
    for (int threads : {1, 3}) {
      const check::Where where(describe(kernels, model.shape()) + " threads " + std::to_string(threads));
      Encoder encoder(model.shape(), model.packed->data(), threads, kernels);
      add_all(encoder);
      const auto got = call(encoder, mix.sequences, mix.subnets);
      for (size_t i = 0; i < got.size(); ++i) CHECK(same(got[i], expected[i]));
      CHECK(same(call(encoder, {mix.sequences.back()}, {mix.subnets.back()})[0], expected.back()));
    }
  }
}

TEST(hidden_states) {
  for (DType dtype : kDTypes)
    for (int threads : {1, 3}) {
      const Model model(deep(dtype));
      const check::Where where(describe(*available_kernels()[0], model.shape()) + " threads " +
                               std::to_string(threads));
      Encoder encoder(model.shape(), model.packed->data(), threads, *available_kernels()[0]);
      add_all(encoder);
      Mix mix(model.shape(), {5, 3, 8});
      mix.subnets = {2, 0, 1};  // all of full depth
      const int layers = model.shape().layers();
      const auto all = call(encoder, mix.sequences, mix.subnets, {2, 1, true, layers + 1});
      const auto last = call(encoder, mix.sequences, mix.subnets, {0, 0, false, 1});
      const auto none = call(encoder, mix.sequences, mix.subnets);
      const auto some = call(encoder, mix.sequences, mix.subnets, {0, 0, false, 3});
      for (size_t b = 0; b < all.size(); ++b) {
        CHECK(same(all[b].states[layers], last[b].states[0]));
        for (int k = 0; k < 3; ++k) CHECK(same(all[b].states[k], some[b].states[k]));
        CHECK(!same(all[b].states[layers], all[b].states[layers - 1]));
        CHECK(same(all[b], none[b]) && same(last[b], none[b]));
      }
    }
}

std::string wrong_states(const Model& model, const Subnet& subnet, const Sequence& sequence,
                         const std::vector<std::vector<float>>& states) {
  const auto plain = Forward<float>(model.parameters).run(subnet, sequence).states;
  const auto truth = Forward<double>(model.parameters).run(subnet, sequence).states;
  Judge judge(model.shape().dtype == DType::kF32 ? kFloatEps : kBf16Eps);
  for (size_t k = 0; k < truth.size(); ++k)
    for (size_t i = 0; i < truth[k].size(); ++i) judge.add(states[k][i], plain[k][i], truth[k][i]);
  return judge.verdict();
}

TEST(hidden_states_of_different_layers) {
  // As many layers each, but not the same ones: a sequence's states are those after its own layers.
  for (DType dtype : kDTypes)
    for (int threads : {1, 2}) {
      const Model model(deep(dtype));
      const check::Where where(describe(*available_kernels()[0], model.shape()) + " threads " +
                               std::to_string(threads));
      Encoder encoder(model.shape(), model.packed->data(), threads, *available_kernels()[0]);
      const std::vector<std::vector<int>> kept = {{0, 1}, {3, 11}, {1, 7}};
      std::vector<int32_t> numbers;
      for (const auto& layers : kept) numbers.push_back(encoder.add_subnet({layers, {2, 3}, {9, 21}}));
      const Mix mix(model.shape(), {4, 6, 2});
      const auto together = call(encoder, mix.sequences, numbers, {1, 0, false, 3});
      for (size_t b = 0; b < together.size(); ++b) {
        const auto single = call(encoder, {mix.sequences[b]}, {numbers[b]}, {0, 0, false, 3})[0];
        for (int k = 0; k < 3; ++k) CHECK(same(together[b].states[k], single.states[k]));
        CHECK_GOOD(wrong_states(model, {kept[b], {2, 3}, {9, 21}}, mix.sequences[b], together[b].states));
      }
    }
}

TEST(outputs_that_are_not_wanted) {
  const Model model(bert(DType::kBf16));
  for (int threads : {1, 2}) {
    Encoder encoder(model.shape(), model.packed->data(), threads, *available_kernels()[0]);
    add_all(encoder);
    const Mix mix(model.shape(), {6});
    const auto expected = call(encoder, mix.sequences, {2})[0];
    std::vector<int64_t> ids(mix.sequences[0].ids.begin(), mix.sequences[0].ids.end());
    std::vector<int64_t> types(mix.sequences[0].token_types.begin(), mix.sequences[0].token_types.end());
    const int32_t subnet = 2;
    const Batch batch{1, 6, ids.data(), nullptr, types.data(), nullptr, &subnet};
    std::vector<float> pooled(40, NAN), logits(3, NAN), last(6 * 40, NAN);
    double seconds[kStages] = {};
    Output output;
    encoder.run(batch, output);
    output.logits = logits.data();
    encoder.run(batch, output);
    CHECK(same(logits, expected.logits));
    output = {};
    output.pooled = pooled.data();
    output.seconds = seconds;
    encoder.run(batch, output);
    CHECK(same(pooled, expected.pooled));
    CHECK(std::all_of(std::begin(seconds), std::end(seconds), [](double s) { return s >= 0; }));
    CHECK(std::accumulate(std::begin(seconds), std::end(seconds), 0.0) > 0);
    output = {};
    output.hidden = {last.data()};
    encoder.run(batch, output);
    CHECK(std::none_of(last.begin(), last.end(), [](float v) { return std::isnan(v); }));
    // Token types that are not given are 0, and a call without sequences does nothing.
    std::vector<float> untyped(3, NAN), zeros(3, NAN);
    output = {};
    output.logits = untyped.data();
    encoder.run({1, 6, ids.data(), nullptr, nullptr, nullptr, &subnet}, output);
    types.assign(6, 0);
    output.logits = zeros.data();
    encoder.run({1, 6, ids.data(), nullptr, types.data(), nullptr, &subnet}, output);
    CHECK(same(untyped, zeros) && !same(untyped, expected.logits));
    encoder.run({0, 6, nullptr, nullptr, nullptr, nullptr, nullptr}, output);
    CHECK(same(untyped, zeros));
  }
}

TEST(many_threads_call_one_encoder) {
  for (DType dtype : kDTypes)
    for (int team : {1, 3}) {
      const Model model(bert(dtype));
      const Kernels& kernels = *available_kernels()[0];
      const Mix mix(model.shape(), {1, 9, 17, 30});
      const auto expected = alone(model, kernels, mix);
      Encoder encoder(model.shape(), model.packed->data(), team, kernels);
      add_all(encoder);
      std::vector<std::thread> callers;
      for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&, caller] {
          for (int i = 0; i < 6; ++i) {
            const int at = (caller + i) % 4;
            if (i % 3 == 2) {  // sub-networks come and bad calls happen meanwhile
              encoder.add_subnet({{0}, {1}, {1}});
              CHECK_REFUSES("sub-network", call(encoder, {mix.sequences[at]}, {1000}));
              const auto got = call(encoder, mix.sequences, mix.subnets);
              for (size_t b = 0; b < got.size(); ++b) CHECK(same(got[b], expected[b]));
            } else {
              CHECK(same(call(encoder, {mix.sequences[at]}, {mix.subnets[at]})[0], expected[at]));
            }
          }
        });
      for (std::thread& t : callers) t.join();
    }
}

TEST(what_is_not_a_number_stays_with_its_sequence) {
  // Neither batch-mates nor later calls, which use the same memory again, see it.
  constexpr int poisoned = 5;
  for (auto family : {bert, roberta})
    for (DType dtype : kDTypes) {
      Parameters parameters = random_parameters(family(dtype), 33);
      Rows& word = parameters.tables.at("word");
      if (dtype == DType::kS8) word.scale[poisoned] = NAN;
      else std::fill_n(word.stored.begin() + int64_t{poisoned} * word.columns, word.columns, NAN);
      const auto packed = pack(parameters);
      Random random(34);
      auto sequences = random_sequences(parameters.shape, random, {9, 33, 6, 2});
      for (Sequence& q : sequences) std::replace(q.ids.begin(), q.ids.end(), poisoned, poisoned + 1);
      auto bad = sequences;
      bad[1].ids[1] = poisoned;
      for (const Kernels* kernels : available_kernels())
        for (int threads : {1, 2}) {
          const check::Where where(describe(*kernels, parameters.shape) + " threads " +
                                   std::to_string(threads));
          Encoder encoder(parameters.shape, packed->data(), threads, *kernels);
          add_all(encoder);
          const std::vector<int32_t> subnets = {0, 0, 2, 3};
          const auto before = call(encoder, sequences, subnets);
          const auto during = call(encoder, bad, subnets);
          const auto after = call(encoder, sequences, subnets);
          for (size_t b = 0; b < before.size(); ++b) {
            CHECK(same(before[b], after[b]));
            if (b != 1) CHECK(same(before[b], during[b]));
          }
          auto is_nan = [](float v) { return std::isnan(v); };
          CHECK(std::all_of(during[1].pooled.begin(), during[1].pooled.end(), is_nan));
          CHECK(std::all_of(during[1].logits.begin(), during[1].logits.end(), is_nan));
        }
    }
}

TEST(bad_calls_are_refused_and_leave_the_encoder_usable) {
  for (DType dtype : kDTypes)
    for (int threads : {1, 2}) {
      const Model model(bert(dtype));
      const Shape& shape = model.shape();
      const check::Where where(std::string(name_of(dtype)) + " threads " + std::to_string(threads));
      Encoder encoder(shape, model.packed->data(), threads, *available_kernels()[0]);
      add_all(encoder);
      const Mix mix(shape, {4, 4});
      const auto expected = call(encoder, mix.sequences, {0, 3});
      std::vector<int64_t> ids(8, 1), types(8, 0), positions(8, 0);
      std::vector<uint8_t> mask(8, 1);
      std::vector<int32_t> subnets = {0, 3};
      auto refused = [&](const char* says) {
        std::vector<float> pooled(2 * shape.hidden, -5);
        Output output;
        output.pooled = pooled.data();
        const Batch batch{2, 4, ids.data(), mask.data(), types.data(), positions.data(), subnets.data()};
        CHECK_REFUSES(says, encoder.run(batch, output));
        CHECK(std::all_of(pooled.begin(), pooled.end(), [](float v) { return v == -5; }));
        const auto again = call(encoder, mix.sequences, {0, 3});
        for (size_t b = 0; b < again.size(); ++b) CHECK(same(again[b], expected[b]));
      };
      auto try_values = [&](std::vector<int64_t>& where_, std::initializer_list<int64_t> values,
                            const char* says) {
        for (int64_t value : values) {
          const int64_t old = where_[6];
          where_[6] = value;
          refused(says);
          where_[6] = old;
        }
      };
      const int64_t far = int64_t{1} << 32;  // 0 when cut to 32 bits
      try_values(ids, {-1, shape.vocabulary, far, -far}, "token ids");
      try_values(types, {-1, shape.token_types, far}, "token_type_ids");
      try_values(positions, {-1, shape.positions, far}, "position_ids");
      std::fill_n(mask.begin() + 4, 4, uint8_t{0});
      refused("attention_mask leaves no token in row 1");
      std::fill_n(mask.begin() + 4, 4, uint8_t{1});
      for (int32_t number : {-1, 4, 1 << 30}) {
        subnets[1] = number;
        refused("sub-network");
      }
      std::vector<int64_t> too_long(shape.positions + 1, 1);
      Output output;
      CHECK_REFUSES("position_ids", encoder.run({1, shape.positions + 1, too_long.data(), nullptr, nullptr,
                                                 nullptr, subnets.data()},
                                                output));
    }
}

TEST(bad_sub_networks_are_refused) {
  const Model model(bert(DType::kF32));
  Encoder encoder(model.shape(), model.packed->data(), 1, *available_kernels()[0]);
  CHECK(encoder.add_subnet({{0, 2}, {5, 4}, {70, 130}}) == 0);
  CHECK_REFUSES("one layer or more", encoder.add_subnet({{}, {}, {}}));
  CHECK_REFUSES("for each", encoder.add_subnet({{0, 1}, {1}, {1, 1}}));
  CHECK_REFUSES("for each", encoder.add_subnet({{0, 1}, {1, 1}, {1}}));
  CHECK_REFUSES("ascending", encoder.add_subnet({{1, 0}, {1, 1}, {1, 1}}));
  CHECK_REFUSES("ascending", encoder.add_subnet({{1, 1}, {1, 1}, {1, 1}}));
  CHECK_REFUSES("ascending", encoder.add_subnet({{-1}, {1}, {1}}));
  CHECK_REFUSES("below 3", encoder.add_subnet({{3}, {1}, {1}}));
  CHECK_REFUSES("layer 1", encoder.add_subnet({{1}, {4}, {1}}));
  CHECK_REFUSES("layer 1", encoder.add_subnet({{1}, {0}, {1}}));
  CHECK_REFUSES("layer 1", encoder.add_subnet({{1}, {1}, {34}}));
  CHECK_REFUSES("layer 1", encoder.add_subnet({{1}, {1}, {0}}));
  CHECK(encoder.add_subnet({{1}, {3}, {33}}) == 1);
}

}  // namespace
