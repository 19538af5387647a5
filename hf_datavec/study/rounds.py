"""Several rounds at equal total epochs: FedAvg, and relays of merges, by one loop over the same pieces.

The fused model of one round is the base of the next. FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, all
sites in every round) is the mean by image counts with the mixture of the sites' statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hf_datavec import recalibrate
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.models import Network
from hf_datavec.recipe import AUTO
from hf_datavec.study.choosing import choose, judge_of
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import slug
from hf_datavec.study.restoring import Restorer
from hf_datavec.study.sections import Combining, Heads, Study

FEDAVG, FEDAVG_MODE = Combining(method="linear", options={"normalize": True}, weights="examples"), "moments"


@dataclass(frozen=True, slots=True)
class Pace:
    """How many epochs a round has, and what comes between rounds."""

    epochs: float | None = None  # without it, the study's epochs are shared out over the rounds
    heads: Heads | None = None  # a round of heads after every round, whose result the next begins with


def pace(study: Study) -> Pace:
    """That of the study's relays."""
    chosen = study.relay
    return Pace(chosen.epochs, study.heads if chosen.heads else None) if chosen else Pace()


def relay(seed: Seed, rounds: int, merge: Combining, mode: str, how: Pace) -> list[Path]:
    """The fused models of each round, made now if they are not kept yet."""
    name = "-".join((slug(merge.name), mode, *_told(rounds, how)))
    share = 1 / rounds if how.epochs is None else how.epochs / seed.place.study.training.epochs
    base, found = seed.base, []
    for number in range(1, rounds + 1):
        fused = seed.folder / "rounds" / name / f"round-{number}"
        if not fused.exists():
            # A probe would throw away what the head has learned in the rounds before.
            settings = seed.settings(share=share, probe=number == 1)
            some = [
                partial(seed.vector, f"{name}/round-{number}/{site}", site, settings, base=base) for site in seed.sites
            ]
            # The sites have trained a first round of all epochs anyway.
            vectors = seed.site_vectors() if number == 1 and share == 1 else [vector() for vector in some]
            seed.write(fuse_and_restore(seed, vectors, merge, mode, base), open_checkpoint(base), fused)
        found.append(fused)
        base = _headed(seed, fused, how.heads) if how.heads and number < rounds else fused
    return found


def _told(rounds: int, how: Pace) -> tuple[str, ...]:
    if how.epochs is None:
        return (str(rounds), *(("heads", kind(how.heads)) if how.heads else ()))
    return ("each", f"{how.epochs:g}", *(("heads", kind(how.heads)) if how.heads else ()))


def with_heads(seed: Seed, heads: Heads, rounds: int = 1) -> Path:
    """The fused model after a last round in which every site fitted the head alone, and heads were merged."""
    merge, mode = heads.merge, heads.restore
    if rounds > 1:
        return _headed(seed, relay(seed, rounds, merge, mode, pace(seed.place.study))[-1], heads)
    name = f"{slug(merge.name)}-{mode}-heads-{kind(heads)}"
    first, second = (seed.folder / "rounds" / name / f"round-{number}" for number in (1, 2))
    if not first.exists():
        network = fuse_and_restore(seed, seed.site_vectors(), merge, mode, seed.base)
        seed.write(network, open_checkpoint(seed.base), first)
    return _merged_heads(seed, f"{name}/round-2", heads, first, second)


def _headed(seed: Seed, fused: Path, heads: Heads) -> Path:
    """The fused model of a round of a relay with the sites' heads, merged."""
    place = fused.with_name(f"{fused.name}-heads-{kind(heads)}")
    return _merged_heads(seed, f"{fused.parent.name}/{place.name}", heads, fused, place)


def begin(seed: Seed) -> None:
    """Make what a seed's networks start from, if it is not the base itself and is not kept yet."""
    if chosen := seed.place.study.start:
        _merged_heads(seed, seed.base.name, Heads(steps=chosen.steps), seed.place.base, seed.base)


def heads_alone(seed: Seed, heads: Heads) -> Path:
    """The control: the base, which nobody trained, with the heads that the sites fitted to it, merged."""
    name = f"heads-alone-{kind(heads)}"
    return _merged_heads(seed, name, heads, seed.place.base, seed.folder / "rounds" / name)


def kind(heads: Heads) -> str:
    """How heads are fitted, as folders tell it."""
    if heads.fit == "steps":
        return str(heads.steps)
    target = repr(heads.target).removesuffix(".0")
    return "least-squares" + (f"-{target}" if heads.target != Heads().target else "")


def _merged_heads(seed: Seed, name: str, heads: Heads, base: Path, place: Path) -> Path:
    if not place.exists():
        closed = heads.fit == "least_squares"
        alone = seed.settings(share=0)
        # In closed form every image counts alike, whatever the loss was.
        balanced = alone.class_balanced and not closed
        steps = 0 if closed else heads.steps
        settings = replace(alone, probe_steps=steps, least_squares=closed, target=heads.target, class_balanced=balanced)
        vectors = [seed.vector(f"{name}/{site}", site, settings, base=base, with_gram=closed) for site in seed.sites]
        # Nothing but the head has moved, so the statistics of the base still fit.
        merge = Combining(method="regmean", weights="examples") if closed else Combining(method="mean")
        network = fuse_and_restore(seed, vectors, merge, "none", base)
        seed.write(network, open_checkpoint(base), place)
    return place


def fuse_and_restore(seed: Seed, vectors: list[Path], merge: Combining, mode: str, base: Path) -> Network:
    """The shared network after one round."""
    plan = seed.plan(vectors, merge, base=base)
    judge = judge_of(seed, plan) if AUTO in (merge.method, merge.scale, mode) else None
    decided = choose(seed, plan, mode, judge)
    plan, mode = decided.plan, decided.mode
    network = seed.merged(plan)
    sites = recalibrate.sharing(plan.base, plan.contributions, device=seed.place.device)
    Restorer(sites, seed.public, seed.place.study.public.count).apply(network, mode)
    return network
