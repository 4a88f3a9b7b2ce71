// Products of a few rows with a large constant weight, for x86 with AVX512-bf16.
//
// A decode step multiplies 1 to some 100 rows with every weight of the model, so that a weight is read from memory
// for little arithmetic. The libraries' kernels read, then compute; the time is the sum of both. Here the next block
// of weights is fetched into the second-level cache while the current one is used, so that the time is nearer to the
// larger of the two. Blocks are packed so that one block is read front to back.
//
// Layout of a packed weight [N, K]: [N / 32, K / 2, 32, 2], bf16, or int8 with one fp32 scale a column of the output.
// N counts the columns of all siblings (projections of the same input), each padded to a multiple of 32.
//
// Every output is one chain of fused multiply-adds over K in order, whatever the number of rows and of threads: a
// row's bits do not depend on what shares the batch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define PROMPTMUX_LINEAR_X86 1
#include <immintrin.h>
#endif

namespace promptmux {
namespace {

constexpr int64_t kColumns = 32;   // columns of the output in a block
constexpr int kMaxRows = 12;       // 12 rows x 2 vectors of accumulators, with 2 weights and a row in 27 registers
constexpr int64_t kRowsAtOnce = 192;  // rows of the input that stay in the second-level cache beside two blocks

// Where a block's answers go: a sibling's own output.
struct Target {
  uint16_t* out;      // [rows, width]
  int64_t width;      // columns of this sibling
  int64_t first;      // the block's first column in it
};

struct Problem {
  const uint16_t* input;  // [rows, row_stride], bf16
  int64_t rows, row_stride, pairs;  // pairs: K / 2
  const void* packed;
  const float* scale;     // [N padded] or null
  const float* bias;      // [N padded] or null
  std::vector<Target> targets;  // one a block
};

#ifdef PROMPTMUX_LINEAR_X86
#define PROMPTMUX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define PROMPTMUX_INLINE PROMPTMUX_TARGET inline __attribute__((always_inline))

PROMPTMUX_INLINE __m512bh load_bf16(const uint16_t* weights) {
  return (__m512bh)_mm512_loadu_si512(weights);
}

// 32 int8 as bf16: every int8 is exact in bf16.
PROMPTMUX_INLINE __m512bh load_int8(const int8_t* weights) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)weights)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(weights + 16))));
  return _mm512_cvtne2ps_pbh(high, low);
}

PROMPTMUX_INLINE __m512bh load_weights(const uint16_t* weights) { return load_bf16(weights); }
PROMPTMUX_INLINE __m512bh load_weights(const int8_t* weights) { return load_int8(weights); }

PROMPTMUX_INLINE void finish(__m512 sum, const float* scale, const float* bias, uint16_t* out, int64_t left) {
  if (scale != nullptr) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(scale));
  if (bias != nullptr) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias));
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sum);
  if (left >= 16) {
    _mm256_storeu_si256((__m256i*)out, rounded);
  } else if (left > 0) {
    _mm256_mask_storeu_epi16(out, (__mmask16)((1u << left) - 1), rounded);
  }
}

// One block of 32 columns for kRows rows. `ahead` is fetched meanwhile, `stride` bytes a pair.
template <int kRows, typename Weight>
PROMPTMUX_TARGET void multiply(
    const uint16_t* input, int64_t row_stride, int64_t pairs, const Weight* weights, const float* scale,
    const float* bias, uint16_t* out, int64_t width, int64_t left, const char* ahead, int64_t stride) {
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    sums[row][0] = _mm512_setzero_ps();
    sums[row][1] = _mm512_setzero_ps();
  }
  constexpr int64_t kLine = 64;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512bh first = load_weights(weights);
    const __m512bh second = load_weights(weights + kColumns);
    weights += 2 * kColumns;
    _mm_prefetch(ahead, _MM_HINT_T1);
    if (sizeof(Weight) == 2) _mm_prefetch(ahead + kLine, _MM_HINT_T1);
    ahead += stride;
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const __m512bh both =
          (__m512bh)_mm512_set1_epi32(*(const int32_t*)(input + row * row_stride + 2 * pair));
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], both, first);
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], both, second);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    finish(sums[row][0], scale, bias, out + row * width, left);
    finish(sums[row][1], scale ? scale + 16 : nullptr, bias ? bias + 16 : nullptr, out + row * width + 16, left - 16);
  }
}

