"""Benchmarks: one question a file. Each prints a table and ends with one JSON line; results/ keeps measured tables."""
