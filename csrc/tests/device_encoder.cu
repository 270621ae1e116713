// The encoder's kernels on a GPU, without Python: every sub-network of a grid against plain loops, in
// bfloat16 and with int8 weights, twice, from memory that holds NaN. A program to run by itself, or under
// compute-sanitizer (tests/engine/test_persistent.py does both).
//
//   device_encoder            small sizes, for a sanitizer
//   device_encoder base       BERT-base with random weights, 128 tokens: errors, and microseconds of a launch
//   device_encoder times      BERT-base: microseconds of a launch for several lengths
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "../cuda/encoder.h"
#include "cuda_model.h"

using namespace dynabert::cuda;

namespace {

void check(cudaError_t code) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(code));
  std::exit(2);
}

/// Memory of the device, freed when the program ends.
template <class T>
T* upload(const T* values, std::size_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)));
  if (values) {
    check(cudaMemcpy(memory, values, count * sizeof(T), cudaMemcpyHostToDevice));
  } else {
    check(cudaMemset(memory, 0xff, count * sizeof(T)));
  }
  return memory;
}
const Bf16* upload(const Vector& v) { return upload(v.data(), v.count); }
const char* upload(const Weight& w) { return upload(w.data(), w.bytes()); }

/// The model's layers, with their weights on the device.
std::vector<Layer> upload(const Model& model) {
  std::vector<Layer> layers;
  for (const LayerWeights& l : model.layers) {
    layers.push_back({upload(l.qkv),
                      upload(l.qkv_bias),
                      upload(l.out),
                      upload(l.out_bias),
                      upload(l.norm1),
                      upload(l.norm1_bias),
                      upload(l.up),
                      upload(l.up_bias),
                      upload(l.down),
                      upload(l.down_bias),
                      upload(l.norm2),
                      upload(l.norm2_bias),
                      0,
                      0,
                      {},
                      {},
                      {},
                      {}});
  }
  return layers;
}

struct Memory {
  Bf16 *x, *qkv, *context, *inner;
  float* parts;
  uint32_t* barrier;
};

float microseconds(const Encoder& e, const Plan& plan) {
  constexpr int kRuns = 200;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin));
  for (int i = 0; i < kRuns; ++i) encode(e, plan, nullptr);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  return 1000 * milliseconds / kRuns;
}

/// Arguments of a launch but for the plan.
Encoder encoder_on(const Model& model, const std::vector<Layer>& layers, const Subnet& net, int tokens,
                   const std::vector<int64_t>& offsets, const Memory& memory) {
  Encoder e = encoder_of(model, net, tokens);
  for (int i = 0; i < e.layers; ++i) {
    e.layer[i] = layers[net.layers[i]];
    e.layer[i].heads = net.heads[i], e.layer[i].neurons = net.neurons[i];
  }
  e.activation = Activation::kGelu;
  e.sequences = static_cast<int>(offsets.size()) - 1;
  for (int b = 0; b < e.sequences; ++b) e.longest = std::max<int>(e.longest, offsets[b + 1] - offsets[b]);
  e.offsets = upload(offsets.data(), offsets.size());
  e.x = memory.x, e.qkv = memory.qkv, e.context = memory.context, e.inner = memory.inner,
  e.parts = memory.parts;
  e.barrier = memory.barrier;
  return e;
}

