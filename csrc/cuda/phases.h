// What a warp does between two points at which its block works together. Each function is a part of a phase;
// body.h has the order, the block's barriers and the grid's.
//
// `M` is the machine: a GPU's memory, or that of a simulation, which checks every access. It has
//   kBulk, kWgmma                whether weights come by bulk copies, and whether it has wgmma
//   warp                         number of this warp in its block
//   shared                       first byte of the block's shared memory
//   activations(p)               16 bytes that another block wrote in an earlier phase
//   half_activations(p)          8 of them
//   constants(p)                 8 bytes that nobody writes
//   sums(p)                      16 bytes of parts, written in an earlier phase
//   store(p, low, high)          8 bytes of activations
//   store(p, sums)               16 bytes of parts
//   put(p, value)                into the buffers in shared memory
//   expect(buffer, bytes)        one lane of the block: so many bytes will come into this buffer,
//   copy_run(buffer, to, p, n)   n of them, later, from p
//   copy(to, p)                  where copies are not in bulk: 16 bytes of weights into shared memory, later
//   matrices(at, b)              four core matrices at this byte of shared memory, a row's word for each lane
//   bytes(at, b)                 256 bytes there, 8 for each lane
//   wgmma<blocks>(sums, a, at, run)
//                                begins sums += a b, with b as in `describe`
//   wgmma_fence(), wgmma_commit(), wgmma_wait<n>()
//                                registers are ready; these are a group; waits for all groups but n
#pragma once

#include "schedule.h"

namespace dynabert::cuda {

// ---- a warp together ----

struct Pair {
  uint32_t b[2];
};

/// sums += a b, see tile.h.
HD void multiply_add(PerLane<Float4>& sums, const PerLane<Fragment>& a, const PerLane<Pair>& b) {
#if defined(__CUDA_ARCH__)
  float* c = sums.value.value;
  const uint32_t *x = a.value.a, *y = b.value.b;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
#else
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane_row(lane), t = lane_step(lane);
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, index = 2 * t + i / 2 * 8;
      left[row][index] = low_bf16(a[lane].a[i]);
      left[row][index + 1] = high_bf16(a[lane].a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      right[2 * t + 8 * i][g] = low_bf16(b[lane].b[i]);
      right[2 * t + 8 * i + 1][g] = high_bf16(b[lane].b[i]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane_row(lane) + i / 2 * 8, column = 2 * lane_step(lane) + i % 2;
      float total = 0;
      for (int k = 0; k < 16; ++k) total += left[row][k] * right[k][column];
      sums[lane].value[i] += total;
    }
  }
#endif
}

/// v[lane] + v[lane ^ mask], or the larger of the two, in every lane.
template <bool kLarger>
HD void combine(PerLane<float>& v, int mask) {
#if defined(__CUDA_ARCH__)
  const float other = __shfl_xor_sync(0xffffffffu, v.value, mask);
  v.value = kLarger ? fmaxf(v.value, other) : v.value + other;
#else
  const PerLane<float> before = v;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float mine = before[lane], other = before[lane ^ mask];
    v[lane] = kLarger ? std::fmax(mine, other) : mine + other;
  }
#endif
}

// ---- products ----

/// Fetch the weights of a unit into a buffer, the bytes of shared memory from `to` on. In bulk one lane says
/// what is to come; else every thread of the block copies a share.
template <class M>
HD void fetch_weights(M& m, const Product& p, const Unit& u, int buffer, int to) {
  const int run = unit_run(p, u);
  const char* from =
      p.weight + u.column / 8 * p.stride + static_cast<int64_t>(u.first / kChunk) * block_bytes(p.int8);
  if constexpr (M::kBulk) {
    if (m.warp != 0) return;
    one_lane([&] {
      m.expect(buffer, u.blocks * run);
      for (int j = 0; j < u.blocks; ++j) m.copy_run(buffer, to + j * run, from + j * p.stride, run);
    });
  } else {
    constexpr int kWord = sizeof(Word4);
    each_lane([&](int lane) {
      for (int j = 0; j < u.blocks; ++j) {
        for (int at = (m.warp * kLanes + lane) * kWord; at < run; at += kThreads * kWord)
          m.copy(to + j * run + at, from + j * p.stride + at);
      }
    });
  }
}

