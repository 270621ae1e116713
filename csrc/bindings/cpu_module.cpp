// Python's view of the CPU engine: numpy arrays in and out, the GIL released while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <optional>

#include "../cpu/encoder.h"
#include "../cpu/ops.h"

namespace py = pybind11;
using namespace dynabert;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Shape shape_from(const py::dict& fields) {
  auto integer = [&](const char* name) { return fields[name].cast<int>(); };
  auto choice = [&](const char* name, std::initializer_list<const char*> names) {
    const auto given = fields[name].cast<std::string>();
    int index = 0;
    for (const char* known : names) {
      if (given == known) return index;
      ++index;
    }
    throw std::invalid_argument(std::string(name) + " is unknown: " + given);
  };
  Shape s;
  s.dtype = static_cast<DType>(choice("dtype", {"fp32", "bf16", "int8"}));
  s.activation = static_cast<Activation>(choice("activation", {"", "gelu", "gelu_tanh", "relu"}));
  s.vocabulary = integer("vocab_size");
  s.positions = integer("max_position_embeddings");
  s.token_types = integer("type_vocab_size");
  s.hidden = integer("hidden_size");
  s.head_size = integer("head_size");
  s.labels = integer("num_labels");
  s.first_position = integer("first_position");
  s.padding_id = integer("padding_id");
  s.eps = fields["layer_norm_eps"].cast<float>();
  s.heads = fields["layer_heads"].cast<std::vector<int>>();
  s.neurons = fields["layer_neurons"].cast<std::vector<int>>();
  s.check();
  return s;
}

const Kernels& find_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (name.empty() || name == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("the instruction set must be one of " + names +
                              " (those this processor has), got " + name);
}

/// The encoder, and the Python object whose memory it reads.
class Engine {
 public:
  Engine(const py::dict& fields, py::buffer memory, int threads, const std::string& isa)
      : memory_(memory.request()) {
    const Shape shape = shape_from(fields);
    if (memory_.size * memory_.itemsize != packed_bytes(shape))
      throw std::invalid_argument("the packed weights have " +
                                  std::to_string(memory_.size * memory_.itemsize) +
                                  " bytes, the model's shape needs " + std::to_string(packed_bytes(shape)));
    if (reinterpret_cast<uintptr_t>(memory_.ptr) % 64)
      throw std::invalid_argument("the packed weights must be aligned to 64 bytes");
    encoder_ =
        std::make_unique<Encoder>(shape, static_cast<const char*>(memory_.ptr), threads, find_kernels(isa));
  }

  int add_subnet(std::vector<int> layers, std::vector<int> heads, std::vector<int> neurons) {
    return encoder_->add_subnet({std::move(layers), std::move(heads), std::move(neurons)});
  }

  py::tuple run(const Array<int64_t>& ids, const std::optional<Array<uint8_t>>& mask,
                const std::optional<Array<int64_t>>& token_types,
                const std::optional<Array<int64_t>>& positions, const Array<int32_t>& subnets,
                int hidden_states, bool pooled, bool profile) {
    if (ids.ndim() != 2) throw std::invalid_argument("input_ids must be [batch, length]");
    const Shape& shape = encoder_->shape();
    const int64_t sequences = ids.shape(0), length = ids.shape(1), hidden = shape.hidden;
    auto same = [&](const char* name, const auto& array) {
      if (array && (array->ndim() != 2 || array->shape(0) != sequences || array->shape(1) != length))
        throw std::invalid_argument(std::string(name) + " must have the shape of input_ids");
    };
    same("attention_mask", mask);
    same("token_type_ids", token_types);
    same("position_ids", positions);
    if (subnets.ndim() != 1 || subnets.shape(0) != sequences)
      throw std::invalid_argument("there must be one sub-network for each sequence");
    Batch batch{sequences,
                length,
                ids.data(),
                mask ? mask->data() : nullptr,
                token_types ? token_types->data() : nullptr,
                positions ? positions->data() : nullptr,
                subnets.data()};
    Output output;
    Array<float> logits({sequences, static_cast<int64_t>(shape.labels)}),
        pool({pooled ? sequences : 0, hidden});
    if (shape.labels) output.logits = logits.mutable_data();
    if (pooled) output.pooled = pool.mutable_data();
    py::list states;
    for (int i = 0; i < hidden_states; ++i) {
      Array<float> state({sequences, length, hidden});
      if (mask) std::fill_n(state.mutable_data(), state.size(), 0.f);
      output.hidden.push_back(state.mutable_data());
      states.append(std::move(state));
    }
    double seconds[kStages] = {};
    if (profile) output.seconds = seconds;
    {
      py::gil_scoped_release release;
      encoder_->run(batch, output);
    }
    py::dict stages;
    for (int i = 0; profile && i < kStages; ++i) stages[kStageNames[i]] = seconds[i];
    return py::make_tuple(logits, pool, states, stages);
  }

