"""The whole walk on a device that is not the CPU: the simulated one, or with `make gpu` the one that FRUGAN_TEST_DEVICE names."""

import copy
import gc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import frugan
from frugan.cli import main
from frugan.config import recipes
from frugan.config.run import Run
from frugan.gan.networks.convolutions import Conv2d, ConvTranspose2d
from frugan.memory import levers
from frugan.memory.budget import TooLittle
from frugan.memory.layout import Guarantee
from frugan.memory.recover import Change
from frugan.memory.segments import Full, Segments
from frugan.reporting.console import Console
from frugan.training.planning import find
from frugan.training.session import Session
from frugan.training.trainer import Trainer
from frugan.utils import device
from frugan.utils.accelerator import accelerator

from . import sim
from .conftest import OWN_CODE, SMALL, assert_same_state, final_state
from .test_convolutions import CHOSEN
from .test_recover import TINY, Scarce, everything
from .test_resume import Killed, kill_at

NAME = os.environ.get("FRUGAN_TEST_DEVICE", "sim")
MIB = 1 << 20
simulated = NAME == "sim"
if simulated:
    if why := sim.missing():
        pytest.skip(why, allow_module_level=True)
    sim.setup()
DEVICE = device.choose(NAME)
FEW_PLANS = dict.fromkeys(
    ("recompute_generator", "checkpoint_blocks", "separate_terms", "offload_activations"), "no"
)  # sooner made
UNCOUPLED = {"norm_g": "none", "norm_d": "none"}
only_simulated = pytest.mark.skipif(not simulated, reason="a real device does not let one set this")


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """The device as new: no limit, no other programs, nothing kept by the allocator."""
    yield
    there = accelerator(DEVICE)
    assert there is not None
    there.limit(None)
    if simulated:
        sim.others(0)
        sim.fail(-1)
    gc.collect()
    there.release()


def settings_of(recipe: str, **own: object) -> dict[str, object]:
    return SMALL | {"recipe": recipe, "device": NAME} | own


