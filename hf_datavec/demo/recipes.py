"""The recipes of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_datavec.demo.material import SITES
from hf_datavec.recipe import AUTO

RECIPE = """# {comment}
base: {home}/base
vectors:
{vectors}
merge: {merge}
recalibrate:
  mode: {mode}
  images: {home}/images/public
{more}evaluate:
  images: {home}/images/test
"""


# After the restoration the fused network learns from the sites' networks, and is made as sure as they are together.
LEARNING = """  tune: {loss: ensemble, epochs: 10}
  temperature: ensemble
"""


def write(
    path: Path,
    *,
    comment: str,
    home: str = "..",
    sites: Sequence[str] = SITES,
    method: str = "sum",
    scale: float = 0.5,
    mode: str = "statistics",
) -> None:
    """Write a recipe; `home` leads from its folder to the demonstration's. With `method="auto"` networks learn, too."""
    vectors = "\n".join(f"  - {home}/vectors/{site}" for site in sites)
    automatic = method == AUTO
    merge = f"{{method: {method}}}" if automatic else f"{{method: {method}, scale: {scale}}}"
    text = RECIPE.format(
        comment=comment, home=home, vectors=vectors, merge=merge, mode=mode, more=LEARNING if automatic else ""
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
