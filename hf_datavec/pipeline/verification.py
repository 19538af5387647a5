"""Vectors held against their manifests beside other work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from hf_datavec import processes
from hf_datavec.plan import Plan
from hf_datavec.vector import TaskVector


@contextlib.contextmanager
def verifying(plan: Plan) -> Iterator[Callable[[], None]]:
    """Hold every vector against its manifest while the block runs; yields what waits until all are.

    Several processes do it before the block instead, each taking a share.

    Raises: InputError when a vector differs, also when the block has failed, since that may be why.
    """
    vectors = [one.source for one in plan.contributions if isinstance(one.source, TaskVector)]
    if processes.count() > 1:
        processes.together(lambda: _verify(vectors[processes.index() :: processes.count()]))
        vectors = []
    with ThreadPoolExecutor(1, "verify") as pool:
        # One thread fills what those that combine leave free while they wait for each other.
        asked = [pool.submit(vector.verify, threads=1) for vector in vectors]

        def verified() -> None:
            for one in asked:
                one.result()

        try:
            yield verified
        except Exception:
            verified()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _verify(vectors: Sequence[TaskVector]) -> None:
    for vector in vectors:
        vector.verify()
