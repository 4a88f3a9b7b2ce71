// Small products out of packed words.
//
// A word is 32 bits: one float, or (where the CPU multiplies bfloat16) two bfloat16 that are neighbours in the
// dimension that is summed over. Left operands are rows of words; right operands are laid out so that sixteen columns
// of one word lie side by side. Every number of a result is summed in one fixed order, whatever the number of rows and
// columns that are computed together: that is what makes a token's bits independent of its neighbours.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>
#include <utility>

namespace promptmux {

constexpr int kPageSize = 16;
constexpr int kTilePages = 4;
constexpr int kTileColumns = kTilePages * kPageSize;

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PROMPTMUX_BF16_PAIRS 1
#else
#define PROMPTMUX_BF16_PAIRS 0
#endif

// Rows and vectors of a result that are held in registers at once: 24 of 32 at AVX-512, 12 of 16 halves below.
constexpr int kPanelRows = 6;
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 1;
#endif

template <typename T>
constexpr bool kInPairs = PROMPTMUX_BF16_PAIRS && std::is_same_v<T, c10::BFloat16>;

template <typename T>
constexpr int words_for(int numbers) {
  return kInPairs<T> ? (numbers + 1) / 2 : numbers;
}

constexpr int rounded_to_lanes(int numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

// `right` holds sixteen words, whatever it is called.
template <bool in_pairs>
PROMPTMUX_INLINE Floats multiply_words(int32_t left, Floats right, Floats acc) {
#if PROMPTMUX_BF16_PAIRS
  if constexpr (in_pairs) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
  }
#endif
  return multiply_add(splat(__builtin_bit_cast(float, left)), right, acc);
}

PROMPTMUX_INLINE Floats load_words(const int32_t* from) { return load(reinterpret_cast<const float*>(from)); }

PROMPTMUX_INLINE void store_words(int32_t* to, Floats words) { store(reinterpret_cast<float*>(to), words); }

// acc[i][j] += left[i][w] * right[w][j] for one word after another, j counting vectors of sixteen columns.
template <bool in_pairs, int rows, int vectors>
PROMPTMUX_INLINE void add_words(const int32_t* left, int left_stride, const int32_t* right, int right_stride,
                                int num_words, Floats (&acc)[rows][vectors]) {
  for (int word = 0; word < num_words; ++word) {
    const int32_t* columns = right + int64_t{word} * right_stride;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) {
        acc[i][j] = multiply_words<in_pairs>(left[i * left_stride + word], load_words(columns + j * kLanes), acc[i][j]);
      }
    }
  }
}

// How many words of keys are summed by themselves before they are added to a score. A chain of additions is as slow as
// it is long, and where a page is multiplied alone (pages.h) there are few of them side by side.
constexpr int kSummedWords = kLanes / 2;

// result = left * right for `rows` rows and `vectors` times sixteen columns; `factors` is not used.
template <bool in_pairs, int rows, int vectors>
void score_panel(const int32_t* left, int left_stride, const int32_t* right, int right_stride, int num_words,
                 const float*, float* result, int result_stride) {
  for (int first = 0; first < num_words; first += kSummedWords) {
    Floats acc[rows][vectors] = {};
    add_words<in_pairs, rows, vectors>(left + first, left_stride, right + int64_t{first} * right_stride, right_stride,
                                       std::min(kSummedWords, num_words - first), acc);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) {
        float* sums = result + i * result_stride + j * kLanes;
        store(sums, first == 0 ? acc[i][j] : load(sums) + acc[i][j]);
      }
    }
  }
}

// result[i] = result[i] * factors[i] + left[i] * right, for as many rows and columns.
template <bool in_pairs, int rows, int vectors>
void add_panel(const int32_t* left, int left_stride, const int32_t* right, int right_stride, int num_words,
               const float* factors, float* result, int result_stride) {
  Floats acc[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) acc[i][j] = load(result + i * result_stride + j * kLanes) * factors[i];
  }
  add_words<in_pairs, rows, vectors>(left, left_stride, right, right_stride, num_words, acc);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) store(result + i * result_stride + j * kLanes, acc[i][j]);
  }
}

using PanelProduct = void (*)(const int32_t*, int, const int32_t*, int, int, const float*, float*, int);
constexpr int kNumPanelSizes = kPanelRows * kPanelVectors;

template <bool in_pairs, int... sizes>
constexpr std::array<PanelProduct, kNumPanelSizes> score_panels(std::integer_sequence<int, sizes...>) {
  return {score_panel<in_pairs, sizes / kPanelVectors + 1, sizes % kPanelVectors + 1>...};
}

template <bool in_pairs, int... sizes>
constexpr std::array<PanelProduct, kNumPanelSizes> add_panels(std::integer_sequence<int, sizes...>) {
  return {add_panel<in_pairs, sizes / kPanelVectors + 1, sizes % kPanelVectors + 1>...};
}

template <bool in_pairs>
constexpr auto kScorePanels = score_panels<in_pairs>(std::make_integer_sequence<int, kNumPanelSizes>{});

template <bool in_pairs>
constexpr auto kAddPanels = add_panels<in_pairs>(std::make_integer_sequence<int, kNumPanelSizes>{});

// One of the above for up to kPanelRows rows and any number of vectors.
inline void multiply_panels(const std::array<PanelProduct, kNumPanelSizes>& products, int rows, int vectors,
                            const int32_t* left, int left_stride, const int32_t* right, int right_stride, int num_words,
                            const float* factors, float* result, int result_stride) {
  for (int first = 0; first < vectors; first += kPanelVectors) {
    const int together = std::min(kPanelVectors, vectors - first);
    products[(rows - 1) * kPanelVectors + together - 1](left, left_stride, right + first * kLanes, right_stride,
                                                        num_words, factors, result + first * kLanes, result_stride);
  }
}

// A row of numbers as the left operand of a product: `stride` words, zero from the end of the numbers on.
template <typename T>
void pack_row(const T* numbers, int count, int32_t* words, int stride) {
  if constexpr (kInPairs<T>) {
    std::fill(words + count / 2, words + stride, 0);
    std::memcpy(words, numbers, sizeof(T) * count);
  } else {
    for (int first = 0; first < stride; first += kLanes) {
      store_words(words + first, load_some_as_floats(numbers + first, count - first));
    }
  }
}

// `vectors` vectors of weights as a left operand, rounded to the words' format.
template <bool in_pairs>
PROMPTMUX_INLINE void store_weights(const Floats* weights, int vectors, int32_t* words) {
#if PROMPTMUX_BF16_PAIRS
  if constexpr (in_pairs) {
    for (int i = 0; i < vectors; ++i) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights[i]);
      std::memcpy(words + i * kLanes / 2, &rounded, sizeof(rounded));
    }
    return;
  }
#endif
  for (int i = 0; i < vectors; ++i) store_words(words + i * kLanes, weights[i]);
}

}  // namespace promptmux
