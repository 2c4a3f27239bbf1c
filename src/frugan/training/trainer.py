"""Training: everything is built from a recipe, then one readable loop."""

import gc
import math
import os
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.data.loader import Loader
from frugan.data.opening import keepable, open_loader, resolve
from frugan.data.sources import open_source
from frugan.data.sources.base import Source
from frugan.gan import sampling
from frugan.gan.build import average, freeze, lay_out, make_step, optimizers
from frugan.gan.networks import Network, build
from frugan.gan.optim import rate_factor
from frugan.gan.step import Terms
from frugan.gan.summary import summarise
from frugan.memory import limit
from frugan.memory.layout import Layout
from frugan.memory.plan import Plan
from frugan.memory.recover import Change, OutOfMemory
from frugan.reporting.console import Console
from frugan.reporting.records import LayoutChanged, Line, MemoryMeasured
from frugan.reporting.run_folder import RunFolder
from frugan.training.observer import Observer
from frugan.training.planner import Planner, find, notices, recovery
from frugan.training.state import Mean, State, take_weights
from frugan.utils import checkpoint, device
from frugan.utils.draws import Draws
from frugan.utils.errors import UserError
from frugan.utils.signals import Signals, Stopped
from frugan.utils.units import size

OnUpdate = Callable[[int], None]
_begun: list[bool] = []  # one for each training of this process
PACKING = 160 << 20  # bytes that decoding and packing images may take: below that a budget is not held while it goes on


def train(recipe: Recipe, run: Run, console: Console, on_update: OnUpdate | None = None) -> Path:
    """What `Trainer.train` does, in a program that finds its memory, threads and arithmetic as they were; the run folder."""
    if _begun:
        gc.collect()  # what an earlier training left, if it was broken off: `Trainer` freezes what is there
    _begun.append(True)
    with limit.as_before():
        return Trainer(recipe, run, console, on_update).train()


