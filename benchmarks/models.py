"""The engine on models that are not ours: what it predicts against what the process then holds, with and without a budget.

    pip install torchvision timm transformers
    python benchmarks/models.py [--only resnet18 vit_b_32]

Thirty models with random weights, each trained for two updates by Adam or SGD on random images or tokens, in a process of its own
for each cell: without a budget, and within one halfway between the smallest that the engine names and what it predicts without. The
peak is the process's as the system counts it (VmHWM from before the first update, and ``ru_maxrss`` from its start).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tyro
from rich.console import Console
from rich.table import Table

# Library, name, side of the images (of tokens: length), batch.
MODELS: list[tuple[str, str, int, int]] = [
    ("torchvision", "resnet18", 96, 32), ("torchvision", "resnet50", 96, 16), ("torchvision", "mobilenet_v3_large", 96, 32),
    ("torchvision", "densenet121", 96, 16), ("torchvision", "efficientnet_b0", 96, 32), ("torchvision", "convnext_tiny", 96, 16),
    ("torchvision", "vit_b_32", 224, 16), ("torchvision", "swin_t", 96, 16), ("torchvision", "regnet_y_400mf", 96, 32),
    ("torchvision", "shufflenet_v2_x1_0", 96, 32), ("torchvision", "squeezenet1_1", 96, 32), ("torchvision", "vgg11_bn", 64, 16),
    ("torchvision", "mnasnet1_0", 96, 32), ("torchvision", "googlenet", 96, 16),
    ("timm", "resnet26d", 96, 16), ("timm", "mixer_s32_224", 224, 16), ("timm", "deit_tiny_patch16_224", 224, 16),
    ("timm", "convmixer_768_32", 64, 4), ("timm", "poolformer_s12", 96, 16), ("timm", "mobilevitv2_050", 128, 16),
    ("timm", "efficientformer_l1", 224, 8), ("timm", "ghostnet_100", 96, 32), ("timm", "repvgg_a0", 96, 16),
    ("timm", "gmlp_s16_224", 224, 8), ("timm", "resmlp_12_224", 224, 16), ("timm", "levit_128s", 224, 16),
    ("transformers", "bert", 128, 16), ("transformers", "gpt2", 128, 8), ("transformers", "distilbert", 128, 16),
    ("transformers", "t5", 64, 16), ("transformers", "electra", 128, 16), ("transformers", "roberta", 128, 8),
]  # fmt: skip
# Those whose batch norm may be computed over the whole batch: the passes that takes grow with the square of its layers.
EXACT = ("resnet18", "resnet50", "vgg11_bn", "repvgg_a0")


@dataclass
class Options:
    only: tuple[str, ...] = ()  # models by name; none: all
    cell: str | None = None  # used by the script itself: measures one


def made(library: str, name: str) -> Any:
    """The module, with random weights."""
    import torch

    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10)
    import transformers as hf

    small = {"vocab_size": 8000}
    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    if name == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=384, n_layer=6, n_head=6, **small))
    if name == "t5":
        return hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=256, d_ff=1024, num_layers=4, num_heads=4, decoder_start_token_id=0, pad_token_id=0, **small)
        )
    if name == "distilbert":
        return hf.DistilBertForMaskedLM(hf.DistilBertConfig(dim=384, n_layers=4, n_heads=6, hidden_dim=1536, **small))
    kind = {"bert": "Bert", "electra": "Electra", "roberta": "Roberta"}[name]
    return getattr(hf, f"{kind}ForMaskedLM")(getattr(hf, f"{kind}Config")(**small, **size))


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """One training through the engine."""
    import resource

    import torch
    from torch.nn.functional import cross_entropy

    from frugan.memory import Engine, limit
    from frugan.utils.errors import UserError

    library, name, side, batch = cell["model"]
    device = torch.device("cpu")
    module = made(library, name)
    module.train()
    if library == "transformers":
        given = [torch.randint(0, 8000, (batch, side)), torch.randint(0, 8000, (batch, side))]

        def loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            more = {"labels": targets} if name == "t5" else {}
            logits = model(input_ids=tokens, use_cache=False, **more).logits if name in ("t5", "gpt2") else model(tokens).logits
            return cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)

    else:
        given = [torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))]

        def loss(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = model(images)
            logits = logits[0] if isinstance(logits, tuple) else logits
            return cross_entropy(logits, labels, reduction="none")

    sgd = cell["number"] % 3 == 2
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9) if sgd else torch.optim.Adam(module.parameters(), lr=1e-4)
    )
    told: list[str] = []
    engine = Engine(
        module, loss, optimizer, batch=batch, memory=cell["memory"], whole_batch_norm=name in EXACT,
        changed=lambda change: told.append(str(change)),
    )  # fmt: skip
    try:
        engine.plan(*(g[:2] for g in given))
    except UserError as error:
        return {"refused": str(error)}
    planning = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with engine:
        for _ in range(2):
            engine.step(*given)
        peak = limit.peak(device)
    assert engine.choice is not None
    choice = engine.choice.chosen["the step"]
    return {
        "predicted": engine.predicted, "peak": peak, "planning": planning, "layout": str(choice.layout),
        "freed": engine.choice.freed, "allocates": choice.allocated, "changes": told,
    }  # fmt: skip


def measured(**cell: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended by {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(options: Options) -> None:
    if options.cell:
        print(json.dumps(run(json.loads(options.cell))))
        return
    table = Table(title="memory.Engine on models that are not ours")
    for heading in ("model", "batch", "budget MiB", "plan", "predicted", "process", "error"):
        table.add_column(heading, justify="left" if heading in ("model", "plan") else "right")
    errors: list[float] = []
    over = failed = 0
    for number, model in enumerate(MODELS):
        if options.only and model[1] not in options.only:
            continue
        free = measured(model=model, memory=None, number=number)
        refused = measured(model=model, memory="1MiB", number=number).get("refused", "")
        smallest = int(refused.split("the smallest that works is ")[1].split("MiB")[0]) if "smallest" in refused else None
        budgets: list[int | None] = [None]
        if smallest and "predicted" in free:
            budgets += [max(smallest, (smallest + (free["predicted"] >> 20)) // 2), smallest]
        for budget in budgets:
            found = free if budget is None else measured(model=model, memory=f"{budget}MiB", number=number)
            print(model, budget, found, file=sys.stderr, flush=True)
            shown = str(budget or "-")
            if "predicted" not in found:
                failed += 1
                table.add_row(f"{model[0]} {model[1]}", str(model[3]), shown, next(iter(found.values()))[:60], "-", "-", "-")
                continue
            errors.append(found["predicted"] / found["peak"] - 1)
            exceeded = budget is not None and found["peak"] > budget << 20
            over += exceeded
            table.add_row(
                f"{model[0]} {model[1]}", str(model[3]), shown + (" exceeded" if exceeded else ""),
                f"{found['layout']} ({found['freed']})" + ("; changed" if found["changes"] else ""),
                f"{found['predicted'] / 2**20:.0f}", f"{found['peak'] / 2**20:.0f}", f"{errors[-1]:+.1%}",
            )  # fmt: skip
    Console(width=150).print(table)
    import torch

    within = sum(0 <= e <= 0.03 for e in errors)
    print(
        f"{len(errors)} trainings, torch {torch.__version__}, {torch.get_num_threads()} threads: {within} within 0 to +3% "
        f"({within / max(1, len(errors)):.0%}), {sum(abs(e) <= 0.05 for e in errors)} within 5%, from {min(errors):+.1%} to "
        f"{max(errors):+.1%}; {over} budgets exceeded, {failed} failed."
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
