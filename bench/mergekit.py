"""Compare hf-datavec's fused tensors with mergekit's, for every method that both have, on a small transformer.

mergekit lives in an environment of its own:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    python bench/mergekit.py /tmp/mergekit/bin/mergekit-pytorch

It makes a small random ViT and four fine-tunes in a temporary folder (a common direction and one of their own each),
merges them by both programs, and prints a table: the largest difference between two tensors' values, and why where they
differ. `mergekit-pytorch` merges files as they are; `mergekit-yaml` takes a ViT's names from the live module and loses
tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Tensors are equal when no value differs by more; fine-tunes move values by about 0.02, mergekit computes in float32.
TOLERANCE = 1e-5
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Case:
    """One method with the same settings in both programs; from `origin: zero` mergekit combines whole models."""

    name: str
    theirs: str
    options: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    sites: int = 4
    origin: str = "base"
    why: str = ""


WEIGHTS = (1.0, 0.5, 2.0, 1.5)
TRIMMED = {"density": 0.7, "gamma": 0.05}
ALL = {"density": 1.0, "epsilon": 0.0}
HALF = {"density": 0.5, "epsilon": 0.1}
DRAWN = (
    "the masks are drawn otherwise (mergekit's depend on the order in which tensors are visited), and it enlarges what "
    "is left to the tensor's old L1 norm; here each value is divided by its chance to stay, as in the paper"
)
STOPS = (
    "mergekit stops at the class token, of shape 1 x 1 x 16, as it does at every depthwise kernel: it ranks along the "
    "second axis, and a row of one value has the chance 0/0"
)
PAPER = "mergekit averages over agreeing sites only with `normalize: true`; the papers do, and so does this by default"
ARC = "mergekit turns whole models, not vectors (here: a base of zeros), and takes the chord above cosine 0.9995"
CASES = (
    Case("linear", "linear", weights=WEIGHTS),
    Case("mean", "linear", weights=(1.0,) * 4),
    Case("sum", "task_arithmetic", weights=(1.0,) * 4),
    Case("task_arithmetic", "task_arithmetic", weights=WEIGHTS),
    Case("ties", "ties", {"density": 0.5, "scope": "tensor"}, {"density": 0.5}, WEIGHTS),
    Case(
        "ties", "ties", {"density": 0.5}, {"density": 0.5}, WEIGHTS,
        why="mergekit trims each tensor for itself; `scope: vector` trims the whole vector, as the paper does",
    ),
    Case("breadcrumbs", "breadcrumbs", TRIMMED, TRIMMED, WEIGHTS),
    Case("breadcrumbs_ties", "breadcrumbs_ties", TRIMMED, TRIMMED | {"normalize": True}, WEIGHTS),
    Case("breadcrumbs_ties", "breadcrumbs_ties", TRIMMED, TRIMMED, WEIGHTS, why=PAPER),
    Case("dare_linear", "dare_linear", {"density": 1.0}, {"density": 1.0}, WEIGHTS),
    Case("dare_linear", "dare_linear", {"density": 0.5}, {"density": 0.5}, WEIGHTS, why=DRAWN),
    Case("dare_ties", "dare_ties", {"density": 1.0}, {"density": 1.0, "normalize": True}, WEIGHTS),
    Case("dare_ties", "dare_ties", {"density": 0.5}, {"density": 0.5, "normalize": True}, WEIGHTS, why=DRAWN),
    Case("della", "della", ALL, ALL, WEIGHTS),
    Case("della", "della", HALF, HALF, WEIGHTS, why=STOPS),
    Case("della_linear", "della_linear", ALL, ALL, WEIGHTS),
    Case("della_linear", "della_linear", HALF, HALF, WEIGHTS, why=STOPS),
    Case("sce", "sce", {"select_topk": 0.5}, {"select_topk": 0.5}),
    Case("model_stock", "model_stock"),
    Case("nuslerp", "nuslerp", weights=WEIGHTS[:2], sites=2),
    Case("slerp", "slerp", parameters={"t": 0.5}, sites=2, origin="zero", why=ARC),
    Case("karcher_mean", "karcher", parameters={"max_iter": 100, "tol": 1e-8}, origin="zero"),
)  # fmt: skip


def make(folder: Path) -> None:
    """Write the base, its zero, the tuned models and their vectors."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    from networks import make_network, make_vector, save_with
    from safetensors.torch import load_file

    base = make_network("vit", folder / "base")
    random, before = torch.Generator().manual_seed(0), load_file(base / MODEL)
    save_with(base, folder / "zero", {name: torch.zeros_like(value) for name, value in before.items()})
    common = {name: torch.randn(value.shape, generator=random) for name, value in sorted(before.items())}
    for site in range(4):
        tuned = {
            name: before[name] + 0.02 * (direction + torch.randn(direction.shape, generator=random))
            for name, direction in common.items()
        }
        save_with(base, folder / f"tuned-{site}", tuned)
        make_vector(base, folder / f"tuned-{site}", folder / f"vector-{site}")


