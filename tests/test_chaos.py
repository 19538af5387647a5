"""Pushes and merges with random faults and kills: every repo is as before or complete, every retry ends right.

HF_DATAVEC_CHAOS_ROUNDS rounds (`make chaos`: 200) from HF_DATAVEC_CHAOS_SEED. What happens in a round follows from the
seed and its number, so `-k "[17]"` with the same seed and as many rounds repeats round 17, up to the moment of a kill.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hub_people import SITES, TOKENS, Person, api, consortium, online
from hubserver import Fault, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff
from networks import make_network, make_vector, tune, write_recipe

from hf_datavec.hub import sendable
from hf_datavec.staging import partial_path

ROUNDS = int(os.environ.get("HF_DATAVEC_CHAOS_ROUNDS", "20"))
SEED = int(os.environ.get("HF_DATAVEC_CHAOS_SEED", "0"))
TARGET = "consortium/target"
MOVING = f"consortium/{SITES[0]}"  # the vector repo whose branch may move
NOTE = "note.txt"  # what somebody else commits to the target meanwhile
SCALES = (1.0, 0.5)
# A killed process costs some seconds of imports, a fault in this process a fraction of one.
PLANS = (*["push, fault"] * 9, *["push, kill"] * 3, *["merge, fault"] * 5, *["merge, kill"] * 2, "merge, moved")

Digests = dict[str, str]

USUAL: dict[str, int] = {}  # how many requests a push and a merge make
ENDS: list[str] = []  # how each round ended before it was run again


@dataclass(repr=False)
class World:
    """A Hub with a base and vectors, and what pushes and merges of them give when nothing goes wrong."""

    folder: Path
    server: HubServer
    vectors: tuple[Path, Path]
    commits: tuple[str, str] = ("", "")
    merged: dict[tuple[float, str], Digests] = field(default_factory=dict)

    def reset(self, before: Path, chance: random.Random) -> Digests | None:
        """The target repository anew: missing, or private with the files of a folder; returns its tree."""
        self.server.faults.clear()
        self.server.log.clear()
        self.server.set_branch(MOVING, "main", self.commits[0])
        found = self.server.hub.repositories.pop(("models", TARGET), None)
        if found:
            shutil.rmtree(found.folder)
        if chance.random() < 0.4:
            return None
        client = api(self.server, "coordinator")
        client.create_repo(TARGET, private=True)
        client.upload_folder(repo_id=TARGET, folder_path=before)
        self.server.log.clear()
        return self.tree()

    def tree(self) -> Digests | None:
        """What the main branch of the target holds, None when there is no such repository."""
        found = self.server.hub.repositories.get(("models", TARGET))
        if found is None:
            return None
        assert found.private, "a repository of the consortium is open to all"
        assert set(found.refs) == {"refs/heads/main"}
        files = found.commits[found.refs["refs/heads/main"]].files
        for entry in files.values():
            assert digest(found.blob(entry.sha256)) == entry.sha256, f"{entry.path} is damaged on the Hub"
        return {path: entry.sha256 for path, entry in files.items()}

    def note(self) -> None:
        """Somebody else's commit on the target's branch, if there is one yet."""
        found = self.server.hub.repositories.get(("models", TARGET))
        if found:
            head = found.commits[found.refs["refs/heads/main"]]
            files = {**head.files, NOTE: found.add_blob(NOTE, b"mine")}
            self.server.set_branch(TARGET, "main", found.record(files, head.id, "hospital-a", "A note").id)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> Digests:
    return {path.name: digest(path) for path in sendable(folder)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    base = make_network("test_resnet", folder / "base")
    for seed, site in enumerate(SITES, start=1):
        make_vector(base, tune(base, folder / f"tuned-{seed}", seed=seed), folder / site)
    with consortium(folder / "hub") as server, online():
        client = api(server, "coordinator")
        places = {"consortium/base": [base], MOVING: [folder / SITES[0], folder / SITES[2]],
                  f"consortium/{SITES[1]}": [folder / SITES[1]]}  # fmt: skip
        made = {}
        for repo, folders in places.items():
            client.create_repo(repo, private=True)
            made[repo] = [str(client.upload_folder(repo_id=repo, folder_path=one).oid) for one in folders]
        first, second = made[MOVING]
        yield World(folder, server, (folder / SITES[0], folder / SITES[1]), (first, second))


@pytest.fixture(autouse=True)
def _coordinator(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the coordinator's machine, with an empty cache and a client that does not wait for long."""
    monkeypatch.setenv("HF_TOKEN", TOKENS["coordinator"])
    template = f"{world.server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {"ENDPOINT": world.server.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in {**settings, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.05)
    with online():
        yield


