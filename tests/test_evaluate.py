"""Evaluation: real images before worse ones, numbers that can be repeated, within the budget, and sentences for what cannot be."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import frugan
from frugan.cli import main
from frugan.config.recipe import Data
from frugan.data.pack_loader import PackLoader
from frugan.data.sources import open_source
from frugan.evaluation.evaluator import Evaluator, chosen
from frugan.evaluation.families import FAMILIES, METRICS, better, inception, register
from frugan.evaluation.families.base import Options
from frugan.evaluation.families.extractor import INCEPTION
from frugan.evaluation.families.patches import PatchesFamily
from frugan.memory import limit
from frugan.reporting.records import Metrics
from frugan.reporting.run_folder import RunFolder
from frugan.utils.errors import UserError

from .conftest import final_state, write_idx

CPU = torch.device("cpu")


def loader(data: str = "digits", **settings: object) -> PackLoader:
    asked = Data(data=data, image_size=16, channels=1, **settings)
    return PackLoader(open_source(asked), asked, seed=0, workers=1, tell=print)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(loader(), "digits", 10, Options(reals=600), CPU, print)


def noise(first: int, count: int) -> Tensor:
    random = np.random.default_rng(first)
    return torch.from_numpy(random.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8))


def faint(images: PackLoader) -> Callable[[int, int], Tensor]:
    """The real ones that were not looked at, under some noise."""
    return lambda first, count: (0.4 * images.batch(600 + first, count) + 0.6 * noise(first, count)).byte()


def test_every_metric_is_in_the_docs_that_the_help_names() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    listed = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    named = [name for names in listed for name in re.findall(r"`(\w+)`", names)]
    assert named == list(METRICS), "the table of docs/evaluation.md has a row for every metric, in the order of the families"


def test_every_offline_metric_puts_real_images_first_and_noise_last(evaluator: Evaluator) -> None:
    images = evaluator.data
    ranked = [evaluator(p, 512) for p in (lambda i, n: images.batch(600 + i, n), faint(images), noise)]
    assert set(ranked[0]) == {*FAMILIES["classifier"].metrics, *FAMILIES["patches"].metrics} - {"class_accuracy"}  # of a class
    for name in ranked[0]:
        best, middle, worst = (values[name] for values in ranked)
        if name == "classes":
            assert best == 10 > worst
        elif "recall" in name:
            assert better(name, best, worst)
        else:
            assert better(name, best, middle) and (better(name, middle, worst) or middle == worst == 0), name


def test_the_number_of_pieces_does_not_matter_and_neither_does_looking_twice(evaluator: Evaluator) -> None:
    asked: list[tuple[int, int]] = []

    def produce(first: int, count: int) -> Tensor:
        asked.append((first, count))
        return evaluator.data.batch(600 + first, count)

    assert evaluator(produce, 100) == evaluator(produce, 100)
    assert asked == [(0, 64), (64, 64)] * 2  # always the same shapes


def test_what_was_seen_in_real_images_is_remembered(evaluator: Evaluator) -> None:
    looked: list[int] = []
    again = Evaluator(
        loader(),
        "digits",
        10,
        Options("frechet_classifier,precision_classifier", reals=600),
        CPU,
        print,
        lambda done, of: looked.append(of),
    )
    assert not looked
    first, second = evaluator(noise, 64), again(noise, 64)
    assert all(second[name] == first[name] for name in second) and list(second) == ["frechet_classifier", "precision_classifier"]


@pytest.fixture
def colour() -> Iterator[type[Any]]:
    """The family of docs/evaluation.md, of grey images."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    there: dict[str, Any] = {}
    exec(compile(example.replace("width = 3", "width = 1"), "evaluation.md", "exec"), there)
    yield there["ColourFamily"]
    del FAMILIES["mean-colour"], METRICS["frechet_mean_colour"]