def ours(folder: Path, case: Case) -> dict[str, Any]:
    """The tensors by hf-datavec."""
    from hf_datavec import fuse
    from hf_datavec.pipeline.prepare import prepare

    entries: list[dict[str, Any]] = []
    for site in range(case.sites):
        entry = {"vector": f"./vector-{site}"} if case.origin == "base" else {"model": f"./tuned-{site}"}
        weight = case.weights[site] if case.weights and case.name not in ("mean", "sum") else None
        entries.append(entry | ({"weight": weight} if weight else {}))
    section = {"method": case.name, "options": case.options}
    recipe = {"base": f"./{case.origin}", "vectors": entries, "merge": section}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    return dict(fuse.run(prepare(folder / "recipe.yaml").plan))


def theirs(program: str, folder: Path, case: Case, number: int) -> dict[str, Any] | None:
    """The tensors by mergekit, or None where it stops."""
    from safetensors.torch import load_file

    models = [
        {"model": str(folder / f"tuned-{site}" / MODEL)}
        | ({"parameters": {"weight": case.weights[site]}} if case.weights else {})
        for site in range(case.sites)
    ]
    config: dict[str, Any] = {"merge_method": case.theirs, "models": models, "dtype": "float32"}
    config |= {"parameters": case.parameters} if case.parameters else {}
    if case.theirs == "slerp":
        config["base_model"] = models[0]["model"]
    elif case.origin == "base" and case.theirs != "linear":
        config["base_model"] = str(folder / "base" / MODEL)
    path, output = folder / f"mergekit-{number}.yaml", folder / f"mergekit-{number}"
    path.write_text(json.dumps(config), "utf-8")
    done = subprocess.run([program, "--quiet", str(path), str(output)], capture_output=True, text=True, check=False)
    if done.returncode and case.why:
        return None
    if done.returncode:
        raise SystemExit(f"mergekit failed on {case.theirs}:\n{done.stderr[-2000:]}")
    return {name: value for file in sorted(output.glob("*.safetensors")) for name, value in load_file(file).items()}


def compared(program: str, folder: Path, case: Case, number: int) -> tuple[float, float]:
    """The largest difference of a value, infinite where mergekit stops, and the largest change that is made here."""
    from safetensors.torch import load_file

    mine, other, before = ours(folder, case), theirs(program, folder, case, number), load_file(folder / "base" / MODEL)
    change = max(float((mine[name] - before[name]).abs().max()) for name in sorted(mine))
    if other is None:
        return math.inf, change
    if set(mine) != set(other):
        raise SystemExit(f"{case.name}: {len(mine)} tensors here, {len(other)} from mergekit")
    difference = max(float((mine[name] - other[name]).abs().max()) for name in sorted(mine))
    return difference, change


def main() -> None:
    """Run all cases and print the table; exit code 1 when a difference is unexplained, or an explained one is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="mergekit-pytorch in mergekit's environment")
    options = parser.parse_args()
    wrong = False
    print("| method | options | largest difference | largest change | tensors | why |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for number, case in enumerate(CASES):
            difference, change = compared(options.program, Path(name), case, number)
            equal = difference <= TOLERANCE
            wrong |= equal == bool(case.why)
            shown = ", ".join(f"{key}: {value}" for key, value in (case.parameters | case.options).items()) or "-"
            words = "equal" if equal else "differ" if math.isfinite(difference) else "none from mergekit"
            print(
                f"| `{case.name}` | {shown} | {difference:.1e} | {change:.2f} | {words} | {case.why or '-'} |",
                flush=True,
            )
    sys.exit(wrong)


if __name__ == "__main__":
    main()
