// One item of work: some tokens of one row, one key-value head, answered over a range of the row's segments.
//
// A tile is multiplied with all queries of the item, softmax and all, before the next is read (online softmax: Milakov
// and Gimelshein 2018; blocked: Dao 2022). Each segment is answered from nothing and then merged, in order, with those
// before it; so a long row may be shared out among threads by segments, and yields the same bits as when it is not.
// Columns that a token does not see add exact zeros to it; so a token's bits are the same computed alone or in a chunk.
//
// Few queries (a decoding row) are multiplied with pages as they lie, many with a packed copy of the tile; either way
// every number is summed in the same order. What is read next is fetched meanwhile, a line at a time: rows lie
// scattered over the pool, where no CPU guesses the next page.
#pragma once

#include "items.h"

#include <cmath>
#include <utility>

namespace promptmux {

template <typename T>
class ItemRunner {
 public:
  static constexpr bool kPairs = kInPairs<T>;

  ItemRunner(const Layer<T>& layer, Scratch& scratch, int max_queries)
      : layer_(layer),
        scratch_(scratch),
        query_words_(rounded_to_lanes(words_for<T>(layer.key_dim))),
        value_numbers_(rounded_to_lanes(layer.value_dim)) {
    scratch.reserve(max_queries, query_words_, query_words_, value_numbers_, value_numbers_);
  }

  // Answers the item; if `kept` is given, leaves its answer there undivided. `next` is fetched while it runs.
  void run(const Item& item, const Item* next, const Partial* kept) {
    const int queries = item.num_tokens * layer_.group;
    if (item.writes) {
      for (int i = 0; i < item.num_tokens; ++i) layer_.write(item.first_token + i, item.kv_head);
    }
    for (int i = 0; i < queries; ++i) {
      const int64_t token = item.first_token + i / layer_.group;
      const int64_t head = item.kv_head * layer_.group + i % layer_.group;
      pack_row(layer_.query.at(token, head), layer_.key_dim, scratch_.query + i * query_words_, query_words_);
    }
    bool is_first = true;
    for (int segment = item.first_segment; segment < item.end_segment; ++segment) {
      if (!answer_segment(item, segment, next, queries)) continue;
      if (is_first) std::swap(scratch_.part, scratch_.whole);
      else merge(scratch_.whole, scratch_.part, queries, value_numbers_);
      is_first = false;
    }
    if (kept != nullptr) {
      std::memcpy(kept->sums, scratch_.whole.sums, sizeof(float) * queries * value_numbers_);
      std::memcpy(kept->maxima, scratch_.whole.maxima, sizeof(float) * queries);
      std::memcpy(kept->divisors, scratch_.whole.divisors, sizeof(float) * queries);
    } else {
      finish(item, scratch_.whole);
    }
  }

  // Adds `part`, of later columns, to `whole`.
  static void merge(const Partial& whole, const Partial& part, int queries, int value_numbers) {
    for (int i = 0; i < queries; ++i) {
      if (part.divisors[i] == 0.0f) continue;  // saw nothing
      if (whole.divisors[i] == 0.0f) {
        std::memcpy(whole.sums + i * value_numbers, part.sums + i * value_numbers, sizeof(float) * value_numbers);
        whole.maxima[i] = part.maxima[i];
        whole.divisors[i] = part.divisors[i];
        continue;
      }
      const float maximum = std::max(whole.maxima[i], part.maxima[i]);
      const float kept = std::exp(whole.maxima[i] - maximum), added = std::exp(part.maxima[i] - maximum);
      for (int j = 0; j < value_numbers; j += kLanes) {
        float* sums = whole.sums + i * value_numbers + j;
        store(sums, load(sums) * kept + load(part.sums + i * value_numbers + j) * added);
      }
      whole.maxima[i] = maximum;
      whole.divisors[i] = whole.divisors[i] * kept + part.divisors[i] * added;
    }
  }

  // Divides, and writes the answers out. A sink is one more column, without a value (gpt-oss).
  void finish(const Item& item, const Partial& whole) {
    for (int i = 0; i < item.num_tokens * layer_.group; ++i) {
      const int64_t head = item.kv_head * layer_.group + i % layer_.group;
      float factor = 1.0f / whole.divisors[i];
      if (layer_.sinks != nullptr) {
        const float maximum = std::max(whole.maxima[i], layer_.sinks[head]);
        const float kept = std::exp(whole.maxima[i] - maximum);
        factor = kept / (whole.divisors[i] * kept + std::exp(layer_.sinks[head] - maximum));
      }
      T* answer = layer_.answers.at(item.first_token + i / layer_.group, head);
      for (int j = 0; j < layer_.value_dim; j += kLanes) {
        store_some(answer + j, load(whole.sums + i * value_numbers_ + j) * factor, layer_.value_dim - j);
      }
    }
  }

