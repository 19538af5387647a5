"""Vectors held against their manifests, beside other work or by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hf_datavec import processes
from hf_datavec.plan import Plan
from hf_datavec.vector import TaskVector


class Verification:
    """Vectors that are to be verified, are being verified, or have been."""

    def __init__(self, vectors: Sequence[TaskVector], pool: ThreadPoolExecutor) -> None:
        self.vectors = tuple(vectors)
        self._pool = pool
        self._asked: tuple[Future[None], ...] | None = None

    def begin(self) -> None:
        """Read all vectors in a thread of their own, if nobody has begun."""
        if self._asked is None:
            # One thread fills what those that combine leave free while they wait for each other.
            self._asked = tuple(self._pool.submit(vector.verify, threads=1) for vector in self.vectors)

    def by_hashes(self, hashes: Sequence[Mapping[str, str]]) -> None:
        """Verify vectors by the hashes of their tensors, which somebody has taken. Raises: InputError when one
        differs."""
        done = Future[None]()
        self._asked = (done,)
        try:
            for vector, found in zip(self.vectors, hashes, strict=True):
                vector.verify_by(found)
        except Exception as error:
            done.set_exception(error)
            raise
        done.set_result(None)

    @property
    def passed(self) -> bool:
        """Whether all vectors have been found to be what their manifests say."""
        return self._asked is not None and all(one.done() and one.exception() is None for one in self._asked)

    def wait(self) -> None:
        """Wait until all are verified. Raises: InputError when one differs."""
        self.begin()
        for one in self._asked or ():
            one.result()


@contextlib.contextmanager
def verifying(plan: Plan) -> Iterator[Verification]:
    """Hold every vector against its manifest at the latest when the block ends with an error or asks for it.

    Several processes do it before the block instead, each taking a share.

    Raises: InputError when a vector differs, also when the block has failed, since that may be why.
    """
    vectors = [one.source for one in plan.contributions if isinstance(one.source, TaskVector)]
    if processes.count() > 1:
        processes.together(lambda: _verify(vectors[processes.index() :: processes.count()]))
        vectors = []
    with ThreadPoolExecutor(1, "verify") as pool:
        verification = Verification(vectors, pool)
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
