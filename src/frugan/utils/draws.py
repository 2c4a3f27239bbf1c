"""Randomness that does not depend on how it is asked for.

Every draw is a row of an endless array that (seed, purpose) names. A row belongs to one sample, so it makes no difference
whether a batch is drawn whole, in micro-batches or by several processes, and resuming needs no saved generator state:
the number of images seen says which rows come next.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 1 << 20  # numbers of a permutation that are kept: 8 MiB
ROUNDS = 6  # of the Feistel network
BLOCK = 64  # rows drawn at once: a generator's stream cannot be entered in the middle
MASK_BLOCK = 4  # the same for dropout masks, whose rows are large: a whole number of 64-bit words, whatever the shape


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed that belongs to ``seed`` and ``purpose``."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def hashed(seed: int, first: int | Tensor, count: int, words: int, device: torch.device) -> Tensor:
    """Rows ``first`` to ``first + count`` of random bits: int64 ``[count, words]`` on ``device``.

    Each number is a hash of its place, by SplitMix64 (Steele et al. 2014), so that an accelerator makes all of them at once; a
    generator would have to be set to each row in turn.
    """
    rows = (torch.arange(count, device=device) + first).mul_(_constant(0xD1342543DE82EF95, device)).add_(_constant(seed, device))
    bits = rows[:, None] + torch.arange(1, words + 1, device=device).mul_(_constant(0x9E3779B97F4A7C15, device))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        bits ^= _shifted(bits, shift).bitwise_and_((1 << (64 - shift)) - 1)  # int64 brings its sign along
        if factor is not None:
            bits *= _constant(factor, device)
    return bits


def quarters(bits: Tensor) -> Tensor:
    """Four numbers of 16 bits, with their sign, for each of ``bits``, int64 ``[n, words]``: ``[n, 4 * words]``."""
    if bits.device.type != "xla":
        return bits.view(torch.int16)
    # A view of another type would cut XLA's program in two.
    pieces = torch.stack([_shifted(bits, shift) & 0xFFFF for shift in (0, 16, 32, 48)], 2)
    return (((pieces + 0x8000) & 0xFFFF) - 0x8000).flatten(1)


def _shifted(bits: Tensor, by: int) -> Tensor:
    # XLA divides instead, and rounds what is negative towards zero: there, nothing may be left to round.
    return (bits & -(1 << by) if bits.device.type == "xla" else bits) >> by


def _constant(number: int, device: torch.device) -> int | Tensor:
    """A factor or summand on ``device``; XLA would round a large one that comes from the host to double precision."""
    return torch.tensor(_signed(number)).to(device) if device.type == "xla" else _signed(number)


def _signed(number: int) -> int:
    """64 bits as int64 has them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