/// Prints a line for each kernel; whether all errors are at most twice those of plain bfloat16, and both runs
/// gave the same bits.
bool compare(const Model& model, const std::vector<Layer>& layers, const Subnet& net, const Vector& input,
             const std::vector<int64_t>& offsets, const Memory& memory, bool times) {
  const int d = model.s.hidden, tokens = static_cast<int>(input.count) / d;
  Encoder e = encoder_on(model, layers, net, tokens, offsets, memory);
  const std::vector<double> exact = plain(model, net, input, offsets, e.activation, e.eps, false);
  const std::vector<double> usual = plain(model, net, input, offsets, e.activation, e.eps, true);
  double theirs = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) theirs = std::max(theirs, std::fabs(usual[i] - exact[i]));
  bool all = true;
  for (int rows : kTileRows) {
    const Plan found = plan(e, current_device(), rows);
    std::vector<Bf16> first(input.count), second(input.count);
    for (std::vector<Bf16>* to : {&first, &second}) {
      check(cudaMemcpy(e.x, input.data(), input.count * sizeof(Bf16), cudaMemcpyHostToDevice));
      encode(e, found, nullptr);
      check(cudaMemcpy(to->data(), e.x, input.count * sizeof(Bf16), cudaMemcpyDeviceToHost));
    }
    const double ours = largest_error(first.data(), exact);
    const bool good = ours <= 2 * theirs && first == second;
    std::printf(
        "%s %s, %d layers of %d heads, %d blocks, tiles of %d rows: error %.4f, of plain bfloat16 %.4f%s",
        good ? "ok  " : "FAIL", e.int8 ? "int8" : "bf16", e.layers, net.heads[0], found.blocks, rows, ours,
        theirs, first == second ? "" : ", another result the second time");
    if (times) std::printf(", %.1f us", microseconds(e, found));
    std::printf("\n");
    all &= good;
  }
  return all;
}

/// Lines of a table of launches; how often the weights could have been read in that time at 4.8 TB/s is the
/// last column.
void print_times(const Model& model, const std::vector<Layer>& layers, const Memory& memory) {
  for (int tokens : {16, 32, 64, 128}) {
    const std::vector<int64_t> offsets = {0, tokens};
    for (auto [width, depth] : {std::pair(1.0, 1.0), std::pair(0.25, 0.5)}) {
      const Subnet net = subnet(model.s, width, depth);
      for (int rows : kTileRows) {
        Encoder e = encoder_on(model, layers, net, tokens, offsets, memory);
        const Plan found = plan(e, current_device(), rows);
        encode(e, found, nullptr);
        const float time = microseconds(e, found);
        double bytes = 0;
        for (int i = 0; i < e.layers; ++i)
          bytes +=
              (e.int8 ? 1.0 : 2.0) * e.hidden * (4.0 * net.heads[i] * e.head_size + 2.0 * net.neurons[i]);
        std::printf("%7s  %6d  w%.2f-d%.2f  %9d  %6d  %7.1f  %7.1f\n", e.int8 ? "int8" : "bf16", tokens,
                    width, depth, rows, found.blocks, time, time * 4.8e6 / bytes);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  const bool base = what == "base" || what == "times";
  const Sizes sizes = base ? Sizes{768, 64, 12, 3072, 12} : Sizes{96, 32, 4, 160, 2};
  const std::vector<int64_t> offsets =
      base ? std::vector<int64_t>{0, 128} : std::vector<int64_t>{0, 20, 20, 37};
  const std::size_t tokens = offsets.back(), wide = sizes.heads * sizes.head_size;
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  Vector input(tokens * sizes.hidden);
  for (std::size_t i = 0; i < input.count; ++i) input.data()[i] = round_bf16(normal(random));
  const uint32_t zero = 0;
  constexpr Bf16* kNothing = nullptr;
  const Memory memory = {upload(kNothing, input.count),
                         upload(kNothing, tokens * 3 * wide),
                         upload(kNothing, tokens * wide),
                         upload(kNothing, tokens * sizes.neurons),
                         upload(static_cast<float*>(nullptr), 16 * input.count),  // the most parts a plan has
                         upload(&zero, 1)};
  std::vector<std::pair<double, double>> grid = {{1, 1}, {0.25, 0.5}};
  if (!base) grid.insert(grid.end(), {{0.75, 1}, {0.5, 1}, {0.25, 1}, {1, 0.5}, {0.75, 0.5}, {0.5, 0.5}});
  if (what == "times") std::printf("weights  tokens  sub-network  tile rows  blocks       us  x floor\n");
  bool good = true;
  for (bool int8 : {false, true}) {
    const Model model(sizes, int8);
    const std::vector<Layer> layers = upload(model);
    if (what == "times") {
      print_times(model, layers, memory);
      continue;
    }
    for (auto [width, depth] : grid)
      good &= compare(model, layers, subnet(sizes, width, depth), input, offsets, memory, base);
  }
  return good ? 0 : 1;
}
