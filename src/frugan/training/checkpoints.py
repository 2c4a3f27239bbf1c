"""The state of a run on disk: written whole, read back, and begun from another run's."""

from contextlib import suppress
from pathlib import Path

from frugan.config.recipe import Recipe
from frugan.gan import sampling
from frugan.gan.transfer import PREFIXES
from frugan.memory import limit
from frugan.reporting.run_folder import RunFolder
from frugan.training.messages import diverged
from frugan.training.session import Session
from frugan.training.state import State
from frugan.utils import checkpoint
from frugan.utils.errors import UserError


def begin(session: Session) -> State:
    """The state of a run as it stands: new, from another run's weights, or from the newest checkpoint.

    Raises:
        UserError: there is nothing to start from, or the checkpoint is damaged or of other networks.
    """
    folder, training = session.folder, session.recipe.training
    resuming = folder.newest_checkpoint() is not None
    weights, origin = None, None
    if training.init_from and not resuming:
        other = RunFolder(Path(training.init_from))
        loaded = other.load_newest() if other.path.is_dir() else None
        if loaded is None:
            reason = "there is no checkpoint in it" if other.path.is_dir() else "there is no such folder"
            raise UserError(f"--init-from {training.init_from}: {reason}; name a run folder.")
        tensors, numbers = loaded
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES)}
        del loaded, tensors  # moments, which are most of it
        with suppress(UserError):  # of a version that had other settings
            origin = Recipe.from_toml(str(numbers.get("recipe")), training.init_from)
    state = State(session.recipe, session.device, weights, session.console.tell, origin)
    if resuming:
        _resume(session, state)
    return state


def _resume(session: Session, state: State) -> None:
    folder, tell, options = session.folder, session.console.tell, session.recipe.optimizer
    tensors, numbers = folder.load_newest() or ({}, {})
    try:
        anew = state.restore(tensors, numbers)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(f"the checkpoint in {folder.path} does not fit these networks ({reason}): give another --out.") from None
    if anew:
        tell(f"{anew} parameters' moments were kept in another way (precision or memory format) and begin anew.")
    session.duration.restore(numbers.get("duration", {}))
    if options.schedule == "plateau":  # the reductions so far, of the learning rates as they are asked for now
        before = Recipe.from_toml(numbers["recipe"], "the checkpoint").optimizer
        rates = zip(numbers["rates"], (before.lr_g, before.lr_d), (options.lr_g, options.lr_d), strict=True)
        for optimizer, (rate, old, new) in zip((state.optimizer_g, state.optimizer_d), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (new / old)
    changed = [f"{k} {numbers[k]} then, {v} now" for k, v in session.machine().items() if numbers[k] != v]
    if changed:
        tell(f"Not the machine it was started on ({'; '.join(changed)}): results can differ by rounding.")


def save(session: Session, state: State) -> None:
    """Writes a checkpoint and the generator, and prunes old checkpoints; of several processes the first does.

    Raises:
        UserError: the training diverged, or a file cannot be written.
    """
    if not session.group.leads:
        return
    limit.release(session.device)
    limit.wait(session.device)  # copies to moments on the host may be under way
    tensors, numbers = state.capture()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise diverged(session, state.images, name, state.scaler.is_enabled())
    folder = session.folder
    mend(session)
    numbers |= {"recipe": session.recipe.to_toml(), "fingerprint": session.loader.fingerprint} | session.machine()
    numbers["duration"] = session.duration.capture()
    checkpoint.save(checkpoint.path_for(folder.checkpoints, state.images), tensors, numbers)
    save_generator(session, state)
    checkpoint.prune(folder.checkpoints, session.run.keep_checkpoints)


def mend(session: Session) -> None:
    """Makes the run folder again if somebody moved or removed it while it was trained, and says so."""
    if session.folder.mend():
        session.console.tell(
            f"{session.folder.path} was moved or removed while it was trained: it is made again, without what was in it, and "
            "training goes on there."
        )


def save_generator(session: Session, state: State) -> None:
    """Writes the generator to use, with its recipe; of several processes the first does."""
    if session.group.leads:
        sampling.save(session.folder.generator_file, state.averaged, session.recipe, state.images)
