// Python's view of the CUDA code: addresses, sizes and streams as integers. Importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "../cuda/encoder.h"
#include "../cuda/matmul.h"

namespace py = pybind11;
using namespace dynabert::cuda;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Activation activation_from(const std::string& name) {
  const std::array<const char*, 4> names = {"", "gelu", "gelu_tanh", "relu"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  throw std::invalid_argument("activation must be '', gelu, gelu_tanh or relu, got " + name);
}

Epilogue epilogue_from(const std::string& name) {
  const std::array<const char*, 6> names = {"", "bias", "relu", "gelu_tanh", "sums of a", "sums of b"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Epilogue>(i);
  }
  throw std::invalid_argument("an epilogue is '', bias, relu, gelu_tanh, 'sums of a' or 'sums of b', got " +
                              name);
}

/// A sub-network's encoder for batches of one size, planned once.
class PersistentEncoder {
 public:
  static constexpr int kWeights = 12;  // of a layer, in the order of `Layer`

  PersistentEncoder(int tokens, int sequences, int longest, int hidden, int head_size, int heads, int neurons,
                    bool int8, const std::string& activation, float eps,
                    const std::vector<std::array<uintptr_t, kWeights>>& weights,
                    const std::vector<std::pair<int, int>>& extents,
                    std::optional<std::tuple<int, int, bool>> device, int tile_rows) {
    if (weights.size() != extents.size() || weights.size() > kMostLayers) {
      throw std::invalid_argument("there must be the extents of each of 1 to " + std::to_string(kMostLayers) +
                                  " layers, got " + std::to_string(weights.size()) + " layers, " +
                                  std::to_string(extents.size()) + " extents");
    }
    e_.tokens = tokens, e_.sequences = sequences, e_.longest = longest;
    e_.hidden = hidden, e_.head_size = head_size;
    e_.heads = heads, e_.neurons = neurons, e_.int8 = int8;
    e_.activation = activation_from(activation);
    e_.eps = eps;
    e_.scale = static_cast<float>(M_LOG2E / std::sqrt(head_size));
    e_.layers = static_cast<int>(weights.size());
    for (int i = 0; i < e_.layers; ++i) {
      const auto& w = weights[i];
      auto packed = [&](int n) { return pointer<const char>(w[n]); };
      auto at = [&](int n) { return pointer<const Bf16>(w[n]); };
      e_.layer[i] = {packed(0),
                     at(1),
                     packed(2),
                     at(3),
                     at(4),
                     at(5),
                     packed(6),
                     at(7),
                     packed(8),
                     at(9),
                     at(10),
                     at(11),
                     extents[i].first,
                     extents[i].second,
                     {},
                     {},
                     {},
                     {}};
      for (uintptr_t address : w) {
        if (address % 16) throw std::invalid_argument("weights must begin at multiples of 16 bytes");
      }
    }
    Device on{};
    if (device) {
      std::tie(on.multiprocessors, on.shared_bytes, on.wgmma) = *device;
    } else {
      on = current_device();
    }
    plan_ = plan(e_, on, tile_rows);
    lay_out();
  }

  std::size_t workspace_bytes() const { return workspace_; }
  int blocks() const { return plan_.blocks; }
  int tile_rows() const { return plan_.tile_rows; }

  /// x [T, D] becomes the last layer's output. The workspace's first 4 bytes are zero at its first use.
  void run(uintptr_t x, uintptr_t offsets, uintptr_t workspace, uintptr_t stream) const {
    if (x % 16 || workspace % kUnit)
      throw std::invalid_argument("x must begin at a multiple of 16 bytes, the workspace of 256");
    Encoder e = e_;
    auto at = [&](std::size_t offset) { return pointer<char>(workspace + offset); };
    e.x = pointer<Bf16>(x);
    e.offsets = pointer<const int64_t>(offsets);
    e.barrier = reinterpret_cast<uint32_t*>(at(0));
    e.qkv = reinterpret_cast<Bf16*>(at(qkv_));
    e.context = reinterpret_cast<Bf16*>(at(context_));
    e.inner = reinterpret_cast<Bf16*>(at(inner_));
    e.parts = reinterpret_cast<float*>(at(parts_));
    encode(e, plan_, pointer(stream));
  }

 private:
  static constexpr std::size_t kUnit = 256;

  void lay_out() {
    std::size_t wide = 0, neurons = 0;
    for (int i = 0; i < e_.layers; ++i) {
      wide = std::max<std::size_t>(wide, e_.layer[i].heads * e_.head_size);
      neurons = std::max<std::size_t>(neurons, e_.layer[i].neurons);
    }
    const std::size_t tokens = e_.tokens;
    std::size_t done = kUnit;  // the barrier has it to itself
    auto take = [&](std::size_t bytes) {
      const std::size_t begin = done;
      done += (bytes + kUnit - 1) / kUnit * kUnit;
      return begin;
    };
    qkv_ = take(tokens * 3 * wide * sizeof(Bf16));
    context_ = take(tokens * wide * sizeof(Bf16));
    inner_ = take(tokens * neurons * sizeof(Bf16));
    parts_ = take(plan_.parts * tokens * e_.hidden * sizeof(float));
    workspace_ = done;
  }

  Encoder e_{};
  Plan plan_{};
  std::size_t qkv_ = 0, context_ = 0, inner_ = 0, parts_ = 0, workspace_ = 0;
};

bool run_matmul(std::array<int64_t, 3> sizes, std::array<bool, 2> transposed, std::pair<uintptr_t, int64_t> a,
                std::pair<uintptr_t, int64_t> b, std::pair<uintptr_t, int64_t> d, bool bf16,
                const std::string& epilogue, uintptr_t bias, std::pair<uintptr_t, int64_t> pre,
                bool tokens_inside, int device, std::pair<uintptr_t, std::size_t> workspace,
                uintptr_t stream) {
  Matmul c{};
  c.m = sizes[0], c.n = sizes[1], c.k = sizes[2];
  c.transpose_a = transposed[0], c.transpose_b = transposed[1];
  c.a = pointer(a.first), c.b = pointer(b.first), c.d = pointer(d.first);
  c.a_stride = a.second, c.b_stride = b.second, c.d_stride = d.second;
  c.bf16 = bf16;
  c.epilogue = epilogue_from(epilogue);
  c.bias = pointer(bias);
  c.pre = pointer(pre.first), c.pre_stride = pre.second;
  c.tokens_inside = tokens_inside;
  return matmul(c, device, pointer(workspace.first), workspace.second, pointer(stream));
}

void run_pointwise(bool bf16, const std::string& activation, std::pair<int64_t, int64_t> shape,
                   std::pair<uintptr_t, int64_t> pre, std::pair<uintptr_t, int64_t> grad,
                   std::pair<uintptr_t, int64_t> out, uintptr_t stream) {
  pointwise({pointer(pre.first), pointer(grad.first), pointer(out.first), shape.first, shape.second,
             pre.second, grad.second, out.second, bf16, activation_from(activation)},
            pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  py::register_exception<CudaError>(module, "CudaError", PyExc_RuntimeError);
  py::register_exception<MatmulError>(module, "MatmulError", PyExc_RuntimeError);
  module.attr("architectures") = DYNABERT_CUDA_ARCHITECTURES;
  module.attr("tile_rows") = std::vector<int>(std::begin(kTileRows), std::end(kTileRows));
  module.def("packed_offset", &packed_offset, py::arg("int8"), py::arg("columns"), py::arg("depth"),
             py::arg("column"), py::arg("index"));
  py::class_<PersistentEncoder>(module, "PersistentEncoder")
      .def(py::init<int, int, int, int, int, int, int, bool, std::string, float,
                    std::vector<std::array<uintptr_t, PersistentEncoder::kWeights>>,
                    std::vector<std::pair<int, int>>, std::optional<std::tuple<int, int, bool>>, int>(),
           py::arg("tokens"), py::arg("sequences"), py::arg("longest"), py::arg("hidden"),
           py::arg("head_size"), py::arg("heads"), py::arg("neurons"), py::arg("int8"), py::arg("activation"),
           py::arg("eps"), py::arg("weights"), py::arg("extents"), py::arg("device") = py::none(),
           py::arg("tile_rows") = 0)
      .def_property_readonly("workspace_bytes", &PersistentEncoder::workspace_bytes)
      .def_property_readonly("blocks", &PersistentEncoder::blocks)
      .def_property_readonly("tile_rows", &PersistentEncoder::tile_rows)
      .def("run", &PersistentEncoder::run, py::arg("x"), py::arg("offsets"), py::arg("workspace"),
           py::arg("stream"));
  module.def("load_cublaslt", &load_cublaslt, py::arg("paths"));
  module.def("matmul", &run_matmul, py::arg("sizes"), py::arg("transposed"), py::arg("a"), py::arg("b"),
             py::arg("d"), py::arg("bf16"), py::arg("epilogue"), py::arg("bias"), py::arg("pre"),
             py::arg("tokens_inside"), py::arg("device"), py::arg("workspace"), py::arg("stream"));
  module.def("matmul_counts", [] {
    const MatmulCounts c = matmul_counts();
    return std::make_pair(c.searches, c.calls);
  });
  module.def("pointwise", &run_pointwise, py::arg("bf16"), py::arg("activation"), py::arg("shape"),
             py::arg("pre"), py::arg("grad"), py::arg("out"), py::arg("stream"));
}
