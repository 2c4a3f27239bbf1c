"""Images/s of one training update: the tutorials' loop, a tuned one, and frugan's step, with the same networks and losses.

    python benchmarks/speed.py [--image-size 28] [--channels 1] [--batch-size 128] [--recipes dcgan r3] [--rounds 7] [--compile]

The tutorials' loop and the tuned one are those of `plain.py`: single precision, contiguous images, gradients for D computed
(and thrown away) in G's phase, images for both phases made once where the recipe has it so; or the same with D frozen in G's
phase, channels-last, fused Adam, and a C library that keeps its memory. frugan's step lies in memory as ``frugan train`` has
it, average left out, as the loops have none. Each loop is a process of its own; the processes take turns on the same images,
all resident, and the table has medians of what the rounds have. The share of the peak is that of the arithmetic in the tuned
loop's convolutions and products, by what a product of large matrices does here in the same precision, once a table: a rough
share where a machine changes its speed. Run it on a machine that does nothing else. With ``--compile`` it was run once, for one
recipe; on accelerators never.

Rows with a star train otherwise: batch norm sees micro-batches.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

PLAIN, TUNED = "tutorials' loop, fp32", "tuned loop, "
TURN = 1.0  # seconds, about, that each loop has in a round


@dataclass(frozen=True)
class Loop:
    """One row: whose loop, how it computes, and what is in its environment."""

    whose: Literal["tutorials'", "tuned", "frugan"]
    precision: str = "fp32"
    parts: int = 1
    compiled: bool = False

    @property
    def environment(self) -> dict[str, str]:
        from plain import KEEPING

        return KEEPING if self.whose == "tuned" else {}


LOOPS = {
    PLAIN: Loop("tutorials'"),
    f"{TUNED}fp32": Loop("tuned"),
    f"{TUNED}bf16": Loop("tuned", "bf16"),
    f"{TUNED}bf16, compiled": Loop("tuned", "bf16", compiled=True),
    "frugan, fp32": Loop("frugan"),
    "frugan, fp32, 4 micro-batches": Loop("frugan", parts=4),
    "frugan, bf16": Loop("frugan", "bf16"),
    "frugan, bf16, 4 micro-batches": Loop("frugan", "bf16", 4),
}


@dataclass
class Options:
    recipes: tuple[str, ...] = ("mlp", "upsample", "dcgan", "resize", "r3", "projected")
    image_size: int = 28
    channels: int = 1
    batch_size: int = 128
    rounds: int = 7
    compile: bool = False  # the tuned loop also with networks compiled, which needs a compiler and some minutes
    only: tuple[str, ...] = ()  # loops whose names have one of these in them
    device: str = "auto"
    loop: str | None = None  # used by the script itself: one loop, which computes when it is told to


def updates(loop: Loop, recipe_name: str, options: Options) -> tuple[Callable[[], None], Callable[[], None]]:
    """What computes an update in ``loop``, and what waits for the device."""
    if loop.whose == "frugan":
        from frugan.utils import threads

        threads.begin(None)
    import torch
    from plain import Tuned, plain

    from frugan.config import recipes
    from frugan.data.loader import Batch
    from frugan.gan.networks import build
    from frugan.memory import limit
    from frugan.memory.layout import Layout
    from frugan.training.state import State
    from frugan.utils.device import choose

    device = choose(options.device)
    n, side, channels = options.batch_size, options.image_size, options.channels
    recipe = recipes.get(recipe_name).replace(
        image_size=side, channels=channels, batch_size=n, precision=loop.precision, ema_half_life=0.0, augment="none",
        channels_last=True,
    )  # fmt: skip
    there = torch.randint(0, 256, (8 * n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = 0

    def next_batch() -> int:
        nonlocal seen
        seen += n
        return seen - n

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if loop.whose == "frugan":
        limit.set_freed("reuse", device)
        threads.apart().__enter__()  # for as long as the process lives
        state, layout = State(recipe, device), Layout.of(n, loop.parts)
        state.step.keeps = recipe.training.reuse_fakes and device.type == "cpu"  # as a plan has it where memory suffices

        def ours() -> None:
            first = next_batch()
            for phase in state.phases.values():
                phase.compute(Batch(lambda row, count: there[row % len(there) : row % len(there) + count]), first, layout)
                state.update(phase.optimizer)

        return ours, wait

    networks = [network.to(device) for network in build(recipe.network, side, channels)]
    tuned = Tuned(frozen=True, channels_last=True, fused=True, once=True) if loop.whose == "tuned" else Tuned(once=True)
    made = plain(recipe, *networks, bf16=loop.precision == "bf16", tuned=tuned)
    if loop.compiled:
        for network in networks:
            network.compile()
    pixels = there.to(device).float().div_(127.5).sub_(1)
    return lambda: made.update(lambda row, count: pixels[row % len(there) : row % len(there) + count], next_batch(), n), wait


def arithmetic(recipe: str, options: Options) -> float:
    """Floating-point operations of an update by the tuned loop, without those of products that nobody needs."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):  # torch's own cannot look into gradients of gradients
        total = 0

        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            made = function(*given, **(named or {}))
            if count := flop_registry.get(function._overloadpacket):
                self.total += count(*given, **(named or {}), out_val=made)
            return made

    compute, _ = updates(Loop("tuned"), recipe, options)
    with Counter() as counter:
        compute()
    return float(counter.total)


