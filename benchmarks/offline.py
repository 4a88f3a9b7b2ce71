"""The engine called in process, as `promptmux bench --offline` calls it."""

from server.bench.offline import OfflineEngine

__all__ = ["OfflineEngine"]
