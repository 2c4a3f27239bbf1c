"""What only a GPU can tell, on one page: tests, memory, budgets, recovery, precisions, offloading, resume, speed.

    make gpu                                   # or: python benchmarks/gpu.py; writes docs/gpu.md in at most 22 minutes
    python benchmarks/gpu.py --only speed      # a part, printed; --out FILE writes it, --json FILE keeps the numbers

Each cell is a process of its own: one that fails or takes too long is a row that says so. Sections come in the order of their
importance, and what time did not suffice for is named. Timings are taken between two synchronizations; loops that are compared
take turns in one process, and tables have medians over the turns. A whole run alone writes docs/gpu.md; any other is printed.
"""

import json
import os
import platform
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from frugan.cli import WORKSPACES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
MIB = 1 << 20
RECIPES = ("mlp", "upsample", "dcgan", "r3", "resize")
Cell = dict[str, Any]
Found = dict[str, Any]
Cells = Generator[Cell, Found, None]
SectionName = Literal[
    "hardware", "tests", "prediction", "budgets", "recovery", "speed", "precision", "resume", "offloading", "allocator", "compiled"
]


@dataclass
class Options:
    device: str = "cuda"  # or cuda:1
    minutes: float = 22.0  # after which no cell is begun, and the one that runs is ended
    only: tuple[SectionName, ...] = ()  # sections; none: all
    jobs: int = 1  # cells at a time, of sections that neither time anything nor take all memory
    out: Path | None = None  # the page; unset: docs/gpu.md if this is a whole run on a GPU, else it is printed
    json: Path | None = None  # the numbers as they came
    quick: bool = False  # tiny cells, which say whether everything runs and nothing about speed
    cell: str | None = None  # used by the script itself: measures one


# ---- what a cell has: all of this runs in a process of its own ---------------------------------------------------------------


class Gpu:
    """The device of a cell, and what its driver says of it."""

    def __init__(self, name: str) -> None:
        self.simulated = name.startswith("sim")  # the device of tests/sim, on which this script itself is tried
        if self.simulated:
            sys.path.insert(0, str(ROOT))
            from tests import sim

            sim.setup()
        import torch

        from frugan.utils.device import choose

        if name.startswith("cuda") and (torch.version.cuda or torch.version.hip) and not torch.cuda.is_available():
            sys.exit(
                f"there is no GPU that torch can use here (torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}): "
                f"{reason()}."
            )
        before = used_by_uuid()  # while this process holds nothing
        self.device = choose(name)
        self.words: Any = torch.get_device_module(self.device)
        self.uuid = "" if self.simulated else f"GPU-{self.words.get_device_properties(self.device).uuid}"
        self.others = before.get(self.uuid, 0)
        self.handle = self._handle()
        self.by = "NVML" if self._of_process() is not None else "all that is in use, less what was before"

    def driver(self) -> int:
        """Bytes of the device that this process holds, by the driver."""
        own = self._of_process()
        if own is not None:
            return own
        free, total = self.words.mem_get_info(self.device)
        return max(0, int(total) - int(free) - self.others)

    @contextmanager
    def watched(self) -> Iterator[Callable[[], int]]:
        """While open, looks every few milliseconds what the driver says; gives what the most was so far."""
        most, done = [self.driver()], threading.Event()

        def look() -> None:
            while not done.wait(0.005):
                most[0] = max(most[0], self.driver())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield lambda: most[0]
        finally:
            done.set()
            watcher.join()

    def wait(self) -> None:
        self.words.synchronize(self.device)

    def _handle(self) -> Any:
        if self.simulated:
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            return pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except Exception:  # not installed, no rights, another driver's: then by what is in use
            return None

    def _of_process(self) -> int | None:
        if self.handle is None:
            return None
        import pynvml

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except pynvml.NVMLError:
            return None
        return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)


def reason() -> str:
    """Why torch sees no GPU, in its own words."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        first = re.split(r"(?<=[a-z])\.\s", str(error).strip().splitlines()[0])[0].rstrip(".")
        return (first[:1].lower() + first[1:]) if first else type(error).__name__
    return "it sees none"


def asked(*query: str) -> list[list[str]]:
    """What nvidia-smi answers, a list for each GPU; nothing where it is missing."""
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[word.strip() for word in line.split(",")] for line in lines if line.strip()]


def used_by_uuid() -> dict[str, int]:
    """Bytes in use on each GPU. Unlike NVML's first version it leaves out what the driver keeps for itself."""
    return {row[0]: int(row[1]) * MIB for row in asked("uuid", "memory.used") if len(row) == 2 and row[1].isdigit()}


def recipe_of(cell: Cell, **own: Any) -> Any:
    """The recipe of a cell, fp32 if it does not say otherwise; quick ones are narrow."""
    from frugan.config import recipes

    side, channels = cell["side"], 1 if cell["side"] in (8, 28) else 3
    settings: dict[str, Any] = {"image_size": side, "channels": channels, "batch_size": cell["batch"], "precision": "fp32"}
    if cell["quick"]:
        settings |= {"width_g": 8, "width_d": 8, "latent_dim": 8}
    return recipes.get(cell["recipe"]).replace(**(settings | own))


def pictures(recipe: Any) -> Any:
    """A batch of handwritten digits, enlarged: uint8 ``[n, c, side, side]`` on the host."""
    import torch

    from frugan.data.sources.standard import as_published

    channels, side, _ = recipe.data.shape
    digits = torch.from_numpy(as_published()[0]).float()[:, None]
    some = digits[torch.arange(recipe.training.batch_size) % len(digits)]
    large = torch.nn.functional.interpolate(some, size=(side, side), mode="bilinear")
    return (large * 15.9375).round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous()


