"""Starting from the weights of another training: what fits is taken, also where images have another size.

Blocks are matched by the size of the maps that they work on, in octaves: what makes a map of 8 from one of 4 does the same in a
network for 32 pixels as in one for 64, wherever it stands. Features and the heads on them are matched by their depth. With the same
sizes, and in other networks that are no chain of blocks, names decide.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

from torch import Tensor

from frugan.config.architectures import Projected
from frugan.config.recipe import Recipe
from frugan.config.section import flag
from frugan.gan.networks import Network
from frugan.gan.networks.projected import places
from frugan.gan.summary import Row, summarise
from frugan.utils.errors import UserError

Key = tuple[int, int]  # the octaves of the maps that come into a block and that come out of it
NETWORKS = ("generator", "discriminator")
PREFIXES = ("ema/module.", "generator/", "discriminator/")  # of what is taken from a captured state


@dataclass(frozen=True)
class Taken:
    """What a network took over.

    Args:
        fitted: tensors that fitted.
        of: how many it has.
        new: names and shapes of those that did not.
        matched: whether blocks were matched by their maps.
    """

    fitted: int
    of: int
    new: list[str]
    matched: bool


def take_weights(
    tensors: Mapping[str, Tensor], generator: Network, discriminator: Network, recipe: Recipe, other: Recipe | None
) -> dict[str, Taken]:
    """Copies every weight of a captured state, the averaged generator's if there is one, that fits.

    Args:
        tensors: the state.
        generator: takes them.
        discriminator: takes them.
        recipe: of the two networks, resolved.
        other: of the state; None, if that is not known: blocks are matched by their numbers.

    Returns:
        For each network what it took.
    """
    averaged, plain, judging = PREFIXES
    first = averaged if any(name.startswith(averaged) for name in tensors) else plain
    networks = dict(zip(NETWORKS, (generator, discriminator), strict=True))
    moved: dict[str, dict[int, int]] = {}
    by_maps: list[str] = []  # of which networks blocks are matched by their maps
    if other and differs(recipe, other):
        here, there = summarise(recipe, (generator, discriminator)), summarise(other)
        for name in NETWORKS:
            if len(networks[name].chain) != len(networks[name].blocks):  # no chain of blocks
                a, b = recipe.network, other.network
                if isinstance(a, Projected) and isinstance(b, Projected):
                    mine, theirs = (places(x, r.data.shape[1]) for x, r in ((a, recipe), (b, other)))
                    moved[name] = {number: theirs[what] for what, number in mine.items() if what in theirs}
                continue  # else its names say what belongs together
            moved[name] = matched(_keys(here[name], recipe, name), _keys(there[name], other, name), name)
            by_maps.append(name)
    report = {}
    for name, prefix in zip(NETWORKS, (first, judging), strict=True):
        own = networks[name].state_dict()
        there_by_name = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        found = {k: there_by_name.get(_renamed(k, moved[name]) if name in moved else k) for k in own}
        for k, value in found.items():
            if value is not None and k.endswith("classes") and value.shape[1:] == own[k].shape[1:]:
                found[k] = _by_class(own[k], value, other.classes.names if other else (), recipe.classes.names)
        fits = {k: v for k, v in found.items() if v is not None and v.shape == own[k].shape}
        networks[name].load_state_dict(fits, strict=False)
        report[name] = Taken(
            len(fits), len(own), [f"{k} {list(v.shape)}" for k, v in own.items() if k not in fits], name in by_maps
        )
    return report


def _by_class(own: Tensor, there: Tensor, before: Sequence[str], now: Sequence[str]) -> Tensor | None:
    """``own``, one row a class of those ``now``, with the rows of ``there`` that are of one of these; None: no class is in both."""
    if set(before).isdisjoint(now):
        return None
    rows = own.clone()
    for number, name in enumerate(now):
        if name in before:
            rows[number] = there[before.index(name)]
    return rows


def check_frozen(taken: Mapping[str, Taken], discriminator: Network, recipe: Recipe) -> None:
    """Checks that the blocks of D which would stay as they are have been taken over.

    Raises:
        UserError: there is something new in them.
    """
    learning = [i for i, block in enumerate(discriminator.blocks) if any(p.requires_grad for p in block.parameters())]
    kept = tuple(f"blocks.{i}." for i in learning[: recipe.training.freeze_d])
    if fresh := [name for name in taken["discriminator"].new if name.startswith(kept)]:
        raise UserError(
            f"--freeze-d {recipe.training.freeze_d} would keep what is new in D: {recipe.training.init_from} has nothing for "
            f"{fresh[0].split(' ')[0]}. Use a smaller --freeze-d."
        )


def said(taken: Mapping[str, Taken], recipe: Recipe, other: Recipe | None) -> list[str]:
    """What was taken, a sentence a network; and with which widths more would fit, if that is so."""
    sentences, better = [], []
    for name, found in taken.items():
        new = f"; new are {', '.join(found.new[:3])}{' ...' if len(found.new) > 3 else ''}" if found.new else ""
        size = f" ({other.data.image_size}x{other.data.image_size})" if found.matched and other else ""
        how = ", matched by the size of their maps" if found.matched else ""
        sentences.append(
            f"From {recipe.training.init_from}{size}: {found.fitted} of {found.of} tensors of the {name} fit{how}{new}."
        )
        if found.matched and other and (width := _width(f"width_{name[0]}", recipe, other)):
            better.append(width)
    known = other.classes.names if other else ()
    if new_classes := [name for name in recipe.classes.names if name not in known]:
        shown = f"{', '.join(new_classes[:5])}{' ...' if len(new_classes) > 5 else ''}"
        sentences.append(f"Of {len(recipe.classes)} classes {len(new_classes)} are not known there: {shown}.")
    if better:
        sentences.append(f"More would fit with the same channels in maps of the same size: {' '.join(better)}.")
    return sentences


def differs(recipe: Recipe, other: Recipe) -> bool:
    """Whether maps differ in their sizes, or heads in their number, so that blocks must be matched."""
    a, b = ((r.data.image_size, n.kind, n.depth, getattr(n, "feature_levels", 0)) for r in (recipe, other) for n in (r.network,))
    return a != b


def matched(own: Sequence[Key], other: Sequence[Key], network: str) -> dict[int, int]:
    """For the blocks of a network those of another that work on maps of the same sizes.

    Args:
        own: keys of its blocks.
        other: keys of the other's.
        network: ``generator``, which begins at the smallest map, or ``discriminator``, which ends there.

    Returns:
        Number to number. Of several alike those nearest to the smallest map are matched first. The blocks that images come out
        of, or go into, are matched with each other where nothing else matches them.
    """
    mine, theirs = list(range(len(own))), list(range(len(other)))
    if network == "discriminator":
        mine, theirs = mine[::-1], theirs[::-1]
    left = defaultdict(list)
    for j in theirs:
        left[other[j]].append(j)
    found = {i: left[own[i]].pop(0) for i in mine if left[own[i]]}
    if mine[-1] not in found and theirs[-1] not in found.values():
        found[mine[-1]] = theirs[-1]
    return found


def _keys(rows: Sequence[Row], recipe: Recipe, network: str) -> list[Key]:
    outs: dict[int, int] = {}
    for row in rows:
        number = row.name.split(".")[0]
        if number.isdigit():
            outs[int(number)] = row.shape[-1] if len(row.shape) == 3 else 1
    before = 1 if network == "generator" else recipe.data.image_size or 1
    keys = []
    for i in sorted(outs):
        keys.append((octave(before), octave(outs[i])))
        before = outs[i]
    return keys


def octave(side: int) -> int:
    """The power of two that is nearest to ``side``: 28 pixels are one of 32, 7 one of 8."""
    return round(log2(side))


def _renamed(name: str, moved: Mapping[int, int]) -> str:
    """The name of a tensor in the other network; empty if its block has none there."""
    first, _, rest = name.partition(".")
    number, _, inside = rest.partition(".")
    if first != "blocks" or not number.isdigit():
        return name
    return f"blocks.{moved[int(number)]}.{inside}" if int(number) in moved else ""


def _width(name: str, recipe: Recipe, other: Recipe) -> str:
    """The flag for the width that gives maps of the same size the same channels, if it is not what was asked for."""
    here, there = getattr(recipe.network, name, None), getattr(other.network, name, None)
    if here is None or there is None or recipe.network.kind != other.network.kind or recipe.network.kind == "mlp":
        return ""
    wanted = there / 2 ** (octave(recipe.data.image_size or 1) - octave(other.data.image_size or 1))
    return f"{flag(name)} {int(wanted)}" if wanted != here and wanted >= 1 and wanted == int(wanted) else ""
