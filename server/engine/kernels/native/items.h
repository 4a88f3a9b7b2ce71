// What a step comes to: the layer's tensors, items of work, and the memory in which one thread answers an item.
//
// A row's columns are cut into tiles of 64 (four pages) and segments of 512, at fixed places.
#pragma once

#include "pages.h"

#include <limits>
#include <memory>
#include <new>

namespace promptmux {

constexpr int kSegmentColumns = 512;
constexpr int kMaxQueries = 96;  // rows of packed queries in an item
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A tensor [tokens, heads, dim] whose last dimension is contiguous.
template <typename T>
struct TokenView {
  T* data;
  int64_t token_stride;
  int64_t head_stride;

  T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <typename T>
struct Layer {
  TokenView<const T> query, key, value;
  TokenView<T> answers;
  T* key_pages;
  T* value_pages;
  const int32_t* page_table;
  int64_t table_width;
  const int64_t* write_slots;
  const float* sinks;  // [heads], or null
  int64_t kv_heads;
  int group, key_dim, value_dim;
  float scaling, softcap;
  int64_t window;  // 0: none

  T* key_page(int64_t page, int64_t kv_head) const {
    return key_pages + (page * kv_heads + kv_head) * kPageSize * key_dim;
  }
  T* value_page(int64_t page, int64_t kv_head) const {
    return value_pages + (page * kv_heads + kv_head) * kPageSize * value_dim;
  }
  void write(int64_t token, int64_t kv_head) const {
    const int64_t page = write_slots[token] / kPageSize, offset = write_slots[token] % kPageSize;
    std::memcpy(key_page(page, kv_head) + offset * key_dim, key.at(token, kv_head), sizeof(T) * key_dim);
    std::memcpy(value_page(page, kv_head) + offset * value_dim, value.at(token, kv_head), sizeof(T) * value_dim);
  }
  int64_t first_seen(int64_t column) const { return window > 0 ? std::max<int64_t>(0, column + 1 - window) : 0; }
};

// Where a segment's answer of one (row, kv head) is kept until all of them are there.
struct Partial {
  float* sums;      // [queries, rounded value_dim]
  float* maxima;    // [queries]
  float* divisors;  // [queries]
};

struct Item {
  int64_t row, kv_head;
  int64_t first_token;   // in the packed batch
  int64_t first_column;  // of that token
  int num_tokens;
  int first_segment, end_segment;
  bool writes;    // this step's keys and values of its tokens
  int split = -1;  // of a row whose segments are shared out: which; else -1
  int64_t end_column() const { return first_column + num_tokens; }
};

// A thread's own memory; grows to the largest item it has seen.
class Scratch {
 public:
  void reserve(int queries, int query_words, int key_words, int value_words, int value_numbers) {
    const size_t sizes[] = {size_t(queries) * query_words,       size_t(key_words) * kTileColumns,
                            size_t(kTileColumns) * value_words,  size_t(queries) * value_numbers,
                            size_t(queries) * value_numbers,     size_t(queries) * 4,
                            size_t(kMaxTogether) * kTileColumns, size_t(kMaxTogether) * kTileColumns};
    size_t total = 0;
    for (size_t size : sizes) total += rounded(size);
    if (total > capacity_) {
      words_.reset(static_cast<int32_t*>(::operator new(total * sizeof(int32_t), std::align_val_t{64})));
      capacity_ = total;
    }
    int32_t* next = words_.get();
    const auto take = [&](size_t size) {
      int32_t* taken = next;
      next += rounded(size);
      return taken;
    };
    query = take(sizes[0]);
    keys = take(sizes[1]);
    values = take(sizes[2]);
    part.sums = reinterpret_cast<float*>(take(sizes[3]));
    whole.sums = reinterpret_cast<float*>(take(sizes[4]));
    part.maxima = reinterpret_cast<float*>(take(sizes[5]));
    part.divisors = part.maxima + queries;
    whole.maxima = part.divisors + queries;
    whole.divisors = whole.maxima + queries;
    scores = reinterpret_cast<float*>(take(sizes[6]));
    weights = take(sizes[7]);
  }

  int32_t* query;  // [queries, query words]
  int32_t* keys;   // [key words, kTileColumns]
  int32_t* values;  // [columns or pairs of columns, rounded value_dim]
  Partial part, whole;
  float* scores;     // [kMaxTogether, kTileColumns]
  int32_t* weights;  // [kMaxTogether, words of a tile]

 private:
  struct Free {
    void operator()(int32_t* words) const { ::operator delete(words, std::align_val_t{64}); }
  };
  static size_t rounded(size_t words) { return (words + kLanes - 1) / kLanes * kLanes; }

  std::unique_ptr<int32_t, Free> words_;
  size_t capacity_ = 0;
};

// The pages of one tile that an item reads: `first .. end - 1` of its four.
struct Tile {
  int64_t index;  // in the row
  int first, end;
};

// The pages of a tile as they lie in the pool, of one head, and those to fetch meanwhile (perhaps the same).
template <typename T>
struct TilePages {
  const T* keys[kTilePages];
  const T* values[kTilePages];
  const T* next_keys[kTilePages];
  const T* next_values[kTilePages];
  int count;
};

inline Tile tile_at(int64_t index, int64_t first_column, int64_t end_column) {
  const int64_t start = index * kTileColumns;
  const int64_t from = std::max(first_column, start) - start, to = std::min(end_column - start, int64_t{kTileColumns});
  return {index, static_cast<int>(from / kPageSize), static_cast<int>((to + kPageSize - 1) / kPageSize)};
}

}  // namespace promptmux