# ---- the walk --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", OWN_CODE)
def test_a_recipe_trains_samples_evaluates_and_generates(recipe: str, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = settings_of(recipe, flip=True, conditional=True, evaluate_every=2, evaluate_samples=64, sample_every=1)
    frugan.train(few, out=out, **asked)
    for name in (
        "real_images.png",
        "generated_images/epoch_1.png",
        "final_generated_images.png",
        "report.html",
        "best.safetensors",
    ):
        assert (out / name).stat().st_size > 0, name
    assert {"metrics", "memory"} <= {line.get("event") for line in lines(out)}
    on_device, on_host = (frugan.load(out, device=name).generate(9, seed=3) for name in (NAME, "cpu"))
    assert on_device.device.type == "cpu"
    assert (on_device.int() - on_host.int()).abs().max() <= (0 if simulated else 3)
    main(["evaluate", str(out), "--samples", "64", "--device", NAME])
    main(["generate", str(out), "--n", "4", "--device", NAME, "--out", str(tmp_path / "made")])
    assert any((tmp_path / "made").iterdir())


@only_simulated
@pytest.mark.parametrize("recipe", ["dcgan", "r3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_ends_with_the_weights_that_the_cpu_gives(recipe: str, precision: str, few: Path, tmp_path: Path) -> None:
    asked = {
        "precision": precision, "flip": True, "augment": "diff", "accumulation_steps": 2, "generator_accumulation_steps": 3,
        "epochs": 1, "channels_last": recipe != "dcgan",  # else the CPU has products of its own (test_convolutions.py)
    }  # fmt: skip
    runs = [frugan.train(few, out=tmp_path / name, **settings_of(recipe, device=name, **asked)) for name in ("sim", "cpu")]
    if recipe == "dcgan":
        assert_same_state(*runs)
    (there, _), (here, _) = (final_state(run) for run in runs)
    for name, tensor in there.items():  # r3's convolutions are computed by another of the CPU's kernels
        assert torch.allclose(tensor.float(), here[name].float(), rtol=1e-3, atol=1e-4), name


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_change_no_bit(recipe: str, precision: str, few: Path, tmp_path: Path) -> None:
    more = {"flip": True, "augment": "diff", "conditional": True} if precision == "fp32" else {"accumulation_steps": 2}
    runs = []
    for way in ("yes", "no"):
        asked = settings_of(recipe, precision=precision, **more)
        settings = {k: v for k, v in asked.items() if k in recipes.get(recipe).flat()}
        run = Run(out=str(tmp_path / way), device=NAME, cuda_graphs=way)  # type: ignore[arg-type]
        trainer = Trainer(Session.open(recipes.get(recipe).replace(data=str(few), **settings), run, Console(True)))
        runs.append(trainer.train())
        assert trainer.loop
        assert [r.graph is not None for r in trainer.loop.graphs.recorded.values()] == ([True] * 2 if way == "yes" else [])
    assert_same_state(*runs)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
def test_where_memory_runs_out_while_a_graph_is_made_training_goes_on_without(few: Path, tmp_path: Path) -> None:
    plain = frugan.train(few, out=tmp_path / "plain", cuda_graphs="no", **settings_of("dcgan"))
    for fails in (0, 3, 30):  # on its tape, and while it is recorded

        def scarce(images: int, fails: int = fails) -> None:
            nonlocal open_
            if images == 32 and not open_:
                open_ = Scarce(fails, DEVICE)
                open_.__enter__()
            elif images == 48 and open_:
                open_.__exit__(None, None, None)

        open_: Scarce | None = None
        run = frugan.train(few, out=tmp_path / f"{fails}", cuda_graphs="yes", on_update=scarce, **settings_of("dcgan"))
        assert_same_state(plain, run)


@pytest.mark.parametrize(
    ("recipe", "precision"), [("dcgan", "fp32"), ("upsample", "fp32"), ("projected", "fp32"), ("dcgan", "fp16")]
)
def test_a_training_that_is_killed_and_goes_on_was_never_stopped(recipe: str, precision: str, few: Path, tmp_path: Path) -> None:
    asked = settings_of(recipe, precision=precision, flip=True, augment="ada", ada_images=500, accumulation_steps=3)
    if recipe == "projected":  # takes a minute with it
        asked["whole_batch_norm"] = "no"
    straight = frugan.train(few, out=tmp_path / "straight", **asked)
    with pytest.raises(Killed):
        frugan.train(few, out=tmp_path / "broken", on_update=kill_at(7), **asked)
    assert_same_state(straight, frugan.train(few, out=tmp_path / "broken", **asked))


@pytest.mark.parametrize("recipe", OWN_CODE)
def test_the_smallest_budget_that_is_named_is_held_and_less_is_refused(
    recipe: str, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", str(few), "--recipe", recipe, "--image-size", "32", "--batch-size", "64", "--epochs", "1", "--device", NAME]
    asked += ["--whole-batch-norm", "no"]  # in the smallest budget it takes ten times as long; tests/test_batchnorm.py has it
    if recipe != "dcgan":  # one that looks at all plans is enough
        few_plans = FEW_PLANS | {"offload_state": "no"}
        asked += [word for name, value in few_plans.items() for word in (f"--{name.replace('_', '-')}", value)]

    def within(memory: str, out: str) -> tuple[int, str]:
        try:
            main([*asked, "--memory", memory, "--out", str(tmp_path / out)])
        except SystemExit as ended:
            return int(ended.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    code, said = within("2MiB", "a")
    assert code == 2 and len(said.splitlines()) == 1, said
    named = r"the smallest that works is --memory (\d+)MiB"
    first = int(re.search(named, said)[1])  # type: ignore[index]
    code, said = within(f"{int(0.9 * first)}MiB", "b")
    assert code == 2
    smallest = int(re.search(named, said)[1])  # type: ignore[index]
    assert first <= smallest <= first + 1  # of one process, in which the training before has left something
    assert within(f"{smallest}MiB", "c") == (0, "")
    memory = next(line for line in lines(tmp_path / "c") if line.get("event") == "memory")
    assert memory["measured"] <= memory["budget"] == smallest * MIB
    assert memory["measured"] <= memory["predicted"] * 1.02
    assert "memory ran out" not in {line.get("event") for line in lines(tmp_path / "c")}
    ratio = torch.get_device_module(DEVICE).set_per_process_memory_fraction
    ratio(1.0, DEVICE)  # as it is after the training: a large tensor has room again
    torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE)


def test_what_is_named_has_room_to_look_for_a_plan() -> None:
    """It is looked at with more samples than are computed at once where memory is scarcest."""
    few_plans = {"offload_state": "no", "recompute_generator": "no", "checkpoint_blocks": "no"}
    recipe = recipes.get("r3").replace(image_size=48, channels=3, batch_size=16, **few_plans)
    with pytest.raises(TooLittle) as refused:
        find(recipe, DEVICE, memory="2MiB")
    smallest = refused.value.smallest
    assert find(recipe, DEVICE, memory=f"{smallest}")[1].predicted <= smallest


@pytest.mark.parametrize("recipe", OWN_CODE)
def test_memory_that_runs_out_in_an_update_is_recovered_from(recipe: str, few: Path, tmp_path: Path) -> None:
    asked = {k: v for k, v in TINY.items() if k in recipes.get(recipe).flat()}
    outcomes: list[Guarantee] = []

    def some_allocations(images: int) -> None:
        if images != 32:
            return
        assert trainer.loop
        loop = trainer.loop
        state, recovery = loop.state, loop.recovery
        before, layouts, counters = everything(trainer), dict(recovery.layouts), (state.images, state.updates)
        changes: list[Change] = []
        recovery.changed = changes.append

        def update(fails: int | None) -> tuple[dict[str, Tensor], int]:
            for key, tensor in state.capture()[0].items():
                tensor.copy_(before[key])
            state.images, state.updates = counters
            recovery.layouts = dict(layouts)
            changes.clear()
            with Scarce(fails, DEVICE) as scarce:
                loop.advance()
            return everything(trainer), scarce.allocations

        wanted, allocations = update(None)
        for fails in range(0, allocations, max(1, allocations // 25)):
            got, _ = update(fails)
            guarantee = max((c.guarantee for c in changes), default=Guarantee.BITWISE)
            outcomes.append(guarantee)
            for key, tensor in wanted.items():
                if guarantee == Guarantee.BITWISE:
                    assert torch.equal(tensor, got[key]), (fails, key, changes)
                elif guarantee == Guarantee.REASSOCIATION:
                    assert torch.allclose(tensor.float(), got[key].float(), rtol=1e-4, atol=1e-4), (fails, key, changes)
        update(None)

    run = Run(out=str(tmp_path / "r"), device=NAME, cuda_graphs="no")
    trainer = Trainer(Session.open(recipes.get(recipe).replace(data=str(few), **asked), run, Console(True)), some_allocations)
    trainer.train()
    assert len(outcomes) > 20 and (recipe != "r3" or any(outcomes))


def test_plans_are_shown_for_the_device(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--image-size", "32", "--batch-size", "64", "--separate-terms", "no", "--offload-activations", "no", "--device", NAME]
    main(["plan", str(few), *asked, "--compare", "--memory", "110MiB" if simulated else "4GiB"])
    said = capsys.readouterr().out
    assert "images/s" in said
    assert not simulated or "micro-batches of" in said


# ---- memory on the device --------------------------------------------------------------------------------------------------------


@only_simulated
def test_a_device_that_is_full_is_a_sentence(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = accelerator(DEVICE)
    assert there is not None
    sim.others(there.free() - 3 * MIB)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(few), "--recipe", "dcgan", "--device", NAME])
    assert capsys.readouterr().err == "frugan: memory ran out: close other programs or ask for less, then run the command again.\n"


@pytest.mark.parametrize("recipe", OWN_CODE)
@pytest.mark.parametrize("levers_", [{}, {"offload_activations": True}])
def test_what_is_predicted_is_what_the_allocator_reserves(
    recipe: str, levers_: dict[str, object], few: Path, tmp_path: Path
) -> None:
    asked = {"image_size": 32, "batch_size": 64, "epochs": 2, "device": NAME, "quiet": True}
    run = frugan.train(few, out=tmp_path / "run", recipe=recipe, **asked, **dict.fromkeys(levers_, "yes"))
    memory = next(line for line in lines(run) if line.get("event") == "memory")
    assert -0.03 < memory["predicted"] / memory["measured"] - 1 < 0.15, memory


def test_offloading_changes_no_bit_and_takes_less(few: Path, tmp_path: Path) -> None:
    asked = settings_of("r3", image_size=32, batch_size=64, epochs=2)
    plain = frugan.train(few, out=tmp_path / "plain", **asked)
    peaks = {}
    for lever in ("offload_activations", "offload_state"):
        run = frugan.train(few, out=tmp_path / lever, **asked, **{lever: "yes"})
        assert_same_state(plain, run)
        peaks[lever] = json.loads((run / "plan.json").read_text())["training_allocates"]
    before = json.loads((plain / "plan.json").read_text())["training_allocates"]
    assert all(peak < before for peak in peaks.values()), (before, peaks)


def test_offloaded_state_is_taken_by_itself_where_nothing_else_fits(few: Path, tmp_path: Path) -> None:
    width = 160 if simulated else 320  # on a GPU 20 MiB more are named than must be
    wide = FEW_PLANS | {"image_size": 16, "batch_size": 64, "width_g": width, "width_d": width, "latent_dim": 256}
    recipe = recipes.get("dcgan").replace(**wide, channels=1, data=str(few))
    smallest: dict[str, int] = {}
    for choice in ("no", "yes"):
        with pytest.raises(TooLittle) as refused:
            find(recipe.replace(offload_state=choice), DEVICE, memory="2MiB")
        smallest[choice] = refused.value.smallest
    assert smallest["yes"] < smallest["no"] - 12 * MIB
    least = str(smallest["yes"])
    planner, plan = find(recipe, DEVICE, memory=least)
    assert planner.recipe.memory.offload_state == "yes" and plan.predicted <= int(least)
    assert find(recipe, DEVICE, memory=str(2 * smallest["no"]))[0].recipe.memory.offload_state == "auto"

    asked = settings_of("dcgan", memory=least, **(wide | {"epochs": 3}))
    straight = frugan.train(few, out=tmp_path / "a", **asked)
    with pytest.raises(Killed):
        frugan.train(few, out=tmp_path / "b", on_update=kill_at(8), **asked)
    assert_same_state(straight, frugan.train(few, out=tmp_path / "b", **asked))
    assert json.loads((straight / "plan.json").read_text())["offload_state"] == "yes"


def test_an_update_with_offloaded_moments_allocates_nothing_on_the_device(few: Path, tmp_path: Path) -> None:
    there = accelerator(DEVICE)
    assert there is not None
    allocated: list[int] = []

    def look(images: int) -> None:
        if images == 16:
            trainer.loop.state.optimizer_d.zero_grad(set_to_none=False)
            for parameter in trainer.loop.state.discriminator.parameters():
                parameter.grad = torch.zeros_like(parameter)
            there.forget_peak()
            before = there.allocated()
            trainer.loop.state.optimizer_d.step()
            allocated.append(there.most_allocated() - before)
            trainer.loop.state.optimizer_d.zero_grad(set_to_none=True)

    recipe = recipes.get("r3").replace(data=str(few), image_size=8, batch_size=16, epochs=1, offload_state="yes")
    trainer = Trainer(Session.open(recipe, Run(out=str(tmp_path / "r"), device=NAME), Console(True)), look)
    trainer.train()
    assert allocated == [0]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", CHOSEN, ids=repr)
def test_convolutions_by_products_are_torchs(layer: Conv2d | ConvTranspose2d, precision: torch.dtype) -> None:
    found = []
    x = torch.randn(6, layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with device.arithmetic("fp32", DEVICE):
        for by_products in (False, True):
            mine = copy.deepcopy(layer).to(DEVICE, memory_format=torch.channels_last)
            mine.by_products = by_products
            there = x.to(DEVICE, memory_format=torch.channels_last).requires_grad_()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision != torch.float32):
                made = mine(there)
            assert made.dtype == precision and made.device == DEVICE
            made.float().square().mean().backward()
            found.append([t.detach().float().cpu() for t in (made, there.grad, *(p.grad for p in mine.parameters()))])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) < (2e-6 if precision == torch.float32 else 2e-2)


@pytest.mark.parametrize("size", [20, 28, 44])
def test_sizes_that_pooling_does_not_divide(size: int, few: Path, tmp_path: Path) -> None:
    for recipe in ("dcgan", "r3"):
        run = frugan.train(few, out=tmp_path / recipe, **settings_of(recipe, image_size=size, epochs=1, width_g=4, width_d=4))
        there, here = (frugan.load(run, device=name).network for name in (NAME, "cpu"))
        noise = torch.randn(2, 8)
        with torch.no_grad(), device.arithmetic("fp32", DEVICE):
            assert torch.allclose(there(noise.to(DEVICE)).cpu(), here(noise), atol=1e-3)


@only_simulated
def test_what_other_programs_hold_is_not_ours(few: Path, tmp_path: Path) -> None:
    there = accelerator(DEVICE)
    assert there is not None
    torch.empty(1, device=DEVICE)
    recipe = recipes.get("dcgan").replace(image_size=32, channels=1, batch_size=64, data=str(few), offload_state="no", **FEW_PLANS)
    with pytest.raises(TooLittle) as refused:
        find(recipe, DEVICE, memory="2MiB")
    alone = there.context()  # with all that planning has loaded
    sim.others(300 * MIB)
    import frugan.utils.accelerator as module

    module._others.pop(DEVICE, None)  # as a process that starts beside them
    there.release()
    torch.sim.empty_cache()  # type: ignore[attr-defined]
    assert not there.reserved()
    there.meet()
    module._others[DEVICE] -= alone  # what this process held already when it looked
    try:
        assert there.context() == alone
        with pytest.raises(TooLittle) as again:
            find(recipe, DEVICE, memory="2MiB")
        assert again.value.smallest == refused.value.smallest
        assert there.free() <= there.total() - 300 * MIB
    finally:
        module._others.pop(DEVICE, None)


@only_simulated
def test_a_device_that_is_not_the_current_one_is_the_one_that_is_measured_and_limited(few: Path, tmp_path: Path) -> None:
    asked = settings_of("dcgan", device="sim:1", image_size=32, batch_size=64, epochs=1, offload_state="no", **FEW_PLANS)
    with pytest.raises(frugan.UserError) as refused:
        frugan.train(few, out=tmp_path / "a", memory="2MiB", **asked)
    smallest = re.search(r"--memory (\d+)MiB", str(refused.value).split("smallest")[1])[1]  # type: ignore[index]
    other = torch.ones(40 * MIB, dtype=torch.uint8, device="sim:0")
    run = frugan.train(few, out=tmp_path / "b", memory=f"{smallest}MiB", **asked)
    memory = next(line for line in lines(run) if line.get("event") == "memory")
    assert 26 * MIB < memory["measured"] <= memory["budget"] < 64 * MIB + sim.memory_reserved("sim:1")
    assert other.sum() == len(other)
    # Of the host there is a prediction too; what the simulated device holds is the host's as well.
    assert abs(memory["host"] - memory["host_predicted"]) < memory["measured"] + 32 * MIB
    assert memory["host_predicted"] > 200 * MIB


@only_simulated
def test_a_shortage_that_passes_is_left_behind(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frugan.memory.recover.PATIENCE", 2)

    there = accelerator(DEVICE)
    assert there is not None

    def others_come_and_go(images: int) -> None:
        assert there is not None
        if images == 128:
            there.release()
            there.limit(there.context() + there.reserved() + 2 * MIB)
        if images == 320:
            there.limit(None)

    asked = settings_of("dcgan", image_size=32, batch_size=64, epochs=24, width_d=32, **UNCOUPLED, **FEW_PLANS)
    run = frugan.train(few, out=tmp_path / "r", on_update=others_come_and_go, **asked)
    events = [line["event"] for line in lines(run) if "phase" in line]
    assert events[0] == "memory ran out" and events[-1] == "memory suffices again"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["layouts"] == plan["planned"]


@pytest.mark.parametrize("strides", [(1, 2), (1, 0)])
def test_offloaded_tensors_come_back_with_their_strides(strides: tuple[int, int]) -> None:
    x = torch.randn(4, 6, 5, 5).to(DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    if strides[1] == 0:
        x = x.detach()[:, :, :1].expand(4, 6, 5, 5).requires_grad_()
    seen: list[tuple[int, ...]] = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
            (x,) = ctx.saved_tensors
            seen.append(x.stride())
            return 2 * x * grad

    with levers.offloading(DEVICE, True):
        out = Square.apply(x)  # type: ignore[no-untyped-call]
    out.sum().backward()
    assert seen == [x.stride()]
    assert x.grad is not None and torch.equal(x.grad, 2 * x.detach())


# ---- the simulated allocator and its model ---------------------------------------------------------------------------------------


@only_simulated
@settings(max_examples=60)
@given(
    moves=st.lists(st.tuples(st.booleans(), st.integers(1, 40 * MIB), st.integers(0, 1 << 30)), min_size=1, max_size=60),
    cap=st.none() | st.integers(1, 40),
)
def test_the_model_of_segments_reserves_what_the_allocator_does(moves: list[tuple[bool, int, int]], cap: int | None) -> None:
    there = accelerator(DEVICE)
    assert there is not None
    if there.allocated():
        gc.collect()  # what an earlier test left
    there.release()
    assert not there.reserved()
    limited = None if cap is None else cap * 8 * MIB
    words = torch.get_device_module(DEVICE)
    words.set_per_process_memory_fraction(1.0 if limited is None else limited / there.total(), DEVICE)
    model = Segments(limited)
    blocks: list[tuple[Tensor, tuple[int, int, bool]]] = []
    there.forget_peak()
    for give, size, which in moves:
        if give and blocks:
            tensor, block = blocks.pop(which % len(blocks))
            del tensor
            model.free(*block)
        else:
            size = size % 3000 + 1 if which % 2 else size  # half of them small
            try:
                block = model.allocate(size)
            except Full:
                with pytest.raises(torch.OutOfMemoryError):
                    torch.empty(size, dtype=torch.uint8, device=DEVICE)
                continue
            blocks.append((torch.empty(size, dtype=torch.uint8, device=DEVICE), block))
        assert there.reserved() == model.reserved
    assert there.most_reserved() == model.top
    blocks.clear()
    words.set_per_process_memory_fraction(1.0, DEVICE)


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_what_is_on_the_host_already_stays_there_when_the_rest_is_offloaded() -> None:
    seen: list[str] = []

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
            ctx.save_for_backward(x, factor)
            return x * factor.item()

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
            seen.extend(tensor.device.type for tensor in ctx.saved_tensors)
            return grad * 3, None

    x = torch.ones(4).to(DEVICE).requires_grad_()
    with levers.offloading(DEVICE, True):
        out = Scale.apply(x, torch.tensor(3.0))  # type: ignore[no-untyped-call]
    out.sum().backward()
    assert seen == [DEVICE.type, "cpu"]
