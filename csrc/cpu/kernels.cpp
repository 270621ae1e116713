#include "kernels.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dynabert {

int64_t attention_scratch(int length, int head_size) {
  const int64_t keys = round_up(length, kPanelColumns);
  const int64_t head = round_up(head_size, kPanelColumns);
  // K and V as panels, scores and probabilities of one tile of queries, one word a value.
  return kWordBytes * (2 * keys * head + 2 * kTileRows * keys + kTileRows * head);
}

int64_t attention_backward_scratch(int length, int head_size) {
  const int64_t keys = round_up(length, kPanelColumns);
  const int64_t head = round_up(head_size, kPanelColumns);
  // Panels of K (twice), V, and of a block of Q and dO; P, dS and a transpose; two tiles of scores; dK and
  // dV.
  const int64_t words = 5 * keys * head + 2 * kQueryBlock * head + 3 * kQueryBlock * keys +
                        2 * kTileRows * keys + 2 * kTileRows * head;
  return kWordBytes * words + 16 * 64;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512_bf16::kernels());
  if (avx512) found.push_back(&avx512::kernels());
  if (avx2) found.push_back(&avx2::kernels());
#elif defined(__aarch64__)
  const unsigned long capabilities = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
  if ((capabilities & HWCAP_ASIMDDP) && (more & HWCAP2_I8MM) && (more & HWCAP2_BF16))
    found.push_back(&neon_bf16::kernels());
  found.push_back(&neon::kernels());
#endif
  found.push_back(&portable::kernels());
  return found;
}

}  // namespace dynabert
