"""The command line and the same from Python."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import frugan
from frugan.cli import main
from frugan.reporting.run_folder import RunFolder

from .conftest import final_state

FLAGS = [
    "--data_path", "DATA", "--epochs", "2", "--batch_size", "16", "--lr_g", "0.0002", "--lr_d", "0.0001",
    "--beta1", "0.4", "--beta2", "0.99", "--latent_dim", "12", "--accumulation_steps", "2", "--generator_accumulation_steps", "4",
    "--image_size", "16", "--seed", "5", "--device", "cpu", "--out", "OUT",
]  # fmt: skip


@pytest.mark.parametrize("dashes", [False, True])
def test_the_flags_of_the_usual_scripts(dashes: bool, few: Path, tmp_path: Path) -> None:
    said = {"DATA": str(few), "OUT": str(tmp_path / "run")}
    flags = [said.get(f, f.replace("_", "-") if dashes else f) for f in FLAGS]
    main(["train", *flags, "--width-g", "4", "--width-d", "4", "--quiet"])
    numbers = final_state(tmp_path / "run")[1]
    recipe = frugan.Recipe.from_toml(str(numbers["recipe"]), "run").flat()
    wanted = {
        "epochs": 2, "batch_size": 16, "lr_g": 0.0002, "lr_d": 0.0001, "beta1": 0.4, "beta2": 0.99, "latent_dim": 12,
        "accumulation_steps": 2, "generator_accumulation_steps": 4, "image_size": 16, "seed": 5,
    }  # fmt: skip
    assert {k: recipe[k] for k in wanted} == wanted


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train", "--help"], ["train", "--recipe", "r3", "--help"], ["train", "--recipe", "x"]]
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    script = f"""
import sys
from frugan.cli import main
try:
    main({arguments!r})
except SystemExit:
    sys.exit("torch" in sys.modules)
sys.exit("did not exit")
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_run_folder_holds_what_it_should(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["--recipe", "dcgan", "--batch-size", "16", "--width-g", "4", "--width-d", "4"]
    main(["train", str(few), *small, "--epochs", "5", "--out", str(run)])
    said = capsys.readouterr().out
    for word in (
        "generator",
        "discriminator",
        "activations an image",
        "epoch 5/5",
        "Loss_D",
        "Loss_G",
        "D(x)",
        "D(G(z))",
        "images/s",
        "Final",
    ):
        assert word in said
    with Image.open(run / "final_generated_images.png") as final, Image.open(run / "generated_images" / "epoch_5.png") as grid:
        assert final.size == (4 * 66 + 2,) * 2
        assert grid.size == (8 * 66 + 2,) * 2
    for name in ("real_images.png", "training_loss.png", "generator.safetensors", "recipe.toml"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "plan.json").read_text())["updates"] == 20
    assert len(list((run / "checkpoints").iterdir())) == 2
    last = RunFolder(run).read_log()[-1].as_dict()
    assert last["images"] == 320
    assert {"Loss_D", "Loss_G", "D(x)", "D(G(z))", "D(G(z)) after", "lr_g", "lr_d", "images/s", "epoch"} <= last.keys()
    for line in RunFolder(run).read_log()[:-1]:  # images/s are without pictures and checkpoints, the time left is with them
        assert 0 <= line.looking < 1
        assert line.seconds_left == pytest.approx((320 - line.images) / (line.speed * (1 - line.looking)))
    assert last["looking"] > 0


