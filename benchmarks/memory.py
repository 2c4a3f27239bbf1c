"""What is left of frugan's advantage: one loop from the tutorials' to frugan, a step at a time.

    python benchmarks/memory.py [--image-size 64] [--rounds 5] [--recipes dcgan r3] [--batches 64 512 4096] [--last]
    python benchmarks/memory.py --batch-norm [--image-size 64] [--rounds 5] [--recipes dcgan upsample mlp] [--batches 64]

Each row adds one thing that a careful engineer would do to the row above; the last is ``frugan train`` as a user gets it, planner,
trainer, console and files included, within the memory that the row above held (or the smallest that frugan names). Each
measurement is a process of its own; the rows take turns, and the table has medians. *Allocates*: the most bytes of tensors that
were alive at once in an update, as the CPU allocator reports. *Process*: the most that the process held, as the system counts it.
Rows with a star train otherwise: batch norm sees micro-batches, in frugan's row by ``--whole-batch-norm no``, so that the same is
compared; what exact statistics cost is the other table. Parity is checked first: in double precision both must train to
the same weights.

``--batch-norm`` is a table of its own: what it costs that micro-batches are exact under batch norm. Both phases and the updates of
frugan's own step, in the whole batch, with blocks recomputed, and in micro-batches, whose statistics are their own or the whole
batch's.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import tyro
from plain import KEEPING, Tuned, plain
from rich.console import Console
from rich.table import Table

MICRO = 16
ROWS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain loop": ({}, {}),
    "+ accumulation, micro-batches of 16": ({"micro_batch": MICRO}, {}),
    "+ D frozen in G's phase": ({"micro_batch": MICRO, "frozen": True}, {}),
    "+ channels-last": ({"micro_batch": MICRO, "frozen": True, "channels_last": True}, {}),
    "+ fused Adam": ({"micro_batch": MICRO, "frozen": True, "channels_last": True, "fused": True}, {}),
    "+ MALLOC_ settings": ({"micro_batch": MICRO, "frozen": True, "channels_last": True, "fused": True}, KEEPING),
}
FRUGAN = "frugan train"
LAYOUTS: dict[str, tuple[bool, list[str]]] = {  # whether the batch is cut, and levers
    "whole batch": (False, []),
    "whole batch, blocks recomputed, separate terms": (False, ["checkpoint_blocks", "separate_terms"]),
    f"micro-batches of {MICRO}, statistics of each*": (True, []),
    f"micro-batches of {MICRO}, statistics of the whole batch": (True, ["whole_batch_norm"]),
}


@dataclass
class Options:
    image_size: int = 64
    recipes: tuple[str, ...] = ("dcgan", "r3")
    batches: tuple[int, ...] = (64, 512, 4096)
    plain_most: int = 512  # batches above this are not tried as a whole, which would need too much
    rounds: int = 5
    updates: int = 2  # that are timed in each process, after one that is not
    last: bool = False  # the last loop and frugan alone: what a change of frugan can move
    batch_norm: bool = False  # the table of that alone
    cell: str | None = None  # used by the script itself: measures one


def pictures(first: int, count: int, side: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(first)  # each row its own, however they are asked for
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def looped(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an update, bytes allocated and held, of a loop without frugan."""
    import torch

    from frugan.config import recipes
    from frugan.gan.networks import build
    from frugan.memory import host, private

    side, batch = cell["side"], cell["batch"]
    recipe = recipes.get(cell["recipe"]).replace(image_size=side, channels=3, batch_size=batch)
    live = most = 0
    moves: list[int] = []
    recording = ExitStack()

    def account() -> None:
        nonlocal live, most
        recording.close()
        for move in moves:
            live += move
            most = max(most, live)
        moves.clear()

    def images(row: int, count: int) -> torch.Tensor:
        if cell["what"] == "bytes":  # after each micro-batch: of all of a large batch the record itself would take gigabytes
            account()
            recording.enter_context(private.recording(moves))
        return pictures(row, count, side).float().div_(127.5).sub_(1)

    if cell["what"] == "bytes":
        recording.enter_context(private.recording(moves))
    loop = plain(recipe, *build(recipe.network, side, 3), tuned=Tuned(**cell["tuned"]))
    seconds = []
    for i in range(1 + cell["updates"]):
        begin = time.perf_counter()
        loop.update(images, i * batch, batch)
        seconds.append(time.perf_counter() - begin)
    if cell["what"] == "bytes":
        account()
        return {"bytes": most}
    return {"seconds": statistics.median(seconds[1:] or seconds), "process": host.status("VmHWM")}


