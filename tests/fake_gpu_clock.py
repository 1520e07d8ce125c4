"""A GPU of `runtime.timing` whose time passes only where something says so."""

from __future__ import annotations


class FakeClock:
    def __init__(self, event_ms: float = 0.001) -> None:
        self.event_ms = event_ms
        self.now = 0.0
        self.bytes = 0

    def spend(self, ms: float) -> None:
        self.now += ms

    def time_ms(self, run) -> float:
        before = self.now
        run()
        self.now += self.event_ms
        return self.now - before

    def used_bytes(self) -> int:
        return self.bytes
