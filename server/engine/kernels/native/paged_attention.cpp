// Shares a step's rows out among torch's threads. See rows.h for what is done with one of them.
#include "paged_attention.h"

#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <vector>

namespace promptmux {
namespace {

// Fewer numbers of keys and values than this are read faster by one thread than handed to another.
constexpr int64_t kNumbersAThread = 16384;

void check_inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_pages,
                  const at::Tensor& value_pages, const Step& step) {
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, "query, key and value are [tokens, heads, dim]");
  TORCH_CHECK(key_pages.dim() == 4 && value_pages.dim() == 4, "a pool is [pages, kv_heads, page_size, dim]");
  const int64_t tokens = query.size(0), kv_heads = key_pages.size(1);
  TORCH_CHECK(key.size(0) == tokens && value.size(0) == tokens, "query, key and value differ in tokens");
  TORCH_CHECK(key.size(1) == kv_heads && value.size(1) == kv_heads && value_pages.size(1) == kv_heads,
              "keys, values and pools differ in heads");
  TORCH_CHECK(kv_heads > 0 && query.size(1) % kv_heads == 0 && query.size(1) / kv_heads <= kMaxQueries, "the ",
              query.size(1), " query heads are no multiple of the ", kv_heads, " key-value heads, or too many");
  TORCH_CHECK(query.size(2) == key.size(2) && key.size(2) == key_pages.size(3), "query, key and pool differ in dim");
  TORCH_CHECK(value.size(2) == value_pages.size(3), "value and pool differ in dim");
  TORCH_CHECK(key_pages.size(2) == kPageSize && value_pages.size(2) == kPageSize, "a page has 16 columns");
  TORCH_CHECK(key_pages.size(0) == value_pages.size(0), "the pools differ in pages");
  TORCH_CHECK(key_pages.is_contiguous() && value_pages.is_contiguous(), "the pools are not contiguous");
  for (const at::Tensor* tensor : {&key, &value, &key_pages, &value_pages}) {
    TORCH_CHECK(tensor->scalar_type() == query.scalar_type(), "query, key, value and pools differ in dtype");
  }
  TORCH_CHECK(step.page_table.dim() == 2 && step.page_table.scalar_type() == at::kInt &&
                  step.page_table.is_contiguous(), "page_table is a contiguous int32 [rows, pages]");
  const int64_t rows = step.page_table.size(0);
  TORCH_CHECK(step.lengths.numel() == rows && step.lengths.scalar_type() == at::kInt && step.lengths.is_contiguous(),
              "lengths is a contiguous int32 [rows]");
  TORCH_CHECK(step.query_starts.numel() == rows + 1 && step.query_starts.scalar_type() == at::kInt &&
                  step.query_starts.is_contiguous(), "query_starts is a contiguous int32 [rows + 1]");
  TORCH_CHECK(step.write_slots.numel() == tokens && step.write_slots.scalar_type() == at::kLong &&
                  step.write_slots.is_contiguous(), "write_slots is a contiguous int64 [tokens]");
}

// What a step's rows come to: items in the order in which they are taken, and the rows that are shared out by segments.
struct Work {
  std::vector<Item> items;
  std::vector<int64_t> written_first;  // tokens whose keys and values no single item may write
  struct Split {
    int64_t first_number;  // of its partials, which lie side by side
    int num_partials, queries;
  };
  std::vector<Split> splits;     // one a (row, kv head)
  int64_t partial_numbers = 0;  // of all partials
  int max_queries = 0;
  int64_t cost = 0;  // numbers of keys and values that are read, about
};