def through_frugan(cell: dict[str, Any]) -> dict[str, Any]:
    """The same by `frugan.train`, within a budget."""
    import frugan
    from frugan.memory import host, limit
    from frugan.utils.errors import UserError

    class Enough(Exception):
        pass

    clock: list[float] = []
    most = host.status("VmHWM")

    def count(images: int) -> None:
        clock.append(time.perf_counter())
        if len(clock) > cell["updates"] + 1:
            raise Enough

    with tempfile.TemporaryDirectory() as out:

        def run(memory: str) -> None:
            frugan.train(
                cell["folder"], out=out, recipe=cell["recipe"], image_size=cell["side"], batch_size=cell["batch"], epochs=1000,
                memory=memory, on_update=count, quiet=True, device="cpu", whole_batch_norm="no", report_every=1000,
                sample_every=1000,
            )  # fmt: skip

        budget = f"{cell['process'] >> 20}MiB"
        try:
            run(budget)
        except Enough:
            pass
        except UserError as error:
            if "the smallest that works is --memory " not in str(error):
                raise
            budget = str(error).split("the smallest that works is --memory ")[1].split("MiB")[0] + "MiB"
            try:
                run(budget)
            except Enough:
                pass
        plan = json.loads((Path(out) / "plan.json").read_text())
    took = [b - a for a, b in pairwise(clock)]
    return {
        "seconds": statistics.median(took[1:] or took), "process": max(most, host.status("VmHWM"), limit.most()),
        "bytes": plan["training_allocates"], "guarantee": plan["guarantee"], "budget": budget,
        "plan": "; ".join(f"{n} {max(p['sizes'])}" for n, p in plan["layouts"].items()) + f", {plan['freed_memory']}",
    }  # fmt: skip


