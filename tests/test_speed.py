"""What a command may take: libraries that it starts, and memory beyond the files that it maps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import make_network, make_vector, save_with, tune, write_recipe

from hf_datavec.methods import all_methods

FRAMEWORKS = ("transformers", "timm", "datasets", "torchvision", "accelerate")
# Prints the large libraries that a command has imported by its end.
WATCHED = """
import sys
from hf_datavec.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print([name for name in ("torch", *{frameworks}) if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    base = make_network("resnet", folder / "base")
    for seed in range(3):
        tune(base, folder / f"tuned-{seed}", seed=seed)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}")
    vectors = ["./site-0", "./site-1", {"model": "./tuned-2"}]
    for method in ("mean", "ties", "dare_ties", "median", "breadcrumbs", "krum"):
        sites = [*vectors, "./site-2", {"vector": "./site-1", "name": "again"}]
        write_recipe(folder / f"{method}.yaml", base="./base", vectors=sites, merge={"method": method})
    return folder


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (["--help"], []),
        (["methods"], []),
        (["schema"], []),
        (["plan", "mean.yaml"], []),
        (["diff", "base", "tuned-0", "-o", "vector"], []),
        (["merge", "mean.yaml", "-o", "fused-mean"], []),
        (["merge", "ties.yaml", "-o", "fused-ties"], []),
        (["merge", "dare_ties.yaml", "-o", "fused-dare_ties"], []),
        (["merge", "median.yaml", "-o", "fused-median"], []),
        (["merge", "breadcrumbs.yaml", "-o", "fused-breadcrumbs"], ["torch"]),
        (["merge", "krum.yaml", "-o", "fused-krum"], ["torch"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value and value[0] != "torch" else None,
)
def test_a_command_starts_no_library_that_it_does_not_need(command, allowed, study):
    program = WATCHED.format(frameworks=FRAMEWORKS)
    done = subprocess.run([sys.executable, "-c", program, *command], cwd=study, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().split("\n")[-1] == str(allowed)


def peak(command: list[str], folder: Path) -> int:
    """The largest memory of a process that is not file pages, in bytes."""
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL)
    found = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        found = max([found, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.003)
    assert process.wait() == 0
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
def test_a_merge_takes_little_memory_beyond_its_files_however_many_vectors_there_are(tmp_path):
    large = torch.zeros(2048, 4096)  # 34 MB
    base = make_network("vit", tmp_path / "small")
    base = save_with(base, tmp_path / "base", {"vit.large.weight": large, "classifier.weight": torch.zeros(3, 16)})
    random = torch.Generator().manual_seed(0)
    for site in range(8):
        moved = {"vit.large.weight": torch.randn(large.shape, generator=random), "classifier.weight": torch.ones(3, 16)}
        make_vector(base, save_with(base, tmp_path / "tuned", moved), tmp_path / f"site-{site}")
    alone = {library: peak(["-c", f"import {library}"], tmp_path) for library in ("numpy", "torch")}
    peaks = {}
    for method, count in (("mean", 2), ("mean", 8), ("ties", 8), ("median", 8), ("breadcrumbs", 8)):
        recipe = {"base": "./base", "vectors": [f"./site-{n}" for n in range(count)], "merge": {"method": method}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        command = ["-m", "hf_datavec", "merge", "recipe.yaml", "-o", f"fused-{method}-{count}"]
        peaks[method, count] = peak(command, tmp_path) - alone["torch" if method == "breadcrumbs" else "numpy"]
    # The inputs are 306 MB; what remains is other libraries, and pieces of a few megabytes.
    by_torch = peaks.pop(("breadcrumbs", 8))
    assert max(peaks.values()) < 80 * MEGABYTE, peaks
    # It measures each tensor before it combines it, so that of the result a tensor is held as a whole.
    assert by_torch < large.nbytes + 80 * MEGABYTE, by_torch
    assert peaks["mean", 8] - peaks["mean", 2] < large.nbytes, peaks


# Every method on one tensor in turn, and what it takes of memory that is not file pages beside what its step allows.
BOUNDS = """
import json, sys, threading
from pathlib import Path
import torch
from hf_datavec import fuse, survey
from hf_datavec.pipeline.prepare import prepare

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def run(plan, name, peak):
    measured, done = survey.take(plan), threading.Event()
    def watch():
        while not done.wait(0.0005):
            peak.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    before = anonymous()
    for _ in fuse.pieces(plan, only={name}, survey=measured):
        pass
    done.set()
    watcher.join()
    return max(peak, default=before) - before

torch.linalg.svd(torch.eye(64))
for path in sys.argv[2:]:
    plan = prepare(Path(path)).plan
    step = next(step for step in plan.steps if step.name == sys.argv[1])
    run(plan, step.name, [])  # what libraries start
    print(json.dumps([path, run(plan, step.name, []), plan.bound(step)]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
def test_no_method_takes_more_memory_than_the_plan_says(tmp_path):
    base = make_network("vit", tmp_path / "small")
    base = save_with(
        base, tmp_path / "base", {"vit.large.weight": torch.zeros(384, 1024), "classifier.weight": torch.zeros(3, 16)}
    )
    random = torch.Generator().manual_seed(0)
    for site in range(5):
        moved = {"vit.large.weight": torch.randn(384, 1024, generator=random), "classifier.weight": torch.ones(3, 16)}
        make_vector(base, save_with(base, tmp_path / "tuned", moved), tmp_path / f"site-{site}")
    paths = []
    for name, method in all_methods().items():
        if method.from_sites or method.learned or method.needs_counts:
            continue
        count = 5 if method.refuse(5, {}) is None else 2
        merge = {"method": name, "options": {"steps": 2} if name == "wudi" else {}}
        recipe = {"base": "./base", "vectors": [f"./site-{n}" for n in range(count)], "merge": merge}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        paths.append(f"{name}.yaml")
    # What is freed is given back at once, so that nothing counts but what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", BOUNDS, "vit.large.weight", *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths) > 25
    beyond = [one for one in found if one[1] > one[2] + 4 * MEGABYTE]
    assert not beyond, beyond
    # The account sees the tensors: a method of whole ones takes them several times.
    assert dict(one[:2] for one in found)["wudi.yaml"] > 5 * 384 * 1024 * 8