@dataclass(frozen=True)
class Operation:
    """A command, what the target's branch held before it, and every tree that may be there when it is done."""

    command: tuple[str, ...]
    before: Digests | None
    complete: tuple[Digests, ...]
    output: Path | None = None


def push(world: World, *, chance: random.Random) -> Operation:
    """A push of a vector to a repository that is missing, or holds another vector."""
    new, old = chance.sample(world.vectors, 2)
    before = world.reset(old, chance)
    return Operation(("push", str(new), TARGET), before, (digests(new),))


def merge(world: World, *, chance: random.Random, folder: Path, run: Callable) -> Operation:
    """A merge of vectors on the Hub that pushes its result to where nothing is, or another result."""
    scale, other = chance.sample(SCALES, 2)
    complete = tuple(whole_merge(world, scale, commit, run) for commit in world.commits)
    before = world.reset(world.folder / f"fused-{other}-{world.commits[0]}", chance)
    recipe(folder, scale)
    command = ("merge", "recipe.yaml", "--device", "cpu")
    return Operation(command, before, complete, folder / "fused")


def recipe(folder: Path, scale: float) -> None:
    vectors = [MOVING, f"consortium/{SITES[1]}"]
    write_recipe(
        folder / "recipe.yaml", base="consortium/base", vectors=vectors, output="./fused",
        merge={"method": "sum", "scale": scale}, push={"repo": TARGET},
    )  # fmt: skip


def whole_merge(world: World, scale: float, commit: str, run: Callable) -> Digests:
    """What a merge gives from a commit of the moving branch; both scales are made, so that each has a predecessor."""
    for one in SCALES:
        if (one, commit) not in world.merged:
            world.server.set_branch(MOVING, "main", commit)
            recipe(Path.cwd(), one)
            outcome = run("merge", "recipe.yaml", "--device", "cpu", "--no-push")
            assert outcome.code == 0, outcome.err
            place = world.folder / f"fused-{one}-{commit}"
            shutil.move(Path.cwd() / "fused", place)
            shutil.rmtree(Path.cwd() / "cache")
            world.merged[one, commit] = digests(place)
    return world.merged[scale, commit]


def some_fault(world: World, chance: random.Random, requests: int) -> Fault:
    """Any fault from any request of an operation on, once or for good."""
    skip, times = chance.randrange(requests), chance.choice([1, 1, 2, None])
    kind = chance.choice(["status"] * 7 + ["drop"] * 3 + ["slow", "corrupt", "corrupt", "note"])
    if kind == "note":
        return Fault("", "call", skip=skip, action=world.note)
    if kind == "slow":
        return Fault("", "slow", skip=skip, seconds=chance.uniform(0, 0.3))
    return Fault(
        "", kind, skip=skip, times=times, status=chance.choice([401, 403, 404, 409, 412, 429, 500]), retry_after=0,
        after=chance.choice([0, chance.randrange(400), chance.randrange(100_000)]),
        side=chance.choice([None, "request", "answer"]),
    )  # fmt: skip


def killed(world: World, operation: Operation, chance: random.Random) -> int:
    """Run the command as a process and kill it at, or a moment after, one of its requests; returns its exit code."""
    folder, requests = Path.cwd(), USUAL[operation.command[0]]
    person = Person("coordinator", folder, world.server)
    pause = chance.choice([0.0, chance.uniform(0, 1.0 if operation.output else 0.05)])
    met = threading.Event()

    def strike() -> None:
        met.set()
        if not pause:
            process.kill()

    world.server.faults.append(Fault("", "call", skip=chance.randrange(requests), action=strike))
    # The same cache as this process has, in which the command is run again.
    process = person.start(*operation.command, HF_HUB_CACHE=str(folder / "cache"))
    while process.poll() is None and not met.wait(0.01):
        pass
    time.sleep(pause)
    process.kill()
    said = process.communicate()
    assert "Traceback" not in said[1], said[1]
    time.sleep(0.05)  # what reached the server before is still done there
    return process.returncode


