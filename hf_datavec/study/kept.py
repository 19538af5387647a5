"""What was predicted, on disk, so that an interrupted study goes on and a table can be made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Kept:
    """Results in a folder, each under what it is the result of."""

    folder: Path

    def probabilities(self, key: str, compute: Callable[[], Floats]) -> Floats:
        """The probabilities (n, k) that are kept under a key, computed if there are none."""
        import numpy as np

        place = self._place(key, "npy")
        if not place.exists():
            found = compute()
            partial = place.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, found, allow_pickle=False)
            os.replace(partial, place)  # a killed run leaves no half result under the key
        loaded: Floats = np.load(place, allow_pickle=False)
        return loaded

    def has(self, key: str) -> bool:
        """Whether probabilities are kept under a key."""
        return self._place(key, "npy").exists()

    def numbers(self, key: str, compute: Callable[[], Any]) -> Any:
        """Plain data that is kept under a key, computed if there is none."""
        place = self._place(key, "json")
        if not place.exists():
            partial = place.with_suffix(".partial")
            partial.write_text(json.dumps(compute()), "utf-8")
            os.replace(partial, place)
        return json.loads(place.read_text("utf-8"))

    def _place(self, key: str, ending: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        readable = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in key)[:60]
        return self.folder / f"{readable}-{blake3(key.encode()).hexdigest()[:8]}.{ending}"