def peaks(options: Options) -> dict[str, float]:
    """Floating-point operations a second of large products, by precision."""
    import torch

    from frugan.utils.device import choose

    device, found = choose(options.device), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048, device=device).to(dtype)
        seconds = []
        for _ in range(8):
            begin = time.perf_counter()
            (a @ a)[0, 0].item()
            seconds.append(time.perf_counter() - begin)
        found[name] = 2 * 2048**3 / min(seconds)
    return found


def work(options: Options) -> None:
    """One loop: says when it is warm, and computes as many updates as each line asks for."""
    assert options.loop
    if options.loop == "arithmetic":
        print(json.dumps({"peaks": peaks(options), "arithmetic": [arithmetic(name, options) for name in options.recipes]}))
        return
    compute, wait = updates(LOOPS[options.loop], options.recipes[0], options)

    def timed(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            compute()
        wait()
        return time.perf_counter() - begin

    timed(2)
    print(timed(1), flush=True)
    for line in sys.stdin:
        print(timed(int(line)), flush=True)


def started(loop: str, recipe: str, options: Options) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--loop", loop, "--recipes", recipe, "--image-size", f"{options.image_size}"]
    command += ["--channels", f"{options.channels}", "--batch-size", f"{options.batch_size}", "--device", options.device]
    environment = os.environ | (LOOPS[loop].environment if loop in LOOPS else {})
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], asked: str = "") -> Any:
    assert process.stdin and process.stdout
    if asked:
        process.stdin.write(f"{asked}\n")
        process.stdin.flush()
    if not (line := process.stdout.readline()):
        sys.exit(f"speed.py: {' '.join(map(str, process.args))} ended")  # type: ignore[arg-type]
    return json.loads(line)


def rates(recipe: str, options: Options) -> dict[str, list[float]]:
    """Images/s of each loop in each round."""
    names = [n for n, loop in LOOPS.items() if options.compile or not loop.compiled]
    names = [n for n in names if not options.only or any(part in n for part in options.only)]
    processes, times = {}, {}
    for name in names:
        processes[name] = started(name, recipe, options)
        times[name] = max(1, round(TURN / answer(processes[name])))
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, process in processes.items():
            found[name].append(times[name] * options.batch_size / answer(process, f"{times[name]}"))
    print(recipe, {name: round(statistics.median(values)) for name, values in found.items()}, file=sys.stderr, flush=True)
    for process in processes.values():
        process.communicate()
    return found


def main(options: Options) -> None:
    if options.loop:
        work(options)
        return
    size = f"{options.image_size}x{options.image_size} {'grey' if options.channels == 1 else 'colour'}"
    table = Table(title=f"images/s at {size}, batch {options.batch_size}")
    for heading in ("recipe", "loop", "images/s", "of the tutorials'", "of the tuned", "of the whole batch", "of the peak"):
        table.add_column(heading, justify="left" if heading in ("recipe", "loop") else "right")
    counting = started("arithmetic", options.recipes[0], options)
    peak = answer(counting)["peaks"]
    for recipe in options.recipes:
        found = rates(recipe, options)
        each = answer(started("arithmetic", recipe, options))["arithmetic"][0] / options.batch_size

        def against(name: str, other: str, found: dict[str, list[float]] = found) -> str:
            if other not in found or other == name:
                return ""
            return f"{statistics.median(a / b for a, b in zip(found[name], found[other], strict=True)):.2f}"

        for name, measured in found.items():
            loop = LOOPS[name]
            star = "*" if loop.parts > 1 and recipe in ("dcgan", "upsample", "resize", "projected", "mlp") else ""
            images = statistics.median(measured)
            table.add_row(
                recipe, name + star, f"{images:,.0f}", against(name, PLAIN), against(name, f"{TUNED}{loop.precision}"),
                against(name, f"frugan, {loop.precision}") if loop.parts > 1 else "", f"{each * images / peak[loop.precision]:.0%}",
            )  # fmt: skip
        table.add_section()
    Console(width=150).print(table)
    import torch

    said = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in peak.items())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} interleaved rounds;")
    print(f"peak, 10^9 operations/s: {said}. *: trains otherwise, as batch norm sees micro-batches.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
