"""Learning-rate schedules and the averaged generator."""

import pytest
import torch
from torch import nn

from frugan.config.recipe import Optimizer
from frugan.gan.optim import Ema, FrugalAdam, LowBitAdam, rate_factor
from frugan.training.duration import Epochs


@pytest.mark.parametrize(
    ("schedule", "at", "factor"),
    [
        ("constant", 7.0, 1.0),
        ("plateau", 7.0, 1.0),
        ("step", 9.99, 1.0),
        ("step", 10.0, 0.5),
        ("step", 29.0, 0.25),
        ("exponential", 10.0, 0.5),
        ("exponential", 5.0, 0.5**0.5),
        ("cosine", 0.0, 1.0),
        ("cosine", 20.0, 0.5),
        ("cosine", 40.0, 0.0),
        ("cosine", 41.0, 0.0),
    ],
)
def test_schedules(schedule: str, at: float, factor: float) -> None:
    share = Epochs(40, 100, 10).share(round(100 * at))
    assert rate_factor(Optimizer(schedule=schedule), at, share) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("batch", [10, 50])
def test_the_average_forgets_half_in_its_half_life_whatever_the_batch(batch: int) -> None:
    network = nn.Linear(1, 1)
    ema = Ema(network, half_life=1000)
    seen = 1_000_000  # long after the ramp
    nn.init.zeros_(network.weight)
    ema.update(network, batch, seen)
    nn.init.ones_(network.weight)
    for _ in range(1000 // batch):
        ema.update(network, batch, seen)
    torch.testing.assert_close(ema.module.weight, torch.full((1, 1), 0.5))


@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_moments_in_8_bits_train_as_those_in_32_do_in_a_quarter_of_their_bytes(beta1: float) -> None:
    def trained(kind: type[FrugalAdam]) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        layer = nn.Conv2d(16, 64, 5, padding=2).to(memory_format=torch.channels_last)
        images, wanted = torch.randn(8, 16, 6, 6), torch.randn(8, 64, 6, 6)
        optimizer = kind(layer.parameters(), 1e-2, (beta1, 0.99))
        for _ in range(60):
            optimizer.zero_grad()
            (layer(images) - wanted).square().mean().backward()
            optimizer.step()
        moments = [m for k, m in optimizer.state[layer.weight].items() if k != "step"]
        assert optimizer.state[layer.weight]["step"] == 60
        return (layer(images) - wanted).square().mean().detach(), sum(m.nbytes for m in moments)

    (loss, whole), (loss_low, low) = trained(FrugalAdam), trained(LowBitAdam)
    assert low < 0.27 * whole
    assert loss < 0.1
    assert abs(loss_low / loss - 1) < 0.25