/// A tile of 16, 32 or 64 rows. The block's warps are `kRowGroups` groups along the rows times `kParts` parts
/// of the sum: where there is one group, a warp's share of A is no other's, and it always comes straight from
/// memory into registers. wgmma has four warps, one behind the other, along 64 rows.
template <class M, int kTileRows, bool kInt8>
struct ProductTile {
  static constexpr int kRows = kTileRows;
  static constexpr bool kWide = M::kWgmma && kRows == 64 && !kInt8;
  static constexpr int kRowGroups = row_groups(kRows, kWide);
  static constexpr int kParts = kWarps / kRowGroups;
  static constexpr int kFragments = kRows / 16 / kRowGroups;
  static constexpr int kAhead = chunks_ahead(kWide);

  PerLane<Word4> a[kAhead][kFragments][2];
  PerLane<Float4> sums[kFragments][8];

  HD int part(const M& m) const { return m.warp / kRowGroups; }
  HD int first_row(const M& m) const { return m.warp % kRowGroups * kFragments * 16; }

  /// What lies beyond the tokens or the sum is loaded as what lies before: a condition for each lane would
  /// have its load waited for where it is given.
  HD void load(M& m, const Encoder& e, const Product& p, const Unit& u, int chunk,
               PerLane<Word4> (&to)[kFragments][2]) {
    UNROLL
    for (int f = 0; f < kFragments; ++f) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        each_lane([&](int lane) {
          const int row = smaller(e.tokens - 1, u.row + first_row(m) + 16 * f + 8 * half + lane_row(lane));
          const int index = smaller(u.last - 8, u.first + chunk * kChunk + chunk_index(lane));
          to[f][half][lane] = m.activations(p.a + (static_cast<int64_t>(row) * p.depth + index));
        });
      }
    }
  }

  /// Both steps of the operand A, with zeros beyond the sum: the weights there are those of other units. Rows
  /// beyond the tokens are computed, and not stored. The instruction wants other registers than those that 16
  /// bytes were loaded into; the mask is what brings them there, here and not where they were loaded.
  HD static void operands(const Unit& u, int chunk, const PerLane<Word4> (&from)[2],
                          PerLane<Fragment> (&to)[2]) {
    const int left = u.last - u.first - chunk * kChunk;
    UNROLL
    for (int s = 0; s < 2; ++s) {
      each_lane([&](int lane) {
        const uint32_t mask = chunk_index(lane) < left ? ~0u : 0u;
        to[s][lane] = fragment_a(from[0][lane], from[1][lane], s);
        UNROLL
        for (int i = 0; i < 4; ++i) to[s][lane].a[i] &= mask;
      });
    }
  }

  HD void begin(M& m, const Encoder& e, const Product& p, const Unit& u) {
    UNROLL
    for (int s = 0; s < kAhead; ++s) {
      const int chunk = part(m) + s * kParts;
      if (kWide || chunk < unit_chunks(u)) load(m, e, p, u, chunk, a[s]);
    }
    UNROLL
    for (int f = 0; f < kFragments; ++f) {
      UNROLL
      for (int j = 0; j < 8; ++j) each_lane([&](int lane) { sums[f][j][lane] = {}; });
    }
  }

  /// The unit's weights lie from byte `weights` of shared memory on.
  HD void multiply(M& m, const Encoder& e, const Product& p, const Unit& u, int weights) {
    if constexpr (kWide) {
      switch (u.blocks) {
        case 1: return multiply_wide<1>(m, e, p, u, weights);
        case 2: return multiply_wide<2>(m, e, p, u, weights);
        case 3: return multiply_wide<3>(m, e, p, u, weights);
        case 4: return multiply_wide<4>(m, e, p, u, weights);
        case 5: return multiply_wide<5>(m, e, p, u, weights);
        case 6: return multiply_wide<6>(m, e, p, u, weights);
        case 7: return multiply_wide<7>(m, e, p, u, weights);
        default: return multiply_wide<8>(m, e, p, u, weights);
      }
    } else {
      const int chunks = unit_chunks(u), run = unit_run(p, u);
      for (int base = part(m); base < chunks; base += kAhead * kParts) {
        UNROLL
        for (int s = 0; s < kAhead; ++s) {
          const int chunk = base + s * kParts;
          if (chunk < chunks) {
            PerLane<Fragment> left[kFragments][2];
            UNROLL
            for (int f = 0; f < kFragments; ++f) operands(u, chunk, a[s][f], left[f]);
            if (chunk + kAhead * kParts < chunks) load(m, e, p, u, chunk + kAhead * kParts, a[s]);
            multiply_chunk(m, weights + chunk * block_bytes(kInt8), run, u.blocks, left);
          }
        }
      }
    }
  }

  template <int kBlocks>
  HD void multiply_wide(M& m, const Encoder& e, const Product& p, const Unit& u, int weights) {
    PerLane<Fragment> left[2][2];
    const int chunks = unit_chunks(u);
    int base = part(m);
    for (; base + kAhead * kParts < chunks; base += kAhead * kParts)
      multiply_round<kBlocks, true>(m, e, p, u, weights, base, left);
    multiply_round<kBlocks, false>(m, e, p, u, weights, base, left);
    m.template wgmma_wait<0>();
  }

  /// As many chunks as registers hold, from chunk `base` on; with `kMore`, what comes after is loaded. There
  /// are no conditions: branches would make one wgmma wait for the one before. Beyond the sum A is zero, and
  /// the weights are those of the last chunk, for what lies behind may be no number. While wgmma reads the
  /// operands of a chunk, those of the next are made.
  template <int kBlocks, bool kMore>
  HD void multiply_round(M& m, const Encoder& e, const Product& p, const Unit& u, int weights, int base,
                         PerLane<Fragment> (&left)[2][2]) {
    static_assert(kAhead % 2 == 0, "a chunk's operands are not those of the one before");
    const int last = unit_chunks(u) - 1, run = unit_run(p, u);
    UNROLL
    for (int s = 0; s < kAhead; ++s) {
      const int chunk = base + s * kParts;
      operands(u, chunk, a[s][0], left[s % 2]);
      if constexpr (kMore) load(m, e, p, u, chunk + kAhead * kParts, a[s]);
      m.wgmma_fence();
      UNROLL
      for (int step = 0; step < 2; ++step) {
        m.template wgmma<kBlocks>(sums[0], left[s % 2][step],
                                  weights + smaller(chunk, last) * block_bytes(false) + step * kStepBytes,
                                  run);
      }
      m.wgmma_commit();
      m.template wgmma_wait<1>();
    }
  }

  HD void multiply_chunk(M& m, int at, int run, int blocks, const PerLane<Fragment> (&left)[kFragments][2]) {
    UNROLL
    for (int j = 0; j < 8; ++j) {
      if (j < blocks) {
        PerLane<Word4> b;
        if constexpr (kInt8) {
          PerLane<Pair> four;
          m.bytes(at + j * run, four);
          each_lane([&](int lane) {
            UNROLL
            for (int i = 0; i < 4; ++i) b[lane].word[i] = widen(four[lane].b[i / 2], i % 2);
          });
        } else {
          m.matrices(at + j * run, b);
        }
        UNROLL
        for (int s = 0; s < 2; ++s) {
          PerLane<Pair> pair;
          each_lane([&](int lane) { pair[lane] = {{b[lane].word[2 * s], b[lane].word[2 * s + 1]}}; });
          UNROLL
          for (int f = 0; f < kFragments; ++f) multiply_add(sums[f][j], left[f][s], pair);
        }
      }
    }
  }

  /// This warp's sums into its part's slab `[kRows, pitch]`, where the unit's weights were.
  HD void spill(M& m, const Product& p, const Unit& u, int buffer) {
    const int pitch = sum_pitch(p.tiling.columns);
    float* slab = reinterpret_cast<float*>(m.shared + buffer) + (part(m) * kRows + first_row(m)) * pitch;
    UNROLL
    for (int f = 0; f < kFragments; ++f) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        UNROLL
        for (int j = 0; j < 8; ++j) {
          if (j < u.blocks) {
            each_lane([&](int lane) {
              const float* two = sums[f][j][lane].value + 2 * half;
              m.put(slab + (16 * f + 8 * half + lane_row(lane)) * pitch + 8 * j + 2 * lane_step(lane),
                    Float2{{two[0], two[1]}});
            });
          }
        }
      }
    }
  }

  /// Adds the parts in order, scales and stores; bias and scales lie in the small floats.
  HD void finish(M& m, const Encoder& e, const Product& p, const Unit& u, int buffer, const float* small) {
    const int pitch = sum_pitch(p.tiling.columns), across = u.blocks * 2;
    const float* slabs = reinterpret_cast<const float*>(m.shared + buffer);
    each_lane([&](int lane) {
      for (int item = m.warp * kLanes + lane; item < kRows * across; item += kThreads) {
        const int row = item / across, column = item % across * 4;
        if (u.row + row >= e.tokens) continue;
        Float4 total = {};
        UNROLL
        for (int i = 0; i < kParts; ++i) {
          const Float4 one = *reinterpret_cast<const Float4*>(slabs + (i * kRows + row) * pitch + column);
          UNROLL
          for (int n = 0; n < 4; ++n) total.value[n] += one.value[n];
        }
        if constexpr (kInt8) {
          UNROLL
          for (int n = 0; n < 4; ++n) total.value[n] *= small[kSmallScales + column + n];
        }
        const int64_t at = static_cast<int64_t>(u.row + row) * p.columns + u.column + column;
        if (p.in_parts) {
          m.store(e.parts + (static_cast<int64_t>(u.split) * e.tokens * e.hidden + at), total);
        } else {
          UNROLL
          for (int n = 0; n < 4; ++n)
            total.value[n] = activate(p.activation, total.value[n] + small[column + n]);
          m.store(p.out + at, pack_bf16(total.value[0], total.value[1]),
                  pack_bf16(total.value[2], total.value[3]));
        }
      }
    });
  }
};

