"""Makes soft prompts: many at once over one frozen backbone, written as PEFT writes them.

Examples (`examples`, `splits`, `encoding`, `plans`) become prompts (`trainer`, `methods`), which are measured
(`prefixes`, `evaluation`) and written down (`run`, `provenance`, `reports`). Meets the server through files and the
store's own reader of them, and imports nothing of it.
"""