def test_plain_lines_where_there_is_no_terminal(few: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frugan", "train", str(few), "--recipe", "mlp", "--batch-size", "32", "--epochs", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "r")], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert done.stdout.count("\nepoch ") == 2
    assert done.stderr == ""


def test_generate_makes_the_same_images_for_a_seed_whatever_their_number(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    generator = frugan.load(run)
    many = generator.generate(100, seed=7)
    assert many.shape == (100, 1, 8, 8)
    assert many.dtype == torch.uint8
    assert torch.equal(many[:5], generator.generate(5, seed=7))
    assert not torch.equal(many[:5], generator.generate(5, seed=8))
    alone = tmp_path / "elsewhere.safetensors"
    (run / "generator.safetensors").rename(alone)
    assert torch.equal(many, frugan.load(alone).generate(100, seed=7))


def test_generate_writes_grids_files_strips_and_loops(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(train(tmp_path / "run"))
    main(["generate", run, "--n", "6", "--seed", "3"])
    assert capsys.readouterr().out.strip() == f"{run}/generated/seed_3_n6.png"
    main(["generate", run, "--seed", "3"])  # writes over no other number of them
    assert capsys.readouterr().out.strip() == f"{run}/generated/seed_3.png"
    main(["generate", run, "--n", "3", "--separate", "--out", str(tmp_path / "many")])
    assert len(list((tmp_path / "many").iterdir())) == 3
    main(["generate", run, "--interpolate", "1", "2", "5", "--frames", "4"])
    with Image.open(f"{run}/generated/interpolation_1-2-5_f4.gif") as loop:
        assert loop.n_frames == 9 + 7
    with Image.open(f"{run}/generated/interpolation_1-2-5_f4.png") as strip:
        assert strip.width > 8 * strip.height
    main(["generate", run, "--interpolate", "1", "2", "--out", str(tmp_path / "way.gif")])
    assert (tmp_path / "way.gif").exists() and (tmp_path / "way.png").exists()
    main(["generate", run, "--out", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").exists()


def test_truncation_scales_the_noise(train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run")
    generator = frugan.load(run)
    plain, typical = generator.generate(8), generator.generate(8, truncation=0.0)
    assert generator.generate(8, truncation=1.0).equal(plain)
    assert all(image.equal(typical[0]) for image in typical) and not plain[0].equal(plain[1])
    assert not generator.generate(8, truncation=1.5).equal(plain)
    assert generator.interpolate([1, 2], frames=2, truncation=0.5)[0].equal(generator.generate(1, seed=1, truncation=0.5)[0])
    main(["generate", str(run), "--n", "2", "--truncation", "0.5"])
    assert capsys.readouterr().out.strip() == f"{run}/generated/seed_0_n2_t0.5.png"
    main(["evaluate", str(run), "--samples", "32", "--metrics", "swd", "--truncation", "0.5"])
    assert "truncation 0.5)" in capsys.readouterr().out
    for command in (["generate", str(run)], ["evaluate", str(run), "--metrics", "swd"]):
        with pytest.raises(SystemExit):
            main([*command, "--truncation", "2.5"])
        assert "--truncation must be from 0 to 2, not 2.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "digits", "digits", "--truncation", "0.5"])
    assert "--truncation is for a generator, and digits is none." in capsys.readouterr().err


def test_interpolation_begins_and_ends_with_the_seeds_images(train: Callable[..., Path], tmp_path: Path) -> None:
    generator = frugan.load(train(tmp_path / "run"))
    way = generator.interpolate([1, 2], frames=6)
    assert len(way) == 7
    for end, seed in ((way[0], 1), (way[-1], 2)):
        assert (end.int() - generator.generate(1, seed=seed)[0].int()).abs().max() <= 1


def test_summary_needs_no_data_when_told_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", "--recipe", "r3", "--image-size", "32", "--channels", "3"])
    said = capsys.readouterr().out
    assert "3 x 32 x 32" in said
    assert "GenerativeBasis" in said


def test_fine_tuning_takes_what_fits_and_freezes(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path / "first", image_size=16)
    capsys.readouterr()
    second = train(tmp_path / "second", image_size=16, init_from=str(first), freeze_d=1, epochs=1, quiet=False)
    said = capsys.readouterr().out
    assert re.search(rf"From {first}: (\d+) of \1 tensors of the generator fit\.", said)
    old, new = final_state(first)[0], final_state(second)[0]
    frozen = [k for k in old if k.startswith("discriminator/blocks.0.")]
    assert frozen
    assert all(torch.equal(old[k], new[k]) for k in frozen)
    assert not torch.equal(old["discriminator/blocks.1.0.weight"], new["discriminator/blocks.1.0.weight"])
    train(tmp_path / "colour", image_size=16, channels=3, init_from=str(first), epochs=1, quiet=False)
    assert "new are blocks.2.0.weight [8, 3, 4, 4]" in capsys.readouterr().out


def test_auto_precision_is_named_and_said_to_be_approximate(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = {"epochs": 1, "quiet": False, "accumulation_steps": 2, "image_size": 16}
    train(tmp_path / "a", precision="bf16", whole_batch_norm="no", **cut)
    said = capsys.readouterr().out
    assert "Approximate: bf16 rounds inside the networks" in said
    assert (
        "Approximate: batch norm in the discriminator takes its statistics from micro-batches of 8 in D's phase and 8 in G's phase."
        in said
    )
    exact = train(tmp_path / "exact", **cut)
    said = capsys.readouterr().out
    assert "Approximate" not in said and "Batch norm takes its statistics from the whole batch, in several passes" in said
    plan = json.loads((exact / "plan.json").read_text())
    assert plan["guarantee"] == "reassociation" and all(layout["whole_batch_norm"] for layout in plan["layouts"].values())
    out = train(tmp_path / "b", precision="auto", epochs=1)
    assert 'precision = "auto"' not in (out / "recipe.toml").read_text()


def test_a_recipe_from_toml(train: Callable[..., Path], tmp_path: Path) -> None:
    out = train(tmp_path / "a", recipe="r3", lr_g=1e-3)
    again = train(tmp_path / "b", recipe=str(out / "recipe.toml"))
    assert (again / "recipe.toml").read_text() == (out / "recipe.toml").read_text()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for command in ("train", "plan", "generate", "evaluate", "report", "data", "summary"):
        assert f"• {command} " in said, command


def test_a_flag_without_a_command_is_one_sentence_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("frugan: a command comes before --device") and len(said.splitlines()) == 1
    main(["--version"])
    assert re.fullmatch(r"frugan \d+\.\d+.*\n", capsys.readouterr().out)


def test_a_plan_says_that_a_batch_has_more_images_than_there_are(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(few), "--recipe", "mlp", "--batch-size", "100"])
    assert "few has 64 images: a training wants as many as a batch has." in capsys.readouterr().out.replace("\n", " ")
    main(["plan", str(few), "--recipe", "mlp", "--batch-size", "64"])
    assert "few has" not in capsys.readouterr().out


def test_a_plan_refuses_arithmetic_that_the_device_has_not(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(few), "--precision", "tf32", "--device", "cpu"])
    assert ended.value.code == 2 and "--precision tf32 is of NVIDIA GPUs" in capsys.readouterr().err


def test_the_score_of_generated_images_is_told_where_the_last_update_was_of_d_alone(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", epochs=1, discriminator_steps=3, quiet=False)
    assert "Loss_G" not in RunFolder(tmp_path / "run").read_log()[-1].measured
    said = capsys.readouterr().out
    assert re.search(r"epoch 1/1  Loss_D \S+  Loss_G \S+  D\(x\) \S+  D\(G\(z\)\) [0-9.]+  \S+ images/s", said)
    assert re.search(r"Final Loss_D \S+  Loss_G \S+  D\(x\) \S+  D\(G\(z\)\) \S+ -> ", said)