def laid_out(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of CPU and bytes of an update by frugan's step, in one layout."""
    import torch

    from frugan.config import recipes
    from frugan.data.loader import Batch
    from frugan.gan.levers import named, of_phase
    from frugan.memory import limit, private
    from frugan.memory.layout import Layout
    from frugan.training.state import State

    side, batch = cell["side"], cell["batch"]
    recipe = recipes.get(cell["recipe"]).replace(image_size=side, channels=3, batch_size=batch)
    device = torch.device("cpu")
    limit.set_freed("reuse", device)
    moves: list[int] = []
    seconds = []
    with private.recording(moves) if cell["what"] == "bytes" else ExitStack():
        state = State(recipe, device)
        for i in range(1 if cell["what"] == "bytes" else 1 + cell["updates"]):
            begin = time.process_time()  # of all threads, so that what else runs matters less
            for phase in state.phases.values():
                levers = {*named(cell["levers"])} & {*of_phase(phase.name)}
                layout = Layout.of(batch, -(-batch // MICRO) if cell["cut"] else 1, levers)
                phase.compute(Batch(lambda row, n: pictures(row, n, side)), i * batch, layout)
                state.update(phase.optimizer)
            seconds.append(time.process_time() - begin)
    live = most = 0
    for move in moves:
        live += move
        most = max(most, live)
    return {"bytes": most, "seconds": statistics.median(seconds[1:] or seconds)}


def batch_norm_table(options: Options) -> Table:
    """What exact micro-batches cost under batch norm."""
    table = Table(title=f"Batch norm over the whole batch, {options.image_size}x{options.image_size} colour, fp32")
    for heading in ("recipe", "batch", "layout", "allocates", "CPU s an update", "of the whole batch", "of micro-batches*"):
        table.add_column(heading, justify="left" if heading in ("recipe", "layout") else "right")
    for recipe in options.recipes:
        for batch in options.batches:
            common = {"recipe": recipe, "side": options.image_size, "batch": batch, "updates": options.updates}
            cells = {name: common | {"name": name, "cut": cut, "levers": levers} for name, (cut, levers) in LAYOUTS.items()}
            bytes_ = {name: measured({}, what="bytes", **cell)["bytes"] for name, cell in cells.items()}
            rounds = [
                {n: measured({}, what="seconds", **cell)["seconds"] for n, cell in cells.items()} for _ in range(options.rounds)
            ]
            took = {name: statistics.median(found[name] for found in rounds) for name in cells}
            whole, each = (took[name] for name in list(cells)[0:3:2])
            for name in cells:
                table.add_row(
                    recipe, str(batch), name, f"{bytes_[name] / 2**20:,.0f} MiB", f"{took[name]:.2f}",
                    f"{took[name] / whole:.2f}", f"{took[name] / each:.2f}",
                )  # fmt: skip
    return table


def parity(recipe_name: str) -> float:
    """The largest relative difference of a weight tensor after two updates in double precision, tuned loop against frugan."""
    import torch

    from frugan.config import recipes
    from frugan.data.loader import Batch
    from frugan.gan.build import lay_out, make_step, optimizers
    from frugan.gan.networks import build
    from frugan.memory.layout import Layout

    cut = 8 if recipe_name == "dcgan" else 3  # batch norm is compared whole: cut, its statistics are others
    recipe = recipes.get(recipe_name).replace(image_size=32, channels=3, batch_size=8)
    found = []
    for ours in (False, True):
        generator, discriminator = (n.double() for n in build(recipe.network, 32, 3))
        if ours:
            lay_out(recipe, generator, discriminator)
            optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, torch.device("cpu"))
            step, layout = make_step(recipe, generator, discriminator), Layout.of(8, -(-8 // cut))
        else:
            loop = plain(recipe, generator, discriminator, tuned=Tuned(cut, frozen=True, channels_last=True))
        for first in (0, 8):
            whole = pictures(first, 8, 32)
            if not ours:
                loop.update(lambda row, n: (whole[row - first : row - first + n].double() / 127.5).sub_(1), first, 8)  # noqa: B023
                continue
            for phase, optimizer in ((step.discriminator_phase, optimizer_d), (step.generator_phase, optimizer_g)):
                phase(Batch(lambda row, n: whole[row - first : row - first + n]), first, layout)  # noqa: B023
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        found.append([p.detach() for n in (generator, discriminator) for p in n.parameters()])
    return max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(*found, strict=True))


def measured(environment: dict[str, str], **cell: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(cell["name"], cell["recipe"], cell["batch"], found, file=sys.stderr, flush=True)
    return dict(found)


def folder_of(images: int, side: int, where: Path) -> None:
    from PIL import Image

    for i in range(images):
        Image.fromarray(pictures(i, 1, side)[0].permute(1, 2, 0).numpy()).save(where / f"{i:05d}.bmp")


def main(options: Options) -> None:
    if options.cell:
        cell = json.loads(options.cell)
        run = laid_out if cell["name"] in LAYOUTS else through_frugan if cell["name"] == FRUGAN else looped
        print(json.dumps(run(cell)))
        return
    if options.batch_norm:
        Console(width=170).print(batch_norm_table(options))
        print("*: trains otherwise, as batch norm sees micro-batches.")
        return
    for recipe in options.recipes:
        error = parity(recipe)
        print(f"parity of {recipe}: weights after 2 updates in double precision agree to {error:.1e}")
        assert error < 1e-6
    table = Table(title=f"{options.image_size}x{options.image_size} colour, fp32")
    for heading in ("recipe", "batch", "loop", "allocates", "process", "s an update", "images/s", "of the tuned loop"):
        table.add_column(heading, justify="left" if heading in ("recipe", "loop") else "right")
    for recipe in options.recipes:
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as folder:
                common = {"recipe": recipe, "side": options.image_size, "batch": batch}
                updates = 5 if batch <= 64 else options.updates if batch <= 2048 else 0
                common["updates"] = updates
                folder_of((updates + 3) * batch, options.image_size, Path(folder))  # no epoch ends in what is timed
                rows = {n: r for n, r in ROWS.items() if r[0] or batch <= options.plain_most}
                rows = dict([*rows.items()][-1:]) if options.last else rows
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*rows, FRUGAN)}
                bytes_ = {
                    name: measured(env, name=name, what="bytes", tuned=tuned, **(common | {"updates": 0}))["bytes"]
                    for name, (tuned, env) in rows.items()
                }
                for _ in range(options.rounds):
                    for name, (tuned, env) in rows.items():
                        found[name].append(measured(env, name=name, what="seconds", tuned=tuned, **common))
                    held = int(statistics.median(f["process"] for f in found[list(rows)[-1]]))
                    found[FRUGAN].append(measured({}, name=FRUGAN, folder=folder, process=held, **common))
                tuned_seconds = statistics.median(f["seconds"] for f in found[list(rows)[-1]])
                for name, runs in found.items():
                    seconds, process = (statistics.median(f[k] for f in runs) for k in ("seconds", "process"))
                    last = runs[-1]
                    otherwise = recipe == "dcgan" and batch > MICRO and (last.get("guarantee") == "approximate" or name in ROWS)
                    star = "*" if otherwise and name != "plain loop" else ""
                    shown = f"{name} ({last['plan']}; {last['budget']})" if name == FRUGAN else name
                    table.add_row(
                        recipe, str(batch), shown + star, f"{bytes_.get(name, last.get('bytes', 0)) / 2**20:,.0f} MiB",
                        f"{process / 2**20:,.0f} MiB", f"{seconds:.2f}", f"{batch / seconds:.0f}", f"{tuned_seconds / seconds:.2f}",
                    )  # fmt: skip
    Console(width=170).print(table)
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} interleaved rounds.")
    print("*: trains otherwise, as batch norm sees micro-batches.")


if __name__ == "__main__":
    main(tyro.cli(Options))