/// The bias of a unit's columns, and their scales, as floats.
template <class M, bool kInt8>
HD void fetch_small(M& m, const Product& p, const Unit& u, float* small) {
  each_lane([&](int lane) {
    const int column = 4 * (m.warp * kLanes + lane);
    if (column >= 8 * u.blocks) return;
    if (!p.in_parts) {
      uint32_t pair[2];
      m.constants(p.bias + u.column + column, pair);
      small[column] = low_bf16(pair[0]);
      small[column + 1] = high_bf16(pair[0]);
      small[column + 2] = low_bf16(pair[1]);
      small[column + 3] = high_bf16(pair[1]);
    }
    if constexpr (kInt8) {
      UNROLL
      for (int n = 0; n < 4; n += 2) {
        uint32_t two[2];
        m.constants(p.scales + u.column + column + n, two);
        small[kSmallScales + column + n] = bits_to_float(two[0]);
        small[kSmallScales + column + n + 1] = bits_to_float(two[1]);
      }
    }
  });
}

// ---- attention ----

/// Where sequences begin, into shared memory: from the device's it would come late in every layer.
template <class M>
HD void keep_offsets(M& m, const Encoder& e) {
  if (e.sequences > kKeptSequences) return;
  int* kept = reinterpret_cast<int*>(m.shared) + kSmallOffsets;
  each_lane([&](int lane) {
    const int i = m.warp * kLanes + lane;
    if (i <= e.sequences) kept[i] = static_cast<int>(e.offsets[i]);
  });
}
template <class M>
HD int offset_of(const M& m, const Encoder& e, int sequence) {
  if (e.sequences <= kKeptSequences) return reinterpret_cast<const int*>(m.shared)[kSmallOffsets + sequence];
  return static_cast<int>(e.offsets[sequence]);
}