  int threads() const { return encoder_->threads(); }
  const char* isa() const { return encoder_->kernels().name; }

 private:
  py::buffer_info memory_;  // holds the memory until the encoder is gone
  std::unique_ptr<Encoder> encoder_;
};

/// Operations per second of one thread's register block on data in its first-level cache.
double peak(const std::string& dtype, const std::string& isa, double seconds) {
  const DType type = dtype == "fp32" ? DType::kF32 : dtype == "bf16" ? DType::kBf16 : DType::kS8;
  const Kernels& kernels = find_kernels(isa);
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  double done = 0, elapsed = 0;
  while (elapsed < seconds) {
    done += static_cast<double>(kernels.peak(type, 1000));
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return done / elapsed;
}

// ---- ops on tensors: addresses and strides from the adapter, which keeps the tensors alive ----

typedef std::tuple<uintptr_t, int64_t> Address;  // of the first value, and elements between rows

View view_of(const Address& address) {
  return {reinterpret_cast<char*>(std::get<0>(address)), std::get<1>(address)};
}

/// Of packed weights: their address, and bytes between panels.
Panels panels_of(const Address& address) {
  return {reinterpret_cast<const char*>(std::get<0>(address)), std::get<1>(address)};
}

const char* pointer(uintptr_t address) { return reinterpret_cast<const char*>(address); }

std::vector<Block> blocks_of(const std::vector<int>& extents, const std::vector<int64_t>& rows) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < extents.size(); ++i) blocks.push_back({rows[i], extents[i]});
  return blocks;
}

