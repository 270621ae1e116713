// Products through cuBLASLt, asked of a library that computes them on a CPU (fake_cublaslt.cpp).
#include "../cuda/matmul.h"

#include <cmath>
#include <random>

#include "../cuda/portable.h"
#include "check.h"

#if __has_include(<cublasLt.h>) && __has_include(<cuda_runtime.h>)
#include <cublasLt.h>
#define HAS_CUBLASLT
#endif

using namespace dynabert::cuda;

namespace {

struct Matrix {
  int64_t rows, columns, stride;  // column-major
  std::vector<Bf16> data;

  Matrix(int64_t r, int64_t c, int64_t s, std::mt19937& random)
      : rows(r), columns(c), stride(s), data(s * c + 8) {
    std::normal_distribution<float> normal;
    for (Bf16& v : data) v = static_cast<Bf16>(pack_bf16(normal(random), 0));
  }
  float at(int64_t row, int64_t column) const { return from_bf16(data[column * stride + row]); }
};

bool close(double got, double want) { return std::fabs(got - want) <= 0.01 * (1 + std::fabs(want)); }

Matmul call_of(const Matrix& a, bool transpose_a, const Matrix& b, bool transpose_b, Matrix& d) {
  Matmul c{};
  c.m = d.rows, c.n = d.columns, c.k = transpose_a ? a.rows : a.columns;
  c.transpose_a = transpose_a, c.transpose_b = transpose_b;
  c.a_stride = a.stride, c.b_stride = b.stride, c.d_stride = d.stride;
  c.bf16 = true;
  c.a = a.data.data(), c.b = b.data.data(), c.d = d.data.data();
  return c;
}

void load() { load_cublaslt({FAKE_CUBLASLT}); }

TEST(every_transposition_and_epilogue) {
  load();
  std::mt19937 random(1);
  const int64_t m = 7, n = 5, k = 11;
  for (bool ta : {false, true}) {
    for (bool tb : {false, true}) {
      for (Epilogue epilogue : {Epilogue::kNone, Epilogue::kBias, Epilogue::kReluBias,
                                Epilogue::kGeluTanhBias, Epilogue::kSumsOfA, Epilogue::kSumsOfB}) {
        const check::Where where("epilogue " + std::to_string(static_cast<int>(epilogue)));
        Matrix a(ta ? k : m, ta ? m : k, 13, random), b(tb ? n : k, tb ? k : n, 12, random),
            d(m, n, 9, random);
        Matrix bias(16, 1, 16, random), pre(m, n, 8, random);
        Matmul c = call_of(a, ta, b, tb, d);
        c.epilogue = epilogue;
        if (epilogue != Epilogue::kNone) c.bias = bias.data.data();
        if (epilogue == Epilogue::kGeluTanhBias) c.pre = pre.data.data(), c.pre_stride = pre.stride;
        const Matrix before = bias;
        CHECK(matmul(c, 0, nullptr, 0, nullptr));
        for (int64_t row = 0; row < m; ++row) {
          for (int64_t column = 0; column < n; ++column) {
            double want = 0;
            for (int64_t i = 0; i < k; ++i)
              want += (ta ? a.at(i, row) : a.at(row, i)) * (tb ? b.at(column, i) : b.at(i, column));
            const bool adds = epilogue == Epilogue::kBias || epilogue == Epilogue::kReluBias || c.pre;
            if (adds) want += before.at(row, 0);
            if (c.pre) CHECK(close(pre.at(row, column), want));
            if (epilogue == Epilogue::kReluBias) want = std::max(want, 0.0);
            if (c.pre) want = activate(Activation::kGeluTanh, static_cast<float>(want));
            CHECK(close(d.at(row, column), want));
          }
        }
        for (int64_t row = 0; epilogue == Epilogue::kSumsOfA && row < m; ++row) {
          double want = 0;
          for (int64_t i = 0; i < k; ++i) want += ta ? a.at(i, row) : a.at(row, i);
          CHECK(close(bias.at(row, 0), want));
        }
        for (int64_t column = 0; epilogue == Epilogue::kSumsOfB && column < n; ++column) {
          double want = 0;
          for (int64_t i = 0; i < k; ++i) want += tb ? b.at(column, i) : b.at(i, column);
          CHECK(close(bias.at(column, 0), want));
        }
      }
    }
  }
}

TEST(an_algorithm_is_searched_once_for_a_bucket) {
  load();
  std::mt19937 random(2);
  auto run = [&](int64_t m, int64_t n) {
    Matrix a(m, 24, m, random), b(24, n, 24, random), d(m, n, m, random);
    const MatmulCounts before = matmul_counts();
    CHECK(matmul(call_of(a, false, b, false, d), 0, nullptr, 0, nullptr));
    CHECK(matmul_counts().calls == before.calls + 1);
    return matmul_counts().searches - before.searches;
  };
  CHECK(run(40, 100) + run(40, 100) <= 2);  // memory may be aligned in two ways
  for (int i = 0; i < 9; ++i) run(40, 97 + i);
  CHECK(run(40, 112) <= 1);
  CHECK(run(48, 100) >= 1);
  CHECK(run(40, 113) >= 1);
}

TEST(what_the_library_cannot_compute) {
  load();
  std::mt19937 random(3);
  Matrix a(1001, 8, 1001, random), b(8, 3, 8, random), d(1001, 3, 1001, random);
  CHECK(!matmul(call_of(a, false, b, false, d), 0, nullptr, 0, nullptr));
  Matmul c = call_of(a, false, b, false, d);
  c.m = 4, c.k = 9, c.b_stride = 3;
  bool threw = false;
  try {
    matmul(c, 0, nullptr, 0, nullptr);
  } catch (const MatmulError& error) {
    threw = std::string(error.what()).find("cuBLAS status 7") != std::string::npos;
  }
  CHECK(threw);
}

TEST(token_buckets) {
  int64_t last = 0;
  for (int64_t tokens = 1; tokens < 70000; ++tokens) {
    const int64_t bucket = token_bucket(tokens);
    CHECK(bucket >= tokens && bucket >= last && token_bucket(bucket) == bucket);
    CHECK(tokens <= 128 ? bucket < tokens + 16 : 8 * bucket < 9 * tokens + 8);
    last = bucket;
  }
}

#ifdef HAS_CUBLASLT
TEST(declarations_are_those_of_the_header) {
  CHECK(lt::kTransA == CUBLASLT_MATMUL_DESC_TRANSA && lt::kTransB == CUBLASLT_MATMUL_DESC_TRANSB);
  CHECK(lt::kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE &&
        lt::kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
  CHECK(lt::kAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
  CHECK(lt::kAuxLeading == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
  CHECK(lt::kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
  CHECK(lt::kAlignA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
  CHECK(lt::kAlignB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
  CHECK(lt::kAlignC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
  CHECK(lt::kAlignD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
  CHECK(lt::kDefault == CUBLASLT_EPILOGUE_DEFAULT && lt::kBias == CUBLASLT_EPILOGUE_BIAS);
  CHECK(lt::kReluBias == CUBLASLT_EPILOGUE_RELU_BIAS && lt::kGeluBias == CUBLASLT_EPILOGUE_GELU_BIAS);
  CHECK(lt::kGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
  CHECK(lt::kGradientA == CUBLASLT_EPILOGUE_BGRADA && lt::kGradientB == CUBLASLT_EPILOGUE_BGRADB);
  CHECK(lt::kFloat32 == CUDA_R_32F && lt::kFloat16 == CUDA_R_16F && lt::kBfloat16 == CUDA_R_16BF);
  CHECK(lt::kCompute32F == CUBLAS_COMPUTE_32F && lt::kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t));
  CHECK(sizeof(lt::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
  CHECK(offsetof(lt::HeuristicResult, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
  CHECK(offsetof(lt::HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
}
#endif

}  // namespace
