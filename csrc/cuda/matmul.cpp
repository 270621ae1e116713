#include "matmul.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

namespace dynabert::cuda {

namespace {

using namespace lt;

struct State {
  std::mutex mutex;
  bool loaded = false;
  std::string path;
  Library library{};
  std::map<int, Handle> handles;  // of devices; they live as long as the process
  std::map<std::vector<int64_t>, Algo> algorithms;
  MatmulCounts counts{};
};

State& state() {
  static State* all = new State;  // never destroyed: the library may be gone before it would be
  return *all;
}

void check(Status status, const char* what) {
  if (status != kSuccess)
    throw MatmulError(std::string(what) + " failed with cuBLAS status " + std::to_string(status));
}

/// An object of cuBLASLt's.
class Owned {
 public:
  explicit Owned(Status (*destroy)(void*)) : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (object) destroy_(object);
  }
  void* object = nullptr;

 private:
  Status (*destroy_)(void*);
};

void* open_library(const std::vector<std::string>& paths, std::string& found) {
  const std::array<const char*, 3> names = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"};
  // What torch has loaded comes first: two versions in one process would each keep a workspace.
  for (const char* name : names) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return found = name, library;
  }
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW)) return found = path, library;
  }
  for (const char* name : names) {
    if (void* library = dlopen(name, RTLD_NOW)) return found = name, library;
  }
  return nullptr;
}

template <class F>
void find(void* library, const char* name, F& function) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw MatmulError(std::string("cuBLASLt has no ") + name);
  function = reinterpret_cast<F>(symbol);
}

