"""One merge as several real processes: the same bytes as from one, one message when one fails, and no process left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ended, environment, start_all
from networks import make_images, make_network, tune, write_recipe

from hf_datavec.staging import partial_path
from hf_datavec.tensors import open_folder
from hf_datavec.writing import in_file_order

PATIENCE = 300

# What each recipe asks of the engine: slices, ranks over whole vectors, inner products of whole vectors, random
# masks, second moments, whole matrices, searches, learning and candidates that the sites' networks judge.
MERGES = {
    "sum": {},
    "ties": {"method": "ties", "options": {"density": 0.3, "scope": "vector"}},
    "site": {"method": "geometric_median", "clip": "median"},
    "drops": {"method": "dare_ties", "options": {"density": 0.4}},
    "fisher": {"method": "fisher"},
    "regmean": {"method": "regmean"},
    "matrix": {"method": "iso_c"},
    "scale": {"scale": {"search": [0.3, 1.0], "images": "./images", "batch_size": 4}},
    "weights": {"method": "linear", "weights": {"search": "coordinate", "rounds": 1, "images": "./images"}},
    "learned": {"method": "adamerging", "options": {"steps": 2}},
    "auto": {"method": "auto"},
}
RESTORED = {
    "sum": "statistics",
    "ties": "relative",
    "site": "repair",
    "drops": "moments",
    "matrix": "tune",
    "auto": "auto",
}
FITTED = {"sum": "ensemble", "ties": "labels"}

MANY = """
import contextlib, sys, time
from pathlib import Path
from hf_datavec import processes
from hf_datavec.api import merge
for name in sys.argv[1:]:
    merge(f"{name}.yaml", output=f"{processes.count()}/{name}", device="cpu")
processes.leave()

# Threads of the group that were left would abort the process now and then as it ends.
def threads():
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            yield path.read_text().strip()

give_up = time.monotonic() + 10
while (left := [name for name in threads() if "gloo" in name]) and time.monotonic() < give_up:
    time.sleep(0.01)
assert not left, left
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A study whose sites share all that methods and modes may ask for, and a recipe for each entry of MERGES."""
    from hf_datavec.cli import main

    folder = tmp_path_factory.mktemp("processes")
    base = make_network("test_resnet", folder / "base")
    images = make_images(folder / "images", each=7)
    for number, site in enumerate(("a", "b", "c"), start=1):
        tuned = tune(base, folder / f"tuned-{site}", seed=number)
        second = ["--with", "fisher,gram", "--images", str(images), "--count", "4"]
        place = str(folder / f"site-{site}")
        assert main(["diff", str(base), str(tuned), "-o", place, "--with-statistics", *second]) == 0
    for name, merge in MERGES.items():
        restore = {"mode": RESTORED.get(name, "statistics"), "images": "./images", "batch_size": 4}
        if restore["mode"] == "moments":
            del restore["images"]
        restore["temperature"] = FITTED.get(name, "none")
        write_recipe(
            folder / f"{name}.yaml", base="./base", vectors=["./site-a", "./site-b", "./site-c"], merge=merge,
            recalibrate=restore, **({"evaluate": {"images": "./images", "batch_size": 5}} if name == "sum" else {}),
        )  # fmt: skip
    return folder


def launched(processes: int, *command: object) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return [*start, *map(str, command)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_two_and_three_processes_write_the_same_bytes(shared):
    script = shared / "many.py"
    script.write_text(MANY)
    for processes in (1, 2, 3):
        command = launched(processes, script, *MERGES)
        done = subprocess.run(command, cwd=shared, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in MERGES:
        one = contents(shared / "1" / name)
        assert {"model.safetensors", "recipe.lock.yaml", "README.md"} <= set(one)
        assert not any(file.startswith(".") for file in one)
        for processes in (2, 3):
            found = contents(shared / str(processes) / name)
            assert [file for file in one if found.get(file) != one[file]] == [], name
            assert set(found) == set(one)


def test_an_error_that_one_process_meets_ends_all_with_one_message_and_its_exit_code(study):
    records = open_folder(study / "base").records.values()
    # The last tensor of the file is the second process's; it alone does not fit the type.
    last = [record.name for record in in_file_order(records) if record.dtype == "F32"][-1]
    merge = {"overrides": [{"tensors": re.escape(last), "scale": 1e9}]}
    vectors = ["./site-a", "./site-b"]
    write_recipe(study / "r.yaml", base="./base", vectors=vectors, merge=merge, output="./fused", dtype="float16")
    (first, out, told), (second, silent, nothing) = ended(start_all(2, ["merge", "r.yaml", "--device", "cpu"], study))
    assert (first, second) == (2, 2), told + nothing
    assert (out, silent, nothing) == ("", "", "")
    assert told.count("error:") == 1
    assert f"error: the fused tensor '{last}' does not fit F16" in told
    assert not (study / "fused").exists()
    assert not partial_path(study / "fused").exists()


def test_a_recipe_that_is_wrong_is_told_once(study):
    (study / "recipe.yaml").write_text("base: ./base\n")
    (first, _, told), (second, _, nothing) = ended(start_all(2, ["merge", "recipe.yaml", "--device", "cpu"], study))
    assert (first, second, nothing) == (2, 2, "")
    assert told.count("recipe.yaml:") == 1


def test_what_runs_as_one_process_says_so_once(study):
    arguments = ["finetune", "base", "images", "-o", "tuned"]
    (first, _, told), (second, _, nothing) = ended(start_all(2, arguments, study))
    assert (first, second, nothing) == (2, 2, "")
    assert told == (
        "error: hf-datavec was started as 2 processes, but finetune runs as one\n"
        "  hint: start it without torchrun or accelerate launch; merge and evaluate take any number\n"
    )


def test_results_are_told_by_the_main_process_alone(study):
    (code, out, told), (other, nothing, silent) = ended(
        start_all(2, ["evaluate", "base", "images", "--batch-size", 4, "--device", "cpu", "--json"], study)
    )
    assert (code, other) == (0, 0), told + silent
    assert json.loads(out)["count"] == 18
    assert (nothing, silent) == ("", "")
