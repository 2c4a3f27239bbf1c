"""``frugan generate``: images with a trained generator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from frugan.cli.parsing import Command
from frugan.utils.errors import UserError, counted

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(kw_only=True)
class Generate:
    """Makes images with a trained generator."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="run folder, or a generator.safetensors")]
    n: Annotated[int, tyro.conf.arg(help="how many images")] = 64
    seed: Annotated[int, tyro.conf.arg(help="the same seed gives the same images")] = 0
    out: Annotated[str | None, tyro.conf.arg(help="picture or folder to write; unset: RUN/generated", help_behavior_hint="")] = None
    separate: Annotated[bool, tyro.conf.arg(help="one file an image, not one grid")] = False
    classes: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="which to make, a row each, by names or numbers; unset: all", metavar="CLASS CLASS ...", help_behavior_hint=""
        ),
    ] = ()
    interpolate: Annotated[
        tuple[int, ...],
        tyro.conf.arg(help="seeds to go between: a strip and a GIF", metavar="SEED SEED ...", help_behavior_hint=""),
    ] = ()
    frames: Annotated[int, tyro.conf.arg(help="steps from one seed to the next")] = 16
    truncation: Annotated[
        float, tyro.conf.arg(help="what noise is multiplied by: below 1 more typical images, above 1 more varied ones")
    ] = 1.0
    best: Annotated[bool, tyro.conf.arg(help="the best generator by --evaluate-every, not the last one")] = False
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, mps or auto")] = "cpu"


def run(options: Generate) -> None:
    """Makes images with a trained generator."""
    from frugan.data.sources.base import plain
    from frugan.reporting import pictures
    from frugan.reporting.run_folder import load_generator

    generator = load_generator(options.run, options.device, best=options.best)
    made_by = Path(options.run)
    out = Path(options.out) if options.out else (made_by if made_by.is_dir() else made_by.parent) / "generated"
    single = out if out.suffix else None
    if single and options.interpolate and single.suffix.lower() == ".gif":  # the strip lies beside it
        single = single.with_suffix(".png")
    if single and single.suffix.lower() not in PICTURES:
        raise UserError(f"--out {out}: pictures are written as .png, .jpg, .webp or .bmp.")
    if single and options.separate:
        raise UserError(f"--separate writes many files: --out {out} must be a folder.")
    if options.interpolate and options.separate:
        raise UserError("--interpolate writes a strip and a GIF: leave --separate out.")
    if options.interpolate and options.n != Generate.n:
        raise UserError("--interpolate makes as many images as --frames says: leave --n out.")
    side = generator.recipe.data.shape[1]
    made = ("_best" if options.best else "") + (f"_t{options.truncation:g}" if options.truncation != 1 else "")
    asked = made + "".join(f"_{plain(name)}" for name in options.classes)  # so that no other is written over
    if options.interpolate:
        if len(options.classes) > 1:
            raise UserError(f"--interpolate keeps to one class: name one of {', '.join(options.classes)}.")
        every = max(1, options.frames // 8)  # a strip of every frame would be too wide to look at
        last = (len(options.interpolate) - 1) * options.frames
        shown = [*range(0, last, every), last]
        if single:
            pictures.check_fits(single, len(shown), side, len(shown))
        of = next(iter(options.classes), None)
        images = generator.interpolate(options.interpolate, options.frames, of=of, truncation=options.truncation)
        frames = f"_f{options.frames}" if options.frames != Generate.frames else ""
        name = "-".join(map(str, options.interpolate)) + frames + asked
        strip, loop = (
            single or out / f"interpolation_{name}.png",
            (single or out / f"interpolation_{name}.gif").with_suffix(".gif"),
        )
        pictures.save(pictures.grid(images[shown], columns=len(shown)), strip)
        pictures.save_loop(images, loop)
        print(f"{strip}\n{loop}")
        return
    classes = options.classes or generator.classes
    if single:
        pictures.check_fits(single, options.n, side, classes=len(classes))
    images = generator.generate(options.n, seed=options.seed, classes=classes, truncation=options.truncation)
    if options.separate:
        for i, image in enumerate(images):
            of = f"_{plain(classes[i % len(classes)])}" if classes else ""
            pictures.save(pictures.single(image), out / f"seed_{options.seed}_{i:05d}{made}{of}.png")
        print(f"{counted(len(images), 'image')} in {out}")
    else:
        number = f"_n{options.n}" if options.n != Generate.n else ""
        path = single or out / f"seed_{options.seed}{number}{asked}.png"
        pictures.save(pictures.grid(images, classes=len(classes)), path)
        print(path)


COMMAND = Command(lambda _: Generate, run)
