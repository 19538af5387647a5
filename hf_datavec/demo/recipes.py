"""The recipes of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_datavec.demo.material import SITES

RECIPE = """# {comment}
base: {home}/base
vectors:
{vectors}
merge:
  method: {method}
  scale: {scale}
recalibrate:
  mode: {mode}
  images: {home}/images/public
evaluate:
  images: {home}/images/test
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
    """Write a recipe; `home` leads from its folder to the demonstration's."""
    vectors = "\n".join(f"  - {home}/vectors/{site}" for site in sites)
    text = RECIPE.format(comment=comment, home=home, vectors=vectors, method=method, scale=scale, mode=mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
