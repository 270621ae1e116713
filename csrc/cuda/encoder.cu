#include <cuda_runtime.h>

#include "encoder.h"
#include "kernel.cuh"

namespace dynabert::cuda {

namespace {

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or the next launch that asks for it would take it for its own
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(code));
}

using Kernel = void (*)(Encoder);

template <bool kInt8>
Kernel kernel_of(int tile_rows) {
  return tile_rows == 64 ? encode<64, kInt8> : tile_rows == 32 ? encode<32, kInt8> : encode<16, kInt8>;
}

}  // namespace

Device current_device() {
  int device = 0, capability = 0, minor = 0;
  Device found{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  };
  ask(capability, cudaDevAttrComputeCapabilityMajor);
  if (capability < 8) throw CudaError("the encoder needs compute capability 8.0 or more");
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  found.wgmma = capability == 9 && minor == 0;
  ask(found.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return found;
}

void encode(const Encoder& e, const Plan& plan, void* stream) {
  const Kernel kernel = e.int8 ? kernel_of<true>(plan.tile_rows) : kernel_of<false>(plan.tile_rows);
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
