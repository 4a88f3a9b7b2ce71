"""The engine: one thread that owns the device and generates tokens for rows of any tasks.

Reading order: `request` (what goes in and out), `row`, `slots` and `scheduler` (bookkeeping, no torch), `plan` (the
index tensors of a step), `isolation` (their check), `kv`, `prefix`, `attention`, `backbone` (tensors), `sampler`,
`text`, `audit`, and `engine`, where they meet in one loop.
"""
