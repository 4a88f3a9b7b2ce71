// Products with one page of the pool: either as it lies there, or after it was packed into words (products.h).
//
// Packing costs about as much as multiplying with ten queries. The two ways sum in the same order, so they give the
// same bits. Wherever a page is read, `next` is a page of the same size (perhaps the same one) that is fetched
// meanwhile, line for line.
#pragma once

#include "products.h"

namespace promptmux {

// The most queries that are multiplied with a page as it lies.
constexpr int kMaxDirect = 8;
constexpr int kMaxTogether = std::max(kMaxDirect, kPanelRows);

template <typename T>
constexpr int kColumnsAWord = kInPairs<T> ? 2 : 1;

// Words of one query's weights over a tile.
template <typename T>
constexpr int kWeightWords = kTileColumns / kColumnsAWord<T>;

// Numbers of a key in sixteen words.
template <typename T>
constexpr int kNumbersABlock = kInPairs<T> ? 2 * kLanes : kLanes;

PROMPTMUX_INLINE void fetch(const void* line) { __builtin_prefetch(line); }

// Sixteen words of every column of a page of keys, from dimension `first`: words[i] holds word i of all columns, zero
// where there is none.
template <typename T>
PROMPTMUX_INLINE void read_keys(const T* page, int64_t key_dim, int64_t first, const T* next, Floats (&words)[kLanes]) {
  const int64_t count = std::min<int64_t>(kNumbersABlock<T>, key_dim - first);
  const T* numbers = page + first;
  const T* line = next + first;
  if (count == kNumbersABlock<T>) {
    for (int column = 0; column < kPageSize; ++column, numbers += key_dim, line += key_dim) {
      fetch(line);
      if constexpr (kInPairs<T>) std::memcpy(&words[column], numbers, sizeof(Floats));
      else words[column] = load_as_floats(numbers);
    }
  } else {
    for (int column = 0; column < kPageSize; ++column, numbers += key_dim, line += key_dim) {
      fetch(line);
      if constexpr (kInPairs<T>) {
        words[column] = Floats{};
        std::memcpy(&words[column], numbers, sizeof(T) * count);
      } else {
        words[column] = load_some_as_floats(numbers, static_cast<int>(count));
      }
    }
  }
  transpose(words);
}

// Packs a page of keys: packed[word][column], words up to a whole number of vectors.
template <typename T>
void pack_keys(const T* page, int key_dim, int32_t* packed, const T* next) {
  for (int first = 0; first < key_dim; first += kNumbersABlock<T>) {
    Floats words[kLanes];
    read_keys(page, key_dim, first, next, words);
    int32_t* block = packed + static_cast<int64_t>(words_for<T>(first)) * kTileColumns;
    for (int word = 0; word < kLanes; ++word) store_words(block + word * kTileColumns, words[word]);
  }
}

// The products of packed queries, `query_stride` words apart and zero from their ends to there, with a page of keys:
// scores[i][column].
template <typename T, int rows>
void score_page(const int32_t* query, int64_t query_stride, const T* page, int64_t key_dim, float* scores,
                const T* next) {
  constexpr int parts = kLanes / kSummedWords;
  Floats total[rows] = {};
  for (int64_t first = 0; first < key_dim; first += kNumbersABlock<T>, query += kLanes) {
    Floats words[kLanes];
    read_keys(page, key_dim, first, next, words);
    Floats acc[parts][rows] = {};
    for (int word = 0; word < kSummedWords; ++word) {
      for (int part = 0; part < parts; ++part) {
        for (int i = 0; i < rows; ++i) {
          const int at = part * kSummedWords + word;
          acc[part][i] = multiply_words<kInPairs<T>>(query[i * query_stride + at], words[at], acc[part][i]);
        }
      }
    }
    for (int part = 0; part < parts; ++part) {
      for (int i = 0; i < rows; ++i) total[i] += acc[part][i];
    }
  }
  for (int i = 0; i < rows; ++i) store(scores + i * kTileColumns, total[i]);
}

// The values of one column, or of two where words are pairs, as two vectors of words; `count` numbers of each are left.
// `seen` has a bit for each column that somebody sees: the others may hold anything, and become zero.
template <typename T>
PROMPTMUX_INLINE void read_values(const T* numbers, int64_t value_dim, int64_t count, int seen, const T* line,
                                  Floats (&words)[2]) {
  fetch(line);
#if PROMPTMUX_BF16_PAIRS
  if constexpr (kInPairs<T>) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    fetch(line + value_dim);
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    const __m512i even = _mm512_maskz_loadu_epi16(seen & 1 ? mask : 0, numbers);
    const __m512i odd = _mm512_maskz_loadu_epi16(seen & 2 ? mask : 0, numbers + value_dim);
    words[0] = (Floats)_mm512_permutex2var_epi16(even, low, odd);
    words[1] = (Floats)_mm512_permutex2var_epi16(even, high, odd);
    return;
  }
#endif
  words[0] = seen & 1 ? load_some_as_floats(numbers, static_cast<int>(count)) : Floats{};
  words[1] = (seen & 1) && count > kLanes ? load_some_as_floats(numbers + kLanes, static_cast<int>(count - kLanes))
                                          : Floats{};
  if constexpr (sizeof(T) == sizeof(float)) fetch(line + kLanes);
}

