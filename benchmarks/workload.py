"""The requests that the benchmarks send; they are those of `promptmux bench`."""

from server.bench.workload import BenchRequest, Workload, make_workload

__all__ = ["BenchRequest", "Workload", "make_workload"]
