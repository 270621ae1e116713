// What a block does from the first phase to the last: the kernel itself. On a GPU a thread's lane of it; in
// the simulation each warp of each block is a thread of the CPU, and a barrier that is missing is a race that
// its sanitizer sees.
//
// Beside what phases.h asks of it, the machine `M` has
//   block, grid        number of this block, and how many there are
//   sync()             waits for the block's warps
//   prepare()          makes the buffers' mbarriers, before any copy
//   arrived(b, parity) waits for what is copied into buffer b: by this thread, or in bulk. The parity is that
//                      of how often it was filled before
//   give_back()        what this thread put into buffers comes before bulk copies behind the next sync()
//   meet(number)       waits for all blocks; they then see what each wrote. The barrier of this number, from
//   0 leave()            what a barrier adds, without waiting
//
// Shared memory: `kSmallBytes`, then two buffers that units of products have by turns. One holds the weights
// of the unit being computed, then its sums; the other receives the weights of the next. Attention has the
// one that waits for none.
#pragma once

#include "phases.h"
#include "plan.h"

namespace dynabert::cuda {

/// A block's units of products.
struct Stream {
  int turn;  // units computed
  Cursor next;
  Unit unit;  // that of `next`: behind a barrier there is no time for divisions

  HD static int buffer(int turn) { return turn % 2; }
  HD static int parity(int turn) { return turn / 2 % 2; }
  HD static int place(const Encoder& e, int turn) { return kSmallBytes + buffer(turn) * e.buffer_bytes; }
};

/// Begin to fetch the weights of the stream's next unit, which will be computed at this turn.
template <class M>
HD void fetch(M& m, const Encoder& e, Stream& s, int tile_rows, int turn) {
  if (s.next.phase < phases(e)) {
    const Product p = product(e, s.next.phase);
    s.unit = product_unit(p, e.tokens, tile_rows, s.next.number);
    fetch_weights(m, p, s.unit, Stream::buffer(turn), Stream::place(e, turn));
  }
}

template <class M, int kTileRows, bool kInt8>
HD void product_phase(M& m, const Encoder& e, int phase, Stream& s) {
  const Product p = product(e, phase);
  float* const small = reinterpret_cast<float*>(m.shared);
  while (s.next.phase == phase) {
    const Unit u = s.unit;
    const int buffer = Stream::place(e, s.turn);
    ProductTile<M, kTileRows, kInt8> tile;
    tile.begin(m, e, p, u);
    m.arrived(Stream::buffer(s.turn), Stream::parity(s.turn));
    m.give_back();
    m.sync();  // all have their share of the weights; nobody reads the sums of the unit before
    fetch_small<M, kInt8>(m, p, u, small);
    s.next = after(e, s.next, m.block, m.grid, kTileRows);
    fetch(m, e, s, kTileRows, s.turn + 1);
    tile.multiply(m, e, p, u, buffer);
    m.sync();
    tile.spill(m, p, u, buffer);
    m.sync();
    tile.finish(m, e, p, u, buffer, small);
    ++s.turn;
  }
}

template <int kHead, class M>
HD void attention_phase(M& m, const Encoder& e, int heads, int scratch) {
  const int count = attention_units(e, heads);
  for (int number = m.block; number < count; number += m.grid) {
    const AttentionUnit u = attention_unit(e, heads, number);
    AttentionTile<M, kHead> tile;
    m.sync();  // the unit before has been merged
    tile.attend(m, e, heads, u, scratch);
    m.sync();
    tile.merge(m, e, heads, u, scratch);
  }
}

template <class M>
HD void norm_phase(M& m, const Encoder& e, int phase) {
  const Layer& l = e.layer[phase / kSteps];
  const bool first = step_of(phase) == Step::kNorm1;
  const int parts = splits(product(e, phase - 1));
  float* const sums = reinterpret_cast<float*>(m.shared) + kSmallSums;
  for (int row = m.block; row < e.tokens; row += m.grid) {
    NormRow<M> norm;
    norm.gather(m, e, first ? l.out_bias : l.down_bias, first ? l.norm1_weight : l.norm2_weight,
                first ? l.norm1_bias : l.norm2_bias, parts, row, sums);
    m.sync();
    norm.centre(m, e, sums);
    m.sync();
    norm.store(m, e, row, sums);
  }
}

template <class M, int kTileRows, bool kInt8>
HD void encode_block(M& m, const Encoder& e) {
  keep_offsets(m, e);
  m.prepare();
  Stream s{0, settle(e, {0, m.block}, m.block, kTileRows), {}};
  fetch(m, e, s, kTileRows, s.turn);
  m.sync();
  for (int phase = 0; phase < phases(e); ++phase) {
    const Step step = step_of(phase);
    if (is_product(step)) {
      product_phase<M, kTileRows, kInt8>(m, e, phase, s);
    } else if (step == Step::kAttention) {
      const int heads = e.layer[phase / kSteps].heads;
      if (e.head_size == 64) {
        attention_phase<64>(m, e, heads, Stream::place(e, s.turn + 1));
      } else {
        attention_phase<32>(m, e, heads, Stream::place(e, s.turn + 1));
      }
    } else {
      norm_phase(m, e, phase);
    }
    if (phase < barriers(e)) m.meet(phase);
  }
  if (barriers(e) % 2) m.leave();
}

}  // namespace dynabert::cuda