// A bit for each of a page's columns `from .. to - 1`.
PROMPTMUX_INLINE int bits_of_columns(int from, int to) {
  const int first = std::clamp(from, 0, kPageSize), end = std::clamp(to, first, kPageSize);
  return (1 << end) - (1 << first);
}
constexpr int kAllColumns = (1 << kPageSize) - 1;

// Packs a page of values: packed[column or pair of columns][dimension]. Columns outside `from .. to - 1` become zero.
template <typename T>
void pack_values(const T* page, int64_t value_dim, int from, int to, int32_t* packed, int64_t stride, const T* next) {
  const int seen = bits_of_columns(from, to);
  for (int column = 0; column < kPageSize; column += kColumnsAWord<T>, packed += stride) {
    for (int64_t first = 0; first < value_dim; first += 2 * kLanes) {
      const int64_t at = column * value_dim + first;
      Floats words[2];
      read_values(page + at, value_dim, value_dim - first, seen >> column, next + at, words);
      store_words(packed + first, words[0]);
      if (value_dim - first > kLanes) store_words(packed + first + kLanes, words[1]);
    }
  }
}

// add_pages for `vectors` vectors of dimensions that start at `first`.
template <typename T, int rows, int vectors>
PROMPTMUX_INLINE void add_some(const int32_t* weights, const T* const* pages, const T* const* nexts, int num_pages,
                               int64_t value_dim, int from, int to, float* sums, int64_t sums_stride,
                               const float* factors, int64_t first) {
  Floats acc[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) acc[i][j] = load(sums + i * sums_stride + first + j * kLanes) * factors[i];
  }
  for (int page = 0; page < num_pages; ++page) {
    const auto add_page = [&](auto seen_at) PROMPTMUX_ALWAYS {
      const T* numbers = pages[page] + first;
      const T* line = nexts[page] + first;
      const int32_t* weight = weights + page * kPageSize / kColumnsAWord<T>;
      for (int column = 0; column < kPageSize; column += kColumnsAWord<T>, ++weight) {
        for (int j = 0; j < vectors; j += 2) {
          Floats words[2];
          // Whole vectors but the last: the compiler need not ask.
          const int64_t count = vectors - j > 2 ? 2 * kLanes : value_dim - first - j * kLanes;
          read_values(numbers + j * kLanes, value_dim, count, seen_at(column), line + j * kLanes, words);
          for (int k = 0; k < 2 && j + k < vectors; ++k) {
            for (int i = 0; i < rows; ++i) {
              acc[i][j + k] = multiply_words<kInPairs<T>>(weight[i * kWeightWords<T>], words[k], acc[i][j + k]);
            }
          }
        }
        numbers += value_dim * kColumnsAWord<T>;
        line += value_dim * kColumnsAWord<T>;
      }
    };
    const int seen = bits_of_columns(from - page * kPageSize, to - page * kPageSize);
    if (seen == kAllColumns) add_page([](int) PROMPTMUX_ALWAYS { return kAllColumns; });
    else add_page([seen](int column) PROMPTMUX_ALWAYS { return seen >> column; });
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) store(sums + i * sums_stride + first + j * kLanes, acc[i][j]);
  }
}

// sums[i] = sums[i] * factors[i] + the values of `num_pages` pages, weighted by weights[i]. `from` and `to`, between
// which lie the columns that anybody sees, count from the first page's first.
template <typename T, int rows>
void add_pages(const int32_t* weights, const T* const* pages, const T* const* nexts, int num_pages, int64_t value_dim,
               int from, int to, float* sums, int64_t sums_stride, const float* factors) {
  const auto add = [&](auto vectors, int64_t first) {
    add_some<T, rows, vectors()>(weights, pages, nexts, num_pages, value_dim, from, to, sums, sums_stride, factors,
                                 first);
  };
  int64_t first = 0;
  if constexpr (rows <= 4) {
    // Enough sums at a time to hide how long one takes; with more rows there are no registers for them, and no need.
    for (; value_dim - first > 3 * kLanes; first += 4 * kLanes) add(std::integral_constant<int, 4>{}, first);
  }
  for (; value_dim - first > kLanes; first += 2 * kLanes) add(std::integral_constant<int, 2>{}, first);
  if (value_dim > first) add(std::integral_constant<int, 1>{}, first);
}

template <typename T, int... rows>
constexpr auto page_scorers(std::integer_sequence<int, rows...>) {
  return std::array{score_page<T, rows + 1>...};
}

template <typename T, int... rows>
constexpr auto page_adders(std::integer_sequence<int, rows...>) {
  return std::array{add_pages<T, rows + 1>...};
}

template <typename T>
constexpr auto kPageScorers = page_scorers<T>(std::make_integer_sequence<int, kMaxDirect>{});

template <typename T>
constexpr auto kPageAdders = page_adders<T>(std::make_integer_sequence<int, kMaxDirect>{});

}  // namespace promptmux
