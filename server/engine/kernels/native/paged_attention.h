// Attention over the paged pool, as `server.engine.kernels.batch` describes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace promptmux {

// The index tensors of one step; see PagedBatch.
struct Step {
  at::Tensor page_table;    // [R, P], int32
  at::Tensor lengths;       // [R], int32
  at::Tensor query_starts;  // [R + 1], int32
  at::Tensor write_slots;   // [T], int64
};

// Writes this step's keys and values to the pool and answers every token: `[T, heads, value_dim]`.
// A window or soft cap that is not positive means none. Throws c10::Error for shapes and dtypes that do not fit
// together, and for a page or slot outside the pool.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& key_pages, const at::Tensor& value_pages, const Step& step, double scaling,
                           int64_t window, double softcap, const std::optional<at::Tensor>& sinks);

}  // namespace promptmux
