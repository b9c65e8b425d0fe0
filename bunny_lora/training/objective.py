"""One micro-batch of learning: from a position in the sample stream to a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel

from bunny_lora.config import Config
from bunny_lora.core.seeding import derive_seed
from bunny_lora.data.captions import count_tokens, without_names
from bunny_lora.model import diffusion
from bunny_lora.model.components import Components, encode_prompts
from bunny_lora.model.lora_scales import lora_scales
from bunny_lora.training.batch import Batch
from bunny_lora.training.latents import EncodedImages
from bunny_lora.training.lessons import Lesson, naming_rows, preserved_rows, with_lessons


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
    """What a loss is computed from. `class_images` only with prior preservation.

    `models` are the adapters in `components`, to switch off for output preservation.
    """

    components: Components
    config: Config
    images: EncodedImages
    class_images: EncodedImages | None = None
    models: Mapping[str, PeftModel] = field(default_factory=dict)
    encode: PromptEncoder = field(init=False)

    def __post_init__(self) -> None:
        captions = ["", *self.images.captions, *self.images.view_captions]
        if self.config.preservation.share:
            nameless = [without_names(caption, self.images.names) for caption in captions]
            captions += [self.config.prior_preservation.class_prompt, *nameless]
        captions += self.class_images.captions if self.class_images else []
        trainable = self.config.lora.train_text_encoder
        self.encode = PromptEncoder(self.components, captions, trainable=trainable)

    def loss(self, position: int) -> torch.Tensor:
        """Return the mean loss of the micro-batch whose first sample is at `position`, a scalar.

        With prior preservation as many class images are drawn beside it, and their loss is added with
        its weight, https://arxiv.org/abs/2208.12242, eq. 2.
        """
        training = self.config.training
        drawn = self._batch(self.images, position)
        instance, lessons = with_lessons(drawn, position, self.config, self.images.names, self._fits)
        batches = [instance]
        if self.class_images is not None:
            batches.append(self._batch(self.class_images, position))
        device = self.components.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(training.seed, "dropout", position))
            if len({batch.latents.shape[1:] for batch in batches}) == 1:
                batches = [Batch.joined(batches)]
            first, *others = batches
            losses = self.losses(first, lessons)
            losses = torch.cat([losses, *(self.losses(batch) for batch in others)])
        prior_weight = self.config.prior_preservation.prior_loss_weight
        own, *prior = losses.split(training.batch_size)
        return own.mean() + sum(prior_weight * part.mean() for part in prior)

    def characters(self, position: int) -> Counter[str]:
        """Count the samples of a micro-batch by who is in their pictures.

        Those of `preservation.share` and `naming.share` learn nothing of their pictures, and are left
        out.
        """
        config, training = self.config, self.config.training
        unseen = {*preserved_rows(config, position), *naming_rows(config, position)}
        _, indices = self.images.indices(training.seed, position, training.batch_size)
        shown = [self.images.samples[i] for row, i in enumerate(indices) if row not in unseen]
        return Counter(name for sample in shown for name in sample.characters)

    def _fits(self, caption: str) -> bool:
        tokenizer = self.components.tokenizer
        return count_tokens(caption, tokenizer) <= tokenizer.model_max_length

    def _batch(self, images: EncodedImages, position: int) -> Batch:
        training, scheduler = self.config.training, self.components.noise_scheduler
        count = scheduler.config.num_train_timesteps
        return images.batch(training.seed, position, training.batch_size, count)

    def losses(self, batch: Batch, lessons: Mapping[int, Lesson] | None = None) -> torch.Tensor:
        """Return the loss of each sample of a batch, float32 [N].

        Args:
            batch: whose noise, timesteps and captions are taken as they are.
            lessons: which samples learn from the model itself, by their row.
        """
        scheduler, device = self.components.noise_scheduler, self.components.device
        alphas_cumprod, kind = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        latents, noise = batch.latents.to(device), batch.noise.to(device)
        timesteps = batch.timesteps.to(device)
        noisy_latents = diffusion.add_noise(latents, noise, timesteps, alphas_cumprod)
        target = diffusion.target(kind, latents, noise, timesteps, alphas_cumprod)
        noisy_latents = noisy_latents.to(self.components.dtype)
        weights = torch.ones(len(latents), device=device)
        lessons = lessons or {}
        if lessons:
            taught = sorted(lessons)
            rows = torch.tensor(taught, device=device)
            told = [lessons[row].caption for row in taught]
            scales = [lessons[row].lora_scale for row in taught]
            with torch.no_grad():
                predicted = self.predict(noisy_latents[rows], timesteps[rows], told, scales)
            target = target.index_copy(0, rows, predicted)
            weights[rows] = torch.tensor([lessons[row].weight for row in taught], device=device)
        scales = [lessons[row].learnt_at if row in lessons else 1.0 for row in range(len(latents))]
        prediction = self.predict(noisy_latents, timesteps, batch.captions, scales)
        mask = None if batch.mask is None else batch.mask.to(device)
        losses = weights * diffusion.loss_per_sample(prediction, target, mask)
        if (gamma := self.config.training.snr_gamma) is not None:
            losses = losses * diffusion.snr_weights(timesteps, alphas_cumprod, gamma, kind)
        return losses

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        captions: list[str],
        scales: Sequence[float],
    ) -> torch.Tensor:
        """Return what the model predicts with its LoRA at these scales, float32 [N, 4, h, w].

        Args:
            noisy_latents: [N, 4, h, w] in the model's dtype.
            timesteps: int64 [N].
            captions: N strings.
            scales: N, of the LoRA; 0: without the LoRA, 1: as it is.
        """
        with lora_scales(self.models.values(), scales):
            hidden_states = self.encode(captions)
            return self.components.unet(noisy_latents, timesteps, hidden_states).sample.float()
