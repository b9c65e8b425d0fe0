"""Pretrain the denoiser and its text encoder on encoded pictures and their captions.

The text encoder begins as that of the world's CLIP, and its token embeddings stay as they are. If no
name ever meant anything, it would learn to drop names, and leave a LoRA nothing to tie a character to:
so most names stand for a species and a fur (`attributes.REGULARS`), in half of the pictures for a
whole look, and some, made up on the spot, for nobody. Heroes' names never occur: words that are taught
to mean nothing come to mean the same.

Every timestep counts the same in the loss of v, as in https://arxiv.org/abs/2202.00512. Min-SNR weights
all but leave out the noisiest ones, and there it is settled what a body does.

The pictures of a step, their captions, timesteps and noise are functions of the seed and the step, so
a run that goes on from its last state ends in the same weights as one that was never interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from bunny_lora.core.files import atomic_path, read_json, sha256, write_json
from bunny_lora.core.seeding import derive_seed, generator
from bunny_lora.model import components, diffusion
from bunny_lora.model.quiet import quiet
from bunny_lora.world import attributes
from bunny_lora.world.pretraining.data import N_PICTURES, drawn_pictures, made_or_shipped
from bunny_lora.world.pretraining.latents import encoded_pictures
from bunny_lora.world.pretraining.learner import TrainState, load_weights
from bunny_lora.world.pretraining.lessons import (
    importance,
    lesson_picture,
    lesson_rows,
    training_caption,
)
from bunny_lora.world.pretraining.pairs import Pairs, eye_differences
from bunny_lora.world.pretraining.tokenizer import build_tokenizer

CHANNELS = (96, 160, 192)
PROMPTS = (
    "grey rabbit wearing a red scarf, happy, standing, meadow, medium shot",
    "orange cat with blue eyes and a green hat, laughing, waving, beach, sunset",
    "brown bear in blue overalls, sitting, forest, wide shot",
    "white fox, surprised, jumping, snow, medium shot",
    "pink mouse wearing a yellow dress, running, desert, medium shot",
    "black cat, sleeping, bedroom, night",
    "cream bunny wearing a purple cape, cheering, city at night, medium shot",
    "ellie, animated character, happy, meadow, closeup",
)


@quiet()
def build_models(clip: Path, side: int, channels: tuple[int, ...], seed: int) -> nn.ModuleDict:
    """Return an untrained UNet (`unet`) for latents of `side` x `side`, and a text encoder to fit it.

    Attention lives in the two lower levels; there is no middle block, as in BK-SDM-Tiny.
    """
    text_encoder = CLIPTextModel.from_pretrained(clip, dtype=torch.float32)
    text_encoder.get_input_embeddings().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "world unet weights"))
        unet = UNet2DConditionModel(
            sample_size=side,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=text_encoder.config.hidden_size,
            attention_head_dim=4,
        )
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule: Stable Diffusion's betas, the UNet predicting v."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def _loss(
    models: nn.ModuleDict,
    latents: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    noise = torch.randn(latents.shape, generator=rng).to(latents.device)
    timesteps = torch.randint(len(alphas_cumprod), (len(latents),), generator=rng).to(latents.device)
    noisy = diffusion.add_noise(latents, noise, timesteps, alphas_cumprod)
    with torch.autocast(latents.device.type, torch.bfloat16):
        states = models["text_encoder"](tokens).last_hidden_state
        prediction = models["unet"](noisy, timesteps, states).sample
    target = diffusion.target("v_prediction", latents, noise, timesteps, alphas_cumprod)
    error = (prediction.float() - target).square().mean(dim=1)
    return (weights * error).sum() / weights.sum()


def _lesson(
    pictures: np.ndarray,
    latents: np.ndarray,
    tokenizer: CLIPTokenizer,
    count: int,
    seeds: tuple[int, int],
    step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `count` pictures by lot: latents, how much each place in them counts, and captions.

    `seeds` are those of the pictures and of all else.
    """
    stream, seed = seeds
    chosen = attributes.generator(seed, "sd batch", step).integers(len(latents), size=count)
    texts = [
        training_caption(lesson_picture(stream, int(index)), seed, step, slot)
        for slot, index in enumerate(chosen)
    ]
    batch = torch.from_numpy(latents[chosen]).float()
    weights = importance(torch.from_numpy(pictures[chosen, 3]), latents.shape[-1])
    return batch, weights, components.tokenize(tokenizer, texts)


