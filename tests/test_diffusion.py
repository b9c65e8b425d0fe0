"""The mathematics, against diffusers' scheduler and against the formulas' own special cases."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from bunny_lora.model import diffusion

SCHEDULERS = {
    "scaled_linear": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "linear": DDPMScheduler(beta_schedule="linear"),
    "zero terminal SNR": DDPMScheduler(
        beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
}


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    latents = torch.randn(5, 4, 6, 8, generator=random)
    return latents, torch.randn(latents.shape, generator=random), torch.tensor([0, 1, 500, 998, 999])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noisy_latents_are_those_of_diffusers(name: str, sample: tuple) -> None:
    scheduler = SCHEDULERS[name]
    latents, noise, timesteps = sample
    ours = diffusion.add_noise(latents, noise, timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, timesteps))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_velocity_is_that_of_diffusers(name: str, sample: tuple) -> None:
    scheduler = SCHEDULERS[name]
    latents, noise, timesteps = sample
    ours = diffusion.target("v_prediction", latents, noise, timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(ours, scheduler.get_velocity(latents, noise, timesteps))


def test_epsilon_predicts_the_noise_and_sample_the_latents(sample: tuple) -> None:
    latents, noise, timesteps = sample
    alphas_cumprod = SCHEDULERS["linear"].alphas_cumprod
    assert diffusion.target("epsilon", latents, noise, timesteps, alphas_cumprod) is noise
    assert diffusion.target("sample", latents, noise, timesteps, alphas_cumprod) is latents
    with pytest.raises(ValueError, match="flow"):
        diffusion.target("flow", latents, noise, timesteps, alphas_cumprod)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(gamma: float) -> None:
    scheduler, timesteps = SCHEDULERS["scaled_linear"], torch.tensor([1, 300, 700, 999])
    snr = compute_snr(scheduler, timesteps)
    clipped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = {
        kind: diffusion.snr_weights(timesteps, scheduler.alphas_cumprod, gamma, kind)
        for kind in ("epsilon", "v_prediction")
    }
    torch.testing.assert_close(weights["epsilon"], clipped / snr)
    torch.testing.assert_close(weights["v_prediction"], clipped / (snr + 1))


def test_loss_is_one_number_a_sample_in_float32(sample: tuple) -> None:
    latents, noise, _ = sample
    losses = diffusion.loss_per_sample(latents.bfloat16(), noise.bfloat16())
    assert losses.dtype == torch.float32 and losses.shape == (5,)
    by_hand = [((a - b) ** 2).mean() for a, b in zip(latents, noise, strict=True)]
    torch.testing.assert_close(losses, torch.stack(by_hand), rtol=0.02, atol=0.02)


def test_biased_timesteps_come_so_many_times_as_often_from_their_range() -> None:
    even = torch.arange(1000)
    for begin, end in ((150, 700), (0, 1000), (0, 1), (999, 1000)):
        assert torch.equal(diffusion.biased_timesteps(even, (begin, end, 1.0), 1000), even)
    drawn = diffusion.biased_timesteps(even, (150, 700, 8.0), 1000)
    counts = torch.histc(drawn.float(), bins=20, min=0, max=1000)
    inside, outside = counts[3:14], torch.cat([counts[:3], counts[14:]])
    assert inside.mean() / outside.mean() == pytest.approx(8, rel=0.05)
    assert inside.max() - inside.min() <= 2 and outside.max() - outside.min() <= 2
    assert drawn.min() >= 0 and drawn.max() <= 999
    never = diffusion.biased_timesteps(even, (150, 700, 1e-6), 1000)
    assert ((never < 150) | (never >= 700)).all()
