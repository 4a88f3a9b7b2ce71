"""Prompts, their versions and owners, kept durably: files in PEFT's format, a catalog, keys.

Knows neither the server nor HTTP nor tensors of any framework. Start at `prompt_store.store.PromptStore`.
"""