template <typename Weight>
using Multiply = void (*)(
    const uint16_t*, int64_t, int64_t, const Weight*, const float*, const float*, uint16_t*, int64_t, int64_t,
    const char*, int64_t);

template <typename Weight>
constexpr Multiply<Weight> kMultiply[kMaxRows + 1] = {
    nullptr, multiply<1, Weight>, multiply<2, Weight>, multiply<3, Weight>, multiply<4, Weight>, multiply<5, Weight>,
    multiply<6, Weight>, multiply<7, Weight>, multiply<8, Weight>, multiply<9, Weight>, multiply<10, Weight>,
    multiply<11, Weight>, multiply<12, Weight>};

PROMPTMUX_TARGET void widen(const int8_t* weights, int64_t count, uint16_t* out, const char* ahead) {
  for (int64_t i = 0; i < count; i += 32) {
    _mm512_storeu_si512(out + i, (__m512i)load_int8(weights + i));
    _mm_prefetch(ahead + i, _MM_HINT_T1);
  }
}

// Rows [first_row, last_row) times one block that is already bf16 or is widened as it is read.
template <typename Weight>
void run_block(
    const Problem& problem, int64_t block, const Weight* weights, int64_t first_row, int64_t last_row,
    const char* ahead, int64_t ahead_bytes) {
  const int64_t rows = last_row - first_row;
  const int64_t chunks = (rows + kMaxRows - 1) / kMaxRows;
  const Target& target = problem.targets[block];
  const float* scale = problem.scale ? problem.scale + block * kColumns : nullptr;
  const float* bias = problem.bias ? problem.bias + block * kColumns : nullptr;
  const int64_t stride = ahead_bytes / (problem.pairs * chunks);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t from = first_row + rows * chunk / chunks;
    const int64_t count = first_row + rows * (chunk + 1) / chunks - from;
    kMultiply<Weight>[count](
        problem.input + from * problem.row_stride, problem.row_stride, problem.pairs, weights, scale, bias,
        target.out + from * target.width + target.first, target.width, target.width - target.first,
        ahead + chunk * problem.pairs * stride, stride);
  }
}

void run_blocks(const Problem& problem, int64_t begin, int64_t end, uint16_t* scratch) {
  const int64_t block_size = problem.pairs * 2 * kColumns;
  const bool is_int8 = problem.scale != nullptr;
  for (int64_t first_row = 0; first_row < problem.rows; first_row += kRowsAtOnce) {
    const int64_t last_row = std::min(problem.rows, first_row + kRowsAtOnce);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t next = block + 1 < end ? block + 1 : begin;
      if (!is_int8) {
        const uint16_t* packed = static_cast<const uint16_t*>(problem.packed);
        run_block<uint16_t>(
            problem, block, packed + block * block_size, first_row, last_row,
            reinterpret_cast<const char*>(packed + next * block_size), block_size * 2);
        continue;
      }
      const int8_t* packed = static_cast<const int8_t*>(problem.packed);
      const char* ahead = reinterpret_cast<const char*>(packed + next * block_size);
      if (last_row - first_row <= kMaxRows) {
        run_block<int8_t>(problem, block, packed + block * block_size, first_row, last_row, ahead, block_size);
      } else {
        widen(packed + block * block_size, block_size, scratch, ahead);
        run_block<uint16_t>(problem, block, scratch, first_row, last_row, ahead, 0);
      }
    }
  }
}

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bf16");
}
#else
void run_blocks(const Problem&, int64_t, int64_t, uint16_t*) {}
bool is_supported() { return false; }
#endif

