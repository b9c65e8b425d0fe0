"""One micro-batch of learning: from a position in the sample stream to a loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from bunny_lora.config import Config
from bunny_lora.core.seeding import derive_seed
from bunny_lora.model import diffusion
from bunny_lora.model.components import Components, encode_prompts
from bunny_lora.training.latents import Batch, EncodedImages


class PromptEncoder:
    """Captions to encoder_hidden_states; once each and for all while the text encoder is frozen.

    Captions that are not among those named at the start, thinned ones, are encoded each time.
    """

    def __init__(self, components: Components, captions: Iterable[str], *, trainable: bool) -> None:
        self.components, self.trainable = components, trainable
        self.known: dict[str, torch.Tensor] = {}
        if not trainable:
            for caption in dict.fromkeys(captions):
                with torch.no_grad():
                    self.known[caption] = encode_prompts(components, [caption])[0]

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Return encoder_hidden_states [N, model_max_length, cross_attention_dim]."""
        if self.trainable:
            return encode_prompts(self.components, captions)
        with torch.no_grad():
            return torch.stack([self._state(caption) for caption in captions])

    def _state(self, caption: str) -> torch.Tensor:
        known = self.known.get(caption)
        return encode_prompts(self.components, [caption])[0] if known is None else known


@dataclass
class Learner:
    """What a loss is computed from. `class_images` only with prior preservation."""

    components: Components
    config: Config
    images: EncodedImages
    class_images: EncodedImages | None = None
    encode: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        captions = self.images.captions + (self.class_images.captions if self.class_images else [])
        trainable = self.config.lora.train_text_encoder
        self.encode = PromptEncoder(self.components, captions, trainable=trainable)

    def loss(self, position: int) -> torch.Tensor:
        """Return the mean loss of the micro-batch whose first sample is at `position`, a scalar.

        With prior preservation as many class images are drawn beside it, and their loss is added with
        its weight, https://arxiv.org/abs/2208.12242, eq. 2.
        """
        training = self.config.training
        batches = [self._batch(self.images, position)]
        if self.class_images is not None:
            batches.append(self._batch(self.class_images, position))
        device = self.components.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(training.seed, "dropout", position))
            losses = self._losses(_join(batches))
        prior_weight = self.config.prior_preservation.prior_loss_weight
        instance, *prior = losses.split(training.batch_size)
        return instance.mean() + sum(prior_weight * part.mean() for part in prior)

    def _batch(self, images: EncodedImages, position: int) -> Batch:
        training, scheduler = self.config.training, self.components.noise_scheduler
        count = scheduler.config.num_train_timesteps
        return images.batch(training.seed, position, training.batch_size, count)

    def _losses(self, batch: Batch) -> torch.Tensor:
        scheduler, device = self.components.noise_scheduler, self.components.device
        alphas_cumprod, kind = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        latents, noise = batch.latents.to(device), batch.noise.to(device)
        timesteps = batch.timesteps.to(device)
        noisy_latents = diffusion.add_noise(latents, noise, timesteps, alphas_cumprod)
        target = diffusion.target(kind, latents, noise, timesteps, alphas_cumprod)
        prediction = self.components.unet(
            noisy_latents.to(self.components.dtype), timesteps, self.encode(batch.captions)
        ).sample
        losses = diffusion.loss_per_sample(prediction, target)
        if (gamma := self.config.training.snr_gamma) is not None:
            losses = losses * diffusion.snr_weights(timesteps, alphas_cumprod, gamma, kind)
        return losses


def _join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        torch.cat([batch.timesteps for batch in batches]),
        [caption for batch in batches for caption in batch.captions],
    )
