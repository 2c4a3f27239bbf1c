"""Where and with what a training runs."""

from dataclasses import dataclass
from typing import Literal

from frugan.config.section import Section, option


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    """Where and with what a training runs: nothing here changes the numbers it ends with."""

    out: str | None = option(None, "run folder; unset: runs/DATA-RECIPE")
    memory: str | None = option(None, "the most memory to hold, as 2GiB or 800MiB; unset: most of what is free")
    allow_approximate: bool = option(False, "where nothing else fits, micro-batches below 16 under batch norm, and bf16")
    device: str = option("auto", "cpu, cuda, cuda:1, xpu, mps, xla; auto: the first of cuda, xpu, mps, cpu that is there")
    cuda_graphs: Literal["auto", "yes", "no"] = option(
        "auto", "give the GPU whole phases at once, several times as fast where networks are small; auto: without a named budget"
    )
    threads: int | None = option(None, "processor threads; unset: all cores, or as the run was started with", least=1)
    workers: int = option(2, "threads that decode images ahead of training", least=1)
    sample_every: int = option(5, "epochs between two pictures of samples", least=1)
    checkpoint_every: int = option(1, "epochs between two checkpoints", least=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", least=1)
    report_every: int = option(50, "updates between two lines of log.jsonl, which also ends each epoch with one", least=1)
    evaluate_every: int = option(0, "epochs between two evaluations, which keep the best checkpoint too; 0: none", least=0)
    evaluate_samples: int = option(2000, "samples of an evaluation while training, and real images as many", least=16)
    metrics: str = option("auto", "what to evaluate by, as swd,frechet_classifier,fid; auto: what needs no download")
    weights: str | None = option(None, "file of Inception's weights, for fid, kid, is, precision and recall")
    tensorboard: bool = option(False, "write curves and samples for TensorBoard into the run folder too")
    trackers: str | None = option(
        None, "what follows the training besides its log and its report, by names with commas, as tensorboard"
    )
    accept_changes: bool = option(False, "go on with an existing run although settings differ from those it was started with")

    def __post_init__(self) -> None:
        said: object = self.memory
        if isinstance(said, (int, float)) and not isinstance(said, bool):  # bytes, as programs say it
            object.__setattr__(self, "memory", str(said))
        super().__post_init__()
