"""PyTorch/XLA on its own CPU device: ``make test-xla``, in an environment that has torch_xla with its torch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("PJRT_DEVICE", "CPU")
pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

import torch_xla.core.xla_model
import torch_xla.debug.metrics

import frugan
from frugan.cli import main
from frugan.reporting.run_folder import RunFolder
from frugan.utils import checkpoint, xla
from frugan.utils.device import fast_precision
from frugan.utils.draws import Draws, hashed, quarters
from frugan.utils.errors import UserError

xla.begin("xla")  # before gradients are computed on the CPU
SHARED = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist"
DATA = str(SHARED) if SHARED.exists() else "digits"
PROGRAMS = 3  # of an update: D's phase, G's, and what follows both


def told(metric: str) -> int:
    """How often XLA has done what ``metric`` counts: ``CompileTime`` of programs, ``ExecuteTime``."""
    torch_xla.core.xla_model.wait_device_ops()
    found = torch_xla.debug.metrics.metric_data(metric)
    return int(found[0]) if found else 0


class Enough(Exception):
    """As many updates as were wanted."""


def updates(recipe: str, device: str, out: Path, count: int, **settings: Any) -> tuple[list[dict[str, float]], list[int]]:
    """Of so many updates what was measured, and after each how many programs there were; in single precision."""
    programs: list[int] = []

    def after(images: int) -> None:
        programs.append(told("CompileTime"))
        if len(programs) == count:
            raise Enough

    named = {"batch_size": 32, "precision": "fp32", "report_every": 1, "epochs": 1, "quiet": True} | settings
    with pytest.raises(Enough):
        frugan.train(DATA, recipe=recipe, device=device, out=out, on_update=after, **named)
    return [line.measured for line in RunFolder(out).read_log()], programs


@pytest.fixture
def _as_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws the dropout masks that accelerators do."""
    own = Draws.keep

    def keep(self: Draws, purpose: str, first: Any, count: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
        before, self.device = self.device, torch.device("meta") if self.device.type == "cpu" else self.device
        try:
            return own(self, purpose, first, count, shape, p)
        finally:
            self.device = before

    monkeypatch.setattr(Draws, "keep", keep)
    monkeypatch.setattr(
        "frugan.utils.draws.hashed", lambda *a: hashed(*a[:-1], torch.device("cpu") if a[-1].type == "meta" else a[-1])
    )


@pytest.mark.usefixtures("_as_on_accelerators")
@pytest.mark.parametrize("recipe", ["dcgan", "upsample", "r3"])
def test_fifty_updates_are_those_of_the_cpu_in_programs_that_are_compiled_once(recipe: str, tmp_path: Path) -> None:
    expected, _ = updates(recipe, "cpu", tmp_path / "cpu", 50)
    found, programs = updates(recipe, "xla", tmp_path / "xla", 50)
    assert len(found) == len(expected) == 50
    for here, there in zip(found, expected, strict=True):
        for name in ("Loss_D", "Loss_G"):
            assert here[name] == pytest.approx(there[name], rel=0.02), (name, here, there)
    assert programs[2] - programs[1] <= PROGRAMS - 1, "one for each phase"
    assert programs[2] == programs[-1], "and none afterwards"


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "dcgan", "accumulation_steps": 4},  # batch norm over the whole batch
        {"recipe": "dcgan", "precision": "bf16"},
        {"recipe": "resize", "augment": "ada", "conditional": True},
        {"recipe": "mlp", "accumulation_steps": 2, "generator_accumulation_steps": 1},
        {"recipe": "projected", "feature_updates": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_whatever_is_asked_for_an_update_is_three_programs(settings: dict[str, Any], tmp_path: Path) -> None:
    counts: list[int] = []

    def after(images: int) -> None:
        counts.append(told("ExecuteTime"))
        if len(counts) == 12:
            raise Enough

    named = {"batch_size": 32, "precision": "fp32", "report_every": 1000, "epochs": 1, "quiet": True} | settings
    with pytest.raises(Enough):
        frugan.train(DATA, device="xla", out=tmp_path / "run", on_update=after, **named)
    asked = 2 if settings.get("augment") == "ada" else 0  # how D does, every fourth update
    assert counts[-1] - counts[3] == PROGRAMS * 8 + asked


def test_micro_batches_add_up(tmp_path: Path) -> None:
    whole, _ = updates("dcgan", "xla", tmp_path / "whole", 4)
    parts, _ = updates("dcgan", "xla", tmp_path / "parts", 4, accumulation_steps=4)
    for here, there in zip(parts, whole, strict=True):
        assert here["Loss_D"] == pytest.approx(there["Loss_D"], rel=1e-4)


def test_a_checkpoint_goes_to_the_cpu_and_back(few: Path, tmp_path: Path) -> None:
    def trained(name: str, devices: list[str]) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        for epochs, device in enumerate(devices, 1):
            frugan.train(few, recipe="dcgan", batch_size=16, epochs=epochs, device=device, out=out, quiet=True, accept_changes=True)
        newest = RunFolder(out).newest_checkpoint()
        assert newest
        return checkpoint.load(newest)[0]

    expected = trained("cpu", ["cpu"] * 3)
    found = trained("both", ["xla", "cpu", "xla"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if tensor.is_floating_point():  # twelve updates; a weight moves by up to 2e-4 in each
            torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=1e-3, msg=name)
        else:
            assert torch.equal(found[name], tensor), name


def test_bits_are_those_of_other_accelerators() -> None:
    device = xla.begin("xla")
    here, there = hashed(12345, 77, 5, 9, torch.device("cpu")), hashed(12345, 77, 5, 9, device)
    assert torch.equal(there.cpu(), here)
    assert torch.equal(quarters(there).cpu(), quarters(here).long())


def test_its_cpu_device_computes_in_single_precision() -> None:
    assert fast_precision(xla.begin("xla")) == "fp32"


def test_what_cannot_be_is_said(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(UserError) as error:
            frugan.train(few, recipe="dcgan", batch_size=16, out=tmp_path / "run", quiet=True, **({"device": "xla"} | settings))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "no such device here" in refused(device="xla:7")
    assert "no such device here" in refused(device="xla:first")
    assert "2 or 4 parts do" in refused(accumulation_steps=3)
    assert "cannot be held on xla:0" in refused(memory="1GiB")
    assert "--freeze-d cannot be done" in refused(freeze_d=1)
    assert "--offload-state cannot be done" in refused(offload_state="yes")
    assert "--precision fp16 cannot be done" in refused(precision="fp16")

    def exhausted(images: int) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes.")

    with pytest.raises(UserError, match="memory ran out on xla:0: ask for more --accumulation-steps"):
        frugan.train(few, recipe="mlp", batch_size=16, out=tmp_path / "full", quiet=True, device="xla", on_update=exhausted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused()


def test_images_are_made_and_evaluated_there(few: Path, tmp_path: Path) -> None:
    run = frugan.train(few, recipe="dcgan", batch_size=16, epochs=1, out=tmp_path / "run", quiet=True, device="xla")
    here, there = (frugan.load(run, device=name).generate(20, seed=3) for name in ("cpu", "xla"))
    assert there.device.type == "cpu"
    assert (here.int() - there.int()).abs().max() <= 1
    main(["evaluate", str(run), "--samples", "32", "--device", "xla"])
    main(["generate", str(run), "--n", "4", "--device", "xla", "--out", str(tmp_path / "made")])
    assert any((tmp_path / "made").iterdir())


def test_nothing_is_planned_for_it(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(few), "--device", "xla"])
    assert "plan with --device cpu" in capsys.readouterr().err