class Frugan:
    """frugan's own update of both networks, as the trainer does it, on one batch; ``graphs``: recorded as CUDA graphs."""

    def __init__(self, recipe: Any, gpu: Gpu, images: Any, parts: int = 1, levers: Any = (), *, graphs: bool = False) -> None:
        from frugan.data.loader import Batch
        from frugan.gan.levers import named
        from frugan.memory.layout import Layout
        from frugan.memory.recover import Recovery
        from frugan.training.graphs import Graphs, possible
        from frugan.training.state import State

        self.batch = len(images)
        self.state = State(recipe, gpu.device)
        self.generator, self.discriminator, self.step = self.state.generator, self.state.discriminator, self.state.step
        layout = Layout.of(self.batch, parts, named(levers))
        recovery = Recovery(
            [self.generator, self.discriminator], gpu.device, dict.fromkeys(self.state.phases, layout), "return",
            levers=dict.fromkeys(self.state.phases, ()), smallest=dict.fromkeys(self.state.phases, self.batch), coupled=True,
            changed=print, needs=lambda phase, layout: None,
        )  # fmt: skip
        self.graphs = Graphs(self.state, recovery, gpu.device, graphs and possible(recipe, gpu.device), print)
        kept = images.to(gpu.device)
        self.images = Batch(lambda row, n: kept[row % self.batch : row % self.batch + n])

    def update(self) -> dict[str, Any]:
        state, measured = self.state, {}
        for phase in state.phases.values():
            measured |= self.graphs.update(phase, self.images, state.images)
        state.images += self.batch
        if state.ema:
            state.ema.update(state.generator, self.batch, state.images)
        return measured