class Order:
    """A random permutation of ``n`` numbers that can be read anywhere.

    Up to `KEPT` numbers it is drawn whole. Above that each number is computed when it is asked for, by a Feistel network on the
    next power of four and walking on from what lies outside (Black and Rogaway 2002), so that memory does not grow with ``n``.
    """

    def __init__(self, seed: int, n: int) -> None:
        self.n = n
        self._whole: Tensor | None = None
        if n <= KEPT:
            self._whole = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            return
        self._half = np.uint64(((n - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(derive(seed, i)) for i in range(ROUNDS)]

    def read(self, first: int, count: int) -> Tensor:
        """The numbers at ``first`` to ``first + count``: int64 ``[count]``."""
        if self._whole is not None:
            return self._whole[first : first + count]
        numbers = self._permuted(np.arange(first, first + count, dtype=np.uint64))
        while len(outside := np.flatnonzero(numbers >= self.n)):
            numbers[outside] = self._permuted(numbers[outside])
        return torch.from_numpy(numbers.astype(np.int64))

    def _permuted(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = x >> self._half, x & mask
        with np.errstate(over="ignore"):
            for key in self._keys:
                mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
                mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << self._half) | right


class Draws:
    """The endless arrays of one seed.

    Normal and uniform rows are drawn on the CPU, so that a seed gives the same images on every device; dropout masks are
    large and drawn on ``device``.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)
        self._generator = torch.Generator()
        self._blocks: dict[str, tuple[int, Tensor]] = {}  # the last block of each purpose: micro-batches share it

    def normal(self, purpose: str, first: int, count: int, *shape: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of standard normal numbers: float32 ``[count, *shape]`` on the CPU."""
        return self._rows(purpose, first, count, lambda: torch.empty(BLOCK, *shape), Tensor.normal_)

    def uniform(self, purpose: str, first: int, count: int, *shape: int) -> Tensor:
        """The same, uniform in [0, 1)."""
        return self._rows(purpose, first, count, lambda: torch.empty(BLOCK, *shape), Tensor.uniform_)

    def among(self, purpose: str, first: int, count: int, numbers: tuple[int, ...]) -> Tensor:
        """Rows of which each is one of ``numbers``, all as likely: int64 ``[count]`` on the CPU."""
        place = self.uniform(purpose, first, count).mul(len(numbers)).long().clamp_(max=len(numbers) - 1)
        return torch.tensor(numbers)[place]

    def keep(self, purpose: str, first: int | Tensor, count: int, shape: tuple[int, ...], p: float) -> Tensor:
        """Rows of a dropout mask on the device, true with chance ``1 - p`` rounded to 1/65536: bool ``[count, *shape]``.

        On an accelerator ``first`` may be an int64 tensor ``[]`` there: nothing is asked of the host.
        """
        device, least = self.device, round(p * 65536) - 32768

        # Four masks from 64 bits: nine times as fast as bernoulli_ on a CPU.
        def mask(bits: Tensor, generator: torch.Generator) -> Tensor:
            bits.random_(-(2**63), None, generator=generator)
            return (bits.view(torch.int16) >= least).view(MASK_BLOCK, *shape)

        size = math.prod(shape)
        if device.type != "cpu":
            bits = hashed(derive(self.seed, purpose), first, count, -(-size // 4), device)
            return (quarters(bits)[:, :size] >= least).view(count, *shape)
        assert isinstance(first, int)
        words = MASK_BLOCK * size // 4
        return self._rows(purpose, first, count, lambda: torch.empty(words, dtype=torch.int64), mask, MASK_BLOCK)

    def kept(self) -> list[Tensor]:
        """The blocks that are kept for the next rows."""
        return [block for _, block in self._blocks.values()]

    def _rows(
        self,
        purpose: str,
        first: int,
        count: int,
        allocate: Callable[[], Tensor],
        fill: Callable[..., Tensor],
        block: int = BLOCK,
    ) -> Tensor:
        rows: Tensor | None = None
        row, end = first, first + count
        while row < end:
            number, offset = divmod(row, block)
            last = self._blocks.get(purpose)
            if last is None or last[0] != number:
                last = None
                self._blocks.pop(purpose, None)  # before the next is drawn: never two of them are held
                self._generator.manual_seed(derive(self.seed, purpose, number))
                last = number, fill(allocate(), generator=self._generator)
                if _stays(last[1]):
                    self._blocks[purpose] = last
            piece = last[1][offset : offset + end - row]
            if rows is None:
                rows = piece.new_empty(count, *piece.shape[1:])
            rows[row - first : row - first + len(piece)] = piece
            row += len(piece)
        assert rows is not None, "no rows were asked for"
        return rows


def _stays(tensor: Tensor) -> bool:
    """Whether ``tensor`` is there after the transformation (torch.func) in which it may have been made: such have no storage."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class Rows:
    """What belongs to the samples of one micro-batch, for one use of them.

    Args:
        draws: the endless arrays of which each sample has its rows.
        scope: the use: another one draws other numbers.
        first: the number of the first sample.
        count: how many there are.
        classes: theirs, int64 ``[count]`` on the device, or None where classes are not learnt.
        noise: what a generator makes them from, ``[count, latent_dim]``, once it has been given that.
    """

    draws: Draws
    scope: str
    first: int
    count: int
    classes: Tensor | None = None
    noise: Tensor | None = None

    def used_as(self, scope: str) -> Self:
        """The same samples for another use."""
        return replace(self, scope=scope)

    def keep(self, layer: str, shape: tuple[int, ...], p: float) -> Tensor:
        """The dropout mask of ``layer``: bool ``[count, *shape]``."""
        return self.draws.keep(f"{self.scope}/{layer}", self.first, self.count, shape, p)