 private:
  // Answers all queries over one segment into `part`. False if none of them sees any of it.
  bool answer_segment(const Item& item, int segment, const Item* next, int queries) {
    const int64_t start = int64_t{segment} * kSegmentColumns;
    const int64_t from = std::max(start, layer_.first_seen(item.first_column));
    const int64_t to = std::min(start + kSegmentColumns, item.end_column());
    if (from >= to) return false;
    std::fill_n(scratch_.part.maxima, queries, -kInfinity);
    std::fill_n(scratch_.part.divisors, queries, 0.0f);
    std::fill_n(scratch_.part.sums, static_cast<size_t>(queries) * value_numbers_, 0.0f);
    const int64_t last = (to - 1) / kTileColumns;
    for (int64_t index = from / kTileColumns; index <= last; ++index) {
      const Tile tile = tile_at(index, from, to);
      TilePages<T> pages;
      if (index < last) {
        pages = look_up(item, tile, &item, tile_at(index + 1, from, to));
      } else if (segment + 1 < item.end_segment) {
        pages = look_up(item, tile, &item, tile_at(index + 1, 0, item.end_column()));
      } else if (next != nullptr) {
        const int64_t first =
            std::max(int64_t{next->first_segment} * kSegmentColumns, layer_.first_seen(next->first_column));
        pages = look_up(item, tile, next, tile_at(first / kTileColumns, first, next->end_column()));
      } else {
        pages = look_up(item, tile, nullptr, tile);
      }
      const int64_t origin = (index * kTilePages + tile.first) * kPageSize;
      const int first_seen = static_cast<int>(std::max<int64_t>(0, from - origin));
      const int end_seen = static_cast<int>(std::min<int64_t>(kTileColumns, to - origin));
      if (queries <= kMaxDirect) {
        answer_directly(item, pages, queries, origin, first_seen, end_seen);
      } else {
        pack(pages, tile.first, first_seen, end_seen);
        for (int panel = 0; panel < queries; panel += kPanelRows) {
          answer_panel(item, tile, panel, std::min(kPanelRows, queries - panel));
        }
      }
    }
    return true;
  }

  TilePages<T> look_up(const Item& item, const Tile& tile, const Item* next, const Tile& following) const {
    TilePages<T> pages{};
    pages.count = tile.end - tile.first;
    const int32_t* table = layer_.page_table + item.row * layer_.table_width + tile.index * kTilePages;
    for (int i = 0; i < pages.count; ++i) {
      pages.keys[i] = layer_.key_page(table[tile.first + i], item.kv_head);
      pages.values[i] = layer_.value_page(table[tile.first + i], item.kv_head);
      pages.next_keys[i] = pages.keys[i];
      pages.next_values[i] = pages.values[i];
    }
    if (next == nullptr) return pages;
    table = layer_.page_table + next->row * layer_.table_width + following.index * kTilePages;
    for (int i = 0; i < following.end - following.first; ++i) {
      const T* keys = layer_.key_page(table[following.first + i], next->kv_head);
      const T* values = layer_.value_page(table[following.first + i], next->kv_head);
      if (i < pages.count) {
        pages.next_keys[i] = keys;
        pages.next_values[i] = values;
      } else {
        // More pages than this tile has to fetch them along with.
        for (int line = 0; line < kPageSize * layer_.key_dim; line += 64 / int{sizeof(T)}) fetch(keys + line);
        for (int line = 0; line < kPageSize * layer_.value_dim; line += 64 / int{sizeof(T)}) fetch(values + line);
      }
    }
    return pages;
  }

  // Scores, softmax and weighted values of all queries, at most kMaxDirect, over a tile that starts at column `origin`.
  void answer_directly(const Item& item, const TilePages<T>& pages, int queries, int64_t origin, int from, int to) {
    for (int i = 0; i < pages.count; ++i) {
      kPageScorers<T>[queries - 1](scratch_.query, query_words_, pages.keys[i], layer_.key_dim,
                                   scratch_.scores + i * kPageSize, pages.next_keys[i]);
    }
    alignas(64) float factors[kLanes];
    weigh_all(item, 0, queries, origin, pages.count, factors);
    kPageAdders<T>[queries - 1](scratch_.weights, pages.values, pages.next_values, pages.count,
                                layer_.value_dim, from, to, scratch_.part.sums, value_numbers_, factors);
  }

