"""What a training image is compared with: the loop that this project began with, and diffusers' own."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch.nn.functional import mse_loss

from bunny_lora.model import adapters, components
from bunny_lora.trainer import LoRATrainer
from bunny_lora.training.batch import Batch

SEED = 42


class Ancestor:
    """The loop that this project began with: float32, all three models at every image, checkpointing.

    Its loss is not divided by the accumulation, so its gradients are that many times as long.
    """

    def __init__(self, trainer: LoRATrainer) -> None:
        config = trainer.config
        self.parts = components.load_components(config.base_model, torch.device("cpu"), torch.float32)
        self.parts.unet.enable_gradient_checkpointing()
        lora = config.lora
        adapters.attach(self.parts.unet, "unet", lora, base_model=config.base_model, seed=SEED)
        self.parts.unet.train()
        parameters = adapters.trainable_parameters(self.parts.unet).values()
        self.optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate)

    def loss(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Encode a picture and its caption, and predict the noise of `batch` in what was encoded."""
        with torch.no_grad():
            mean, std = components.encode_images(self.parts.vae, pixels)
            words = components.encode_prompts(self.parts, batch.captions)
        latents = mean + std * random
        noisy = self.parts.noise_scheduler.add_noise(latents, batch.noise, batch.timesteps)
        predicted = self.parts.unet(noisy, batch.timesteps, words).sample
        return mse_loss(predicted.float(), batch.noise)

    def step(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> None:
        """Learn from one picture."""
        self.loss(pixels, random, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class DiffusersScript:
    """The work of diffusers' example `train_text_to_image_lora.py` with `--mixed_precision=bf16`.

    VAE and text encoder at every image, all frozen weights in `dtype`, autocast around the UNet, no
    gradient checkpointing, gradients clipped. Its data loader and its log are left out.
    """

    def __init__(self, trainer: LoRATrainer) -> None:
        config, dtype = trainer.config, trainer.setup.parts.dtype
        self.parts = components.load_components(config.base_model, torch.device("cpu"), dtype)
        unet, lora = self.parts.unet, config.lora
        unet.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                init_lora_weights="gaussian",
                target_modules=list(lora.target_modules),
            )
        )
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.training.learning_rate)
        unet.train()

    def loss(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Encode a picture and its caption, and predict the noise of `batch` in what was encoded."""
        parts = self.parts
        with torch.no_grad():
            mean, std = components.encode_images(parts.vae, pixels)
            words = components.encode_prompts(parts, batch.captions)
        noisy = parts.noise_scheduler.add_noise(mean + std * random, batch.noise, batch.timesteps)
        low = parts.dtype != torch.float32
        with torch.autocast("cpu", parts.dtype if low else torch.bfloat16, enabled=low):
            predicted = parts.unet(noisy.to(parts.dtype), batch.timesteps, words).sample
        return mse_loss(predicted.float(), batch.noise)

    def step(self, pixels: torch.Tensor, random: torch.Tensor, batch: Batch) -> None:
        """Learn from one picture."""
        self.loss(pixels, random, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