@pytest.mark.usefixtures("colour")
def test_a_new_family_is_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"recipe": "mlp", "epochs": 1, "batch_size": 64, "width_g": 8, "width_d": 8, "quiet": True}
    run = frugan.train(
        "digits", evaluate_every=1, evaluate_samples=64, metrics="swd,frechet_mean_colour", out=tmp_path / "r", **ways
    )
    (event,) = (event for event in RunFolder(run).read_events() if isinstance(event, Metrics))
    assert list(event.values) == ["swd", "frechet_mean_colour"] and event.protocol.endswith("a level; mean colours.")
    assert "Frechet distance (mean colour)" in (run / "report.html").read_text()
    main(["evaluate", str(run), "--samples", "64", "--metrics", "frechet_mean_colour"])
    told = capsys.readouterr().out
    assert "Frechet distance (mean colour)" in told and "on the mean colours" in told
    assert chosen(Options(), labelled=False) == ["swd"]  # it is not automatic
    with pytest.raises(UserError, match="did you mean 'frechet_mean_colour'"):
        chosen(Options("frechet_color"), labelled=False)


def test_the_name_of_a_family_or_a_metric_is_nobody_elses(colour: type[Any]) -> None:
    class Swd(PatchesFamily):
        name = "other"

    for taken, name in ((colour, "mean-colour"), (Swd, "swd")):
        with pytest.raises(ValueError, match=f"there is already a family or a metric called '{name}'"):
            register(taken)


class StandIn:
    """In the place of Inception: the features are every fourth pixel."""

    name, width, official, sha256 = INCEPTION, 64, False, "0123456789"

    def __init__(self, name: str, **_: object) -> None:
        assert name == self.name

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images[:, 0].flatten(1).float() / 255
        return {"features": pixels[:, ::4], "logits": pixels}


def test_metrics_by_other_weights_are_not_called_fid(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inception, "Extractor", StandIn)
    command = ["evaluate", str(run), "--samples", "64", "--weights", "mine.pth", "--any-weights"]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    names = [f"{name}_by_other_weights" for name in ("fid", "kid", "is", "precision", "recall")]
    assert list(found["metrics"])[:5] == names and "swd" in found["metrics"] and not found["official"]
    assert "Inception v3 as in the TensorFlow original (weights 01234567) at 299x299, grey repeated to RGB" in found["protocol"]
    main([*command, "--metrics", "is,fid"])
    told = capsys.readouterr().out
    assert "fid, other weights" in told and "is, other weights" in told and "FID  " not in told
    assert "what is taken with mine.pth is no FID" in told and "64 images are few for a Frechet distance on 64 features" in told


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return frugan.train(
        "digits",
        recipe="mlp",
        epochs=2,
        batch_size=64,
        width_g=8,
        width_d=8,
        evaluate_every=1,
        evaluate_samples=64,
        out=out,
        quiet=True,
    )


def test_training_keeps_the_best_checkpoint_and_writes_down_why(run: Path) -> None:
    events = [event for event in RunFolder(run).read_events() if isinstance(event, Metrics)]
    values = [event.values["frechet_classifier"] for event in events]
    assert len(values) == 2 and events[0].samples == 64 and "1,797 real images of digits" in events[0].protocol
    best = frugan.load(run, best=True)
    assert best.images_seen == events[values.index(min(values))].images
    assert torch.equal(best.generate(2), frugan.load(run, best=True).generate(2))


def test_images_of_the_best_generator_stand_beside_those_of_the_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--best"], ["--separate"], ["--separate", "--best"]):
        main(["generate", str(run), "--n", "2", "--out", str(tmp_path / "made"), *more])
    names = {"seed_0_n2.png", "seed_0_n2_best.png", *(f"seed_0_0000{i}{best}.png" for i in (0, 1) for best in ("", "_best"))}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names


def test_a_resumed_training_evaluates_as_if_it_had_not_been_broken_off(run: Path, tmp_path: Path) -> None:
    ways = {
        "recipe": "mlp",
        "batch_size": 64,
        "width_g": 8,
        "width_d": 8,
        "evaluate_every": 1,
        "evaluate_samples": 64,
        "quiet": True,
    }
    out = tmp_path / "r"

    def stop(images: int) -> None:
        if images == 2560:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frugan.train("digits", epochs=2, out=out, on_update=stop, **ways)
    frugan.train("digits", epochs=2, out=out, **ways)
    ours, theirs = ([e.values for e in RunFolder(r).read_events() if isinstance(e, Metrics)] for r in (out, run))
    assert ours == theirs
    (a, _), (b, _) = final_state(out), final_state(run)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("known", [False, True])  # whether the real images were looked at by an earlier training
