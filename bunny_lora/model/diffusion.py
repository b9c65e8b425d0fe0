"""The mathematics of training a diffusion model, as pure functions on tensors.

x_t = sqrt(alpha_bar_t) · x_0 + sqrt(1 - alpha_bar_t) · noise, https://arxiv.org/abs/2006.11239, eq. 4.
`alphas_cumprod` (float32 [num_train_timesteps]) is the noise scheduler's own, so its betas count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _at(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return alpha_bar at each sample's timestep, shaped to multiply [N, ...] tensors."""
    return alphas_cumprod.to(timesteps.device)[timesteps].view(-1, *[1] * (ndim - 1))


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return x_t [N, C, H, W] from x_0 and noise of the same shape and int64 timesteps [N]."""
    alpha_bar = _at(timesteps, alphas_cumprod, latents.ndim)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """Return what the UNet has to predict, [N, C, H, W].

    "epsilon": the noise; "sample": x_0; "v_prediction": sqrt(alpha_bar) · noise - sqrt(1 - alpha_bar)
    · x_0, https://arxiv.org/abs/2202.00512, appendix D.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        alpha_bar = _at(timesteps, alphas_cumprod, latents.ndim)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def biased_timesteps(timesteps: torch.Tensor, bias: tuple[int, int, float], count: int) -> torch.Tensor:
    """Return timesteps that come more often from a range, int64 [N], of such as are drawn evenly.

    By the inverse of the cumulative distribution, so that a drawn number stays one number. It is what
    diffusers' SDXL scripts draw with --timestep_bias_strategy range.

    Args:
        timesteps: int64 [N], drawn evenly below `count`.
        bias: the range's first timestep, the first above it, and how many times as often it comes.
        count: the noise scheduler's `num_train_timesteps`.
    """
    begin, end, multiplier = bias
    times = torch.ones(count, dtype=torch.double)
    times[begin:end] = multiplier
    whole = times.cumsum(0)
    places = (timesteps.cpu().double() + 0.5) / count * whole[-1]
    return torch.searchsorted(whole, places, right=True).clamp(max=count - 1).to(timesteps.device)


def snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Return min(SNR, gamma) loss weights, float32 [N], for SNR = alpha_bar / (1 - alpha_bar).

    Divided by SNR for epsilon and by SNR + 1 for v, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    alpha_bar = _at(timesteps, alphas_cumprod, 1)
    snr = alpha_bar / (1 - alpha_bar)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp(max=gamma) / divisor


def loss_per_sample(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean squared error of each sample, float32 [N], whatever the inputs' precision.

    With a `mask`, float32 [N, 1, H, W] of weights, it is the weighted mean.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.expand_as(errors).flatten(1)
    return (errors.flatten(1) * weights).sum(1) / weights.sum(1)
