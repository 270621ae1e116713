#include <cuda_runtime.h>

#include "encoder.h"
#include "kernel.cuh"

namespace dynabert::cuda {

namespace {

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw CudaError(std::string(what) + ": " + cudaGetErrorString(code));
}

using Kernel = void (*)(Encoder);

Kernel kernel_of(TileShape tile) {
  if (tile.row_groups == 2) return encode<2, 2>;
  return tile.fragments == 2 ? encode<1, 2> : encode<1, 1>;
}

}  // namespace

Device current_device() {
  int device = 0, capability = 0;
  Device found{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  };
  ask(capability, cudaDevAttrComputeCapabilityMajor);
  if (capability < 8) throw CudaError("the encoder needs compute capability 8.0 or more");
  ask(found.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return found;
}

void encode(const Encoder& e, const Plan& plan, void* stream) {
  const Kernel kernel = kernel_of(plan.tile);
  const int shared = kSmallBytes + 2 * e.buffer_bytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  // A block that waits for one that cannot start would wait for ever: a cooperative launch fails instead.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, e), "the encoder's launch");
}

}  // namespace dynabert::cuda