/// 16 queries of a head: each warp has 16 keys in 128, and what it found is merged in shared memory. kHead is
/// 32 or 64.
template <class M, int kHead>
struct AttentionTile {
  static constexpr int kPitch = kHead + 4;
  static constexpr int kSlab =
      kQueries * (kPitch + 2);             // floats of a warp: sums, then largest and total of each row
  static constexpr int kEach = kHead / 8;  // columns of V that a lane loads, instructions of P V

  PerLane<float> largest[2], total[2];  // of rows g and g + 8; largest in log2 units
  PerLane<Float4> sums[kEach];

  HD static int warps(int length) { return smaller(kWarps, ceil_div(length, 16)); }

  HD void attend(M& m, const Encoder& e, int heads, const AttentionUnit& u, int scratch) {
    const int begin = offset_of(m, e, u.sequence), length = offset_of(m, e, u.sequence + 1) - begin;
    if (u.query >= length || m.warp >= warps(length)) return;
    const int64_t stride = static_cast<int64_t>(3) * heads * kHead;
    const Bf16* q = e.qkv + begin * stride + u.head * 3 * kHead;
    PerLane<Word4> queries[kHead / kChunk][2];
    UNROLL
    for (int c = 0; c < kHead / kChunk; ++c) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        each_lane([&](int lane) {
          // A row beyond the sequence is its last: computed, and not stored.
          const int row = smaller(length - 1, u.query + lane_row(lane) + 8 * half);
          queries[c][half][lane] = m.activations(q + (row * stride + c * kChunk + chunk_index(lane)));
        });
      }
    }
    UNROLL
    for (int half = 0; half < 2; ++half) {
      each_lane([&](int lane) { largest[half][lane] = -INFINITY, total[half][lane] = 0; });
    }
    UNROLL
    for (int j = 0; j < kEach; ++j) each_lane([&](int lane) { sums[j][lane] = {}; });
    for (int key = m.warp * 16; key < length; key += kWarps * 16)
      keys(m, e, q + kHead, stride, queries, key, length);
    put(m, scratch);
  }

  /// Sixteen more keys. k points to the first key's row; values lie kHead behind.
  HD void keys(M& m, const Encoder& e, const Bf16* k, int64_t stride,
               const PerLane<Word4> (&queries)[kHead / kChunk][2], int key, int length) {
    PerLane<Word4> right[2][kHead / kChunk], values[4];
    UNROLL
    for (int n = 0; n < 2; ++n) {
      UNROLL
      for (int c = 0; c < kHead / kChunk; ++c) {
        each_lane([&](int lane) {
          const int row = smaller(length - 1, key + 8 * n + lane_row(lane));
          right[n][c][lane] = m.activations(k + (row * stride + c * kChunk + chunk_index(lane)));
        });
      }
    }
    UNROLL
    for (int i = 0; i < 4; ++i) {
      each_lane([&](int lane) {
        const int row = smaller(length - 1, key + 2 * lane_step(lane) + i % 2 + i / 2 * 8);
        const Bf16* from = k + (kHead + row * stride + lane_row(lane) * kEach);
        if (kEach == 8) {
          values[i][lane] = m.activations(from);
        } else {
          m.half_activations(from, values[i][lane].word);
        }
      });
    }
    PerLane<Float4> scores[2];
    UNROLL
    for (int n = 0; n < 2; ++n) {
      each_lane([&](int lane) { scores[n][lane] = {}; });
      UNROLL
      for (int c = 0; c < kHead / kChunk; ++c) {
        UNROLL
        for (int s = 0; s < 2; ++s) {
          PerLane<Fragment> a;
          PerLane<Pair> b;
          each_lane([&](int lane) {
            a[lane] = fragment_a(queries[c][0][lane], queries[c][1][lane], s);
            b[lane] = {{right[n][c][lane].word[2 * s], right[n][c][lane].word[2 * s + 1]}};
          });
          multiply_add(scores[n], a, b);
        }
      }
      each_lane([&](int lane) {
        UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool real = key + 8 * n + 2 * lane_step(lane) + i % 2 < length;
          scores[n][lane].value[i] = real ? scores[n][lane].value[i] * e.scale : -INFINITY;
        }
      });
    }
    UNROLL
    for (int half = 0; half < 2; ++half) soften(scores, half);
    PerLane<Fragment> p;
    each_lane([&](int lane) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* from = scores[i / 2][lane].value + i % 2 * 2;
        p[lane].a[i] = pack_bf16(from[0], from[1]);
      }
    });
    UNROLL
    for (int j = 0; j < kEach; ++j) {
      PerLane<Pair> v;
      each_lane([&](int lane) {
        const bool upper = j % 2;
        v[lane] = {{pick_halves(values[0][lane].word[j / 2], values[1][lane].word[j / 2], upper),
                    pick_halves(values[2][lane].word[j / 2], values[3][lane].word[j / 2], upper)}};
      });
      multiply_add(sums[j], p, v);
    }
  }

  /// Scores of row g, or g + 8, become exponentials; what was found before is scaled to the new largest. The
  /// first key is real, so the largest is finite.
  HD void soften(PerLane<Float4> (&scores)[2], int half) {
    PerLane<float> most, added;
    each_lane([&](int lane) {
      const float *first = scores[0][lane].value + 2 * half, *second = scores[1][lane].value + 2 * half;
      most[lane] = fmaxf(fmaxf(first[0], first[1]), fmaxf(second[0], second[1]));
    });
    combine<true>(most, 1);
    combine<true>(most, 2);
    each_lane([&](int lane) {
      most[lane] = fmaxf(most[lane], largest[half][lane]);
      const float factor = exp2_of(largest[half][lane] - most[lane]);
      largest[half][lane] = most[lane];
      added[lane] = 0;
      UNROLL
      for (int n = 0; n < 4; ++n) {
        float& score = scores[n / 2][lane].value[2 * half + n % 2];
        score = exp2_of(score - most[lane]);
        added[lane] += score;
      }
      total[half][lane] *= factor;
      UNROLL
      for (int j = 0; j < kEach; ++j) {
        sums[j][lane].value[2 * half] *= factor;
        sums[j][lane].value[2 * half + 1] *= factor;
      }
    });
    combine<false>(added, 1);
    combine<false>(added, 2);
    each_lane([&](int lane) { total[half][lane] += added[lane]; });
  }

  /// Instruction j has the columns kEach g + j: a lane's are 2 kEach from 2 kEach t on.
  HD void put(M& m, int scratch) {
    float* slab = reinterpret_cast<float*>(m.shared + scratch) + m.warp * kSlab;
    each_lane([&](int lane) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(lane) + 8 * half;
        UNROLL
        for (int i = 0; i < kEach / 2; ++i) {
          Float4 four;
          UNROLL
          for (int n = 0; n < 4; ++n) {
            const int column = 4 * i + n;
            four.value[n] = sums[column % kEach][lane].value[2 * half + column / kEach];
          }
          m.put(slab + row * kPitch + 2 * kEach * lane_step(lane) + 4 * i, four);
        }
        if (lane_step(lane) == 0) {
          m.put(slab + kQueries * kPitch + row, largest[half][lane]);
          m.put(slab + kQueries * (kPitch + 1) + row, total[half][lane]);
        }
      }
    });
  }

  HD void merge(M& m, const Encoder& e, int heads, const AttentionUnit& u, int scratch) const {
    const int begin = offset_of(m, e, u.sequence), length = offset_of(m, e, u.sequence + 1) - begin;
    if (u.query >= length) return;
    const float* slabs = reinterpret_cast<const float*>(m.shared + scratch);
    const int count = warps(length);
    each_lane([&](int lane) {
      const int item = m.warp * kLanes + lane, row = item / (kHead / 4), column = item % (kHead / 4) * 4;
      if (row >= kQueries || u.query + row >= length) return;
      float most = -INFINITY, weight = 0;
      for (int i = 0; i < count; ++i) most = fmaxf(most, slabs[i * kSlab + kQueries * kPitch + row]);
      Float4 all = {};
      for (int i = 0; i < count; ++i) {
        const float* slab = slabs + i * kSlab;
        const float factor = exp2_of(slab[kQueries * kPitch + row] - most);
        weight += factor * slab[kQueries * (kPitch + 1) + row];
        const Float4 one = *reinterpret_cast<const Float4*>(slab + row * kPitch + column);
        UNROLL
        for (int n = 0; n < 4; ++n) all.value[n] += factor * one.value[n];
      }
      const float inverse = 1.0f / weight;
      const int64_t token = begin + u.query + row;
      m.store(e.context + (token * heads * kHead + u.head * kHead + column),
              pack_bf16(all.value[0] * inverse, all.value[1] * inverse),
              pack_bf16(all.value[2] * inverse, all.value[3] * inverse));
    });
  }
};

