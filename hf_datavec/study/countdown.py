"""How many steps of a study are done, and about how long the rest takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Countdown:
    """Steps of a known number; those that need no work, since their results are kept, tell nothing of the time."""

    left: int
    begun: float = field(default_factory=time.monotonic)
    done: int = 0

    def step(self) -> str:
        """Count one step that was work; says how long the others take, if they take as long as those before."""
        self.done += 1
        self.left -= 1
        seconds = (time.monotonic() - self.begun) / self.done * self.left
        return f"about {shown(seconds)} left" if self.left else "the last one"


def shown(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
