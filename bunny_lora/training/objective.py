"""One micro-batch of learning: from a position in the sample stream to a loss."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel

from bunny_lora.config import Config
from bunny_lora.core.seeding import derive_seed, generator
from bunny_lora.data.captions import without_names
from bunny_lora.model import diffusion
from bunny_lora.model.components import Components, encode_prompts
from bunny_lora.training.latents import Batch, EncodedImages

# Of preserved samples: half of guidance is the empty prompt, and a class stands for other subjects.
EMPTY, CLASS = 0.25, 0.25


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
        its weight, https://arxiv.org/abs/2208.12242, eq. 2. The noisiest samples may be preserved with
        their names: few pictures are learnt by heart there first, which https://arxiv.org/abs/2507.05964
        answers with a lower rank.
        """
        training = self.config.training
        preserved = self._preserved(position)
        batches = [self._without_names(self._batch(self.images, position), preserved, position)]
        preserved = sorted({*preserved, *self._noisy(batches[0].timesteps)})
        if self.class_images is not None:
            batches.append(self._batch(self.class_images, position))
        device = self.components.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(training.seed, "dropout", position))
            if len({batch.latents.shape[1:] for batch in batches}) == 1:
                batches = [Batch.joined(batches)]
            first, *others = batches
            losses = self.losses(first, preserved)
            losses = torch.cat([losses, *(self.losses(batch, []) for batch in others)])
        prior_weight = self.config.prior_preservation.prior_loss_weight
        instance, *prior = losses.split(training.batch_size)
        return instance.mean() + sum(prior_weight * part.mean() for part in prior)

    def characters(self, position: int) -> Counter[str]:
        """Count the samples of a micro-batch by who is in their pictures.

        Those whose captions name nobody, for `preservation`, teach nothing about them and are left out.
        """
        training, preserved = self.config.training, self._preserved(position)
        _, indices = self.images.indices(training.seed, position, training.batch_size)
        shown = [self.images.samples[i] for row, i in enumerate(indices) if row not in preserved]
        return Counter(name for sample in shown for name in sample.characters)

    def _preserved(self, position: int) -> list[int]:
        """Return which samples of a micro-batch are preserved: spread evenly over the positions."""
        share, count = self.config.preservation.share, self.config.training.batch_size
        n_before = [math.floor((position + row) * share) for row in range(count + 1)]
        return [row for row in range(count) if n_before[row + 1] > n_before[row]]

    def _without_names(self, batch: Batch, rows: list[int], position: int) -> Batch:
        """Return a micro-batch whose preserved samples name nobody."""
        names, seed = self.images.names, self.config.training.seed
        class_prompt, captions = self.config.prior_preservation.class_prompt, list(batch.captions)
        for row in rows:
            random = generator(seed, "preservation", position + row)
            captions[row] = _preserved_caption(captions[row], names, class_prompt, random)
        return replace(batch, captions=captions)

    def _batch(self, images: EncodedImages, position: int) -> Batch:
        training, scheduler = self.config.training, self.components.noise_scheduler
        count = scheduler.config.num_train_timesteps
        return images.batch(training.seed, position, training.batch_size, count)

    def losses(self, batch: Batch, preserved: Sequence[int] = ()) -> torch.Tensor:
        """Return the loss of each sample of a batch, float32 [N].

        Args:
            batch: whose noise, timesteps and captions are taken as they are.
            preserved: which samples are to be as the model without its LoRA predicts.
        """
        scheduler, device = self.components.noise_scheduler, self.components.device
        alphas_cumprod, kind = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
        latents, noise = batch.latents.to(device), batch.noise.to(device)
        timesteps = batch.timesteps.to(device)
        noisy_latents = diffusion.add_noise(latents, noise, timesteps, alphas_cumprod)
        target = diffusion.target(kind, latents, noise, timesteps, alphas_cumprod)
        noisy_latents = noisy_latents.to(self.components.dtype)
        weights = torch.ones(len(latents), device=device)
        if preserved:
            captions = [batch.captions[row] for row in preserved]
            rows = torch.tensor(preserved, device=device)
            base = self._base_prediction(noisy_latents[rows], timesteps[rows], captions)
            target = target.index_copy(0, rows, base)
            weights[rows] = self.config.preservation.weight
        prediction = self.components.unet(noisy_latents, timesteps, self.encode(batch.captions)).sample
        mask = None if batch.mask is None else batch.mask.to(device)
        losses = weights * diffusion.loss_per_sample(prediction, target, mask)
        if (gamma := self.config.training.snr_gamma) is not None:
            losses = losses * diffusion.snr_weights(timesteps, alphas_cumprod, gamma, kind)
        return losses

    def _noisy(self, timesteps: torch.Tensor) -> list[int]:
        """Return which samples are so noisy that `preservation` has them stay as they are."""
        least = self.config.preservation.from_timestep
        return [] if least is None else (timesteps >= least).nonzero().flatten().tolist()

    @torch.no_grad()
    def _base_prediction(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, captions: list[str]
    ) -> torch.Tensor:
        """Return what UNet and text encoder predict without their LoRA, float32 [N, 4, h, w]."""
        with contextlib.ExitStack() as off:
            for model in self.models.values():
                off.enter_context(model.disable_adapter())
            hidden_states = self.encode(captions)
            return self.components.unet(noisy_latents, timesteps, hidden_states).sample.float()


def _preserved_caption(
    caption: str, names: Collection[str], class_prompt: str, random: torch.Generator
) -> str:
    """Return a caption of preservation; without known names nobody could be taken out of it."""
    chance = float(torch.rand((), generator=random))
    if chance < EMPTY:
        return ""
    if chance < EMPTY + CLASS or not names:
        return class_prompt
    return without_names(caption, names)