// ---- norms ----

/// x = norm(sum of parts + bias + x) of one row, four columns a thread, in three parts with the block's
/// barrier between.
template <class M>
struct NormRow {
  PerLane<Float4> z;
  PerLane<Pair> weight, shift;  // come with the parts, not after them

  HD static int column(const M& m, int lane) { return 4 * (m.warp * kLanes + lane); }

  /// `bias` of the product before, `scales` and `shifts` of the norm.
  HD void gather(M& m, const Encoder& e, const Bf16* bias, const Bf16* scales, const Bf16* shifts, int parts,
                 int row, float* small) {
    PerLane<float> sum;
    each_lane([&](int lane) {
      z[lane] = {};
      sum[lane] = 0;
      const int c = column(m, lane);
      if (c >= e.hidden) return;
      uint32_t before[2], added[2];
      const int64_t at = static_cast<int64_t>(row) * e.hidden + c;
      m.half_activations(e.x + at, before);
      m.constants(bias + c, added);
      m.constants(scales + c, weight[lane].b);
      m.constants(shifts + c, shift[lane].b);
      UNROLL
      for (int n = 0; n < 2; ++n) {
        z[lane].value[2 * n] = low_bf16(before[n]) + low_bf16(added[n]);
        z[lane].value[2 * n + 1] = high_bf16(before[n]) + high_bf16(added[n]);
      }
      UNROLL_4
      for (int s = 0; s < parts; ++s) {
        const Float4 one = m.sums(e.parts + (static_cast<int64_t>(s) * e.tokens * e.hidden + at));
        UNROLL
        for (int n = 0; n < 4; ++n) z[lane].value[n] += one.value[n];
      }
      UNROLL
      for (int n = 0; n < 4; ++n) sum[lane] += z[lane].value[n];
    });
    gather_sum(m, sum, small);
  }

