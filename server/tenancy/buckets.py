"""A token bucket: so many a minute, at most a minute's worth at once. Knows time and numbers, nothing else."""


class TokenBucket:
    """Full at first. `now_s` is on one monotonic clock in all calls."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What may be taken now; below zero when what was taken turned out to be more than what was reserved."""
        gained = max(0.0, now_s - self._at_s) * self.per_minute / 60
        self._level = min(float(self.per_minute), self._level + gained)
        self._at_s = max(self._at_s, now_s)
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` may be taken: 0 when it may be now, infinite when it is more than a minute has."""
        missing = amount - self.level(now_s)
        if missing <= 0:
            return 0.0
        return missing * 60 / self.per_minute if 0 < amount <= self.per_minute else float("inf")

    def take(self, amount: float, now_s: float) -> None:
        """A negative amount gives back."""
        self.level(now_s)
        self._level = min(float(self.per_minute), self._level - amount)

    def set_limit(self, per_minute: int, now_s: float) -> None:
        """What is missing to a full bucket stays missing."""
        self._level = per_minute - (self.per_minute - self.level(now_s))
        self.per_minute = per_minute
