"""Nothing is lost: a run killed at any update and continued ends bitwise as one that was never stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import frugan
from frugan.config.recipe import Optimizer
from frugan.reporting.run_folder import RunFolder
from frugan.utils.signals import Stopped

from .conftest import OWN_CODE, assert_same_state, final_state

SCHEDULES = Optimizer.__dataclass_fields__["schedule"].type.__args__
UPDATES = 12  # three epochs of four


class Killed(Exception):
    """As good as SIGKILL for what is on disk: nothing is saved on the way out."""


def kill_at(update: int) -> Callable[[int], None]:
    def hook(images: int) -> None:
        if images == update * 16:
            raise Killed

    return hook


def stop_at(update: int, number: int) -> Callable[[int], None]:
    def hook(images: int) -> None:
        if images == update * 16:
            signal.raise_signal(number)

    return hook


# Every schedule, and every recipe in every precision, but not all of them with each other, which would take many minutes.
COMBINATIONS = [("dcgan", "fp32", schedule) for schedule in SCHEDULES] + [
    (recipe, precision, schedule)
    for recipe in OWN_CODE
    for precision, schedule in (("fp32", "cosine"), ("bf16", "plateau"), ("fp16", "exponential"))
    if (recipe, precision) not in (("dcgan", "fp32"), ("projected", "fp32"), ("projected", "fp16"))
]


@pytest.mark.parametrize(("recipe", "precision", "schedule"), COMBINATIONS)
def test_killed_and_continued_is_never_stopped(
    recipe: str, precision: str, schedule: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {
        "recipe": recipe, "precision": precision, "schedule": schedule, "schedule_epochs": 1, "schedule_patience": 0,
        "accumulation_steps": 3, "generator_accumulation_steps": 2, "flip": True, "conditional": precision != "fp16",
    }  # fmt: skip
    straight = train(tmp_path / "straight", **settings)
    draw = random.Random(f"{recipe}{precision}{schedule}")
    out = tmp_path / "broken"
    with pytest.raises(Killed):
        train(out, on_update=kill_at(draw.randint(1, UPDATES - 1)), **settings)
    with pytest.raises(Stopped):  # a second blow, asked for politely: saved in the middle of an epoch
        train(out, on_update=stop_at(UPDATES - 1, draw.choice([signal.SIGTERM, signal.SIGINT])), **settings)
    assert final_state(out)[1]["updates"] == UPDATES - 1
    assert_same_state(straight, train(out, **settings))


ADAPTIVE = {"augment": "ada", "ada_images": 500, "ada_target": 0.1, "lr_d": 0.01, "norm_d": "none", "accumulation_steps": 3}


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "wgan-gp", "discriminator_steps": 3, "conditional": True, "class_sampling": "balanced"},
        {"ema_half_life": 0},
        {"norm_d": "group"},
        ADAPTIVE,
    ],
)
def test_other_settings_too(settings: dict[str, object], train: Callable[..., Path], tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", **settings)
    for update in (2, 7):
        with pytest.raises(Stopped):
            train(tmp_path / "broken", on_update=stop_at(update, signal.SIGTERM), **settings)
    assert_same_state(straight, train(tmp_path / "broken", **settings))
    assert settings != ADAPTIVE or final_state(straight)[1]["augment"]["p"] > 0  # it did move
    logged = [[line.images for line in RunFolder(run).read_log()] for run in (straight, tmp_path / "broken")]
    assert logged[0] == logged[1]


def test_batches_that_straddle_epochs_and_files_that_are_decoded_anew(
    train: Callable[..., Path], photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frugan.data.pack_loader.SMALL", 0)
    folder = photos(n=20)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:-900])  # found out while training
    settings = {"data": folder, "batch_size": 7, "epochs": 4, "recipe": "r3"}
    straight = train(tmp_path / "straight", **settings)
    with pytest.raises(Stopped):
        train(tmp_path / "broken", on_update=lambda images: images == 35 and signal.raise_signal(signal.SIGTERM), **settings)
    assert_same_state(straight, train(tmp_path / "broken", **settings))


def test_a_real_process_killed_outright_goes_on(train: Callable[..., Path], few: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "frugan", "train", str(few), "--batch-size", "16", "--epochs", "10", "--recipe", "mlp",
        "--width-d", "8", "--width-g", "8", "--latent-dim", "8", "--device", "cpu", "--threads", "2", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")])
    while not RunFolder(tmp_path / "killed").newest_checkpoint():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert final_state(tmp_path / "killed")[1]["images"] < 10 * 64
    for out in ("killed", "straight"):
        subprocess.run([*command, "--out", str(tmp_path / out)], check=True)
    assert_same_state(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_in_a_real_process_saves_says_so_and_exits_with_130(few: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "frugan",
        "train",
        str(few),
        "--batch-size",
        "16",
        "--epochs",
        "5000",
        "--out",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not RunFolder(tmp_path / "r").newest_checkpoint():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors


def test_training_longer_and_running_a_finished_one_again(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tmp_path / "long", epochs=4)
    train(tmp_path / "grown", epochs=2)
    assert_same_state(straight, train(tmp_path / "grown", epochs=4))
    before = final_state(straight)[1]
    train(straight, epochs=4, quiet=False)
    assert "more --epochs go on." in capsys.readouterr().out
    assert final_state(straight)[1] == before


def test_a_finished_run_whose_rates_fell_says_how_to_go_on(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", epochs=1, schedule="cosine")
    train(run, epochs=1, schedule="cosine", quiet=False)
    assert "more --epochs with --accept-changes (learning rates rise again) go on." in capsys.readouterr().out
    with pytest.raises(frugan.UserError, match="epochs was 1 and is now 2"):
        train(run, epochs=2, schedule="cosine")
    train(run, epochs=2, schedule="cosine", accept_changes=True)
    assert final_state(run)[1]["images"] == 2 * final_state(train(tmp_path / "other", epochs=1))[1]["images"]


def test_results_that_a_kill_prevented_are_made_by_the_next_start(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    results = ("final_generated_images.png", "training_loss.png")
    written = [(run / name).read_bytes() for name in results]
    images = frugan.load(run).generate(4)
    for name in (*results, "generator.safetensors"):
        (run / name).unlink()
    train(run)
    assert [(run / name).read_bytes() for name in results] == written
    assert frugan.load(run).generate(4).equal(images)


def test_a_fine_tuning_goes_on_without_the_run_it_started_from(train: Callable[..., Path], tmp_path: Path) -> None:
    first = train(tmp_path / "first", epochs=1)
    straight = train(tmp_path / "straight", init_from=first)
    with pytest.raises(Stopped):
        train(tmp_path / "broken", init_from=first, on_update=stop_at(5, signal.SIGTERM))
    shutil.rmtree(first)
    assert_same_state(straight, train(tmp_path / "broken", init_from=first))


def test_a_run_whose_folder_is_removed_or_moved_goes_on_in_one_made_anew(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tmp_path / "straight", epochs=3)
    removed, moved = tmp_path / "removed", tmp_path / "moved"

    def at(images: int, what: Callable[[], object]) -> Callable[[int], None]:
        return lambda seen: what() and None if seen == images else None

    batch = 16
    for out, what in ((removed, lambda: shutil.rmtree(removed)), (moved, lambda: moved.rename(tmp_path / "elsewhere"))):
        train(out, epochs=3, on_update=at(5 * batch, what), quiet=False)
        assert f"{out} was moved or removed while it was trained" in capsys.readouterr().out
        assert_same_state(straight, out)
        train(out, epochs=3)  # is known again
        assert (out / "report.html").exists() and RunFolder(out).read_log()
    assert (tmp_path / "elsewhere" / "log.jsonl").exists()


def test_accepting_an_average_and_fp16_later(train: Callable[..., Path], tmp_path: Path) -> None:
    out = train(tmp_path / "run", epochs=1, ema_half_life=0, recipe="r3")
    train(out, epochs=2, recipe="r3", precision="fp16", accept_changes=True)
    assert any(k.startswith("ema/") for k in final_state(out)[0])
    assert final_state(out)[1]["scaler"]


def test_accepted_changes_go_on_with_the_new_settings(train: Callable[..., Path], tmp_path: Path) -> None:
    out = train(tmp_path / "run", epochs=2)
    train(out, epochs=3, lr_g=1e-5, accept_changes=True)
    assert final_state(out)[1]["rates"][0] == 1e-5


def test_the_same_seed_is_the_same_training_and_another_is_not(train: Callable[..., Path], tmp_path: Path) -> None:
    one, same = train(tmp_path / "a", seed=1), train(tmp_path / "b", seed=1)
    assert_same_state(one, same)
    other = final_state(train(tmp_path / "c", seed=2))[0]
    assert any(not v.equal(final_state(one)[0][k]) for k, v in other.items() if k.startswith("ema/"))
