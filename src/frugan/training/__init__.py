"""Training, from Python: `train` and, for what it made, `load`. torch is imported only once there is work to do."""

import gc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugan.config.recipe import Data, Recipe
from frugan.config.run import Run

if TYPE_CHECKING:
    from frugan.gan.sampling import Generator

_begun: list[bool] = []  # one for each training of this process


def train(
    data: str | Path | None = None,
    *,
    recipe: str | Recipe | None = None,
    quiet: bool = False,
    on_update: Callable[[int], None] | None = None,
    **settings: Any,
) -> Path:
    """Trains a GAN, or goes on with a training that was interrupted.

    The C library's handling of memory, torch's number of threads and its use of TF32 are set meanwhile, and at the end as before.

    Args:
        data: folder or zip of images, folder of IDX files, or ``digits``, ``mnist``, ``fashion-mnist``; unset: the recipe's.
        recipe: a name (``resize``, ``dcgan``, ``upsample``, ``mlp``, ``r3``, ``projected``), a TOML file, or a `Recipe`; unset:
            ``projected`` for grey images of 32 pixels a side or fewer with labels, if names, IDX files or a pack say so, else
            ``resize``.
        quiet: whether to say nothing.
        on_update: is called with the number of images seen after every update.
        **settings: any setting of the recipe or of the run by its name: ``epochs=5, batch_size=64, out="runs/mine"``.

    Returns:
        The run folder.

    Raises:
        UserError: something about data, settings or folder is wrong; says what, where and what to do.
        frugan.utils.signals.Stopped: SIGINT or SIGTERM came, and the state was saved.
    """
    from frugan.config import recipes

    own = {f.name for f in fields(Run)}
    said = {"data": data} | settings if data is not None else settings
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in said.items()}
    if recipe is None:
        about: Any = {k: v for k, v in plain.items() if k in {f.name for f in fields(Data)}}
        recipe = recipes.default(Data(**about))
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    run: dict[str, Any] = {k: v for k, v in plain.items() if k in own}
    chosen = chosen.replace(**{k: v for k, v in plain.items() if k not in own})
    return run_training(chosen, Run(**run), quiet, on_update)


def run_training(recipe: Recipe, run: Run, quiet: bool = False, on_update: Callable[[int], None] | None = None) -> Path:
    """What `train` does, once it is clear what is asked for."""
    from frugan.training.duration import now

    began = now()
    from frugan.memory import limit
    from frugan.reporting.console import Console
    from frugan.training.session import Session, joined
    from frugan.training.trainer import Trainer

    if _begun:
        gc.collect()  # what an earlier training left, if it was broken off: `Trainer` freezes what is there
    _begun.append(True)
    with limit.as_before(), joined(run.device) as group:
        console = Console(quiet or not group.leads)
        session = group.first(lambda: Session.open(recipe, run, console, began, group))
        group.agree(session.essence())
        return Trainer(session, on_update).train()


def load(run: str | Path, device: str = "cpu", *, best: bool = False) -> "Generator":
    """The trained generator of a run folder (``best``: the best by ``evaluate_every``), or of a ``generator.safetensors``.

    Raises:
        UserError: there is none, or the file is damaged.
    """
    from frugan.reporting.run_folder import load_generator

    return load_generator(run, device, best=best)
