"""Attention over the paged pool, one module a way of computing it: torch alone, C++ on CPU, Triton on CUDA.

All of them take the same `PagedBatch`, and each is tested against the plainest of them.
"""