def pretrain_sd(
    out_dir: Path,
    *,
    max_steps: int = 6_000,
    batch_size: int = 32,
    peak_rate: float = 2.5e-3,
    n_pictures: int = N_PICTURES,
    size: int = 128,
    channels: tuple[int, ...] = CHANNELS,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    start_from: Path | None = None,
    stop_at: int | None = None,
    evaluate_every: int = 500,
    save_every: int = 250,
    n_sample_steps: int = 25,
    report: Callable[[str], None] = print,
) -> Path:
    """Train UNet and text encoder, or go on training them, and return the folder of the pipeline.

    Args:
        out_dir: may hold `vae/` and `clip/` (see `pretrain_vae`, `pretrain_clip`; else the shipped ones
            serve), receives `lessons.npy`, `latents.npy`, `eyes.npy`, `sd_state.safetensors` to go on
            from, `sd/` in diffusers' format (averaged weights, float16), and `samples/`.
        max_steps: length of the whole training; the learning rate ends at 0 there.
        n_pictures: pictures of the random stream to learn from.
        n_workers: processes that draw pictures.
        start_from: a pipeline that an earlier training left, to learn on from, with other pictures.
        stop_at: stop at this step already, as an interruption would.
        n_sample_steps: denoising steps of the pictures in `samples/`.
        report: receives a line of progress now and then.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings, or `start_from` is of
            another shape.
    """
    out_dir = Path(out_dir)
    vae, clip = (made_or_shipped(out_dir, name) for name in ("sd/vae", "clip"))
    shown: dict[str, Any] = {"size": size, "seed": seed, "n_workers": n_workers, "report": report}
    pictures = drawn_pictures(out_dir, n_pictures, draw=lesson_rows, name="lessons", **shown)
    latents = encoded_pictures(out_dir, vae, pictures, device=device, report=report)
    moved = eye_differences(out_dir, vae, pictures, latents, seed=seed, device=device, report=report)
    pairs = Pairs.of(seed, latents, moved)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    models = build_models(clip, latents.shape[-1], channels, seed)
    settings: dict[str, Any] = {"clip": sha256(clip / "model.safetensors"), "channels": list(channels)}
    settings |= {"seed": seed, "batch_size": batch_size, "n_pictures": n_pictures}
    settings |= {"max_steps": max_steps, "peak_rate": peak_rate}
    stream = seed
    if start_from is not None:
        origin = "".join(load_weights(model, start_from / name) for name, model in models.items())
        settings["start_from"] = origin
        seed = derive_seed(seed, f"world sd from {origin}")
    state = TrainState(models.to(device).train(), settings)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def loss_of(step: int) -> torch.Tensor:
        lesson = _lesson(pictures, latents, tokenizer, batch_size, (stream, seed), step)
        batch, weights, tokens = (tensor.to(device) for tensor in lesson)
        rng = generator(seed, "world sd noise", step)
        loss = _loss(models, batch, weights, tokens, alphas_cumprod, rng)
        return loss + pairs.loss(models, tokenizer, alphas_cumprod, seed, step)

    lengths: dict[str, Any] = {
        "max_steps": max_steps,
        "images_per_step": batch_size,
        "stop_at": stop_at,
    }
    often: dict[str, Any] = {"evaluate_every": evaluate_every, "save_every": save_every}
    file = out_dir / "sd_state.safetensors"
    for progress in state.train(loss_of, file, peak_rate=peak_rate, **lengths, **often):
        speed = f"{progress.images_per_sec:.1f} images/s"
        report(f"step {state.step}: loss {progress.mean_loss:.4f}, {speed}")
        with state.averaged():
            pipeline = build_pipeline(models, tokenizer, vae)
            generate_samples(pipeline, out_dir / "samples" / f"{state.step:06d}.png", n_sample_steps)
            export_pipeline(pipeline, out_dir / "sd")
    return out_dir / "sd"


@quiet()
def build_pipeline(
    models: nn.ModuleDict, tokenizer: CLIPTokenizer, vae_dir: Path
) -> diffusers.StableDiffusionPipeline:
    """Return an ordinary pipeline around copies of the models, on the CPU, without a safety checker."""
    return diffusers.StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_dir),
        text_encoder=copy.deepcopy(models["text_encoder"]).cpu().eval(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(models["unet"]).cpu().eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate_samples(pipeline: diffusers.StableDiffusionPipeline, path: Path, n_steps: int) -> None:
    """Draw `PROMPTS`, two pictures each from seeds that stay, as one PNG."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for row in range(2):
        rngs = [generator(row, "world sample", column) for column in range(len(PROMPTS))]
        images = pipeline(
            list(PROMPTS),
            num_inference_steps=n_steps,
            guidance_scale=3.0,
            generator=rngs,
            output_type="np",
        ).images
        rows.append(np.concatenate(list(images), axis=1))
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    with atomic_path(path) as part:
        sheet.save(part)


@quiet()
def export_pipeline(pipeline: diffusers.StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in diffusers' format with float16 weights; it is float16 afterwards.

    Transformers would load the text encoder in the precision that its configuration names, diffusers
    the rest in float32: naming float32 makes both load in float32 unless asked otherwise.
    """
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        nn.Module.half(module)
    with atomic_path(folder) as part:
        components.save_model(pipeline, part)
        config = part / "text_encoder" / "config.json"
        write_json(config, read_json(config) | {"dtype": "float32"})