template <typename T>
Work share_out(const Layer<T>& layer, const Step& step, int64_t num_pages, int64_t num_tokens) {
  const int64_t rows = step.page_table.size(0);
  const int32_t* lengths = step.lengths.const_data_ptr<int32_t>();
  const int32_t* starts = step.query_starts.const_data_ptr<int32_t>();
  const int tokens_a_block = kMaxQueries / layer.group;
  const int64_t numbers_a_query = rounded_to_lanes(layer.value_dim) + 2;
  Work work;
  // Chunks first: the small items at the end even out the threads' times.
  for (const bool decoding : {false, true}) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t count = starts[row + 1] - starts[row], length = lengths[row];
      if ((count == 1) != decoding) continue;
      if (count == 0 && length == 0) continue;  // pads the batch
      const int32_t* table = layer.page_table + row * layer.table_width;
      const int64_t pages = (length + kPageSize - 1) / kPageSize;
      TORCH_CHECK(count >= 1 && count <= length && starts[row] >= 0 && starts[row + 1] <= num_tokens, "row ", row,
                  " has ", count, " tokens and ", length, " columns");
      TORCH_CHECK(pages <= layer.table_width, "row ", row, " has more columns than pages");
      const int64_t past = length - count;
      for (int64_t page = layer.first_seen(past) / kPageSize; page < pages; ++page) {
        TORCH_CHECK(table[page] >= 0 && table[page] < num_pages, "row ", row, ": page ", table[page],
                    " is not in the pool");
      }
      for (int64_t token = starts[row]; token < starts[row + 1]; ++token) {
        const int64_t slot = layer.write_slots[token];
        TORCH_CHECK(slot >= 0 && slot < num_pages * kPageSize, "token ", token, ": slot ", slot, " is not in the pool");
      }
      const int64_t own_slot = int64_t{table[pages - 1]} * kPageSize + (length - 1) % kPageSize;
      const bool writes = decoding && layer.write_slots[starts[row]] == own_slot;
      if (!writes) {
        for (int64_t token = starts[row]; token < starts[row + 1]; ++token) work.written_first.push_back(token);
      }
      for (int64_t first = (count - 1) / tokens_a_block * tokens_a_block; first >= 0; first -= tokens_a_block) {
        const int block = static_cast<int>(std::min<int64_t>(tokens_a_block, count - first));
        const int64_t column = past + first;
        const int first_segment = static_cast<int>(layer.first_seen(column) / kSegmentColumns);
        const int end_segment = static_cast<int>((column + block - 1) / kSegmentColumns) + 1;
        const bool splits = count <= tokens_a_block && end_segment - first_segment > 1;
        work.max_queries = std::max(work.max_queries, block * layer.group);
        work.cost += (column + block - layer.first_seen(column)) * (layer.key_dim + layer.value_dim) * layer.kv_heads *
                     ((block + 7) / 8);
        for (int64_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head) {
          Item item{row, kv_head, starts[row] + first, column, block, first_segment, end_segment, writes};
          if (!splits) {
            work.items.push_back(item);
            continue;
          }
          item.split = static_cast<int>(work.splits.size());
          const int num_partials = end_segment - first_segment, queries = block * layer.group;
          work.splits.push_back({work.partial_numbers, num_partials, queries});
          work.partial_numbers += num_partials * queries * numbers_a_query;
          for (int segment = first_segment; segment < end_segment; ++segment) {
            item.first_segment = segment;
            item.end_segment = segment + 1;
            item.writes = writes && segment + 1 == end_segment;
            work.items.push_back(item);
          }
        }
      }
    }
  }
  return work;
}

template <typename T>
void write_ahead(const Layer<T>& layer, const std::vector<int64_t>& tokens) {
  const int64_t numbers = layer.kv_heads * (layer.key_dim + layer.value_dim);
  const int64_t count = static_cast<int64_t>(tokens.size());
  at::parallel_for(0, count, std::max<int64_t>(1, kNumbersAThread / numbers), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head) layer.write(tokens[i], kv_head);
    }
  });
}

