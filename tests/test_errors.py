"""Every kind of bad input: one clear sentence, exit code 2, no traceback, nothing written over."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import frugan
from frugan.cli import main, parse
from frugan.reporting.run_folder import RunFolder
from frugan.utils.errors import counted

from .conftest import snapshot

SMALL = [
    "--recipe",
    "dcgan",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--width-g",
    "4",
    "--width-d",
    "4",
    "--latent-dim",
    "4",
    "--image-size",
    "8",
    "--device",
    "cpu",
    "--quiet",
]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; what it said. Nothing below ``tmp_path`` may change by it."""

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert "Traceback" not in said.out + said.err
        assert snapshot(tmp_path) == before
        return said.err

    return run


@pytest.fixture
def trained(few: Path, tmp_path: Path) -> Path:
    main(["train", str(few), *SMALL, "--epochs", "2", "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def one_sentence(said: str) -> str:
    assert said.startswith("frugan: ")
    assert said.count("\n") == 1
    return said


def test_no_images_found(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    said = one_sentence(refused("train", tmp_path / "empty", "--out", tmp_path / "r"))
    assert "no images found in" in said
    assert "among 1 file: an image is bmp, gif" in said


def test_a_folder_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    said = one_sentence(refused("train", tmp_path / "fotos", "--out", tmp_path / "r"))
    assert "there is no folder or zip" in said
    assert "fotos" in said


def test_a_path_that_is_mistyped(
    refused: Callable[..., str], photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(n=4, classes=2)
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    for typed, meant in (
        ("photos/clas1", "photos/class1"),
        ("foto", "photos"),
        (tmp_path / "photo/class0", tmp_path / "photos/class0"),
    ):
        assert f"there is no folder or zip {typed}: did you mean '{meant}'?" in one_sentence(refused("train", typed))
    assert "there is no folder or zip photos/none: check the path." in one_sentence(refused("train", "photos/none"))
    assert time.monotonic() - begun < 5  # the hub was not asked


def test_a_data_set_that_is_misspelt(refused: Callable[..., str]) -> None:
    assert "there is no folder or zip fashon-mnist: did you mean 'fashion-mnist'?" in one_sentence(refused("train", "fashon-mnist"))


@pytest.mark.parametrize("content", [b"", b"neither", None], ids=["empty", "garbage", "cut short"])
def test_only_corrupt_images(
    content: bytes | None, refused: Callable[..., str], photos: Callable[..., Path], tmp_path: Path
) -> None:
    folder = photos(n=9)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    said = refused("train", folder, *SMALL, "--out", tmp_path / "r")
    assert "none of the 9 images of photos can be read" in one_sentence(said)


def test_some_corrupt_images_are_named_and_the_rest_is_trained_on(
    photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(n=12)
    (folder / "004.png").write_bytes(b"")
    main(["train", str(folder), *SMALL[:-1], "--out", str(tmp_path / "r")])
    said = capsys.readouterr().out
    assert "Skipped 004.png: not an image, or empty." in said
    assert "1 of 12 images was skipped." in said
    assert (tmp_path / "r" / "final_generated_images.png").exists()


def test_images_smaller_than_the_target_are_enlarged_and_it_is_said_once(
    photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", str(photos(n=9, side=20)), *SMALL[:-1], "--image-size", "32", "--out", str(tmp_path / "r")])
    assert capsys.readouterr().out.count("are enlarged") == 1


def test_a_batch_larger_than_the_data_set(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    said = one_sentence(refused("train", few, *SMALL, "--batch-size", "65", "--out", tmp_path / "r"))
    assert "--batch-size 65 is more than the 64 images of few: use --batch-size 64 or less" in said


def test_a_size_below_8(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    said = one_sentence(refused("train", few, "--image_size", "7", "--out", tmp_path / "r"))
    assert "--image-size must be at least 8, not 7" in said


def test_an_unknown_recipe(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no recipe called 'dcgam': did you mean 'dcgan'?" in one_sentence(refused("train", "--recipe", "dcgam"))
    said = one_sentence(refused("train", "--recipe", tmp_path / "none.toml"))
    assert f"cannot read the recipe {tmp_path / 'none.toml'}: No such file or directory." in said


def test_an_unknown_key(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nepoch = 3\n")
    said = one_sentence(refused("train", "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "r"))
    assert "no key 'epoch' in [training]: did you mean 'epochs'?" in said
    said = one_sentence(refused("train", "--widht-g", "3"))
    assert "there is no flag --widht-g: did you mean '--width-g'?" in said
    for asked in ("--modulation", "--no-modulation", "--upsampling=nearest"):
        said = one_sentence(refused("train", "--recipe", "mlp", asked))
        assert f"{asked.split('=')[0]} is a setting of --recipe dcgan or resize or projected, which was not asked for." in said
    assert "--epochs must be a whole number, not 'many'" in one_sentence(refused("train", "--epochs", "many"))
    assert "--norm_g must be one of batch, group, none, not 'layer'" in one_sentence(refused("train", "--norm_g=layer"))
    assert "--out needs a value" in one_sentence(refused("train", "--out", "--epochs", "3"))
    assert "--out needs a value, and -x looks like a flag: write --out=-x if" in one_sentence(refused("train", "--out", "-x"))
    said = one_sentence(refused("generate", "--interpolate", "1", "2", "runs/a"))
    assert "--interpolate must be a whole number, not 'runs/a'; what is no value of --interpolate comes before it" in said


@pytest.mark.parametrize("rate", ["0", "-0.1"])
def test_a_learning_rate_of_0_or_below(rate: str, refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    said = one_sentence(refused("train", few, "--lr_g", rate, "--out", tmp_path / "r"))
    assert f"--lr-g must be above 0, not {rate}" in said


def test_a_folder_of_other_files(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("aunt")
    said = one_sentence(refused("train", few, *SMALL, "--out", tmp_path / "letters"))
    assert "holds files of something else" in said
    assert "is a file" in one_sentence(refused("train", few, *SMALL, "--out", tmp_path / "letters" / "dear.txt"))


def test_a_folder_of_another_run(refused: Callable[..., str], trained: Path, photos: Callable[..., Path]) -> None:
    said = one_sentence(refused("train", photos(), *SMALL, "--out", trained))
    assert "belongs to another run, of dcgan on other images" in said


def test_other_settings(refused: Callable[..., str], trained: Path, few: Path) -> None:
    said = one_sentence(refused("train", few, *SMALL, "--epochs", "2", "--lr-d", "0.01", "--norm-g", "group", "--out", trained))
    assert "--lr-d was 0.0002 and is now 0.01, --norm-g was batch and is now group" in said
    assert "--accept-changes" in said


def test_accepted_settings_that_do_not_fit(refused: Callable[..., str], trained: Path, few: Path) -> None:
    command = ["train", few, *SMALL, "--width-g", "6", "--epochs", "3", "--out", trained, "--accept-changes"]
    assert "does not fit these networks" in one_sentence(refused(*command))


@pytest.mark.parametrize("harm", ["cut", "edited"])
def test_a_damaged_checkpoint(harm: str, refused: Callable[..., str], trained: Path, few: Path) -> None:
    newest = RunFolder(trained).newest_checkpoint()
    assert newest
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content if harm == "edited" else content[:-100])
    said = one_sentence(refused("train", few, *SMALL, "--epochs", "3", "--out", trained))
    assert newest.name in said
    assert ("its checksum differs" if harm == "edited" else "it may be cut short") in said
    assert "Remove it to go on from the one before it" in said
    newest.unlink()
    main(["train", str(few), *SMALL, "--epochs", "3", "--out", str(trained)])  # as the sentence says
    for path in (trained / "checkpoints").iterdir():
        path.write_bytes(b"cut") if path == RunFolder(trained).newest_checkpoint() else path.unlink()
    said = one_sentence(refused("train", few, *SMALL, "--epochs", "3", "--out", trained))
    assert "There is none before it: give another --out." in said


def test_a_second_training_in_the_same_folder(refused: Callable[..., str], trained: Path, few: Path) -> None:
    with FileLock(trained / ".lock"):
        said = refused("train", few, *SMALL, "--epochs", "2", "--out", trained)
    assert "another training is writing to" in one_sentence(said)


def test_a_device_that_is_not_there(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    said = one_sentence(refused("train", few, "--device", "cuda:99", "--out", tmp_path / "r"))
    assert "--device cuda:99: there is no such device here" in said


def test_xla_without_the_library(refused: Callable[..., str], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    said = one_sentence(refused("train", few, "--device", "xla", "--out", tmp_path / "r"))
    assert f"made for the torch that is installed, which is {torch.__version__}" in said
    assert "frugan[tpu]" in said


def test_a_colour_that_is_none(refused: Callable[..., str], photos: Callable[..., Path], tmp_path: Path) -> None:
    said = one_sentence(refused("train", photos(), "--background", "whyte", "--out", tmp_path / "r"))
    assert "--background 'whyte' is no colour" in said


def test_damaged_archives_and_idx_files(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 no zip")
    assert "cannot read the zip" in one_sentence(refused("train", tmp_path / "a.zip"))
    (tmp_path / "idx").mkdir()
    name = "train-images-idx3-ubyte"
    (tmp_path / "idx" / name).write_bytes((few / name).read_bytes()[:-1])
    assert "is cut short: it has 4,095 of 4,096 bytes" in one_sentence(refused("train", tmp_path / "idx"))
    (tmp_path / "idx" / name).write_bytes(b"\0\0\x0d\3" + (few / name).read_bytes()[4:])
    assert "is not an IDX file of bytes" in one_sentence(refused("train", tmp_path / "idx"))
    assert "has no test images, only train" in one_sentence(refused("train", few, "--split", "test"))
    assert "is neither a folder nor a zip" in one_sentence(refused("train", few / name))


def test_generating_from_what_is_no_run(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    assert "there is no run" in one_sentence(refused("generate", tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "is no run folder" in one_sentence(refused("generate", tmp_path / "empty"))
    assert "at least 1, not 0" in one_sentence(refused("generate", trained, "--n", "0"))
    assert "at least two seeds" in one_sentence(refused("generate", trained, "--interpolate", "3"))
    assert "--interpolate must be a whole number, not 'a'" in one_sentence(refused("generate", trained, "--interpolate", "1", "a"))
    assert "leave --n out" in one_sentence(refused("generate", trained, "--interpolate", "1", "2", "--n", "3"))
    assert "leave --separate out" in one_sentence(refused("generate", trained, "--interpolate", "1", "2", "--separate"))
    below = trained / "recipe.toml" / "a.png"
    assert "cannot write" in one_sentence(refused("generate", trained, "--n", "1", "--out", below))
    assert "no command 'trian': did you mean 'train'?" in one_sentence(refused("trian", "photos"))
    assert "must be a folder" in one_sentence(refused("generate", trained, "--separate", "--out", tmp_path / "a.png"))
    (trained / "generator.safetensors").write_bytes(b"cut")
    assert "cannot be read, it may be cut short" in one_sentence(refused("generate", trained))


def test_fine_tuning_from_nothing_and_freezing_everything(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, reason in (("none", "there is no such folder"), ("empty", "there is no checkpoint in it")):
        said = one_sentence(refused("train", few, *SMALL, "--init-from", tmp_path / name, "--out", tmp_path / "r"))
        assert f"--init-from {tmp_path / name}: {reason}" in said
    assert not (tmp_path / "r").exists()  # no trace of what was refused
    assert "leaves nothing to train" in one_sentence(refused("train", few, *SMALL, "--freeze-d", "2", "--out", tmp_path / "r"))
    assert "--freeze-d is for fine-tuning" in one_sentence(
        refused("train", few, *SMALL, "--freeze-d", "1", "--out", tmp_path / "r")
    )


def test_a_training_that_goes_to_pieces_keeps_its_last_good_state(
    trained: Path, few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = RunFolder(trained).newest_checkpoint()
    assert newest
    content = newest.read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "train",
                str(few),
                *SMALL,
                "--epochs",
                "40",
                "--lr-g",
                "1e30",
                "--lr-d",
                "1e30",
                "--accept-changes",
                "--out",
                str(trained),
            ]
        )
    assert caught.value.code == 2
    said = one_sentence(capsys.readouterr().err)
    assert "is not finite after" in said
    assert f"the last good state is {newest}." in said
    kept = RunFolder(trained).newest_checkpoint()
    assert kept == newest
    assert kept.read_bytes() == content


def test_a_generator_without_a_checkpoint_is_not_trained_over(refused: Callable[..., str], trained: Path, few: Path) -> None:
    for path in (trained / "checkpoints").iterdir():
        path.unlink()
    assert "has a trained generator but no checkpoint" in one_sentence(
        refused("train", few, *SMALL, "--epochs", "2", "--out", trained)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits what Linux counts")
def test_memory_that_runs_out_is_said_and_training_goes_on(few: Path, tmp_path: Path) -> None:
    script = f"""
from frugan.cli import main, parse
from frugan.memory import host, limit
from frugan.training import trainer

begin = trainer.begin

def taken_meanwhile(session):
    state = begin(session)
    limit._beyond = limit._reserved = 64 << 20  # oneDNN ends the process where it cannot reserve addresses for its code
    trainer.room = limit.limited(host.resident() + (100 << 20), session.device)  # the plan had counted on all that is free: 290 MiB
    trainer.room.__enter__()
    return state

trainer.begin = taken_meanwhile
main(["train", {str(few)!r}, "--recipe", "dcgan", "--image-size", "96", "--batch-size", "64", "--quiet", "--epochs", "1",
      "--device", "cpu", "--whole-batch-norm", "no", "--out", {str(tmp_path / "r")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    changes = [event for event in events if event.get("event") == "memory ran out"]
    assert changes[0]["guarantee"] == "bitwise"
    plan = json.loads((tmp_path / "r" / "plan.json").read_text())
    assert plan["freed_memory"] == "return"


def test_batch_norm_on_single_images(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    command = ["train", few, *SMALL, "--recipe", "mlp", "--accumulation-steps", "8", "--whole-batch-norm", "no"]
    command += ["--out", tmp_path / "r"]
    assert "batch norm cannot train on micro-batches of 1" in one_sentence(refused(*command))
    main([str(a) for a in [*command, "--norm-g", "group", "--norm-d", "none"]])


def test_a_run_that_has_no_checkpoint_yet_is_somebodys_too(
    refused: Callable[..., str], few: Path, photos: Callable[..., Path], tmp_path: Path
) -> None:
    def stop(images: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        frugan.train(few, out=tmp_path / "r", on_update=stop, quiet=True, recipe="dcgan", batch_size=8, image_size=8)
    assert "belongs to another run" in one_sentence(refused("train", photos(), *SMALL, "--out", tmp_path / "r"))
    assert "was started with other settings: --" in one_sentence(refused("train", few, *SMALL, "--out", tmp_path / "r"))
    said = one_sentence(refused("train", few, "--recipe", "mlp", "--batch-size", "8", "--out", tmp_path / "r"))
    assert "was started with other settings: --recipe was dcgan and is now mlp. Give another" in said


def test_a_recipe_beside_other_files_is_not_taken_for_a_run(refused: Callable[..., str], few: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("[training]\nepochs = 1\nbatch_size = 8\n")
    said = refused("train", few, "--recipe", tmp_path / "mine" / "recipe.toml", "--out", tmp_path / "mine")
    assert "holds files of something else" in one_sentence(said)


def test_one_of_something_is_singular(refused: Callable[..., str], photos: Callable[..., Path], tmp_path: Path) -> None:
    assert [counted(1, "image"), counted(2000, "image"), counted(0, "class", "classes")] == ["1 image", "2,000 images", "0 classes"]
    assert [counted(1.0, "minute"), counted(0.5, "minute")] == ["1 minute", "0.5 minutes"]
    alone = photos(n=1)
    command = [sys.executable, "-m", "frugan", "train", str(alone), *SMALL[:-1], "--batch-size", "1", "--threads", "1"]
    command += ["--norm-g", "group", "--norm-d", "none"]
    done = subprocess.run([*command, "--out", str(tmp_path / "r")], capture_output=True, text=True, check=True)
    said = done.stdout.replace("\n", " ")
    assert (
        "1 image of photos, colour" in said
        and "dcgan, 1 epoch, fp32 on cpu with 1 thread, into" in said
        and "Only 1 image: " in said
    )
    assert not re.search(r"\b1 (images|epochs|threads|classes|files|channels)\b", said)
    assert "more than the 1 image of photos: use --batch-size 1." in one_sentence(refused("train", alone, "--batch-size", "2"))
    (alone / "000.png").write_bytes(b"")
    for command in (["train"], ["data", "pack"], ["data", "check", "--sheet", str(tmp_path / "s.png")]):
        assert "not even the one image of photos can be read" in one_sentence(refused(*command, alone))


def test_an_empty_name(refused: Callable[..., str]) -> None:
    assert "the name of the data is empty" in one_sentence(refused("train", ""))


def test_data_named_twice(refused: Callable[..., str], few: Path) -> None:
    assert "the data is named twice" in one_sentence(refused("train", few, "--data_path", few))


def test_a_pattern_that_the_shell_has_written_out(refused: Callable[..., str], photos: Callable[..., Path]) -> None:
    folder = photos(n=3)
    said = one_sentence(refused("train", *sorted(folder.iterdir())))
    assert f"3 names came for DATA, {folder / '000.png'} the first: name the folder that holds them, {folder}." in said
    shards = [folder / "a.tar", folder / "b.tar"]
    for shard in shards:
        shard.write_bytes(b"")
    assert f"them, {folder}, or put the pattern in quotes." in one_sentence(refused("train", *shards))
    said = one_sentence(refused("train", folder / "*.png"))
    assert f"patterns such as {folder / '*.png'} are for tars: name the folder of the images, {folder}." in said
    assert f"name its folder, {folder}." in one_sentence(refused("train", folder / "000.png"))


def test_words_that_are_missing_or_too_many(refused: Callable[..., str], tmp_path: Path) -> None:
    for command in ("generate", "evaluate"):
        assert f"RUN is missing: write frugan {command} RUN, before all flags;" in one_sentence(refused(command))
    for command, places in (("train", "DATA"), ("generate", "RUN"), ("evaluate", "RUN and DATA"), ("data pack", "DATA")):
        words = ["digits"] * len(places.split(" and "))
        said = one_sentence(refused(*command.split(), *words, "more", "--seed" if command == "generate" else "--workers", "1"))
        assert f"'more' is too much, frugan {command} takes {places} alone" in said
    for given in (["--data", "digits"], ["--data=digits"]):
        assert "there is no flag --data: write DATA without it, as in frugan train DATA." in one_sentence(refused("train", *given))
    assert "there is no flag --run: write RUN without it" in one_sentence(refused("generate", "--run", "r"))
    assert "there is no flag -x: flags begin with two dashes" in one_sentence(refused("train", "-x"))
    assert "there is no flag --no-compare: leave --compare out" in one_sentence(refused("plan", "--no-compare"))


def test_values_of_choices_and_switches_are_not_taken_for_data(
    refused: Callable[..., str], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (["--flip", "maybe"], ["--flip=maybe"], [str(few), "--flip", "maybe"]):
        assert "--flip must be one of no, yes, auto, not 'maybe'" in one_sentence(refused("train", *given))
    for given in (["--conditional", "yes"], ["--conditional=yes"], [str(few), "--no-conditional", "Yes"]):
        said = one_sentence(refused("train", *given))
        assert "takes no value, and" in said and "write --conditional or --no-conditional." in said
    assert "write --compare alone, or leave it out." in one_sentence(refused("plan", few, "--compare", "true"))
    monkeypatch.chdir(tmp_path)  # where a folder may have such a name
    (tmp_path / "on").symlink_to(few)
    for switch in ("--conditional", "--flip"):
        assert parse(["train", switch, "on"])[1].data == "on"
    assert parse(["train", "--flip", "mnist"])[1].data == "mnist"