/// A hash of one word in each row of a matrix whose rows are `row_bytes` long and `stride` bytes apart.
uint64_t fingerprint(uintptr_t address, int64_t stride, int64_t rows, int64_t row_bytes) {
  const int64_t words = row_bytes / 4;
  uint64_t hash = 0;
  for (int64_t row = 0; row < rows && words; ++row) {
    uint32_t value;  // in another column each time
    std::memcpy(&value, reinterpret_cast<const char*>(address) + row * stride + row * 37 % words * 4, 4);
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

DType tensor_type(bool bf16) { return bf16 ? DType::kBf16 : DType::kF32; }

void bind_ops(py::module_& m) {
  typedef const std::vector<int>& Extents;
  typedef const std::vector<int64_t>& Rows;
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Ops>(m, "Ops")
      .def(py::init([](int threads, const std::string& isa, uintptr_t parallel) {
             return std::make_unique<Ops>(threads, find_kernels(isa),
                                          reinterpret_cast<OpenMpParallel>(parallel));
           }),
           py::arg("threads"), py::arg("isa"), py::arg("parallel"))
      .def(
          "pack",
          [](Ops& ops, bool bf16, Address weight, int rows, int columns, bool contracts, uintptr_t to) {
            ops.pack(tensor_type(bf16), view_of(weight), rows, columns, contracts,
                     reinterpret_cast<char*>(to));
          },
          release)
      .def_static("packed_bytes",
                  [](bool bf16, int rows, int columns, bool contracts) {
                    return Ops::packed_bytes(tensor_type(bf16), rows, columns, contracts);
                  })
      .def_static("fingerprint", &fingerprint)
      .def(
          "expand",
          [](Ops& ops, bool bf16, Address x, Address weight, uintptr_t bias, int depth, Extents extents,
             Rows rows, int activation, Address out, Address pre, Address panels) {
            ops.expand(tensor_type(bf16), view_of(x), view_of(weight), pointer(bias), depth,
                       blocks_of(extents, rows), static_cast<Activation>(activation), view_of(out),
                       view_of(pre), panels_of(panels));
          },
          release)
      .def(
          "contract",
          [](Ops& ops, bool bf16, Address x, Address weight_t, uintptr_t bias, int columns, Extents extents,
             Rows rows, Address out, Address panels) {
            ops.contract(tensor_type(bf16), view_of(x), view_of(weight_t), pointer(bias), columns,
                         blocks_of(extents, rows), view_of(out), panels_of(panels));
          },
          release)
      .def(
          "weight_gradient",
          [](Ops& ops, bool bf16, Address left, Address right, int columns, Extents extents, Rows rows,
             int weight_rows, Address out, uintptr_t sums) {
            ops.weight_gradient(tensor_type(bf16), view_of(left), view_of(right), columns,
                                blocks_of(extents, rows), weight_rows, view_of(out),
                                reinterpret_cast<float*>(sums));
          },
          release)
      .def(
          "expand_backward",
          [](Ops& ops, bool bf16, int activation, Address grad, Address pre, Address x, Address weight,
             int columns, Extents extents, Rows rows, int weight_rows, Address grad_x, Address grad_weight,
             uintptr_t sums, Address panels) {
            ops.expand_backward(tensor_type(bf16), static_cast<Activation>(activation), view_of(grad),
                                view_of(pre), view_of(x), view_of(weight), columns, blocks_of(extents, rows),
                                weight_rows, view_of(grad_x), view_of(grad_weight),
                                reinterpret_cast<float*>(sums), panels_of(panels));
          },
          release)
      .def(
          "column_sums",
          [](Ops& ops, bool bf16, Address x, Extents extents, Rows rows, int columns, uintptr_t sums) {
            ops.column_sums(tensor_type(bf16), view_of(x), blocks_of(extents, rows), columns,
                            reinterpret_cast<float*>(sums));
          },
          release)
      .def(
          "attention",
          [](Ops& ops, bool bf16, int head_size, Address qkv, Address out, Address lse, Address grad,
             Address grad_qkv, const std::vector<int64_t>& offsets, Extents heads, Rows sequences,
             uint64_t seed, uint32_t threshold, float scale) {
            AttentionOp task{tensor_type(bf16), head_size,     {seed, threshold, scale},
                             view_of(qkv),      view_of(out),  reinterpret_cast<float*>(std::get<0>(lse)),
                             std::get<1>(lse),  view_of(grad), view_of(grad_qkv)};
            ops.attention(task, offsets, blocks_of(heads, sequences));
          },
          release)
      .def(
          "norm",
          [](Ops& ops, bool bf16, int hidden, float eps, uint64_t seed, uint32_t threshold, float scale,
             uintptr_t weight, uintptr_t bias, Address x, Address residual, Address z, Address out,
             uintptr_t mean, uintptr_t rstd, int64_t rows) {
            ops.norm({tensor_type(bf16),
                      false,
                      hidden,
                      eps,
                      {seed, threshold, scale},
                      pointer(weight),
                      pointer(bias),
                      view_of(x),
                      view_of(residual),
                      view_of(z),
                      view_of(out),
                      reinterpret_cast<float*>(mean),
                      reinterpret_cast<float*>(rstd),
                      {},
                      {}},
                     rows);
          },
          release)
      .def(
          "embed",
          [](Ops& ops, bool bf16, int hidden, float eps, uint64_t seed, uint32_t threshold, float scale,
             uintptr_t weight, uintptr_t bias, std::array<Address, 3> tables, std::array<uintptr_t, 3> ids,
             Address z, Address out, uintptr_t mean, uintptr_t rstd, int64_t rows) {
            NormOp task{tensor_type(bf16),
                        true,
                        hidden,
                        eps,
                        {seed, threshold, scale},
                        pointer(weight),
                        pointer(bias),
                        {},
                        {},
                        view_of(z),
                        view_of(out),
                        reinterpret_cast<float*>(mean),
                        reinterpret_cast<float*>(rstd),
                        {},
                        {}};
            for (int i = 0; i < 3; ++i) {
              task.tables[i] = view_of(tables[i]);
              task.ids[i] = reinterpret_cast<const int64_t*>(ids[i]);
            }
            ops.norm(task, rows);
          },
          release)
      .def(
          "norm_backward",
          [](Ops& ops, bool bf16, bool embeds, int hidden, uint64_t seed, uint32_t threshold, float scale,
             uintptr_t weight, Address grad, Address z, uintptr_t mean, uintptr_t rstd, Address grad_z,
             Address grad_x, uintptr_t grad_weight, uintptr_t grad_bias, int64_t rows) {
            ops.norm_backward({tensor_type(bf16),
                               embeds,
                               hidden,
                               0.f,
                               {seed, threshold, scale},
                               pointer(weight),
                               nullptr,
                               view_of(grad_x),
                               view_of(grad_z),
                               view_of(z),
                               view_of(grad),
                               reinterpret_cast<float*>(mean),
                               reinterpret_cast<float*>(rstd),
                               {},
                               {}},
                              rows, reinterpret_cast<char*>(grad_weight), reinterpret_cast<char*>(grad_bias));
          },
          release)
      .def(
          "scatter",
          [](Ops& ops, bool bf16, Address grad, uintptr_t ids, int64_t rows, uintptr_t table, int columns) {
            ops.scatter(tensor_type(bf16), view_of(grad), reinterpret_cast<const int64_t*>(ids), rows,
                        reinterpret_cast<char*>(table), columns);
          },
          release)
      .def(
          "loss",
          [](Ops& ops, bool bf16, bool cross_entropy, int columns, Address student, Address teacher,
             int64_t rows) {
            return ops.loss(
                {tensor_type(bf16), cross_entropy, columns, view_of(student), view_of(teacher), {}, 0}, rows);
          },
          release)
      .def(
          "loss_backward",
          [](Ops& ops, bool bf16, bool cross_entropy, int columns, Address student, Address teacher,
             Address out, float scale, int64_t rows) {
            ops.loss_backward({tensor_type(bf16), cross_entropy, columns, view_of(student), view_of(teacher),
                               view_of(out), scale},
                              rows);
          },
          release);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU engine's native part; use dynabert_fast.engine.";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_kernels()) names.push_back(k->name);
    return names;
  });
  m.def("peak", &peak, py::arg("dtype"), py::arg("isa"), py::arg("seconds") = 0.1);
  m.def("layout", [](const py::dict& fields) {
    py::list sections;
    for (const Section& s : layout(shape_from(fields)))
      sections.append(py::make_tuple(s.name, std::string(1, s.type), s.shape, s.block, s.offset, s.bytes));
    return sections;
  });
  m.def("packed_bytes", [](const py::dict& fields) { return packed_bytes(shape_from(fields)); });
  py::class_<Engine>(m, "Engine")
      .def(py::init<const py::dict&, py::buffer, int, const std::string&>(), py::arg("shape"),
           py::arg("memory"), py::arg("threads"), py::arg("isa"))
      .def("add_subnet", &Engine::add_subnet)
      .def("run", &Engine::run, py::arg("input_ids"), py::arg("mask"), py::arg("token_types"),
           py::arg("positions"), py::arg("subnets"), py::arg("hidden_states"), py::arg("pooled"),
           py::arg("profile"))
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("isa", &Engine::isa);
  bind_ops(m);
}
