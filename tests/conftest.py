"""Fixtures that several tests share, and a sealed-off environment for all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import leaks
import pytest

# Before any library reads them: no network, no caches outside the test run, no colours, one kind of path.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Tests call the library inside one process that may have multiplied before: see pipeline/device.py.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Several processes share the cores; threads that spin while they wait would only hold each other up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(leaks):
        config.pluginmanager.register(leaks, "leaks")


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf-home"))
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_HOME"]) / "datasets"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """Run `hf-datavec` in this process, in `tmp_path` as working folder."""
    from hf_datavec.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        seen = capsys.readouterr()
        return Outcome(code, leaks.hear(seen.out), leaks.hear(seen.err))

    return call


@pytest.fixture(scope="session")
def study_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small study: base, two tuned sites, their vectors, images; copied for each test that wants one."""
    from networks import make_images, make_network, make_vector, tune

    folder = tmp_path_factory.mktemp("study")
    base = make_network("test_resnet", folder / "base")
    for number, site in enumerate(("site-a", "site-b"), start=1):
        tune(base, folder / f"tuned-{site}", seed=number)
        make_vector(base, folder / f"tuned-{site}", folder / site)
    make_images(folder / "images")
    return folder


@pytest.fixture
def study(study_template: Path, tmp_path: Path) -> Path:
    """A copy of the small study in `tmp_path`, with a recipe that sums its two vectors into `fused`."""
    from networks import write_recipe

    shutil.copytree(study_template, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], output="./fused")
    return tmp_path
