"""Random numbers that belong to a coordinate of a vector, whatever is drawn before them or beside them."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOP = 2**31  # the numbers drawn are whole, from 0 to below this


class Draws:
    """The random numbers of one vector's tensor from a coordinate on, by the seed, the vector's content and the tensor.

    Source: PCG64 DXSM (O'Neill 2014, HMC-CS-2014-0905), whose state can be moved to any place in no time.
    """

    def __init__(self, seed: int, digest: str, key: str, start: int = 0) -> None:
        from numpy.random import PCG64DXSM

        hashed = hashlib.sha256(f"{seed}\0{digest}\0{key}".encode()).digest()
        self._bits = PCG64DXSM(int.from_bytes(hashed[:16], "little"))
        self._start = start

    def keep(self, values: Tensor, chance: float) -> Tensor:
        """The values (d,) whose number is below a chance, zero for the others; as by `uniform`, but faster."""
        import torch

        # All bits where the number is below, none where it is not: on values as bits this is all that dropping takes.
        mask = self._numbers(values.shape[0]).sub_(math.ceil(chance * TOP)).bitwise_right_shift_(31)
        bits = torch.int32 if values.dtype == torch.float32 else torch.int64
        # Drawn on the CPU, so that every device sees the same numbers.
        return mask.to(values.device, bits).bitwise_and_(values.view(bits)).view(values.dtype)

    def uniform(self, count: int) -> Tensor:
        """`count` numbers from 0 to 1, without 1, in float64."""
        return self._numbers(count).double() / TOP

    def normal(self, count: int) -> Tensor:
        """`count` numbers of a normal distribution, in float64; they are not those of single coordinates."""
        import torch

        torch_seed = int.from_bytes(self._bits.random_raw(1).tobytes(), "little", signed=True)
        return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(torch_seed))

    def _numbers(self, count: int) -> Tensor:
        import numpy
        import torch

        # Two numbers of 31 bits come from each of the generator's steps.
        before = self._start % 2
        self._bits.advance(self._start // 2)
        self._start = 0
        raw = self._bits.random_raw((before + count + 1) // 2).view(numpy.int32)
        return torch.from_numpy(raw[before : before + count]).bitwise_and_(TOP - 1)
