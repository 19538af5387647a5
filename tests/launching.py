"""Several real processes of one run, started as any launcher starts them: by telling each its place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hf_datavec

PATIENCE = 200


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that must find this package and use one thread, as torchrun has it: convolutions
    round by the number of threads. Processes meet on loopback, which a machine without a network has, too; torch's
    warning that it has no name there is no message of ours."""
    package = str(Path(hf_datavec.__file__).parents[1])
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    quiet = {"GLOO_SOCKET_IFNAME": loopback, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **quiet, **more}


def start_all(processes: int, arguments: Sequence[object], folder: Path) -> list[subprocess.Popen[str]]:
    """`hf-datavec` with some arguments as several processes on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, "-m", "hf_datavec", *map(str, arguments)]
    started = []
    for place in range(processes):
        told = {"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": str(processes)}
        own = environment(**told, LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )  # fmt: skip
    return started


def ended(started: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process; none is left behind."""
    try:
        told = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, told, strict=True)]


def kill_after_an_epoch(arguments: Sequence[object], folder: Path, output: str) -> None:
    """Train by `hf-datavec` with some arguments, and kill it once the first checkpoint of its output is complete."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_datavec", *map(str, arguments)], cwd=folder, stderr=subprocess.PIPE
    )
    checkpoints = folder / f".{output}.partial" / "checkpoints"
    deadline = time.monotonic() + PATIENCE
    while not any(map(is_json, checkpoints.glob("checkpoint-*/trainer_state.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (folder / output).exists()


def is_json(path: Path) -> bool:
    """Whether a file that another process writes has been written to its end."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def assert_goes_on(run: Callable[..., Any], folder: Path, options: Sequence[str]) -> None:
    """Train `tuned` on, and hold it against `whole`, which nothing interrupts."""
    again = run("finetune", "base", "images", "-o", "tuned", *options)
    assert again.code == 0, again.err
    assert "going on with the unfinished training of 'tuned'\n" in again.err
    assert run("finetune", "base", "images", "-o", "whole", *options).code == 0
    resumed, whole = (load_file(folder / name / "model.safetensors") for name in ("tuned", "whole"))
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-4, atol=1e-5)