def tutorial(recipe: Any, gpu: Gpu, images: Any, tuned: str = "", compiled: bool = False) -> Callable[[], None]:
    """An update as tutorials have it, whose images and noise are on the device already.

    ``tuned``: a precision; then the usual advice is followed too: D frozen in G's phase, channels-last, fused Adam.
    """
    import torch

    from frugan.gan.losses import LOSSES
    from frugan.gan.networks import build
    from frugan.gan.networks.blocks import Dropout
    from frugan.gan.penalties import squared_norm

    options, objective, device = recipe.optimizer, recipe.objective, gpu.device
    channels, side, _ = recipe.data.shape
    layout = torch.channels_last if tuned else torch.contiguous_format
    networks = build(recipe.network, side, channels)
    for network in networks:
        for block in network.blocks:
            for name, layer in block.named_children():
                if isinstance(layer, Dropout):
                    setattr(block, name, torch.nn.Dropout(layer.p))
        network.to(device, memory_format=layout)
    optimizer_g, optimizer_d = (
        torch.optim.Adam(n.parameters(), lr=rate, betas=(options.beta1, options.beta2), fused=True if tuned else None)
        for n, rate in zip(networks, (options.lr_g, options.lr_d), strict=True)
    )
    frozen = [*networks[1].parameters()]
    generator, discriminator = (torch.compile(n) if compiled else n for n in networks)
    real = images.to(device).float().div(127.5).sub(1).contiguous(memory_format=layout)
    loss, n = LOSSES[type(objective)], len(images)
    scaler = torch.amp.GradScaler(device.type, enabled=tuned == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(tuned)

    def cast() -> Any:
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def judge(x: Any) -> Any:
        with cast():
            return discriminator(x).float()

    def generate() -> Any:
        with cast():
            return generator(torch.randn(n, recipe.network.latent_dim, device=device)).float()

    def penalty(logits: Any, x: Any) -> Any:
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return squared_norm(gradient)

    def update() -> None:
        optimizer_d.zero_grad()
        fake = generate().detach().requires_grad_(objective.r2 > 0)
        there = real.detach().requires_grad_(objective.r1 > 0)
        real_logits, fake_logits = judge(there), judge(fake)
        terms = loss.discriminator(objective, real_logits, fake_logits)
        if objective.r1:
            terms = terms + objective.r1 * penalty(real_logits, there)
        if objective.r2:
            terms = terms + objective.r2 * penalty(fake_logits, fake)
        scaler.scale(terms.mean()).backward()
        scaler.step(optimizer_d)
        optimizer_g.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(not tuned)
        fake_logits = judge(generate())
        with torch.set_grad_enabled(not tuned):
            real_logits = judge(real) if loss.paired else None
        scaler.scale(loss.generator(objective, fake_logits, real_logits).mean()).backward()
        scaler.step(optimizer_g)
        scaler.update()
        for parameter in frozen:
            parameter.requires_grad_(True)

    return update


def tell(found: Found) -> None:
    """What was found so far; the last of these counts."""
    print("RESULT " + json.dumps(found), flush=True)


def measure_hardware(gpu: Gpu, cell: Cell) -> Found:
    import torch

    there = gpu.words.get_device_properties(gpu.device)
    free, total = gpu.words.mem_get_info(gpu.device)
    cpu = re.search(r"model name\s*:\s*(.+)", text) if (text := _text("/proc/cpuinfo")) else None
    memory = re.search(r"MemTotal:\s*(\d+)", text) if (text := _text("/proc/meminfo")) else None
    found = {
        "device": there.name, "its memory": f"{total / MIB:,.0f} MiB, of which {free / MIB:,.0f} MiB were free",
        "torch": torch.__version__, "Python": platform.python_version(), "system": platform.platform(),
        "CPU": f"{cpu[1] if cpu else platform.processor() or 'unknown'}, {os.cpu_count()} cores",
        "memory of the host": f"{int(memory[1]) / 1024:,.0f} MiB" if memory else "unknown",
        "what a process holds, by": gpu.by,
    }  # fmt: skip
    if gpu.device.type == "cuda":
        rows = {row[0]: row[1] for row in asked("uuid", "driver_version") if len(row) == 2}
        found |= {
            "compute capability": f"{there.major}.{there.minor}, {there.multi_processor_count} multiprocessors",
            "driver": rows.get(gpu.uuid, "unknown"), "CUDA": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cuDNN": str(torch.backends.cudnn.version()), "torch is built for": ", ".join(torch.cuda.get_arch_list()),
            "allocator": torch.cuda.get_allocator_backend(),
        }  # fmt: skip
        if gpu.handle is not None:  # its two versions differ by what the driver keeps for itself
            import pynvml

            with suppress(Exception):
                first = pynvml.nvmlDeviceGetMemoryInfo(gpu.handle)
                second = pynvml.nvmlDeviceGetMemoryInfo(gpu.handle, version=pynvml.nvmlMemory_v2)
                found["NVML says"] = (
                    f"{first.total / MIB:,.0f} MiB, in use {first.used / MIB:,.0f} (version 1), {second.used / MIB:,.0f} and "
                    f"{second.reserved / MIB:,.0f} kept by the driver (version 2)"
                )
    return found


def measure_prediction(gpu: Gpu, cell: Cell) -> Found:
    from frugan.gan.levers import jobs
    from frugan.memory import limit
    from frugan.memory.layout import Layout
    from frugan.memory.search import Search
    from frugan.training.model import Model
    from frugan.utils.device import arithmetic

    recipe = recipe_of(cell)
    with arithmetic("fp32", gpu.device):
        model = Model(recipe, gpu.device)
        coupled = model.generator.couples_samples, model.discriminator.couples_samples
        search = Search(jobs(recipe, gpu.device, coupled, model.growth), gpu.device)
        search.prepare()
        del model
        layout = Layout.of(cell["batch"], cell["parts"])
        exact = {job.name: search.exact(job, layout) for job in search.jobs}
        allocated = max(e.moment.bytes for e in exact.values())
        held = search.holds([e.timeline for e in exact.values()], "reuse")
        del search, exact
        framework = limit.baseline(gpu.device)
        begun = gpu.words.memory_allocated(gpu.device), gpu.words.memory_reserved(gpu.device)
        limit.forget_peak(gpu.device)
        with gpu.watched() as most:
            loop = Frugan(recipe, gpu, pictures(recipe), cell["parts"])
            for _ in range(3):
                loop.update()
            gpu.wait()
            driver = most()
    words = gpu.words
    return {
        "allocated": [allocated, words.max_memory_allocated(gpu.device) - begun[0]],
        "reserved": [held, words.max_memory_reserved(gpu.device) - begun[1]],
        "process": [framework + held, max(driver, gpu.driver())],
        "by torch": limit.peak(gpu.device), "left over": begun,
    }  # fmt: skip


def trained(gpu: Gpu, cell: Cell, out: str, images: int | None = None, **own: Any) -> Found:
    """A training as a person starts it, on the built-in digits or the first of them; what its log says of memory."""
    import frugan
    from frugan.data.sources.standard import as_published
    from frugan.memory import limit

    settings = {
        "recipe": cell["recipe"], "image_size": cell["side"], "batch_size": cell["batch"], "epochs": 1, "out": out, "quiet": True,
        "sample_every": 100, "device": f"{gpu.device}",
    }  # fmt: skip
    data = "digits"
    if images is not None:
        data = f"{out}-digits"
        Path(data).mkdir()
        some = (as_published()[0][:images] * 15.9375).round().astype("uint8")
        header = struct.pack(">4B3I", 0, 0, 8, 3, *some.shape)
        (Path(data) / "train-images-idx3-ubyte").write_bytes(header + some.tobytes())
    if cell["quick"] and cell["measure"] != "recovery":  # which needs more than a few segments
        settings |= {"width_g": 8, "width_d": 8, "latent_dim": 8}
    limit.forget_peak(gpu.device)
    with gpu.watched() as most:
        frugan.train(data, **(settings | own))
        driver = most()
    return logged(out) | {"driver": driver}


def logged(out: str) -> Found:
    """What a run folder says of memory and losses."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    memory = next((line for line in reversed(lines) if line.get("event") == "memory"), {})
    losses = [v for line in lines if "event" not in line for k, v in line.items() if k.startswith("Loss")]
    return {
        "predicted": memory.get("predicted"), "peak": memory.get("measured"), "losses": losses,
        "events": [line for line in lines if line.get("event") not in (None, "memory")],
        "images": max(line.get("images", 0) for line in lines),
    }  # fmt: skip


def measure_budget(gpu: Gpu, cell: Cell) -> Found:
    """A training within ``memory`` bytes, or the smallest that is named when it is refused."""
    from frugan.training.planner import TooLittle

    with tempfile.TemporaryDirectory() as folder:
        try:
            return trained(gpu, cell, f"{folder}/run", 3 * cell["batch"], memory=str(cell["memory"]))
        except TooLittle as error:
            return {"refused": str(error), "smallest": error.smallest}


def measure_recovery(gpu: Gpu, cell: Cell) -> Found:
    """A training during which nearly all that is free is taken, and given back later; it is ended after ``stop`` updates."""
    import torch

    class Enough(Exception):
        pass

    ballast: list[Any] = []
    taken: Found = {}

    def fill(images: int) -> None:
        update = images // cell["batch"]
        if update == cell["fill"]:
            needs = gpu.words.max_memory_allocated(gpu.device) - gpu.words.memory_allocated(gpu.device)
            gpu.words.empty_cache()
            leave = max(int(cell["share"] * needs), 24 * MIB)  # a segment for small tensors and one for larger ones
            free = int(gpu.words.mem_get_info(gpu.device)[0])
            for _ in range(20):
                try:
                    ballast.append(torch.empty(max(1, free - leave), dtype=torch.uint8, device=gpu.device))
                    break
                except torch.OutOfMemoryError:
                    free -= 16 * MIB
            taken.update(needs=needs, left=leave, ballast=len(ballast[0]) if ballast else 0)
        if update == cell["empty"]:
            ballast.clear()
            gpu.words.empty_cache()
        if update == cell["stop"]:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        with suppress(Enough):
            trained(gpu, cell, f"{folder}/run", on_update=fill, report_every=1)
        return logged(f"{folder}/run") | taken


def timed(gpu: Gpu, update: Callable[[], object], updates: int, batch: int) -> float:
    """Images a second."""
    gpu.wait()
    begin = time.perf_counter()
    for _ in range(updates):
        update()
    gpu.wait()
    return updates * batch / (time.perf_counter() - begin)


def measure_precision(gpu: Gpu, cell: Cell) -> Found:
    import torch

    from frugan.utils.device import arithmetic

    recipe = recipe_of(cell, precision=cell["precision"])
    with arithmetic(cell["precision"], gpu.device):
        loop = Frugan(recipe, gpu, pictures(recipe))
        broken = torch.zeros((), device=gpu.device)  # not looked at while it goes on, which would wait each time
        last: dict[str, Any] = {}

        def update() -> None:
            last.update(loop.update())
            for value in last.values():
                broken.add_((~value.isfinite()).float())

        for _ in range(cell["updates"]):
            update()
        weights = sum(int((~p.isfinite()).sum()) for n in (loop.generator, loop.discriminator) for p in n.parameters())
        return {
            "broken": int(broken), "broken weights": weights, "scale": loop.step.scaler.get_scale(),
            "losses": [float(last["Loss_D"]), float(last["Loss_G"])],
        }  # fmt: skip


def measure_offloading(gpu: Gpu, cell: Cell) -> Found:
    import torch

    from frugan.memory import limit
    from frugan.utils.device import arithmetic

    ways = {
        "on the device": ({}, []), "the same again": ({}, []), "moments and average on the host": ({"offload_state": "yes"}, []),
        "activations on the host": ({}, ["offload_activations"]),
        "both": ({"offload_state": "yes"}, ["offload_activations"]),
    }  # fmt: skip
    found: Found = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        reference = None
        for name, (settings, levers) in ways.items():
            recipe = recipe_of(cell, **settings)
            with arithmetic("fp32", gpu.device):
                limit.baseline(gpu.device)
                limit.forget_peak(gpu.device)
                before = gpu.words.memory_allocated(gpu.device)
                loop = Frugan(recipe, gpu, pictures(recipe), levers=levers)
                for _ in range(5):
                    loop.update()
                gpu.wait()
                held = gpu.words.max_memory_allocated(gpu.device) - before
                weights = [p.detach().cpu() for n in (loop.generator, loop.discriminator) for p in n.parameters()]
                rate = timed(gpu, loop.update, cell["updates"], cell["batch"])
            reference = reference or weights
            apart = max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(reference, weights, strict=True))
            same = all(torch.equal(a, b) for a, b in zip(reference, weights, strict=True))
            way = f"{name}, deterministic algorithms" if deterministic else name
            found[way] = {"allocated": held, "milliseconds": 1e3 * cell["batch"] / rate, "same": same, "apart": apart}
            del loop
            tell(found)
        if found["the same again"]["same"]:
            break  # the device repeats itself as it is
    return found


def measure_resume(gpu: Gpu, cell: Cell) -> Found:
    """Trains, is killed in the middle, goes on, or compares two runs by the bits of everything in their last checkpoint."""
    import torch

    if cell["what"] == "compare":
        from frugan.reporting.run_folder import RunFolder
        from frugan.utils import checkpoint

        (one, _), (other, _) = (checkpoint.load(RunFolder(Path(run)).newest_checkpoint()) for run in cell["runs"])
        equal = [name for name in one if torch.equal(one[name], other[name])]
        numbers = [name for name in one if one[name].is_floating_point()]
        apart = max(float((one[n] - other[n]).double().norm() / one[n].double().norm().clamp_min(1e-12)) for n in numbers)
        return {"tensors": len(one), "equal": len(equal), "apart": apart}

    def kill(images: int) -> None:
        if images == cell["kill"]:
            tell({"images": images})
            os._exit(0)  # as a kill: nothing is written any more

    own: dict[str, Any] = {"on_update": kill} if cell["kill"] else {}
    return {"images": trained(gpu, cell, cell["run"], epochs=2, **own)["images"]}


def measure_speed(gpu: Gpu, cell: Cell) -> Found:
    from frugan.utils.device import arithmetic, fast_precision

    fast = fast_precision(gpu.device).replace("fp32", "bf16")
    images = pictures(recipe_of(cell))

    def frugal(precision: str, *, graphs: bool = True) -> Callable[[], object]:
        return Frugan(recipe_of(cell, precision=precision), gpu, images, graphs=graphs and not gpu.simulated).update

    plain = recipe_of(cell)
    loops: dict[str, tuple[str | None, Callable[[], Callable[[], object]]]] = {
        "tutorial": (None, lambda: tutorial(plain, gpu, images)),
        f"tuned, {fast}": (None, lambda: tutorial(plain, gpu, images, tuned=fast)),
        f"tuned, {fast}, compiled": (None, lambda: tutorial(plain, gpu, images, tuned=fast, compiled=True)),
        "frugan, fp32": ("fp32", lambda: frugal("fp32")),
        "frugan, tf32": ("tf32", lambda: frugal("tf32")),
        f"frugan, {fast}": (fast, lambda: frugal(fast)),
        f"frugan, {fast}, no graphs": (fast, lambda: frugal(fast, graphs=False)),
    }
    if not cell["compiled"]:
        del loops[f"tuned, {fast}, compiled"]
    else:
        del loops["frugan, fp32"], loops["frugan, tf32"], loops[f"frugan, {fast}, no graphs"]
    updates: dict[str, Callable[[], object]] = {}
    found: Found = {}
    for name, (precision, make) in loops.items():

        def run(precision: str | None = precision, name: str = name) -> float:
            if precision is None:  # torch as it comes
                return timed(gpu, updates[name], cell["updates"], cell["batch"])
            with arithmetic(precision, gpu.device):
                return timed(gpu, updates[name], cell["updates"], cell["batch"])

        begin = time.perf_counter()
        try:
            updates[name] = make()
            run()  # warms up, compiles
            found[name] = {"begun in": time.perf_counter() - begin, "rates": [], "run": run}
        except Exception as error:
            updates.pop(name, None)
            found[name] = {"failed": sentence(error)}
        tell({name: {k: v for k, v in f.items() if k != "run"} for name, f in found.items()})
    for _ in range(cell["rounds"]):
        for name in updates:
            found[name]["rates"].append(found[name]["run"]())
        tell({name: {k: v for k, v in f.items() if k != "run"} for name, f in found.items()})
    return {name: {k: v for k, v in f.items() if k != "run"} for name, f in found.items()}


MEASURES: dict[str, Callable[[Gpu, Cell], Found]] = {
    "hardware": measure_hardware, "prediction": measure_prediction, "budget": measure_budget, "recovery": measure_recovery,
    "precision": measure_precision, "offloading": measure_offloading, "resume": measure_resume, "speed": measure_speed,
}  # fmt: skip


def sentence(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) < 200 else first[:197] + "..."


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


# ---- the page: all of this runs in the process that starts the others, without torch -----------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: of it.
        says: what was done.
        columns: of its table.
        cells: what is measured, in groups: the cells of a group one after the other, each with what the one before gave.
        rows: a cell and what it gave to rows of the table.
        alone: whether nothing else may run meanwhile, since it is timed, or takes all memory.
    """

    title: str
    says: str
    columns: tuple[str, ...]
    cells: Callable[[Options], list[Cells]]
    rows: Callable[[Cell, Found], list[tuple[object, ...]]]
    alone: bool = True


def each(*cells: Cell) -> Cells:
    """A group of cells that need nothing of one another."""
    return (cell for cell in cells)


def hardware(options: Options) -> list[Cells]:
    return [each({"measure": "hardware"})]


def hardware_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    return list(found.items())


def device_tests(options: Options) -> list[Cells]:
    return [each({"measure": "tests", "seconds": 300, "jobs": options.jobs})]


def tests_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    return [("tests/test_device.py", found["summary"]), *(("", line) for line in found["lines"])]


def prediction(options: Options) -> list[Cells]:
    sizes, batches = (28, 64, 128), (32, 128)
    if options.quick:
        return [each({"measure": "prediction", "recipe": "dcgan", "side": 8, "batch": 16, "parts": 4})]
    groups = []
    for recipe in RECIPES:
        common = {"measure": "prediction", "recipe": recipe, "parts": 1}
        cells = [common | {"side": side, "batch": batch} for batch in batches for side in sizes]
        groups.append(each(*cells, *([cells[-1] | {"parts": 4}] if recipe in ("dcgan", "r3", "resize") else [])))
    return groups


def prediction_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    row: list[object] = [cell["recipe"], cell["side"], f"{cell['batch']}" + (f" in {cell['parts']}" if cell["parts"] > 1 else "")]
    for what in ("allocated", "reserved", "process"):
        predicted, measured = found[what]
        row += [mib(predicted), mib(measured), f"{(predicted / measured - 1) * 100:+.1f}%" if measured else "-"]
    return [tuple(row)]


def budgets(options: Options) -> list[Cells]:
    side, batch = (8, 64) if options.quick else (64, 128)
    common = {"measure": "budget", "side": side, "batch": batch}
    return [at_its_smallest(common | {"recipe": recipe}, whole=True) for recipe in (RECIPES[:1] if options.quick else RECIPES)]


def at_its_smallest(common: Cell, *, whole: bool) -> Cells:
    """A budget that is refused, the smallest that is named then, and around it."""
    found = yield common | {"memory": MIB, "share": "1 MiB"}
    if smallest := found.get("smallest"):
        yield common | {"memory": smallest, "share": "the smallest"}
        if whole:
            yield common | {"memory": 2 * smallest, "share": "twice that"}
            yield common | {"memory": int(0.9 * smallest), "share": "90% of it"}


def budget_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    label = (cell["recipe"], cell["share"], mib(cell["memory"]))
    must_be = cell["share"] in ("1 MiB", "90% of it")
    if "refused" in found:
        return [(*label, "-", "-", "-", f"{'' if must_be else 'NOT held: '}refused, names {mib(found['smallest'])} MiB")]
    held = "held" if found["peak"] <= cell["memory"] else f"NOT held: over by {mib(found['peak'] - cell['memory'])} MiB"
    if must_be:
        held = f"NOT refused, {held}"
    if found["driver"] > cell["memory"]:
        held += f"; by the driver over by {mib(found['driver'] - cell['memory'])} MiB"
    if found["events"]:
        held += f"; {len(found['events'])} changes of plan, as memory ran out"
    return [(*label, mib(found["predicted"]), mib(found["peak"]), mib(found["driver"]), held)]


def recovery(options: Options) -> list[Cells]:
    common = {"measure": "recovery", "fill": 3, "empty": 10, "stop": 13, "share": 0.4, "side": 64, "batch": 128}
    if options.quick:
        common |= {"fill": 1, "empty": 3, "stop": 4, "side": 28, "batch": 64}
    return [each(*(common | {"recipe": recipe} for recipe in (("r3",) if options.quick else RECIPES)))]


def recovery_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    changes = [f"{e['phase']}: {e['change']} ({e['guarantee']})" for e in found["events"] if "change" in e]
    finite = all(v == v and abs(v) < 1e9 for v in found["losses"])
    went_on = f"went on to {found['images']} images, losses {'finite' if finite else 'NOT finite'}"
    left = (mib(found.get("ballast")), mib(found.get("needs")), mib(found.get("left")))
    return [(cell["recipe"], *left, "; ".join(changes) or "memory did not run out", went_on)]


def speed_cells(options: Options, compiled: bool) -> list[Cells]:
    sizes = ((8, 16),) if options.quick else ((28, 128), (64, 64))
    common = {"measure": "speed", "compiled": compiled, "seconds": 180 if compiled else 90}
    common |= {"rounds": 2, "updates": 1} if options.quick else {"rounds": 5, "updates": 20}
    recipes = ("r3",) if options.quick else RECIPES
    return [each(*(common | {"recipe": r, "side": side, "batch": batch} for side, batch in sizes for r in recipes))]


def speed_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    base = found.get("tutorial", {}).get("rates")
    rows: list[tuple[object, ...]] = []
    for name, loop in found.items():
        if not isinstance(loop, dict):
            continue
        label = (cell["recipe"], cell["side"], cell["batch"], name)
        if rates := loop.get("rates"):
            ratio = statistics.median(a / b for a, b in zip(rates, base, strict=False)) if base else None
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            shown = f"{ratio:.2f}" if ratio else "-"
            rows.append((*label, f"{statistics.median(rates):,.0f}", spread, shown, f"{loop['begun in']:.1f}"))
        else:
            rows.append((*label, loop.get("failed", "no time for a round"), "", "", ""))
    return rows


def precisions(options: Options) -> list[Cells]:
    side, batch, updates = (8, 16, 10) if options.quick else (64, 64, 200)
    common = {"measure": "precision", "side": side, "batch": batch, "updates": updates}
    named = ("tf32", "bf16") if options.quick else ("fp32", "tf32", "bf16", "fp16")
    recipes = ("dcgan",) if options.quick else RECIPES
    return [each(*(common | {"recipe": recipe, "precision": precision} for precision in named)) for recipe in recipes]


def precision_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    broken = found["broken"] + found["broken weights"]
    finite = "all finite" if not broken else f"{found['broken']} values and {found['broken weights']} weights not finite"
    scale = f"{found['scale']:g}" if cell["precision"] == "fp16" else "-"
    losses = ", ".join(f"{v:.3f}" for v in found["losses"])
    return [(cell["recipe"], cell["precision"], cell["updates"], finite, losses, scale)]


def resume(options: Options) -> list[Cells]:
    return [resumed(options, recipe) for recipe in (("mlp",) if options.quick else RECIPES)]


def resumed(options: Options, recipe: str) -> Cells:
    """A run, the same again, and one that is killed and goes on; then they are compared."""
    side, batch = (8, 256) if options.quick else (28, 128)
    epoch = 1797 // batch
    killed = (epoch + epoch // 2) * batch
    with tempfile.TemporaryDirectory() as folder:
        common = {"measure": "resume", "recipe": recipe, "side": side, "batch": batch, "what": "train", "shown": ""}
        runs = {name: f"{folder}/{recipe}-{name}" for name in ("one", "again", "killed")}
        for name, kill in (("one", 0), ("again", 0), ("killed", killed), ("killed", 0)):
            found = yield common | {"run": runs[name], "kill": kill}
            if "failed" in found:
                break
        else:
            for name, shown in (("again", "run twice"), ("killed", f"killed after {killed} images, gone on with")):
                yield common | {"what": "compare", "runs": [runs["one"], runs[name]], "shown": shown}


def resume_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    if cell["what"] == "train":
        return []
    same = "bitwise" if found["tensors"] == found["equal"] else f"{found['apart']:.1e}"
    return [(cell["recipe"], cell["shown"], found["tensors"], found["equal"], same)]


def offloading(options: Options) -> list[Cells]:
    side, batch, updates = (8, 16, 2) if options.quick else (64, 64, 20)
    common = {"measure": "offloading", "side": side, "batch": batch, "updates": updates}
    return [each(*(common | {"recipe": recipe} for recipe in (("mlp",) if options.quick else ("dcgan", "r3"))))]


def offloading_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    return [
        (
            cell["recipe"], name, mib(way["allocated"]), f"{way['milliseconds']:.1f}",
            "bitwise" if way["same"] else f"{way['apart']:.1e}",
        )
        for name, way in found.items() if isinstance(way, dict)
    ]  # fmt: skip


def allocator(options: Options) -> list[Cells]:
    side, batch = (8, 16) if options.quick else (64, 128)
    expandable = {"allocator": "expandable_segments:True"}
    groups = []
    for recipe in ("r3",) if options.quick else RECIPES:
        common = {"measure": "prediction", "recipe": recipe, "side": side, "batch": batch, "parts": 1}
        groups.append(each(*(common | way for way in ((expandable,) if options.quick else ({"allocator": ""}, expandable)))))
    for recipe in () if options.quick else ("dcgan", "r3"):
        common = {"measure": "budget", "recipe": recipe, "side": side, "batch": batch} | expandable
        groups.append(at_its_smallest(common, whole=False))
    return groups


def allocator_rows(cell: Cell, found: Found) -> list[tuple[object, ...]]:
    mode = cell["allocator"] or "as it comes"
    if cell["measure"] == "prediction":
        row = prediction_rows(cell, found)[0]
        return [(cell["recipe"], mode, "training", *row[6:9], "")]
    row = budget_rows(cell, found)[0]
    return [(cell["recipe"], mode, f"budget: {cell['share']}, {row[2]} MiB", *row[3:5], "", row[6])]


SECTIONS: dict[str, Section] = {
    "hardware": Section("Hardware", "", ("", ""), hardware, hardware_rows),
    "tests": Section(
        "Device tests", "The walk of the test suite (`tests/test_device.py`), on this device.", ("", ""), device_tests, tests_rows,
        alone=False,
    ),
    "prediction": Section(
        "Prediction",
        "MiB predicted before training and measured during three updates of both networks, fp32. *Allocated* is tensors, against "
        "`max_memory_allocated`; *reserved* is what the allocator takes for them, against `max_memory_reserved`, without the "
        "margin that plans add; *process* is that and what the process held before, against what the driver says.",
        ("recipe", "px", "batch", "allocated", "measured", "error", "reserved", "measured", "error", "process", "driver", "error"),
        prediction, prediction_rows, alone=False,
    ),
    "budgets": Section(
        "Budgets",
        "`frugan train --memory` on built-in digits, three updates, at the smallest budget that frugan names, at twice that, and "
        "at 90% of it, which must be refused. MiB; *held at most* is what torch has reserved and the context.",
        ("recipe", "budget", "MiB", "predicted", "held at most", "by the driver", "outcome"), budgets, budget_rows, alone=False,
    ),
    "recovery": Section(
        "Recovery",
        "During a training without a budget everything that is free is taken but for 40% of what a phase needs beyond what is "
        "there all the time, for seven updates. It must go on.",
        ("recipe", "MiB taken", "a phase needs", "left", "what was changed", "outcome"), recovery, recovery_rows,
    ),
    "speed": Section(
        "Speed",
        "Images/s of an update of both networks on one batch, medians of interleaved rounds. *Tutorial*: torch as it comes, where "
        "convolutions may round to TF32, D's gradients computed in G's phase too; images and noise are on the device already. "
        "*Tuned*: autocast, channels-last, fused Adam, D frozen in G's phase. *frugan*: everything its trainer does, images from "
        "the host and the averaged generator included; its fp32 never rounds to TF32.",
        ("recipe", "px", "batch", "loop", "images/s", "from, to", "of the tutorial", "begun in, s"),
        lambda options: speed_cells(options, False), speed_rows,
    ),
    "precision": Section(
        "Precisions",
        "Updates in each precision; whether all losses and weights stayed finite, the last losses of D and G, and the scale of "
        "fp16 (65536 at the start).",
        ("recipe", "precision", "updates", "finite", "last losses", "scale"), precisions, precision_rows, alone=False,
    ),
    "resume": Section(
        "Resume",
        "Two epochs, each time in processes of their own; everything in the last checkpoint is compared with that of a run which "
        "was never stopped. Where even two such runs differ, the device does not repeat itself; the number is the largest relative "
        "difference of a tensor.",
        ("recipe", "compared with one run", "tensors", "equal", "difference"), resume, resume_rows, alone=False,
    ),
    "offloading": Section(
        "Offloading",
        "The most that is allocated, the time of an update, and the weights after five updates against those of the first line.",
        ("recipe", "what waits where", "MiB", "ms an update", "weights"), offloading, offloading_rows,
    ),
    "allocator": Section(
        "Allocator modes",
        "With `PYTORCH_ALLOC_CONF=expandable_segments:True`, and without. MiB reserved, and for a budget held at most.",
        ("recipe", "mode", "what", "predicted", "measured", "error", "outcome"), allocator, allocator_rows, alone=False,
    ),
    "compiled": Section(
        "Speed, compiled",
        "As above, the tuned loop also with `torch.compile` of both networks; *begun in* has compiling in it.",
        ("recipe", "px", "batch", "loop", "images/s", "from, to", "of the tutorial", "begun in, s"),
        lambda options: speed_cells(options, True), speed_rows,
    ),
}  # fmt: skip


def mib(count: float | None) -> str:
    return "-" if count is None else f"{count / MIB:,.1f}" if count < 100 * MIB else f"{count / MIB:,.0f}"


def ended(command: list[str], seconds: float, **environment: str) -> tuple[str, str, str]:
    """What a process wrote on both streams, and why it ended: nothing if it ended well. Its children end with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip
    why = ""
    try:
        out, error = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        why = f"ended after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if why:
        out, error = process.communicate()
    elif process.returncode < 0:
        why = f"ended by signal {-process.returncode}"
    elif process.returncode:
        why = sentence(RuntimeError((error.strip().splitlines() or [f"exit status {process.returncode}"])[-1]))
    return out, error, why


def measured(cell: Cell, options: Options, left: float, cache: str) -> Found:
    """What a cell gives; ``failed`` says why it gave no more."""
    seconds = min(left, cell.get("seconds", 120))
    if cell["measure"] == "tests":
        command = [sys.executable, "-m", "pytest", "tests/test_device.py", "-q", "-rfE", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", "-n", f"{cell['jobs'] // 2}"] if cell["jobs"] > 1 else []
        out, error, why = ended(command, seconds, FRUGAN_TEST_DEVICE=options.device)
        lines = [line for line in (out + error).splitlines() if line.strip()]
        counted = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
        summary = counted[-1].strip("= ") if counted else why or "no tests were found"
        named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return {"summary": summary, "lines": [sentence(RuntimeError(line)) for line in named[:20]]}
    command = [sys.executable, __file__, "--device", options.device, "--cell", json.dumps(cell)]
    environment = {"FRUGAN_CACHE": cache, "PYTHONWARNINGS": "ignore"} | WORKSPACES
    if cell["measure"] == "offloading":
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS does not repeat itself
    if mode := cell.get("allocator"):  # the newer name and the older one
        environment |= {"PYTORCH_ALLOC_CONF": mode, "PYTORCH_CUDA_ALLOC_CONF": mode}
    out, error, why = ended(command, seconds, **environment)
    results = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT ")]
    found: Found = json.loads(results[-1]) if results else {}
    if "Traceback" in error:
        print(error[-6000:], file=sys.stderr)
    return found | {"failed": why} if why else found


def table(section: Section, rows: Iterable[tuple[object, ...]]) -> str:
    wide = len(section.columns)
    lines = [section.columns, ("---",) * wide, *((*row, *[""] * (wide - len(row))) for row in rows)]
    return "\n".join("| " + " | ".join(str(word).replace("|", "/") for word in line) + " |" for line in lines)


def shown(section: Section, cells: list[tuple[Cell, Found]]) -> str:
    rows: list[tuple[object, ...]] = []
    for cell, found in cells:
        failed = found.get("failed")
        whole = {k: v for k, v in found.items() if k != "failed"}
        try:
            made = section.rows(cell, whole)
        except (KeyError, TypeError):  # it did not get that far
            made = []
        if failed or (not made and not whole):
            about = [
                cell.get(k) for k in ("recipe", "side", "batch", "precision", "share", "allocator", "what", "run") if cell.get(k)
            ]
            made.append((" ".join(Path(str(a)).name for a in about), f"failed: {failed or 'it gave nothing'}"))
        rows += made
    return table(section, rows) if rows else "Nothing was measured."


def page(options: Options, results: dict[str, list[tuple[Cell, Found]]], unreached: dict[str, str], seconds: float) -> str:
    simulated = options.device.startswith("sim")
    what = "the simulated device of the test suite, not a GPU" if simulated else "a GPU"
    quick = " Cells are tiny (`--quick`): nothing here says how fast anything is." if options.quick else ""
    parts = [
        f"# What only a GPU can tell\n\nWritten by `make gpu` (`benchmarks/gpu.py`) on {time.strftime('%Y-%m-%d')}, on {what}, in "
        f"{seconds / 60:.1f} minutes.{quick} Each cell is a process of its own."
    ]
    for name, section in SECTIONS.items():
        body = shown(section, results[name]) if results.get(name) else ""
        note = unreached.get(name, "")
        parts.append("\n\n".join(part for part in (f"## {section.title}", section.says, body, note) if part))
    return "\n\n".join(parts) + "\n"


def main(options: Options) -> None:
    if options.cell:
        from frugan.utils.errors import UserError

        cell = json.loads(options.cell)
        try:
            tell(MEASURES[cell["measure"]](Gpu(options.device), cell))
        except UserError as error:
            sys.exit(str(error))
        return
    begun = time.monotonic()
    end = begun + 60 * options.minutes
    results: dict[str, list[tuple[Cell, Found]]] = {}
    unreached: dict[str, str] = {}

    def run(name: str, cells: Cells, cache: str) -> list[tuple[Cell, Found]]:
        """All that a group of cells gives while there is time."""
        done: list[tuple[Cell, Found]] = []
        found: Found | None = None
        with suppress(StopIteration):
            while True:
                cell = cells.send(found) if found is not None else next(cells)
                if (left := end - time.monotonic()) < 5:
                    cells.close()
                    unreached[name] = f"Not reached, or not to its end: {options.minutes:g} minutes were over."
                    break
                cell |= {"quick": options.quick}
                found = measured(cell, options, left, cache)
                if name == "hardware" and "failed" in found:
                    print(found["failed"], file=sys.stderr)
                    sys.exit(1)
                done.append((cell, found))
                took = f"{time.monotonic() - begun:5.0f} s"
                print(took, name, json.dumps(cell), json.dumps(found), file=sys.stderr, flush=True)
        return done

    for name in SECTIONS:
        if options.only and name not in options.only and name != "hardware":
            unreached[name] = "Not asked for this time."
        elif name == "compiled" and options.device.startswith("sim"):
            unreached[name] = "Not on the simulated device."
    asked = {name: section for name, section in SECTIONS.items() if name not in unreached}
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(options.jobs) as pool:
        results["hardware"] = run("hardware", SECTIONS["hardware"].cells(options)[0], cache)
        together = {
            name: [pool.submit(run, name, group, cache) for group in section.cells(options)]
            for name, section in asked.items() if not section.alone
        }  # fmt: skip
        results |= {name: [found for group in groups for found in group.result()] for name, groups in together.items()}
        for name, section in asked.items():
            if section.alone and name != "hardware":
                results[name] = [found for group in section.cells(options) for found in run(name, group, cache)]
    text = page(options, results, unreached, time.monotonic() - begun)
    if options.json:
        numbers = {name: [{"cell": c, "found": f} for c, f in done] for name, done in results.items()}
        options.json.write_text(json.dumps(numbers, indent=1))
    whole = options.device.startswith("cuda") and not options.only and not options.quick
    out = options.out or (PAGE if whole else None)
    if out is None:
        print(text)
    else:
        out.write_text(text)
        print(f"Written to {out}.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
