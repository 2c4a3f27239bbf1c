"""What `gpu.py` measures: each a function of the device and of a cell, run in a process of its own.

A cell is what JSON has: ``measure`` names the function, the rest is its settings; what it gives, or gave until it was ended, is
printed by `tell`.
"""

import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
Cell = dict[str, Any]
Found = dict[str, Any]


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
        self.uuid = (
            "" if self.simulated or self.device.type == "cpu" else f"GPU-{self.words.get_device_properties(self.device).uuid}"
        )
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
        search = Search(jobs(recipe, gpu.device, coupled, model.growth, in_four_passes=model.step.in_four_passes), gpu.device)
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
