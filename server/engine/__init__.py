"""The engine: one thread that owns the device and generates tokens for rows of any tasks.

Reading order: `request` (what goes in and out), `row`, `pages`, `row_pages`, `text_cache` and `scheduler`
(bookkeeping, no torch), `plan` (the index tensors of a step), `isolation` (their check), `kv`, `row_memory`, `prefix`,
`residency`, `attention` and `kernels`, `forward`, `backbone` (tensors), `sampler`, `text`, `audit`, and `engine`, where
they meet in one loop.
"""