void load(State& s, const std::vector<std::string>& paths) {
  if (s.loaded) return;
  void* library = open_library(paths, s.path);
  if (!library) {
    throw MatmulError("libcublasLt is not found: install a CUDA build of torch, or nvidia-cublas");
  }
  Library& l = s.library;
  find(library, "cublasLtCreate", l.create);
  find(library, "cublasLtMatmulDescCreate", l.desc_create);
  find(library, "cublasLtMatmulDescDestroy", l.desc_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", l.desc_set);
  find(library, "cublasLtMatrixLayoutCreate", l.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", l.layout_destroy);
  find(library, "cublasLtMatmulPreferenceCreate", l.preference_create);
  find(library, "cublasLtMatmulPreferenceDestroy", l.preference_destroy);
  find(library, "cublasLtMatmulPreferenceSetAttribute", l.preference_set);
  find(library, "cublasLtMatmulAlgoGetHeuristic", l.heuristic);
  find(library, "cublasLtMatmulAlgoCheck", l.algo_check);
  find(library, "cublasLtMatmul", l.matmul);
  find(library, "cublasLtGetVersion", l.version);
  s.loaded = true;
}

Handle handle_of(State& s, int device) {
  Handle& handle = s.handles[device];
  if (!handle) check(s.library.create(&handle), "cublasLtCreate");
  return handle;
}

/// The largest power of two, up to 256, that divides an address.
uint32_t alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

EpilogueKind kind_of(const Matmul& c) {
  switch (c.epilogue) {
    case Epilogue::kBias: return lt::kBias;
    case Epilogue::kReluBias: return lt::kReluBias;
    case Epilogue::kGeluTanhBias: return c.pre ? kGeluAuxBias : kGeluBias;
    case Epilogue::kSumsOfA: return kGradientA;
    case Epilogue::kSumsOfB: return kGradientB;
    default: return kDefault;
  }
}

/// Of the same algorithm are calls of one shape but for the tokens.
std::vector<int64_t> key_of(const Matmul& c, int device, size_t workspace_bytes) {
  return {device,
          c.m,
          c.tokens_inside ? c.n : token_bucket(c.n),
          c.tokens_inside ? token_bucket(c.k) : c.k,
          c.transpose_a,
          c.transpose_b,
          c.a_stride,
          c.b_stride,
          c.d_stride,
          c.bf16,
          kind_of(c),
          c.pre_stride,
          alignment(c.a),
          alignment(c.b),
          alignment(c.d),
          static_cast<int64_t>(workspace_bytes)};
}

/// What cuBLASLt wants to know of a call.
struct Description {
  explicit Description(const Library& l)
      : desc(l.desc_destroy), a(l.layout_destroy), b(l.layout_destroy), d(l.layout_destroy) {}
  Owned desc, a, b, d;
};

void describe(const Library& l, const Matmul& c, Description& to) {
  const DataType type = c.bf16 ? kBfloat16 : kFloat16;
  check(l.desc_create(&to.desc.object, kCompute32F, kFloat32), "cublasLtMatmulDescCreate");
  auto set = [&](DescAttribute attribute, const auto& value) {
    check(l.desc_set(to.desc.object, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  };
  set(kTransA, int32_t{c.transpose_a ? kTransposed : kNo});
  set(kTransB, int32_t{c.transpose_b ? kTransposed : kNo});
  set(lt::kEpilogue, int32_t{kind_of(c)});
  if (c.bias) set(kBiasPointer, c.bias);
  if (c.pre) {
    set(kAuxPointer, c.pre);
    set(kAuxLeading, c.pre_stride);
  }
  auto layout = [&](Owned& owned, int64_t rows, int64_t columns, int64_t stride) {
    check(l.layout_create(&owned.object, type, rows, columns, stride), "cublasLtMatrixLayoutCreate");
  };
  layout(to.a, c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k, c.a_stride);
  layout(to.b, c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, c.b_stride);
  layout(to.d, c.m, c.n, c.d_stride);
}

/// The best algorithm by cuBLASLt's heuristics; false where it has none.
bool search(const Library& l, Handle handle, const Matmul& c, const Description& of, size_t workspace_bytes,
            Algo& found) {
  Owned preference(l.preference_destroy);
  check(l.preference_create(&preference.object), "cublasLtMatmulPreferenceCreate");
  auto set = [&](PreferenceAttribute attribute, const auto& value) {
    check(l.preference_set(preference.object, attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  set(kMaxWorkspace, uint64_t{workspace_bytes});
  set(kAlignA, alignment(c.a));
  set(kAlignB, alignment(c.b));
  set(kAlignC, alignment(c.d));
  set(kAlignD, alignment(c.d));
  HeuristicResult result{};
  int count = 0;
  const Status status = l.heuristic(handle, of.desc.object, of.a.object, of.b.object, of.d.object,
                                    of.d.object, preference.object, 1, &result, &count);
  if (status == kNotSupported || (status == kSuccess && count == 0)) return false;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  found = result.algo;
  return result.state == kSuccess;
}

}  // namespace

int64_t token_bucket(int64_t tokens) {
  int64_t step = 16;
  while (step * 16 < tokens) step *= 2;
  return (tokens + step - 1) / step * step;
}

std::string load_cublaslt(const std::vector<std::string>& paths) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  load(s, paths);
  return s.path + ", version " + std::to_string(s.library.version());
}

bool matmul(const Matmul& call, int device, void* workspace, size_t workspace_bytes, void* stream) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  load(s, {});
  const Handle handle = handle_of(s, device);
  Description of(s.library);
  describe(s.library, call, of);
  const std::vector<int64_t> key = key_of(call, device, workspace_bytes);
  auto found = s.algorithms.find(key);
  HeuristicResult ignored{};
  const bool fits = found != s.algorithms.end() &&
                    s.library.algo_check(handle, of.desc.object, of.a.object, of.b.object, of.d.object,
                                         of.d.object, &found->second, &ignored) == kSuccess &&
                    ignored.workspace <= workspace_bytes;
  if (!fits) {
    ++s.counts.searches;
    Algo algo;
    if (!search(s.library, handle, call, of, workspace_bytes, algo)) return false;
    found = s.algorithms.insert_or_assign(key, algo).first;
  }
  ++s.counts.calls;
  const float one = 1, zero = 0;
  check(
      s.library.matmul(handle, of.desc.object, &one, call.a, of.a.object, call.b, of.b.object, &zero, call.d,
                       of.d.object, call.d, of.d.object, &found->second, workspace, workspace_bytes, stream),
      "cublasLtMatmul");
  return true;
}

MatmulCounts matmul_counts() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.counts;
}

}  // namespace dynabert::cuda