class Trainer:
    """One run: data, networks and folder of a recipe.

    Args:
        recipe: what to train; image size and channels are filled in from the data.
        run: where, and with what.
        console: what speaks to the person.
        on_update: is called with the number of images seen after every update.

    Raises:
        UserError: anything about data, recipe or folder that cannot be trained; nothing was written then.
    """

    def __init__(self, recipe: Recipe, run: Run, console: Console, on_update: OnUpdate | None = None) -> None:
        self.run = run
        self.console = console
        self.on_update = on_update
        self.device = device.choose(run.device)
        limit.handle("return", self.device)  # until there is a plan
        source = open_source(recipe.data)
        self.recipe = self._resolve(recipe, source)
        seed = self.recipe.training.seed
        self.loader = self._load(source, seed)
        self.name, self.classes = source.name, len(source.classes)  # not the source, which may hold a million names
        self.batch = self.recipe.training.batch_size
        if self.batch > len(self.loader):
            raise UserError(
                f"--batch-size {self.batch} is more than the {len(self.loader)} images of {source.name}: "
                f"use --batch-size {min(64, len(self.loader))} or fewer."
            )
        self.total = math.ceil(self.recipe.training.epochs * len(self.loader) / self.batch) * self.batch
        self.folder = RunFolder(Path(run.out) if run.out else Path("runs") / f"{source.name}-{self.recipe.recipe}")
        saved = self.folder.saved_plan()
        if run.allow_approximate and saved.get("precision") == "bf16":
            self.recipe = self.recipe.replace(precision="bf16")  # as it was planned
        if self.recipe.memory.offload_state == "auto" and saved.get("offload_state") == "yes":
            self.recipe = self.recipe.replace(offload_state="yes")
        self._set_threads(saved.get("threads"))
        self.signals = Signals()

    def _resolve(self, recipe: Recipe, source: Source) -> Recipe:
        data = resolve(source, recipe.data, self.console.tell)
        memory = recipe.memory
        if memory.precision == "auto":
            memory = replace(memory, precision=device.fast_precision(self.device))  # type: ignore[arg-type]
        return replace(recipe, data=data, memory=memory)

    def _load(self, source: Source, seed: int) -> Loader:
        """The images of ``source``; packing them is held to a budget on the CPU, if that leaves room for it."""
        run, tell = self.run, self.console.tell
        budget = limit.budget(run.memory, self.device)
        keep = keepable(budget, self.device)
        room = (
            source.random_access and self.device.type == "cpu" and budget is not None and budget - limit.held(self.device) > PACKING
        )
        try:
            with limit.limited(budget, self.device) if budget is not None and room else nullcontext():
                return open_loader(
                    source, self.recipe.data, seed=seed, workers=run.workers, tell=tell, keep=keep, device=self.device,
                    progress=self.console.packing,
                )  # fmt: skip
        except limit.SHORTAGE as error:
            if isinstance(error, UserError) or not limit.is_out_of_memory(error):
                raise
        within = f" within --memory {run.memory}" if room else ""
        raise UserError(
            f"memory ran out while packing {source.name}{within}: use fewer --workers, or pack it first with frugan data pack."
        )

    def _set_threads(self, before: object) -> None:
        """As asked for, else as many as the run was started with (``before``), since sums are split by threads.

        Before memory is limited: each thread reserves its stack when it starts.
        """
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        elif isinstance(before, int) and before != torch.get_num_threads():
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(before)
            slow = f", more than this machine's {cores} cores: slow" if before > cores else ""
            self.console.tell(
                f"With {before} threads, as it was started{slow}; --threads {cores} uses all cores, and differs by rounding."
            )

    def _build(self, resuming: bool) -> State:
        """Networks, optimizers and average, as new or, unless ``resuming``, from the run to start from."""
        recipe = self.recipe
        data, options, training = recipe.data, recipe.optimizer, recipe.training
        channels, size, _ = data.shape
        generator, discriminator = build(recipe.network, size, channels, training.seed)
        if training.init_from and not resuming:
            self._start_from(training.init_from, generator, discriminator)
        lay_out(recipe, generator, discriminator)
        generator.to(self.device)
        discriminator.to(self.device)
        freeze(recipe, discriminator)
        self.step = make_step(recipe, generator, discriminator)
        optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, self.device)
        factor, patience = options.schedule_factor, options.schedule_patience
        return State(
            generator, discriminator, average(recipe, generator, self.device), optimizer_g, optimizer_d, self.step.scaler,
            ReduceLROnPlateau(optimizer_g, factor=factor, patience=patience, threshold=0),
            ReduceLROnPlateau(optimizer_d, factor=factor, patience=patience, threshold=0),
        )  # fmt: skip

    def _start_from(self, run: str, generator: Network, discriminator: Network) -> None:
        """Takes the weights that fit from another run, and says which did."""
        loaded = RunFolder(Path(run)).load_newest() if Path(run).is_dir() else None
        if loaded is None:
            raise UserError(f"--init-from {run}: there is no checkpoint in it.")
        for name, (fitted, of, new) in take_weights(loaded[0], generator, discriminator).items():
            shown = f"; new are {', '.join(new[:3])}{' ...' if len(new) > 3 else ''}" if new else ""
            self.console.tell(f"From {run}: {fitted} of {of} tensors of the {name} fit{shown}.")

    def train(self) -> Path:
        """Trains to the end, from the newest checkpoint if there is one; the run folder.

        Raises:
            UserError: the folder is another's, a file cannot be written, or the training went to pieces.
            Stopped: by SIGINT or SIGTERM, with everything saved.
        """
        self._freezes = not gc.get_freeze_count()  # what a program has frozen itself is its own affair
        self._freeze()
        try:
            with self.folder, self.signals, device.arithmetic(self.recipe.memory.precision, self.device):
                return self._train()
        except (*limit.SHORTAGE, OutOfMemory) as error:
            if not (isinstance(error, OutOfMemory) or limit.is_out_of_memory(error)):
                raise
            raise self._out_of_memory(error) from None
        finally:
            if self._freezes:
                gc.unfreeze()
            self.console.stop()
            self.loader.close()

    def _freeze(self) -> None:
        """Collections need not look at what is there now, which takes them a third of a second."""
        if self._freezes:
            gc.freeze()

    def _train(self) -> Path:
        recipe, folder = self.recipe, self.folder
        folder.check(recipe, self._about(), self.run.accept_changes)
        observer = Observer(recipe, self.run, folder, self.loader, self.name, self.classes, self.console, self.device)
        with closing(observer) as self.observer:
            self.plan = self._plan(resuming=folder.newest_checkpoint() is not None)
            gc.collect()
            self._freeze()  # planning imports much
            budget = self.plan.budget if self.plan.named else None
            with limit.held_to(budget, self.device, self.plan.reserved, self.plan.held):
                return self._train_within(self._about())

    def _train_within(self, about: dict[str, Any]) -> Path:
        recipe, console, folder = self.recipe, self.console, self.folder
        resumed = folder.newest_checkpoint() is not None
        self.state = state = self._build(resuming=resumed)
        self.recovery = recovery(recipe, self.plan, self.step, self.run.allow_approximate, self._changed)
        if resumed:
            self._resume()
        folder.claim(recipe, about | self.plan.as_dict())
        if not resumed:
            folder.log_file.unlink(missing_ok=True)
        self.observer.begin(state.images)
        self._introduce()
        if resumed:
            console.tell(f"Going on from {state.images:,} images.")
        if state.images >= self.total:
            console.tell(f"{folder.path} is already trained for {state.images:,} images; more --epochs go on.")
            self._results()  # the last time could have been killed before they were written
            return folder.path

        mean = Mean()
        self._clock, self._clock_images = time.monotonic(), state.images
        self.measured: dict[str, float] = {}
        console.start(state.images, self.total)
        while state.images < self.total:
            drawn = state.images
            terms = self._advance()
            self.recovery.again(partial(mean.add, terms))
            self.recovery.again(partial(state.epoch_mean.add, terms))
            ended = state.images // len(self.loader) > drawn // len(self.loader)
            within = state.images % len(self.loader) // self.batch  # updates of this epoch, so that a resumed log is the same
            if ended or (within and within % self.run.report_every == 0) or state.images >= self.total:
                judged = {}
                if "Loss_G" in terms:
                    judged = {"D(G(z)) before": float(terms["D(G(z))"]), "D(G(z)) after": self._judged(drawn)}
                self._report(mean, judged)
            console.progress(self._line(self.measured), recipe.training.epochs, self.plan.budget if self.plan.named else None)
            if ended:
                self._end_epoch(state.images // len(self.loader))
            if self.on_update:
                self.on_update(state.images)
            if self.signals.received is not None and state.images < self.total:
                self._save()
                raise Stopped(self.signals.received, state.images)
        self._results()
        self._measured()
        return folder.path

    def _advance(self) -> Terms:
        """One update of D and, if it is its turn, one of G; what was measured."""
        state, run, step = self.state, self.recovery.run, self.step
        first, steps_g = state.images, self.recipe.training.discriminator_steps
        self._set_rates()
        try:
            images = self.recovery.again(partial(self.loader.images, first, self.batch))
        except UserError:  # images that cannot be reached any more; nothing of this update has happened yet
            self._save()
            raise
        terms = run("D", partial(step.discriminator_phase, images, first))
        self._update(state.optimizer_d)
        if (state.updates + 1) % steps_g == 0:
            terms |= run("G", partial(step.generator_phase, images, first))
            self._update(state.optimizer_g)
            if state.ema:
                # It allocates nothing but a number, before it changes anything.
                self.recovery.again(partial(state.ema.update, state.generator, self.batch * steps_g, first + self.batch))
        state.images += self.batch
        state.updates += 1
        return terms

    def _judged(self, first: int) -> float:
        sizes = self.recovery.layouts["G"].sizes
        return float(self.recovery.again(lambda: self.step.judge_generated(first, sizes)))

    def _update(self, optimizer: Adam) -> None:
        scaler = self.state.scaler
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _set_rates(self) -> None:
        options = self.recipe.optimizer
        if options.schedule != "plateau":
            factor = rate_factor(options, self.state.images / len(self.loader), self.recipe.training.epochs)
            self.state.optimizer_g.param_groups[0]["lr"] = options.lr_g * factor
            self.state.optimizer_d.param_groups[0]["lr"] = options.lr_d * factor

    def _report(self, mean: Mean, judged: dict[str, float]) -> None:
        state = self.state
        measured = mean.take() | judged
        # fp16 overflows now and then: the scaler skips the update and lowers its scale, at worst until nothing is left of it.
        skipping = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
        for name, value in list(measured.items()):
            if not math.isfinite(value):
                if not skipping:
                    raise self._went_to_pieces(name)
                del measured[name]
        self.measured = measured
        self.observer.line(self._line(measured))

    def _line(self, measured: dict[str, float]) -> Line:
        """How far training is, how fast it goes, and what was measured."""
        state, images = self.state, self.state.images
        rate = (images - self._clock_images) / max(time.monotonic() - self._clock, 1e-9)
        lr_g, lr_d = (optimizer.param_groups[0]["lr"] for optimizer in (state.optimizer_g, state.optimizer_d))
        return Line(
            images=images, epoch=images / len(self.loader), updates=state.updates, speed=rate,
            seconds_left=(self.total - images) / rate, memory=limit.held(self.device), measured=measured, lr_g=lr_g, lr_d=lr_d,
        )  # fmt: skip

    def _end_epoch(self, number: int) -> None:
        state, training = self.state, self.recipe.training
        means = state.epoch_mean.take()
        if self.recipe.optimizer.schedule == "plateau":
            state.plateau_d.step(means["Loss_D"])
            if "Loss_G" in means:
                state.plateau_g.step(means["Loss_G"])
        self.console.epoch(self._line(self.measured | means), number, training.epochs)
        is_best = self.observer.epoch(number, state.images, state.updates, self._sample)
        if is_best or number % self.run.checkpoint_every == 0 or state.images >= self.total:
            self._save()
        if is_best:
            self.folder.keep_best()
        limit.release(self.device)

    def _went_to_pieces(self, name: str) -> UserError:
        way = ", or --precision bf16 or fp32" if self.state.scaler.is_enabled() else ""
        return UserError(
            f"{name} is not finite after {self.state.images:,} images: training went to pieces. "
            f"Try lower --lr-g and --lr-d{way}; {self._last_state()}."
        )

    def _out_of_memory(self, error: Exception) -> UserError:
        """One sentence, after everything cheaper was tried."""
        reason = str(error) if isinstance(error, OutOfMemory) else "memory ran out"
        held = f" within --memory {self.run.memory}" if self.run.memory else ""
        return UserError(
            f"{reason}{held}: close other programs or give a larger --memory, then run the same command; {self._last_state()}."
        )

    def _changed(self, change: Change) -> None:
        """Says and writes down what was changed because memory ran out, or suffices again."""
        images, recovery, cause = self.state.images, self.recovery, change.cause
        self.console.tell(
            f"{cause[0].upper()}{cause[1:]} in {change.phase}'s phase after {images:,} images; going on with {change.change} "
            f"({change.guarantee})."
        )
        how = {"phase": change.phase, "change": change.change, "guarantee": str(change.guarantee)}
        self.observer.event(LayoutChanged(event=cause, images=images, **how))
        layouts = {name: layout.as_dict() for name, layout in recovery.layouts.items()}
        self.folder.rewrite_plan({"layouts": layouts, "freed_memory": recovery.handling})

    def _last_state(self) -> str:
        saved = self.folder.newest_checkpoint()
        return f"the last good state is {saved}" if saved else "nothing was saved yet"

    def _sample(self, seed: int, first: int, count: int) -> Tensor:
        limit.release(self.device)
        noise = Draws(seed).normal("sample", first, count, self.recipe.network.latent_dim)
        return sampling.to_images(self.state.averaged, noise, self.recovery.layouts["G"].micro_batch)

    def _save(self) -> None:
        limit.release(self.device)
        limit.wait(self.device)  # copies to moments on the host may be under way
        tensors, numbers = self.state.capture()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._went_to_pieces(name)
        recipe, folder = self.recipe, self.folder
        numbers |= {"recipe": recipe.to_toml(), "fingerprint": self.loader.fingerprint} | self._machine()
        checkpoint.save(checkpoint.path_for(folder.checkpoints, self.state.images), tensors, numbers)
        sampling.save(folder.generator_file, self.state.averaged, recipe, self.state.images)
        checkpoint.prune(folder.checkpoints, self.run.keep_checkpoints)

    def _results(self) -> None:
        """Everything that stands at the end of a run."""
        sampling.save(self.folder.generator_file, self.state.averaged, self.recipe, self.state.images)
        self.observer.finish(self._sample)

    def _measured(self) -> None:
        """Predicted and measured peak, side by side."""
        measured = limit.peak(self.device)
        if measured is None:
            return
        plan = self.plan
        within = f", within --memory {size(plan.budget)}" if plan.named else ""
        self.console.tell(f"Memory: {size(measured)} at most, {size(plan.predicted)} predicted{within}.")
        budget = plan.budget if plan.named else None
        self.observer.event(MemoryMeasured(images=self.state.images, predicted=plan.predicted, measured=measured, budget=budget))

    def _resume(self) -> None:
        tensors, numbers = self.folder.load_newest() or ({}, {})
        try:
            anew = self.state.restore(tensors, numbers)
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise UserError(
                f"the checkpoint in {self.folder.path} does not fit these networks ({reason}): give another --out."
            ) from None
        if anew:
            self.console.tell(f"{anew} parameters' moments were kept in another way (precision or memory format) and begin anew.")
        options = self.recipe.optimizer
        if options.schedule == "plateau":  # the reductions so far, of the learning rates as they are asked for now
            before = Recipe.from_toml(numbers["recipe"], "the checkpoint").optimizer
            rates = zip(numbers["rates"], (before.lr_g, before.lr_d), (options.lr_g, options.lr_d), strict=True)
            for optimizer, (rate, old, new) in zip((self.state.optimizer_g, self.state.optimizer_d), rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * (new / old)
        self.folder.rewind_log(self.state.images)
        changed = [f"{k} {numbers[k]} then, {v} now" for k, v in self._machine().items() if numbers[k] != v]
        if changed:
            self.console.tell(f"Not the machine it was started on ({'; '.join(changed)}): results can differ by rounding.")

    def _machine(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "device": self.device.type, "threads": torch.get_num_threads()}

    def _about(self) -> dict[str, Any]:
        """What this run is about, so that it is known again."""
        return {
            "images": len(self.loader), "fingerprint": self.loader.fingerprint, "device": str(self.device),
            "precision": self.recipe.memory.precision, "updates": self.total // self.batch,
            "offload_state": self.recipe.memory.offload_state, "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _plan(self, resuming: bool) -> Plan:
        """The plan of this run: the one it was started with if that still fits, so that it goes on as it was."""
        options: dict[str, Any] = {"data": self.loader.ahead(self.batch), "memory": self.run.memory}
        options |= {"evaluation": self.observer.needs(), "approximate": self.run.allow_approximate, "apart": True}
        saved = self.folder.saved_plan() if resuming else {}
        if "layouts" in saved:
            layouts = {name: Layout.from_dict(layout) for name, layout in saved["layouts"].items()}
            if all(sum(layout.sizes) == self.batch for layout in layouts.values()):
                plan = Planner(self.recipe, self.device, **options).with_layouts(layouts, saved["freed_memory"])
                if plan is not None:
                    planned = {name: Layout.from_dict(layout) for name, layout in saved.get("planned", {}).items()}
                    return replace(plan, planned=planned or None)
                self.console.tell("The plan this run was started with does not fit any more; planning anew.")
        planner, plan = find(self.recipe, self.device, let_go=self.loader.let_go, **options)
        self.recipe = planner.recipe
        return plan

    def _introduce(self) -> None:
        recipe, tell = self.recipe, self.console.tell
        data, memory = recipe.data, recipe.memory
        classes = f" in {self.classes} classes" if self.classes else ""
        kind = "grey" if data.channels == 1 else "colour"
        tell(f"{len(self.loader):,} images of {self.name}{classes}, {kind}, {data.image_size}x{data.image_size}.")
        self.console.networks(summarise(recipe, (self.state.generator, self.state.discriminator)))
        tell(
            f"Recipe {recipe.recipe}, {recipe.training.epochs} epochs, {memory.precision} on {self.device} with "
            f"{torch.get_num_threads()} threads, into {self.folder.path}."
        )
        self.console.plan(self.plan, self.batch)
        if memory.precision == "fp32" and (fast := device.fast_precision(self.device)) != "fp32":
            tell(f"This device is faster in {fast}, which rounds more: --precision {fast}.")
        for notice in notices(recipe, self.plan, self.state.generator, self.state.discriminator, self.device):
            tell(notice)
