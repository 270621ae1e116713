// Attention of one head of one sequence.
#include <algorithm>

#include "support.h"

using namespace dynabert;

namespace {

constexpr int kLengths[] = {1, 2, 5, 63, 64, 65, 130};
constexpr int kHeadSizes[] = {1, 3, 32, 64, 80};

struct Problem {
  bool bf16;
  int length, head_size, heads, begin;  // the sequence's rows start at `begin`
  std::vector<float> values;            // [length][heads][3][head_size], rounded to the type

  float at(int row, int head, int part, int i) const {
    return values[((int64_t{row} * heads + head) * 3 + part) * head_size + i];
  }
};

Problem make(Random& random, bool bf16, int length, int head_size, float sharpness) {
  Problem p{bf16, length, head_size, 3, 2, {}};
  for (int64_t i = 0; i < int64_t{length} * p.heads * 3 * head_size; ++i) {
    const bool value = i / head_size % 3 == 2;
    const float x = random.normal() * (value ? 1 : sharpness);
    p.values.push_back(bf16 ? round_bf16(x) : x);
  }
  return p;
}

/// qkv and context of a problem. The rows of other sequences are poison, and so are other heads.
struct Arrays {
  int element;
  int64_t qkv_stride, context_stride;
  Memory qkv, context, scratch;
  AttentionTask task;