def check(operation: Operation, world: World, *, done: bool) -> None:
    """Raise unless the branch and the output are as before or complete; complete if the command said so."""
    tree = world.tree()
    files = {path: value for path, value in (tree or {}).items() if path not in (NOTE, ".gitattributes")}
    before = {path: value for path, value in (operation.before or {}).items() if path != ".gitattributes"}
    allowed = [*operation.complete, *([] if done else [before])]
    assert files in allowed, f"the branch holds {sorted(files)}, neither as before nor complete"
    if operation.output and (done or operation.output.exists()):
        assert digests(operation.output) in operation.complete, "the output is neither absent nor complete"
    if operation.output and done:
        assert digests(operation.output) == files
        assert not partial_path(operation.output).exists()


def count_requests(kind: str, operation: Operation, world: World, run: Callable) -> None:
    """Run the operation without any trouble once, and note how many requests it makes."""
    outcome = run(*operation.command)
    assert outcome.code == 0, outcome.err
    check(operation, world, done=True)
    USUAL[kind] = len(world.server.log)
    shutil.rmtree(operation.output or Path.cwd() / "nothing", ignore_errors=True)
    shutil.rmtree(Path.cwd() / "cache", ignore_errors=True)


def troubled(trouble: str, world: World, operation: Operation, chance: random.Random, run: Callable) -> int:
    """Run the operation in this process, with one or two faults or a vector's branch that moves; the exit code."""
    requests = USUAL[operation.command[0]]
    if trouble == "moved":
        move = partial(world.server.set_branch, MOVING, "main", world.commits[1])
        world.server.faults.append(Fault("", "call", skip=chance.randrange(requests), action=move))
    else:
        world.server.faults += [some_fault(world, chance, requests) for _ in range(chance.choice([1, 1, 2]))]
    outcome = run(*operation.command)
    assert outcome.code in (0, 1, 2), outcome.err
    assert (outcome.code != 0) == ("error: " in outcome.err), outcome.err
    return outcome.code


@pytest.mark.parametrize("number", range(ROUNDS))
def test_after_a_fault_or_a_kill_all_is_as_before_or_complete_and_a_retry_ends_right(number, world, tmp_path, run):
    chance = random.Random(f"{SEED}:{number}")
    kind, _, trouble = PLANS[number % len(PLANS)].partition(", ")
    begin = partial(push, world) if kind == "push" else partial(merge, world, folder=tmp_path, run=run)
    if kind not in USUAL:
        count_requests(kind, begin(chance=random.Random(0)), world, run)
    operation = begin(chance=chance)
    code = killed(world, operation, chance) if trouble == "kill" else troubled(trouble, world, operation, chance, run)
    told = f"seed {SEED}, round {number}: {kind}, {trouble}, exit code {code}, {world.server.faults}"
    print(told)
    check(operation, world, done=code == 0)
    moved = world.tree() != operation.before
    end = "done" if code == 0 else "killed" if code < 0 else "failed"
    ENDS.append(f"{kind} {end}, branch {'moved' if moved else 'as before'}")
    noted = NOTE in (world.tree() or {})
    world.server.faults.clear()
    if code != 0:
        again = run(*operation.command)
        print(told)  # the command took away what was captured before
        assert again.code == 0, again.err
        check(operation, world, done=True)
    assert noted <= (NOTE in (world.tree() or {})), "somebody else's commit was lost"


def test_the_rounds_were_troubled_enough_to_show_something(capsys):
    if len(ENDS) < 20:
        pytest.skip("too few rounds to tell")
    if ROUNDS > 20:
        with capsys.disabled():
            counts = dict(sorted(Counter(ENDS).items()))
            print(f"\nseed {SEED}, {len(ENDS)} rounds before they were run again: {counts}")
    stopped = [end for end in ENDS if "done" not in end]
    assert len(stopped) >= len(ENDS) // 3
    assert {end.split()[0] for end in stopped} == {"push", "merge"}
