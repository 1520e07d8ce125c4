"""What an engine's layers cost, as `Engine.profile` measures it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LayerTimes"]


@dataclass(slots=True)
class LayerTimes:
    """Times of an engine's layers, mean over the runs.

    Attributes:
        runs: How often each layer ran.
    """

    runs: dict[str, int] = field(default_factory=dict)
    _total_ms: dict[str, float] = field(default_factory=dict)

    def add(self, layer: str, ms: float) -> None:
        """Counts one run of a layer."""
        self.runs[layer] = self.runs.get(layer, 0) + 1
        self._total_ms[layer] = self._total_ms.get(layer, 0.0) + ms

    @property
    def layers(self) -> dict[str, float]:
        """Mean milliseconds by layer, in the engine's order."""
        return {layer: total / self.runs[layer] for layer, total in self._total_ms.items()}

    @property
    def total_ms(self) -> float:
        """All layers together; more than a call takes, since timing keeps layers apart."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        total = self.total_ms or 1.0
        slowest = sorted(self.layers.items(), key=lambda item: -item[1])
        lines = [f"{ms:9.4f} ms {100 * ms / total:5.1f} %  {layer}" for layer, ms in slowest]
        return "\n".join([*lines, f"{self.total_ms:9.4f} ms          {len(slowest)} layers"])