  Arrays(const Problem& p, int head)
      : element(p.bf16 ? 2 : 4),
        qkv_stride(3 * p.heads * p.head_size + 3),
        context_stride(p.heads * p.head_size + 5),
        qkv((p.begin + p.length) * qkv_stride * element),
        context((p.begin + p.length + 1) * context_stride * element),
        scratch(attention_scratch(p.length, p.head_size)),
        task{p.bf16, qkv.data(), qkv_stride, context.data(), context_stride, p.head_size} {
    for (int r = 0; r < p.length; ++r)
      for (int part = 0; part < 3; ++part)
        for (int i = 0; i < p.head_size; ++i)
          put(p.bf16 ? DType::kBf16 : DType::kF32, qkv.data(),
              (p.begin + r) * qkv_stride + (3 * head + part) * p.head_size + i, p.at(r, head, part, i));
  }
  void expect(const Problem& p, int head, int from, int to) {
    for (int r = from; r < to; ++r)
      context.expect(((p.begin + r) * context_stride + head * p.head_size) * element, p.head_size * element);
  }
  float at(const Problem& p, int row, int head, int i) const {
    const int64_t index = (p.begin + row) * context_stride + head * p.head_size + i;
    return p.bf16 ? bf16_value(context.as<uint16_t>()[index]) : context.as<float>()[index];
  }
};

/// softmax(q K^T / sqrt(d)) V of one query, in one type; probabilities rounded to bf16 if asked to.
template <class T>
std::vector<T> attend(const Problem& p, int head, int query, bool round) {
  std::vector<T> scores(p.length);
  T most = -INFINITY, sum = 0;
  for (int k = 0; k < p.length; ++k) {
    T dot = 0;
    for (int i = 0; i < p.head_size; ++i)
      dot += static_cast<T>(p.at(query, head, 0, i)) * static_cast<T>(p.at(k, head, 1, i));
    scores[k] = dot / std::sqrt(static_cast<T>(p.head_size));
    most = std::max(most, scores[k]);
  }
  for (T& s : scores) sum += s = std::exp(s - most);
  std::vector<T> out(p.head_size);
  for (int k = 0; k < p.length; ++k) {
    const T weight = round ? round_bf16(static_cast<float>(scores[k] / sum)) : scores[k] / sum;
    for (int i = 0; i < p.head_size; ++i) out[i] += weight * static_cast<T>(p.at(k, head, 2, i));
  }
  if (round)
    for (T& v : out) v = round_bf16(static_cast<float>(v));
  return out;
}

void compute(const Kernels& kernels, const Problem& p, Arrays& arrays, int head, int from, int to) {
  arrays.scratch.poison();
  kernels.attention(arrays.task, head, p.begin, p.begin + p.length, from, to, arrays.scratch.data());
}

TEST(each_length_and_head_size) {
  Random random(21);
  for (bool bf16 : {false, true})
    for (int length : kLengths)
      for (int head_size : kHeadSizes)
        for (float sharpness : {1.f, 6.f}) {
          const Problem p = make(random, bf16, length, head_size, sharpness);
          const int head = length % 2 ? 0 : 2;
          std::vector<std::vector<float>> plain;
          std::vector<std::vector<double>> truth;
          for (int q = 0; q < length; ++q) {
            plain.push_back(attend<float>(p, head, q, bf16));
            truth.push_back(attend<double>(p, head, q, false));
          }
          for (const Kernels* kernels : available_kernels()) {
            const check::Where where(std::string(kernels->name) + (bf16 ? " bf16" : " fp32") + " length " +
                                     std::to_string(length) + " head size " + std::to_string(head_size) +
                                     " sharpness " + std::to_string(sharpness));
            Arrays arrays(p, head);
            arrays.expect(p, head, 0, length);
            compute(*kernels, p, arrays, head, 0, length);
            Judge judge(bf16 ? kBf16Eps : kFloatEps);
            for (int q = 0; q < length; ++q)
              for (int i = 0; i < head_size; ++i)
                judge.add(arrays.at(p, q, head, i), plain[q][i], truth[q][i]);
            CHECK_GOOD(judge.verdict());
            CHECK_GOOD(arrays.context.stray());
          }
        }
}

TEST(each_range_of_queries) {
  // The same bits as all queries at once, and nothing else is written.
  Random random(22);
  for (bool bf16 : {false, true})
    for (int length : {1, 7, 65})
      for (int head_size : {3, 32}) {
        const Problem p = make(random, bf16, length, head_size, 2);
        for (const Kernels* kernels : available_kernels()) {
          const check::Where where(std::string(kernels->name) + (bf16 ? " bf16" : " fp32") + " length " +
                                   std::to_string(length) + " head size " + std::to_string(head_size));
          Arrays whole(p, 1);
          compute(*kernels, p, whole, 1, 0, length);
          for (int from = 0; from < length; from += 1 + length / 9)
            for (int to : {from + 1, (from + length + 1) / 2, length}) {
              if (to <= from) continue;
              Arrays part(p, 1);
              part.expect(p, 1, from, to);
              compute(*kernels, p, part, 1, from, to);
              bool same = true;
              for (int q = from; q < to; ++q)
                for (int i = 0; i < head_size; ++i)
                  same = same && part.at(p, q, 1, i) == whole.at(p, q, 1, i);
              CHECK(same);
              CHECK_GOOD(part.context.stray());
            }
        }
      }
}

TEST(nothing_is_written_behind_the_scratch) {
  Random random(23);
  for (bool bf16 : {false, true})
    for (int length : {1, 63, 64, 65, 128})
      for (int head_size : kHeadSizes) {
        const Problem p = make(random, bf16, length, head_size, 1);
        for (const Kernels* kernels : available_kernels()) {
          const check::Where where(kernels->name);
          Arrays arrays(p, 0);
          const int64_t bytes = attention_scratch(length, head_size);
          Memory scratch(bytes + 4096);
          scratch.expect(0, bytes);
          kernels->attention(arrays.task, 0, p.begin, p.begin + length, 0, length, scratch.data());
          CHECK_GOOD(scratch.stray());
        }
      }
}

TEST(nan_is_not_lost) {
  // In a query: its own output. In a key: every output. In a value: its column of every output.
  Random random(24);
  constexpr int length = 70, head_size = 5, column = 3;
  for (bool bf16 : {false, true})
    for (int part : {0, 1, 2})
      for (int row : {0, 33, 69}) {
        Problem p = make(random, bf16, length, head_size, 1);
        p.values[((int64_t{row} * p.heads + 1) * 3 + part) * head_size + column] = NAN;
        for (const Kernels* kernels : available_kernels()) {
          const check::Where where(std::string(kernels->name) + (bf16 ? " bf16" : " fp32") + " part " +
                                   std::to_string(part) + " row " + std::to_string(row));
          Arrays arrays(p, 1);
          compute(*kernels, p, arrays, 1, 0, length);
          bool good = true;
          for (int q = 0; q < length; ++q)
            for (int i = 0; i < head_size; ++i) {
              const bool expected = part == 0 ? q == row : part == 1 || i == column;
              good = good && std::isnan(arrays.at(p, q, 1, i)) == expected;
            }
          CHECK(good);
        }
      }
}

}  // namespace
