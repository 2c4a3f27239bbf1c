"""What only a GPU can tell, on one page: tests, memory, budgets, recovery, precisions, offloading, resume, speed.

    make gpu                                   # or: python benchmarks/gpu.py; writes docs/gpu.md in at most 22 minutes
    python benchmarks/gpu.py --only speed      # a part, printed; --out FILE writes it, --json FILE keeps the numbers

Each cell is a process of its own: one that fails or takes too long is a row that says so. Sections come in the order of their
importance, and what time did not suffice for is named. Timings are taken between two synchronizations; loops that are compared
take turns in one process, and tables have medians over the turns. A whole run alone writes docs/gpu.md; any other is printed.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from gpu_cells import MEASURES, MIB, ROOT, Cell, Found, Gpu, sentence, tell

from frugan.cli import WORKSPACES

PAGE = ROOT / "docs" / "gpu.md"
RECIPES = ("mlp", "upsample", "dcgan", "r3", "resize")
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