  // Packs a tile's pages to where they belong in a whole tile, the first being its page `first`.
  void pack(const TilePages<T>& pages, int first, int from, int to) {
    for (int i = 0; i < pages.count; ++i) {
      pack_keys(pages.keys[i], layer_.key_dim, scratch_.keys + (first + i) * kPageSize, pages.next_keys[i]);
      int32_t* values = scratch_.values + int64_t{first + i} * kPageSize / kColumnsAWord<T> * value_numbers_;
      pack_values(pages.values[i], layer_.value_dim, from - i * kPageSize, to - i * kPageSize, values, value_numbers_,
                  pages.next_values[i]);
    }
  }

  // Scores, softmax and weighted values of up to kPanelRows queries over the packed tile.
  void answer_panel(const Item& item, const Tile& tile, int panel, int rows) {
    const int64_t newest = item.first_column + (panel + rows - 1) / layer_.group;
    const int64_t oldest = item.first_column + panel / layer_.group;
    const Tile seen = tile_at(tile.index, layer_.first_seen(oldest), newest + 1);
    const int first = std::max(tile.first, seen.first), end = std::min(tile.end, seen.end);
    if (first >= end) return;
    const int vectors = end - first;
    multiply_panels(kScorePanels<kPairs>, rows, vectors, scratch_.query + panel * query_words_, query_words_,
                    scratch_.keys + first * kPageSize, kTileColumns, words_for<T>(layer_.key_dim), nullptr,
                    scratch_.scores, kTileColumns);
    alignas(64) float factors[kLanes];
    weigh_all(item, panel, rows, (tile.index * kTilePages + first) * kPageSize, vectors, factors);
    multiply_panels(kAddPanels<kPairs>, rows, value_numbers_ / kLanes, scratch_.weights, kWeightWords<T>,
                    scratch_.values + int64_t{first} * kPageSize / kColumnsAWord<T> * value_numbers_, value_numbers_,
                    vectors * kPageSize / kColumnsAWord<T>, factors, scratch_.part.sums + panel * value_numbers_,
                    value_numbers_);
  }

  // Turns the scores of `rows` queries from `panel` on into weights, and gives the factors of what they had before.
  void weigh_all(const Item& item, int panel, int rows, int64_t origin, int vectors, float* factors) {
    alignas(64) float before[kLanes] = {}, after[kLanes] = {}, added[kLanes] = {};
    for (int i = 0; i < rows; ++i) {
      const int64_t column = item.first_column + (panel + i) / layer_.group;
      const int64_t from = layer_.first_seen(column) - origin, to = column + 1 - origin;
      int32_t* words = scratch_.weights + i * kWeightWords<T>;
      if (to <= 0 || from >= vectors * kLanes) {
        // It sees none of this, and -inf less -inf would be no number.
        std::fill_n(words, vectors * kLanes / kColumnsAWord<T>, 0);
        continue;
      }
      before[i] = scratch_.part.maxima[panel + i];
      after[i] = before[i];
      added[i] = weigh(scratch_.scores + i * kTileColumns, vectors, static_cast<int>(std::max<int64_t>(from, 0)),
                       static_cast<int>(std::min<int64_t>(to, kTileColumns)), words, after[i]);
      scratch_.part.maxima[panel + i] = after[i];
    }
    store(factors, exponential(load(before) - load(after)));
    for (int i = 0; i < rows; ++i) {
      float& divisor = scratch_.part.divisors[panel + i];
      divisor = divisor * factors[i] + added[i];
    }
  }

  // One query's scores to weights, of which it sees the columns `from .. to - 1`. Raises `largest_score` to the largest
  // of them and returns the sum of the weights.
  float weigh(const float* scores, int vectors, int from, int to, int32_t* words, float& largest_score) const {
    Floats weights[kTilePages];
    Floats maxima = splat(-kInfinity);
    const bool sees_all = from == 0 && to >= vectors * kLanes;
    for (int j = 0; j < vectors; ++j) {
      Floats score = load(scores + j * kLanes) * layer_.scaling;
      if (layer_.softcap > 0) score = hyperbolic_tangent(score / layer_.softcap) * layer_.softcap;
      if (!sees_all) {
        const Ints columns = kLaneNumbers + j * kLanes;
        score = (columns >= from) & (columns < to) ? score : splat(-kInfinity);
      }
      weights[j] = score;
      maxima = maximum(maxima, score);
    }
    largest_score = std::max(largest_score, largest(maxima));
    Floats total{};
    for (int j = 0; j < vectors; ++j) {
      weights[j] = exponential(weights[j] - largest_score);
      total += weights[j];
    }
    store_weights<kPairs>(weights, vectors, words);
    return sum(total);
  }

  static constexpr Ints kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  const Layer<T>& layer_;
  Scratch& scratch_;
  const int query_words_;    // of a packed query, rounded up to whole vectors
  const int value_numbers_;  // of an answer, rounded up to whole vectors
};

}  // namespace promptmux
