// The operators that torch's dispatcher sees, and the pools and steps that a compiled graph refers to by a number.
//
// `promptmux::attend` is for graphs that were compiled before any step: its pools and index tensors are bound to a
// handle, so the graph depends on the number of tokens alone. It writes to the pool, which its schema does not say (a
// graph cannot name a tensor that it is not given). That is safe because a layer's answer is always used, so that no
// call is dropped; no two calls of a graph have the same handle and layer, so that none are merged; layers follow each
// other through their answers, so that none is moved; and a call that is repeated within a step writes the same bits to
// the same places.
#include "paged_attention.h"

#include <torch/library.h>

#include <memory>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace promptmux {
namespace {

struct Binding {
  std::vector<at::Tensor> key_pages, value_pages;
  std::optional<Step> step;
};

class Registry {
 public:
  void bind_pool(int64_t handle, std::vector<at::Tensor> key_pages, std::vector<at::Tensor> value_pages) {
    TORCH_CHECK(key_pages.size() == value_pages.size(), "a pool has as many layers of keys as of values");
    const std::unique_lock lock(mutex_);
    bindings_[handle] = {std::move(key_pages), std::move(value_pages), std::nullopt};
  }

  void unbind_pool(int64_t handle) {
    const std::unique_lock lock(mutex_);
    bindings_.erase(handle);
  }

  void set_step(int64_t handle, std::optional<Step> step) {
    const std::unique_lock lock(mutex_);
    const auto found = bindings_.find(handle);
    TORCH_CHECK(found != bindings_.end(), "no pool is bound to handle ", handle);
    found->second.step = std::move(step);
  }

  struct Bound {
    at::Tensor key_pages, value_pages;
    Step step;
  };

  Bound at(int64_t handle, int64_t layer) const {
    const std::shared_lock lock(mutex_);
    const auto found = bindings_.find(handle);
    TORCH_CHECK(found != bindings_.end(), "no pool is bound to handle ", handle);
    const Binding& binding = found->second;
    TORCH_CHECK(binding.step.has_value(), "no step is set for handle ", handle);
    TORCH_CHECK(layer >= 0 && layer < static_cast<int64_t>(binding.key_pages.size()), "the pool has no layer ", layer);
    return {binding.key_pages[layer], binding.value_pages[layer], *binding.step};
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<int64_t, Binding> bindings_;
};

Registry& registry() {
  static Registry the_registry;
  return the_registry;
}

at::Tensor paged_attention_op(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& key_pages, const at::Tensor& value_pages, const at::Tensor& page_table,
                              const at::Tensor& lengths, const at::Tensor& query_starts, const at::Tensor& write_slots,
                              double scaling, int64_t window, double softcap, const std::optional<at::Tensor>& sinks) {
  return paged_attention(query, key, value, key_pages, value_pages, {page_table, lengths, query_starts, write_slots},
                         scaling, window, softcap, sinks);
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t handle,
                  int64_t layer, double scaling, int64_t window, double softcap,
                  const std::optional<at::Tensor>& sinks) {
  const Registry::Bound bound = registry().at(handle, layer);
  return paged_attention(query, key, value, bound.key_pages, bound.value_pages, bound.step, scaling, window, softcap,
                         sinks);
}

void bind_pool(int64_t handle, at::TensorList key_pages, at::TensorList value_pages) {
  registry().bind_pool(handle, key_pages.vec(), value_pages.vec());
}

void unbind_pool(int64_t handle) { registry().unbind_pool(handle); }

void set_step(int64_t handle, const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& query_starts,
              const at::Tensor& write_slots) {
  registry().set_step(handle, Step{page_table, lengths, query_starts, write_slots});
}

void clear_step(int64_t handle) { registry().set_step(handle, std::nullopt); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(promptmux, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, "
      "Tensor page_table, Tensor lengths, Tensor query_starts, Tensor write_slots, float scaling, int window, "
      "float softcap, Tensor? sinks) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, int handle, int layer, float scaling, int window, "
      "float softcap, Tensor? sinks) -> Tensor");
  library.def("bind_pool(int handle, Tensor[] key_pages, Tensor[] value_pages) -> ()", bind_pool);
  library.def("unbind_pool(int handle) -> ()", unbind_pool);
  library.def(
      "set_step(int handle, Tensor page_table, Tensor lengths, Tensor query_starts, Tensor write_slots) -> ()",
      set_step);
  library.def("clear_step(int handle) -> ()", clear_step);
}

TORCH_LIBRARY_IMPL(promptmux, CPU, library) {
  library.impl("paged_attention", paged_attention_op);
  library.impl("attend", attend);
}

}  // namespace promptmux
