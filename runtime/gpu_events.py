"""The `Gpu` of timing.py, by torch's events on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["TorchGpu"]


class TorchGpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event  # torch does not type it
        self._begin, self._end = event(enable_timing=True), event(enable_timing=True)

    def time_ms(self, run: Callable[[], object]) -> float:
        """See `timing.Gpu`. The begin lies on an idle stream, so the host's time until the work is given counts too."""
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def used_bytes(self) -> int:
        """See `timing.Gpu`."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