template <typename T>
void run(const Layer<T>& layer, const Work& work) {
  const int value_numbers = rounded_to_lanes(layer.value_dim);
  const at::Tensor partials = at::empty({work.partial_numbers}, at::kFloat);
  std::vector<std::atomic<int>> finished(work.splits.size());
  const auto partial_at = [&](const Work::Split& split, int index) {
    const int64_t sums = int64_t{split.queries} * value_numbers;
    float* first = partials.mutable_data_ptr<float>() + split.first_number + index * (sums + 2 * split.queries);
    return Partial{first, first + sums, first + sums + split.queries};
  };
  const int64_t num_items = static_cast<int64_t>(work.items.size());
  std::atomic<int64_t> taken{0};
  const int64_t most = std::min<int64_t>(at::get_num_threads(), num_items);
  const int64_t workers = std::clamp<int64_t>(work.cost / kNumbersAThread, 1, most);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    ItemRunner<T> runner(layer, scratch, work.max_queries);
    for (int64_t i = taken.fetch_add(1), next = 0; i < num_items; i = next) {
      next = taken.fetch_add(1);  // known ahead, so that it can be fetched
      const Item& item = work.items[i];
      const Item* following = next < num_items ? &work.items[next] : nullptr;
      if (item.split < 0) {
        runner.run(item, following, nullptr);
        continue;
      }
      const Work::Split& split = work.splits[item.split];
      // The segments of a split lie side by side, so the first of them is found from any of them.
      const int first_segment = static_cast<int>(layer.first_seen(item.first_column) / kSegmentColumns);
      const Partial mine = partial_at(split, item.first_segment - first_segment);
      runner.run(item, following, &mine);
      // Whoever comes last sees what the others wrote, and merges all of it in order.
      if (finished[item.split].fetch_add(1, std::memory_order_acq_rel) + 1 < split.num_partials) continue;
      const Partial whole = partial_at(split, 0);
      for (int other = 1; other < split.num_partials; ++other) {
        ItemRunner<T>::merge(whole, partial_at(split, other), split.queries, value_numbers);
      }
      runner.finish(item, whole);
    }
  });
}

template <typename T>
TokenView<T> view_of(const at::Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

at::Tensor with_dense_heads(const at::Tensor& tensor) {
  return tensor.stride(2) == 1 ? tensor : tensor.contiguous();
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& key_pages, const at::Tensor& value_pages, const Step& step, double scaling,
                           int64_t window, double softcap, const std::optional<at::Tensor>& sinks) {
  check_inputs(query, key, value, key_pages, value_pages, step);
  const at::Tensor queries = with_dense_heads(query), keys = with_dense_heads(key), values = with_dense_heads(value);
  at::Tensor logits_of_sinks;
  if (sinks.has_value()) {
    TORCH_CHECK(sinks->numel() == query.size(1), "sinks is [heads]");
    logits_of_sinks = sinks->to(at::kFloat).contiguous();
  }
  const int64_t tokens = query.size(0), rows = step.page_table.size(0);
  at::Tensor answers = at::empty({tokens, query.size(1), value.size(2)}, query.options());
  const int64_t answered = rows > 0 ? step.query_starts.const_data_ptr<int32_t>()[rows] : 0;
  if (answered < tokens) answers.narrow(0, answered, tokens - answered).zero_();
  if (rows == 0) return answers;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "paged_attention", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      TORCH_CHECK(false, "paged_attention takes float32, bfloat16 and float16");
    } else {
      Layer<scalar_t> layer;
      layer.query = view_of<const scalar_t>(queries);
      layer.key = view_of<const scalar_t>(keys);
      layer.value = view_of<const scalar_t>(values);
      layer.answers = view_of<scalar_t>(answers);
      layer.key_pages = static_cast<scalar_t*>(key_pages.data_ptr());
      layer.value_pages = static_cast<scalar_t*>(value_pages.data_ptr());
      layer.page_table = step.page_table.const_data_ptr<int32_t>();
      layer.table_width = step.page_table.size(1);
      layer.write_slots = step.write_slots.const_data_ptr<int64_t>();
      layer.sinks = sinks.has_value() ? logits_of_sinks.const_data_ptr<float>() : nullptr;
      layer.kv_heads = key_pages.size(1);
      layer.group = static_cast<int>(query.size(1) / layer.kv_heads);
      layer.key_dim = static_cast<int>(key.size(2));
      layer.value_dim = static_cast<int>(value.size(2));
      layer.scaling = static_cast<float>(scaling);
      layer.softcap = static_cast<float>(softcap);
      layer.window = std::max<int64_t>(0, window);
      const Work work = share_out(layer, step, key_pages.size(0), tokens);
      write_ahead(layer, work.written_first);
      run(layer, work);
    }
  });
  return answers;
}

}  // namespace promptmux
