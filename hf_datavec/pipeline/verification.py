"""Vectors held against their manifests beside other work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hf_datavec import processes
from hf_datavec.plan import Plan
from hf_datavec.vector import TaskVector


@dataclass(frozen=True, slots=True)
class Verification:
    """Vectors that are being verified, or have been."""

    asked: tuple[Future[None], ...]

    @property
    def passed(self) -> bool:
        """Whether all vectors have been found to be what their manifests say."""
        return all(one.done() and one.exception() is None for one in self.asked)

    def wait(self) -> None:
        """Wait until all are verified. Raises: InputError when one differs."""
        for one in self.asked:
            one.result()


@contextlib.contextmanager
def verifying(plan: Plan) -> Iterator[Verification]:
    """Hold every vector against its manifest while the block runs.

    Several processes do it before the block instead, each taking a share.

    Raises: InputError when a vector differs, also when the block has failed, since that may be why.
    """
    vectors = [one.source for one in plan.contributions if isinstance(one.source, TaskVector)]
    if processes.count() > 1:
        processes.together(lambda: _verify(vectors[processes.index() :: processes.count()]))
        vectors = []
    with ThreadPoolExecutor(1, "verify") as pool:
        # One thread fills what those that combine leave free while they wait for each other.
        verification = Verification(tuple(pool.submit(vector.verify, threads=1) for vector in vectors))
        try:
            yield verification
        except Exception:
            verification.wait()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _verify(vectors: Sequence[TaskVector]) -> None:
    for vector in vectors:
        vector.verify()
