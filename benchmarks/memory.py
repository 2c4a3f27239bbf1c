"""What training allocates, and images/s, against a plain PyTorch loop with the same networks, at growing effective batches.

    python benchmarks/memory.py [--image-size 64] [--micro-batch 16] [--rounds 2]

Allocated is everything from the first weight to the end of an update of both networks: weights, gradients, moments, average and
activations, as the CPU allocator reports it. Each measurement is a process of its own; for speed the loops take turns, and the
table has medians. Parity is checked first: in double precision both loops must train to the same weights.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import tyro
from plain import plain
from rich.console import Console
from rich.table import Table


@dataclass
class Options:
    image_size: int = 64
    micro_batch: int = 16
    batches: tuple[int, ...] = (64, 512, 4096)
    plain_most: int = 1024  # batches above this are not tried with the plain loop, which would need too much
    rounds: int = 2
    cell: str | None = None  # used by the script itself: measures one


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an update, or bytes allocated, or final weights, of one loop."""
    import torch

    from frugan import recipes
    from frugan.build import average, lay_out, make_step, optimizers
    from frugan.memory import host, private
    from frugan.memory.plan import Layout
    from frugan.networks import build

    side, batch, device = cell["side"], cell["batch"], torch.device("cpu")
    dtype = torch.float64 if cell["what"] == "weights" else torch.float32
    recipe = recipes.get(cell["recipe"]).replace(image_size=side, channels=3, batch_size=batch)

    live = most = 0
    moves: list[int] = []
    recording = ExitStack()

    def record() -> None:
        moves.clear()
        recording.enter_context(private.recording(moves))

    def account() -> None:
        nonlocal live, most
        recording.close()
        for move in moves:
            live += move
            most = max(most, live)

    def images(first: int, count: int) -> torch.Tensor:
        if cell["what"] == "bytes":  # after each micro-batch: of all of a large batch the record itself would take gigabytes
            account()
            record()
        generator = torch.Generator().manual_seed(first)  # each row its own, however they are asked for
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)

    whole = images(0, batch) if cell["what"] == "weights" else None

    def make() -> Any:
        generator, discriminator = build(recipe.network, side, 3)
        if cell["loop"] == "plain":
            loop = plain(recipe, generator.to(dtype), discriminator.to(dtype))

            def update(first: int) -> None:
                batch_ = images(first, batch) if whole is None else whole
                loop.update(batch_.to(dtype).div_(127.5).sub_(1), first)

        else:
            host.handle("reuse")  # as training does
            lay_out(recipe, generator.to(dtype), discriminator.to(dtype))
            optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, device)
            step, ema = make_step(recipe, generator, discriminator), average(recipe, generator, device)
            layout = Layout.of(batch, -(-batch // cell["micro_batch"]))

            def update(first: int) -> None:
                read = images if whole is None else (lambda row, n: whole[row - first : row - first + n])
                for phase, optimizer in ((step.discriminator_phase, optimizer_d), (step.generator_phase, optimizer_g)):
                    phase(read, first, layout)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if ema:
                    ema.update(generator, batch, first + batch)

        return update, generator, discriminator

    if cell["what"] == "bytes":
        record()
        make()[0](0)
        account()
        return {"bytes": most}
    update, generator, discriminator = make()
    if cell["what"] == "weights":
        for i in range(2):
            update(i * batch)
        return {"weights": [float(p.double().norm()) for n in (generator, discriminator) for p in n.parameters()]}
    update(0)
    seconds = []
    for i in range(1, 1 + cell["updates"]):
        begin = time.perf_counter()
        update(i * batch)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds)}


def measured(**cell: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(cell, {k: v for k, v in found.items() if k != "weights"}, file=sys.stderr, flush=True)
    return dict(found)


def main(options: Options) -> None:
    if options.cell:
        print(json.dumps(run(json.loads(options.cell))))
        return
    side, micro = options.image_size, options.micro_batch
    for recipe, cut in (("dcgan", 8), ("r3", 3)):  # batch norm is compared whole: cut, its statistics are others
        both = [
            measured(what="weights", recipe=recipe, loop=loop, side=side, batch=8, micro_batch=cut) for loop in ("plain", "frugan")
        ]
        error = max(abs(a - b) / max(a, 1e-9) for a, b in zip(*(b["weights"] for b in both), strict=True))
        print(f"parity of {recipe}: norms of weights after 2 updates in double precision agree to {error:.1e}")
        assert error < 1e-6

    table = Table(title=f"{side}x{side} colour, fp32, micro-batches of {micro}")
    for heading in ("recipe", "batch", "plain MiB", "frugan MiB", "of plain", "plain images/s", "frugan images/s", "of plain"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for recipe in ("dcgan", "r3"):
        for batch in options.batches:
            loops = ("plain", "frugan") if batch <= options.plain_most else ("frugan",)
            common = {"recipe": recipe, "side": side, "batch": batch, "micro_batch": micro}
            bytes_ = {loop: measured(what="bytes", loop=loop, **common)["bytes"] for loop in loops}
            rates: dict[str, list[float]] = {loop: [] for loop in loops}
            for _ in range(options.rounds if batch <= options.plain_most else 0):
                for loop in loops:
                    found = measured(what="seconds", loop=loop, updates=max(1, min(8, 512 // batch)), **common)
                    rates[loop].append(batch / found["seconds"])
            rate = {loop: statistics.median(r) for loop, r in rates.items() if r}
            share = f"1/{bytes_['plain'] / bytes_['frugan']:.1f}" if "plain" in bytes_ else "-"
            speed = f"{rate['frugan'] / rate['plain']:.2f}" if "plain" in rate else "-"
            shown = [f"{bytes_[loop] / 2**20:,.0f}" if loop in bytes_ else "-" for loop in ("plain", "frugan")]
            shown += [share, *(f"{rate[loop]:.0f}" if loop in rate else "-" for loop in ("plain", "frugan")), speed]
            table.add_row(recipe, str(batch), *shown)
    Console(width=120).print(table)
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} interleaved rounds")


if __name__ == "__main__":
    main(tyro.cli(Options))
