"""Random numbers that belong to a coordinate of a vector, whatever is drawn before them or beside them."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Numbers = NDArray[np.int32]

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

        bits = torch.int32 if values.dtype == torch.float32 else torch.int64
        # Drawn on the CPU, so that every device sees the same numbers.
        mask = torch.from_numpy(self._mask(values.shape[0], chance)).to(values.device, bits)
        return mask.bitwise_and_(values.view(bits)).view(values.dtype)

    def keep_of(self, values: NDArray[np.float32], chance: float) -> NDArray[np.float32]:
        """The same of a numpy row (d,)."""
        import numpy as np

        mask = self._mask(len(values), chance)
        np.bitwise_and(mask, values.view(np.int32), out=mask)
        return mask.view(np.float32)

    def uniform(self, count: int) -> Tensor:
        """`count` numbers from 0 to 1, without 1, in float64."""
        import torch

        return torch.from_numpy(self._numbers(count)).double() / TOP

    def normal(self, count: int) -> Tensor:
        """`count` numbers of a normal distribution, in float64; they are not those of single coordinates."""
        import torch

        torch_seed = int.from_bytes(self._bits.random_raw(1).tobytes(), "little", signed=True)
        return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(torch_seed))

    def _mask(self, count: int, chance: float) -> Numbers:
        """All bits where a number is below a chance, none where it is not: all that dropping values as bits takes."""
        import numpy as np

        found = self._numbers(count)
        # A chance of one is one number too many for 32 bits: it wraps around, and so does every difference to it.
        np.subtract(found, np.int64(math.ceil(chance * TOP)).astype(np.int32), out=found)
        np.right_shift(found, 31, out=found)
        return found

    def _numbers(self, count: int) -> Numbers:
        import numpy as np

        # Two numbers of 31 bits come from each of the generator's steps.
        before = self._start % 2
        self._bits.advance(self._start // 2)
        self._start = 0
        found: Numbers = self._bits.random_raw((before + count + 1) // 2).view(np.int32)[before : before + count]
        np.bitwise_and(found, TOP - 1, out=found)
        return found
