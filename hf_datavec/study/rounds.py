"""Several rounds at equal total epochs: FedAvg, and relays of merges, by one loop over the same pieces.

The fused model of one round is the base of the next. FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, all
sites in every round) is the mean by image counts with the mixture of the sites' statistics.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hf_datavec import recalibrate
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.models import Network
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import slug
from hf_datavec.study.restoring import Restorer
from hf_datavec.study.sections import Combining, Heads

FEDAVG, FEDAVG_MODE = Combining(method="linear", options={"normalize": True}, weights="examples"), "moments"


def relay(seed: Seed, rounds: int, merge: Combining, mode: str, *, epochs: float | None = None) -> list[Path]:
    """The fused models of each round, made now if they are not kept yet.

    Every round has `epochs`, or without them the same share of the study's.
    """
    name = f"{slug(merge.name)}-{mode}-{rounds}" if epochs is None else f"{slug(merge.name)}-{mode}-each-{epochs:g}"
    share = 1 / rounds if epochs is None else epochs / seed.place.study.training.epochs
    base, found = seed.place.base, []
    for number in range(1, rounds + 1):
        fused = seed.folder / "rounds" / name / f"round-{number}"
        if not fused.exists():
            # A probe would throw away what the head has learned in the rounds before.
            settings = seed.settings(share=share, probe=number == 1)
            if number == 1 and share == 1:  # what the sites have trained anyway
                vectors = seed.site_vectors()
            else:
                vectors = [
                    seed.vector(f"{name}/round-{number}/{site}", site, settings, base=base) for site in seed.sites
                ]
            network = fuse_and_restore(seed, vectors, merge, mode, base)
            seed.write(network, open_checkpoint(base), fused)
        base = fused
        found.append(fused)
    return found


def with_heads(seed: Seed, heads: Heads, rounds: int = 1) -> Path:
    """The fused model after a last round in which every site fitted the head alone, and heads were merged."""
    merge, mode = heads.merge, heads.restore
    name = f"{slug(merge.name)}-{mode}-heads-{kind(heads)}"
    if rounds > 1:
        again = seed.place.study.relay
        fused = relay(seed, rounds, merge, mode, epochs=again.epochs if again else None)[-1]
        place = fused.with_name(f"{fused.name}-heads-{kind(heads)}")
        return _merged_heads(seed, f"{name}-{fused.parent.name}-{fused.name}", heads, fused, place)
    first, second = (seed.folder / "rounds" / name / f"round-{number}" for number in (1, 2))
    if not first.exists():
        network = fuse_and_restore(seed, seed.site_vectors(), merge, mode, seed.place.base)
        seed.write(network, open_checkpoint(seed.place.base), first)
    return _merged_heads(seed, f"{name}/round-2", heads, first, second)


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
    network = seed.merged(plan)
    sites = recalibrate.sharing(plan.base, plan.contributions, device=seed.place.device)
    Restorer(sites, seed.public, seed.place.study.public.count).apply(network, mode)
    return network
