// The whole forward pass of one packed model, in one call.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "model.h"
#include "thread_team.h"

namespace dynabert {

/// What a pass spends its time on, in the order of a layer.
enum Stage { kEmbed, kQkv, kAttention, kQuantise, kOut, kNorm, kUp, kDown, kPool, kStages };
extern const char* const kStageNames[kStages];

/// Kept layers and their extents; rules of loop bounds, never weights.
struct Subnet {
  std::vector<int> layers, heads, neurons;
};

/// A padded batch [B, S]; null pointers stand for all real, type 0 and the family's positions.
struct Batch {
  int64_t sequences = 0, length = 0;
  const int64_t* ids = nullptr;
  const uint8_t* mask = nullptr;
  const int64_t* token_types = nullptr;
  const int64_t* positions = nullptr;
  const int32_t* subnets = nullptr;  // of each sequence, numbers that `add_subnet` gave
};

/// Where results go, in the caller's order; null where one is not wanted.
struct Output {
  float* logits = nullptr;  // [B, C]
  float* pooled = nullptr;  // [B, D]
  // After the embeddings and after each layer that a sequence's sub-network keeps, or the last state
  // alone: [B, S, D]. Padding is left as it is, and so are the states that a shallower one does not have.
  std::vector<float*> hidden;
  double* seconds = nullptr;  // of each stage, [kStages]
};

class Encoder {
 public:
  /// `buffer` holds packed_bytes(shape) bytes aligned to 64 and outlives the encoder.
  Encoder(const Shape& shape, const char* buffer, int threads, const Kernels& kernels);
  ~Encoder();

  const Shape& shape() const { return model_.shape; }
  const Kernels& kernels() const { return kernels_; }
  int threads() const { return team_.size(); }

  /// Registers a sub-network; throws std::invalid_argument if it does not fit the model.
  int add_subnet(Subnet subnet);

  /// Safe to call from many threads at once. With one thread, calls run side by side; with more, they
  /// take turns on the team. Throws std::invalid_argument for ids, masks and positions out of range.
  void run(const Batch& batch, const Output& output);

 private:
  struct Workspace;
  class Pass;
  std::unique_ptr<Workspace> take_workspace();
  void give_back(std::unique_ptr<Workspace> workspace);

  Model model_;
  const Kernels& kernels_;
  ThreadTeam team_;
  std::mutex turn_;             // of the team
  std::mutex mutex_;            // of what follows
  std::deque<Subnet> subnets_;  // a deque: its elements stay where they are
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace dynabert