// The products of one input with its siblings' weights. See the top of the file for the layout.
std::vector<at::Tensor> linear(
    const at::Tensor& input, const at::Tensor& packed, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& bias, at::IntArrayRef widths) {
  TORCH_CHECK(is_supported(), "promptmux::linear needs AVX512-bf16");
  TORCH_CHECK(input.scalar_type() == at::kBFloat16 && input.dim() >= 1, "promptmux::linear takes bf16");
  TORCH_CHECK(packed.dim() == 4 && packed.size(2) == kColumns && packed.size(3) == 2 && packed.is_contiguous(),
              "promptmux::linear: the weight is not packed");
  TORCH_CHECK(packed.scalar_type() == (scale.has_value() ? at::kChar : at::kBFloat16),
              "promptmux::linear: a packed weight is bf16, or int8 with a scale");
  const int64_t pairs = packed.size(1);
  TORCH_CHECK(input.size(-1) == 2 * pairs, "promptmux::linear: the input is ", input.size(-1), " wide, not ", 2 * pairs);
  for (const auto* column : {&scale, &bias}) {
    TORCH_CHECK(!column->has_value() || ((*column)->scalar_type() == at::kFloat && (*column)->is_contiguous() &&
                                         (*column)->numel() == packed.size(0) * kColumns),
                "promptmux::linear: scale and bias are fp32, one a padded column");
  }
  at::Tensor rows = input.dim() == 2 ? input : input.reshape({-1, input.size(-1)});
  if (rows.stride(1) != 1 || rows.stride(0) % 2 != 0) rows = rows.contiguous();
  Problem problem{
      static_cast<const uint16_t*>(rows.const_data_ptr()), rows.size(0), rows.stride(0), pairs,
      packed.const_data_ptr(), scale ? scale->const_data_ptr<float>() : nullptr,
      bias ? bias->const_data_ptr<float>() : nullptr, {}};
  std::vector<at::Tensor> outputs;
  std::vector<int64_t> shape = input.sizes().vec();
  for (const int64_t width : widths) {
    shape.back() = width;
    outputs.push_back(at::empty(shape, input.options()));
    auto* out = static_cast<uint16_t*>(outputs.back().data_ptr());
    for (int64_t first = 0; first < width; first += kColumns) problem.targets.push_back({out, width, first});
  }
  TORCH_CHECK(static_cast<int64_t>(problem.targets.size()) == packed.size(0),
              "promptmux::linear: the widths do not add up to the packed weight");
  if (problem.rows == 0) return outputs;
  const bool widens = scale.has_value() && problem.rows > kMaxRows;
  at::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> scratch(widens ? pairs * 2 * kColumns : 0);
    run_blocks(problem, begin, end, scratch.data());
  });
  return outputs;
}

// Shapes alone, for export: the rows may be counted by a symbol.
std::vector<at::Tensor> linear_shapes(
    const at::Tensor& input, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    at::IntArrayRef widths) {
  std::vector<at::Tensor> outputs;
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  for (const int64_t width : widths) {
    shape.back() = width;
    outputs.push_back(at::empty_symint(shape, input.options()));
  }
  return outputs;
}

bool linear_is_supported() { return is_supported(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(promptmux, library) {
  library.def("linear(Tensor input, Tensor packed, Tensor? scale, Tensor? bias, int[] widths) -> Tensor[]");
  library.def("linear_is_supported() -> bool", &linear_is_supported);
}

TORCH_LIBRARY_IMPL(promptmux, CPU, library) {
  library.impl("linear", &linear);
}

TORCH_LIBRARY_IMPL(promptmux, Meta, library) {
  library.impl("linear", &linear_shapes);
}

}  // namespace promptmux