  HD void centre(M& m, const Encoder& e, float* small) {
    PerLane<float> sum;
    each_lane([&](int lane) {
      sum[lane] = 0;
      if (column(m, lane) >= e.hidden) return;
      const float mean = block_sum(small) / static_cast<float>(e.hidden);
      UNROLL
      for (int n = 0; n < 4; ++n) {
        z[lane].value[n] -= mean;
        sum[lane] += z[lane].value[n] * z[lane].value[n];
      }
    });
    gather_sum(m, sum, small + kWarps);
  }

  HD void store(M& m, const Encoder& e, int row, const float* small) {
    each_lane([&](int lane) {
      const int c = column(m, lane);
      if (c >= e.hidden) return;
      const float scale = reciprocal_root(block_sum(small + kWarps) / static_cast<float>(e.hidden) + e.eps);
      uint32_t out[2];
      UNROLL
      for (int n = 0; n < 2; ++n) {
        const uint32_t w = weight[lane].b[n], b = shift[lane].b[n];
        out[n] = pack_bf16(z[lane].value[2 * n] * scale * low_bf16(w) + low_bf16(b),
                           z[lane].value[2 * n + 1] * scale * high_bf16(w) + high_bf16(b));
      }
      m.store(e.x + (static_cast<int64_t>(row) * e.hidden + c), out[0], out[1]);
    });
  }

  HD static void gather_sum(M& m, PerLane<float>& sum, float* to) {
    UNROLL
    for (int mask = 16; mask > 0; mask /= 2) combine<false>(sum, mask);
    each_lane([&](int lane) {
      if (lane == 0) to[m.warp] = sum[lane];
    });
  }
  HD static float block_sum(const float* small) {
    float total = 0;
    UNROLL
    for (int i = 0; i < kWarps; ++i) total += small[i];
    return total;
  }
};

}  // namespace dynabert::cuda