def test_evaluating_stays_within_the_budget(known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    budget = f"{(limit.baseline(CPU) >> 20) + 300}MiB"
    command = ["train", "digits", "--recipe", "r3", "--epochs", "1", "--batch-size", "64", "--width-g", "8", "--width-d", "8"]
    main([*command, "--evaluate-every", "1", "--evaluate-samples", "256", "--memory", budget, "--out", str(out)])
    said = capsys.readouterr().out
    assert "left out this time" not in said
    events = {event.event: event.as_dict() for event in RunFolder(out).read_events()}
    assert events["metrics"]["values"]["swd"] > 0
    assert events["memory"]["measured"] <= events["memory"]["budget"]
    assert "evaluation" in json.loads((out / "plan.json").read_text())["phases"]["evaluating"]


def test_evaluate_prints_numbers_with_how_they_were_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--samples", "200"])
    said = capsys.readouterr().out
    assert all(METRICS[name].label in said for name in ("swd", "frechet_classifier", "coverage_kl")) and "FID" not in said
    assert "200 samples of" in said and "averaged over training" in said and "16x16 grey" in said
    main(["evaluate", str(run), "--samples", "200", "--best", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"].keys() >= {"swd", "frechet_classifier"} and found["protocol"].startswith("200 samples")


def test_the_split_that_is_named_is_taken(tmp_path: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write_idx(tmp_path / "both", *(np.zeros((70, 8, 8), np.uint8), np.zeros(70, np.uint8)))
    write_idx(tmp_path / "both", np.full((40, 8, 8), 9, np.uint8), np.ones(40, np.uint8), part="t10k")
    run = frugan.train(test, recipe="mlp", epochs=1, batch_size=32, width_g=4, width_d=4, out=tmp_path / "r", quiet=True)
    for arguments, real in (([], "32 of 70 real"), (["--split", "test"], "32 of 40 real"), (["--split", "all"], "32 of 110 real")):
        main(["evaluate", str(run), "--samples", "32", "--metrics", "swd", "--json", *arguments])
        assert real in json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--run-split", "test"])
    assert "--run-split is for images" in capsys.readouterr().err
    main(["evaluate", "digits", "digits", "--run-split", "test", "--samples", "32", "--metrics", "swd"])
    said = capsys.readouterr().out
    assert "--run-split test does nothing here: digits is taken whole." in said and "32 images of digits against" in said


def test_the_best_checkpoint_is_kept_although_it_was_killed_before_it_could_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {
        "recipe": "mlp",
        "batch_size": 64,
        "width_g": 8,
        "width_d": 8,
        "evaluate_every": 1,
        "evaluate_samples": 64,
        "quiet": True,
    }

    def killed(folder: RunFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "keep_best", killed)
        with pytest.raises(KeyboardInterrupt):
            frugan.train("digits", epochs=1, out=tmp_path / "r", metrics="swd", **ways)
    assert not (tmp_path / "r" / "best.safetensors").exists()
    frugan.train("digits", epochs=1, out=tmp_path / "r", metrics="swd", **ways)
    assert frugan.load(tmp_path / "r", best=True).images_seen == frugan.load(tmp_path / "r").images_seen


ODD = [
    '{"images": "x"}',
    '{"images": 9, "event": "metrics"}',
    '{"images": 9, "event": "metrics", "values": {"swd": null}}',
    '{"images": 9, "event": "warning"}',
    '{"images": 9, "event": "warning", "kind": ["a"]}',
    "[" * 100_000,
    '{"images": ' + "9" * 5000,
]


@pytest.mark.parametrize("line", ODD)
def test_a_log_with_odd_lines_is_gone_on_with(line: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    log = tmp_path / "r" / "log.jsonl"
    log.write_text(line + "\n" + log.read_text())
    folder = RunFolder(tmp_path / "r")
    folder.rewind_log(10**9)
    assert folder.read_log()
    ways = {
        "recipe": "mlp",
        "batch_size": 64,
        "width_g": 8,
        "width_d": 8,
        "evaluate_every": 1,
        "evaluate_samples": 64,
        "quiet": True,
    }
    frugan.train("digits", epochs=2, out=tmp_path / "r", **ways)


def test_metrics_without_evaluating_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--evaluate-every 5"):
        frugan.train("digits", metrics="swd", out=tmp_path / "r", quiet=True)


def test_a_run_whose_images_are_elsewhere_says_which_they_are(
    train: Callable[..., Path], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(few.parent)
    run = train(tmp_path / "run", few.name, epochs=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--samples", "32", "--metrics", "swd"])
    assert f"{run} was trained on '{few.name}', which is not to be had from here: name it as DATA" in capsys.readouterr().err
    main(["evaluate", str(run), str(few), "--samples", "32", "--metrics", "swd"])


def test_images_are_evaluated_like_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    for i, image in enumerate(noise(0, 40)):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    main(["evaluate", str(folder), "digits", "--json", "--metrics", "swd,classes"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["metrics"]) == ["classes", "swd"] and "40 images of noise" in found["protocol"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no run folder: name a run, or images and DATA"),
        (["RUN", "--metrics", "fidd"], "there is no metric 'fidd': did you mean 'fid'"),
        (["RUN", "--metrics", ","], "--metrics names none"),
        (["RUN", "--metrics", "fid"], "Inception's weights cannot be downloaded"),
        (["RUN", "--weights", "nowhere.pth"], "cannot read the weights nowhere.pth"),
        (["RUN", "--samples", "5"], "--samples 5 is too few to evaluate by"),
        (["RUN", "PHOTOS", "--metrics", "recall_classifier"], "recall_classifier needs images of at least two classes"),
        (["RUN", "PACK"], "is packed as 20x20 with 3 channels"),
        (["BEGUN"], "has no generator yet"),
        (["BEGUN", "--best"], "has no best checkpoint: --evaluate-every keeps one"),
        (["RUN", "--sample", "5"], "there is no flag --sample: did you mean"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    arguments: list[str], said: str, run: Path, photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.toml").write_text((run / "recipe.toml").read_text())
    places = {"RUN": str(run), "BEGUN": str(tmp_path / "begun")}
    if "PHOTOS" in arguments or "PACK" in arguments:
        places["PHOTOS"] = str(photos(n=4))
    if "PACK" in arguments:
        places["PACK"] = str(tmp_path / "pack")
        main(["data", "pack", places["PHOTOS"], "--image-size", "20", "--channels", "3", "--out", places["PACK"]])
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *(places.get(a, a) for a in arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_one_class_has_no_classifier(photos: Callable[..., Path]) -> None:
    evaluator = Evaluator(loader(str(photos(n=40))), "photos", 0, Options(), CPU, print)
    assert evaluator.metrics == ["swd", "nearest", "copies"]  # of few images
    assert evaluator(lambda i, n: evaluator.data.batch(i, n), 40)["swd"] < 1e-6
    with pytest.raises(UserError, match="two classes"):
        Evaluator(loader(str(photos(n=40))), "photos", 1, Options("classes"), CPU, print)


def test_reports_are_written_by_training_and_on_demand(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Frechet distance (classifier)" in (run / "report.html").read_text()
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    main(["report", str(run), str(run), "--out", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").exists()


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    ways = {"recipe": "mlp", "epochs": 1, "batch_size": 64, "width_g": 8, "width_d": 8, "sample_every": 1, "quiet": True}
    run = frugan.train("digits", tensorboard=True, out=tmp_path / "r", **ways)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"Loss_D", "Loss_G", "D(x)", "memory"} <= set(events.Tags()["scalars"]) and events.Tags()["images"] == ["samples"]
