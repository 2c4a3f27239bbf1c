"""What a training says: its introduction, its notices, and the sentences with which it ends early."""

import re

import torch

from frugan.gan.networks import Network
from frugan.gan.penalties import penalties
from frugan.gan.summary import summarise
from frugan.memory import host, limit
from frugan.memory.plan import Plan
from frugan.memory.recover import OutOfMemory
from frugan.training.session import Session
from frugan.utils import device
from frugan.utils.errors import UserError, counted

HANDFUL = 250  # images below which what to expect is said


def introduce(session: Session, plan: Plan, generator: Network, discriminator: Network) -> None:
    """Says what is about to be trained, on what, and how."""
    recipe, tell = session.recipe, session.console.tell
    data, memory = recipe.data, recipe.memory
    there = len(recipe.classes.present) or session.classes
    classes = f" in {counted(there, 'class', 'classes')}" if there else ""
    kind = "grey" if data.channels == 1 else "colour"
    tell(f"{counted(len(session.loader), 'image')} of {session.name}{classes}, {kind}, {data.image_size}x{data.image_size}.")
    session.console.networks(summarise(recipe, (generator, discriminator)))
    tell(
        f"Recipe {recipe.recipe}, {session.duration.words}, {memory.precision} on {session.device} with "
        f"{counted(torch.get_num_threads(), 'thread')}, into {session.folder.path}."
    )
    session.console.plan(plan, session.batch)
    if memory.precision == "fp32" and (fast := device.fast_precision(session.device)) != "fp32":
        tell(f"This device is faster in {fast}, which rounds more: --precision {fast}.")
    for notice in notices(session, plan, generator, discriminator):
        tell(notice)


def notices(session: Session, plan: Plan, generator: Network, discriminator: Network) -> list[str]:
    """What a person should know of what plan and recipe do to the training."""
    told = []
    recipe, where = session.recipe, session.device
    if (images := len(session.loader)) < HANDFUL:
        told.append(
            f"Only {counted(images, 'image')}: expect variations of these at best, and copies of them if training goes on for "
            "long. The report says how near samples lie to them; --augment ada, --flip auto and --init-from a run on similar "
            "images help."
        )
    if recipe.memory.offload_state == "yes" and where.type != "cpu":
        told.append("Moments and the averaged generator wait on the host: the same bits, and copies in every update.")
    if recipe.memory.moments == "8bit":
        told.append("Approximate: Adam keeps its moments in 8 bits; --moments fp32 does not.")
    if "yes" in (recipe.memory.offload_state, recipe.memory.offload_activations) and where.type == "cpu":
        told.append("On the CPU there is nothing to offload to: --offload-state and --offload-activations do nothing.")
    if where.type == "cpu" and host.lacks_pool():
        told.append(
            "The pool for tensors is not there, so that training is slower or needs more memory: install frugan where there is "
            "a C compiler (gcc)."
        )
    precision = recipe.memory.precision
    if precision == "fp16" and where.type == "cpu":
        told.append("The CPU has no arithmetic of its own for fp16 and is many times slower in it: use --precision bf16 or fp32.")
    if precision in ("tf32", "bf16", "fp16"):
        told.append(f"Approximate: {precision} rounds inside the networks; --precision fp32 does not.")
    for name, network in (("discriminator", discriminator), ("generator", generator)):
        cut = {p: layout.micro_batch for p, layout in plan.layouts.items() if len(layout.sizes) > 1 and not layout.uncoupled}
        if network.couples_samples and cut:
            sizes = " and ".join(f"{size} in {p}'s phase" for p, size in cut.items())
            told.append(f"Approximate: batch norm in the {name} takes its statistics from micro-batches of {sizes}.")
    if session.group.size > 1:
        told.append(f"{session.group.size} processes, each with {session.share.count} of the {session.batch} images of an update.")
        if generator.couples_samples or discriminator.couples_samples:
            told.append(f"Approximate: batch norm takes its statistics from the {session.share.count} images of each process.")
    if any(layout.uncoupled for layout in plan.layouts.values()):
        told.append(
            "Batch norm takes its statistics from the whole batch, in several passes over its micro-batches; --whole-batch-norm no "
            "is faster and takes them from each alone (approximate)."
        )
    if discriminator.couples_samples and penalties(recipe.objective):
        told.append(
            "Gradient penalties are meant for each sample alone, and batch norm in D couples them: consider --norm-d group."
        )
    return told


def diverged(session: Session, images: int, name: str, scaled: bool) -> UserError:
    """``name`` is not finite any more; ``scaled``: the loss is scaled, as fp16 needs."""
    way = ", or --precision bf16 or fp32" if scaled else ""
    return UserError(
        f"{name} is not finite after {counted(images, 'image')}: training diverged. Try lower --lr-g and --lr-d{way}; "
        f"{last_state(session)}."
    )


def out_of_memory(session: Session, error: Exception) -> UserError | None:
    """Memory ran out, after everything cheaper was tried; None: ``error`` says something else."""
    if not (isinstance(error, OutOfMemory) or limit.is_out_of_memory(error)):
        return None
    reason = str(error) if isinstance(error, OutOfMemory) else "memory ran out"
    if session.device.type == "xla":
        return UserError(f"{reason} on {session.device}: ask for more --accumulation-steps; {last_state(session)}.")
    held = f" within --memory {session.run.memory}" if session.run.memory else ""
    return UserError(
        f"{reason}{held}: close other programs or give a larger --memory, then run the same command; {last_state(session)}."
    )


def unsupported(session: Session, error: Exception) -> UserError | None:
    """The device has not an operator; None: ``error`` says something else."""
    if not isinstance(error, NotImplementedError) or not (found := re.search(r"'(\w+::[\w.]+)'", str(error))):
        return None
    way = "set PYTORCH_ENABLE_MPS_FALLBACK=1, by which the CPU computes it, or " if session.device.type == "mps" else ""
    return UserError(f"{session.device} cannot compute {found[1]}: {way}use another --device; {last_state(session)}.")


def last_state(session: Session) -> str:
    """From where the run could go on."""
    saved = session.folder.newest_checkpoint()
    return f"the last good state is {saved}" if saved else "nothing was saved yet"
