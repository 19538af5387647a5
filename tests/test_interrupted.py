"""Long merges that are killed, stopped, run out of disk or lose an input: one message, and the next run goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from launching import PATIENCE, ended, environment, start_all
from networks import LABELS, make_vector, write_recipe

from hf_datavec.models import load
from hf_datavec.pipeline import ledger
from hf_datavec.staging import partial_path
from hf_datavec.vector import TaskVector

# Shards of this size make more than ten files of the network below.
SHARDS = "600KB"


def big_network(folder: Path, seed: int, shard: str = SHARDS) -> Path:
    """A transformer whose tensors are large enough that a method over singular values takes seconds."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768,
        image_size=32, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: row for row, label in enumerate(LABELS)},
    )  # fmt: skip
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder, max_shard_size=shard)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A base in many files, two sites, and the results of two recipes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("big")
    base = big_network(folder / "base", 0)
    for number, site in enumerate("ab", start=1):
        make_vector(base, big_network(folder / f"tuned-{site}", number), folder / f"site-{site}")
    for name, scale in (("whole", 0.4), ("other", 0.3)):
        recipe = recipe_of(folder, name, scale)
        done = subprocess.run(command(recipe), cwd=folder, env=environment(), capture_output=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    assert len(list((folder / "whole").glob("*.safetensors"))) > 10
    return folder


def recipe_of(folder: Path, output: str, scale: float = 0.4, **more: object) -> Path:
    """A recipe whose weights take seconds: every matrix is decomposed."""
    return write_recipe(
        folder / f"{output}.yaml", base="./base", vectors=["./site-a", "./site-b"], output=f"./{output}",
        merge={"method": "tsv", "scale": scale}, **more,
    )  # fmt: skip


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hf_datavec", "merge", str(recipe), "--device", "cpu", *more]


def start(recipe: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(recipe, *more), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload,no-any-return]


def entries(partial: Path) -> list[dict[str, object]]:
    lines = [line for book in sorted(partial.glob(".finished-*.jsonl")) for line in book.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < PATIENCE, "the merge does not get on"
        time.sleep(0.002)


# On a busy machine a merge may be done before its finished parts were seen here.
ATTEMPTS = 5


def stopped(recipe: Path, output: Path, sent: signal.Signals, parts: int = 3) -> str:
    """What a merge said that was sent a signal when some parts were finished."""
    for _ in range(ATTEMPTS):
        process = start(recipe)
        wait_for(lambda: len(entries(partial_path(output))) >= parts, process)
        process.send_signal(sent)
        said, told = process.communicate(timeout=PATIENCE)
        if process.returncode != 0:
            break
        shutil.rmtree(output)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert said == ""
    return told


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")
    }


def same_as(folder: Path, expected: Path) -> bool:
    return contents(folder) == contents(expected) and len(contents(folder)) > 10


def again(recipe: Path) -> str:
    """What a run tells that goes through."""
    done = subprocess.run(command(recipe), env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_merge_that_was_killed_goes_on_where_it_was_and_trusts_no_byte_that_changed(big):
    output, recipe = big / "killed", recipe_of(big, "killed")
    stopped(recipe, output, signal.SIGKILL, parts=4)
    assert not output.exists()
    partial = partial_path(output)
    finished = entries(partial)
    # One of the finished parts does not keep its bytes: the end of the first file, and so of the first part.
    first = sorted(partial.glob("*.safetensors"))[0]
    with open(first, "r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\x01\x02\x03\x04")
    assert f"going on with an interrupted merge: {len(finished) - 1} of " in again(recipe)
    assert same_as(output, big / "whole")
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert not partial.exists()
    load(output)


def test_another_recipe_never_goes_on_with_what_one_left(big):
    output, recipe = big / "changed", recipe_of(big, "changed")
    stopped(recipe, output, signal.SIGKILL)
    assert "going on" not in again(recipe_of(big, "changed", 0.3))
    assert same_as(output, big / "other")


def test_a_large_merge_that_is_asked_to_stop_says_so_once_and_keeps_finished_parts_out_of_sight(big):
    output, recipe = big / "asked", recipe_of(big, "asked")
    told = stopped(recipe, output, signal.SIGTERM)
    assert told.splitlines()[-1].startswith("terminated; nothing half written was left in place")
    assert told.count("terminated") == 1
    assert "Traceback" not in told
    assert not output.exists()
    assert "going on with an interrupted merge: " in again(recipe)
    assert same_as(output, big / "whole")


def test_a_merge_ends_with_one_message_when_an_input_vanishes_or_is_changed(big):
    vector = big / "site-b" / "vector.safetensors"
    content = vector.read_bytes()
    for name, harm, expected in (
        ("gone", vector.unlink, f"error: cannot read '{vector}' any more: No such file or directory\n"),
        (
            "cut",
            lambda: os.truncate(vector, len(content) // 2),
            f"error: '{vector}' was changed while it was being read\n",
        ),
    ):
        output, recipe = big / name, recipe_of(big, name)
        process = start(recipe)
        wait_for(lambda output=output: len(entries(partial_path(output))) >= 2, process)
        harm()
        _, told = process.communicate(timeout=PATIENCE)
        vector.write_bytes(content)
        assert process.returncode == 1, told
        assert expected in told
        assert told.count("error:") == 1
        assert "Traceback" not in told
        assert not output.exists()
        assert "going on" in again(recipe)
        assert same_as(output, big / "whole")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 40 MB of its own, mounted for the test."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with open(path, "wb", buffering=0) as handle:
        while True:
            handle.write(bytes(4096))


def test_a_merge_that_does_not_fit_is_refused_before_its_first_byte(big, small_disk):
    (small_disk / "other").write_bytes(bytes(30_000_000))
    done = subprocess.run(
        command(big / "whole.yaml", "-o", str(small_disk / "fused")), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    needed = sum(path.stat().st_size for path in (big / "whole").glob("*.safetensors")) / 1e6
    said = done.stderr.splitlines()[-2:]
    assert said[0].startswith("error: the merge needs ")
    assert float(said[0].split()[4]) == pytest.approx(needed + 16, abs=1)
    assert said[0].endswith("MB are free")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_disk_that_fills_up_ends_a_merge_with_one_message_and_the_next_run_goes_on(big, small_disk):
    output = small_disk / "fused"
    process = start(big / "whole.yaml", "-o", str(output))
    wait_for(lambda: len(entries(partial_path(output))) >= 3, process)
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "other")
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert told.count("error:") == 1
    assert "No space left on device" in told
    assert "Traceback" not in told
    assert not output.exists()
    (small_disk / "other").unlink()
    done = subprocess.run(
        command(big / "whole.yaml", "-o", str(output)), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "going on with an interrupted merge" in done.stderr
    assert same_as(output, big / "whole")


def test_a_limit_on_the_size_of_files_ends_a_merge_with_one_message_and_leaves_nothing(study):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(study / "recipe.yaml", preexec_fn=limited, cwd=study)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert (
        told.splitlines()[-1]
        == f"error: cannot write '{partial_path(study / 'fused')}/model.safetensors': File too large"
    )
    assert told.count("error:") == 1
    assert not (study / "fused").exists()
    assert not partial_path(study / "fused").exists()


def test_when_one_of_two_processes_is_killed_the_other_says_so_and_one_process_finishes_the_merge(big):
    output, recipe = big / "crew", recipe_of(big, "crew")
    partial = partial_path(output)
    started = start_all(2, ["merge", recipe, "--device", "cpu"], big)
    wait_for(lambda: all((partial / f".finished-{place}.jsonl").exists() for place in (0, 1)), started[0])
    started[1].send_signal(signal.SIGKILL)
    (code, out, told), (killed, _, _) = ended(started)
    assert (code, killed, out) == (1, -signal.SIGKILL, "")
    assert told.count("error:") == 1
    assert "error: another process of this run has ended" in told
    assert "Traceback" not in told
    assert not output.exists()
    assert "going on with an interrupted merge" in again(recipe)
    assert same_as(output, big / "whole")


def test_parts_that_were_made_before_a_wrong_vector_was_known_are_not_gone_on_with(study, run, monkeypatch):
    """A vector is altered by a finite value, the merge dies in its midst, and the site sends the right file again."""
    monkeypatch.setattr(ledger, "WORTH_KEEPING", 0)
    assert run("merge", "recipe.yaml", "-o", "right").code == 0
    file = study / "site-a" / "vector.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[:-4] + b"\x00\x00\x80\x3f")
    real_verify, real_enter, entered, told = TaskVector.verify, ledger.Ledger.enter, [], threading.Event()

    def late(self, **options):
        told.wait(30)
        real_verify(self, **options)

    def enter(self, part, finished):
        real_enter(self, part, finished)
        entered.append(part.number)
        if len(entered) == 3:
            told.set()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(TaskVector, "verify", late)
        patched.setattr(ledger.Ledger, "enter", enter)
        outcome = run("merge", "recipe.yaml", "-o", "fused")
    assert outcome.code == 2
    assert "is not the file its datavec.json describes" in outcome.err
    file.write_bytes(right)
    outcome = run("merge", "recipe.yaml", "-o", "fused")
    assert outcome.code == 0, outcome.err
    assert "going on with an interrupted merge" not in outcome.err
    assert (study / "fused/model.safetensors").read_bytes() == (study / "right/model.safetensors").read_bytes()
