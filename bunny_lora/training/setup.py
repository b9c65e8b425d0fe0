"""Everything that a run is made of, loaded and put together before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from bunny_lora import dataset
from bunny_lora.config import Config
from bunny_lora.core import paths, ranks
from bunny_lora.data import shots
from bunny_lora.data.frames import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, devices, formats, offload, preview, prompts, targets
from bunny_lora.model.components import Components
from bunny_lora.model.fast import allocator, choice, pooled
from bunny_lora.model.formats import LoRA
from bunny_lora.model.image_encoder import load_image_encoder
from bunny_lora.prepare import read_split
from bunny_lora.training import checkpoint, class_images, fingerprint, memory, optim
from bunny_lora.training.checkpoint import TrainingState
from bunny_lora.training.distributed import ProcessGroup
from bunny_lora.training.faces import tie_faces
from bunny_lora.training.latents import EncodedImages, encode_dataset
from bunny_lora.training.objective import Learner
from bunny_lora.training.resume import Start

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Setup:
    """A run between two steps: `state` is what its steps change, the rest stays as it was loaded.

    `base_sha256` and `class_sha256` tell the weights and the class images that it was made with, and
    `history` the environments, see `resume.Start`. `fast_path` is what is computed on one in training.
    `held_out` are the frames that it does not learn from.
    """

    config: Config
    parts: Components
    pipe: StableDiffusionPipeline
    learner: Learner
    state: TrainingState
    group: ProcessGroup
    base_sha256: str
    class_sha256: str | None
    history: tuple[dict[str, Any], ...]
    fast_path: str
    held_out: tuple[Sample, ...] = ()

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return every parameter that training changes."""
        return _trainable(self.parts, self.state.models)

    def set_training_mode(self, training: bool) -> None:
        """Switch dropout and the fast path on for training, off for drawing.

        VAE and text encoder leave memory while they have nothing to do, and come back by themselves.
        """
        for part in self.state.models:
            getattr(self.parts, part).train(training)
        if training:
            factor = self.config.training.pooled_attention or 1
            choice.install(self.parts.unet, choice.read(self.fast_path), factor)
            self.offload_unused()
        else:
            choice.remove(self.parts.unet)

    def offload_unused(self) -> None:
        """Let go of what encodes pictures and captions, but for what is trained."""
        for part in {"vae", "text_encoder"} - self.state.models.keys():
            _offload(self.parts, part, self.config)


def set_up(
    config: Config,
    start: Start = Start(),  # noqa: B008
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> Setup:
    """Load the base model, encode the data, attach LoRA, and put the state of `start` in place.

    Raises:
        BunnyLoraError: no such model, too little memory, or the state was made with other weights.
    """
    say_doubts(config, begun=start.folder is not None)
    with group.main_process_first():
        parts = load_parts(config)
        base_sha256 = fingerprint.model_sha256(parts)
        start.check_base(base_sha256, str(parts.dtype).removeprefix("torch."))
        if group.is_main:
            _say(prompts.doubts(config.training.validation_prompts, parts.tokenizer))
        pipe = components.pipeline_from(parts, config.base_model)
        first_weights = _start_from(parts, config) if group.is_main else {}
        samples, held_out = read_split(config)
        if config.held_out:
            print(shots.told(samples, held_out))
        if config.training.low_memory:
            take_turns(parts, config)
        images = encode(config, parts, samples, config.data_path.parent, "training")
        for line in _idle(config, images):
            print(line)
        class_data, class_sha256 = _class_data(parts, pipe, config, base_sha256, start)

    setup = assemble(config, parts, pipe, images, class_data, start, group)
    group.broadcast_from_main(lambda: _load_state(setup.state, start, first_weights))
    if group.count > 1:
        state = setup.state
        checkpoint.restore(state, group.broadcast_from_main(lambda: checkpoint.snapshot(state)))
    return replace(setup, base_sha256=base_sha256, class_sha256=class_sha256, held_out=tuple(held_out))


def load_parts(config: Config) -> Components:
    """Load the base model, and find out what would not work with it before anything takes long.

    Raises:
        BunnyLoraError: no such model, no such layers in it, or too little memory for its pictures.
    """
    device = devices.resolve_device(config.device)
    dtype = devices.resolve_dtype(config.training.mixed_precision, device)
    if device.type == "cpu" and not config.training.low_memory:
        allocator.keep_freed_memory()
    parts = components.load_components(config.base_model, device, dtype)
    memory.check_images(parts, config.resolution)
    if config.training.pooled_attention and not pooled.applies_to(parts.unet):
        raise BunnyLoraError(
            f"training.pooled_attention: {config.training.pooled_attention} does nothing:"
            f" {config.base_model} does not attend at the size of its latents. Leave it out."
        )
    if config.sampling.preview_decoder is not None:
        preview.load_decoder(config.sampling.preview_decoder, dtype, device)
    for part in _trained_parts(config):
        targets.resolve_targets(getattr(parts, part), part, adapters.target_names(part, config.lora))
    return parts


def assemble(
    config: Config,
    parts: Components,
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    class_images: EncodedImages | None,
    start: Start = Start(),  # noqa: B008
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> Setup:
    """Attach fresh LoRA to a base model that is loaded, and put a run together around it."""
    if config.training.low_memory:
        _offload(parts, "vae", config)
    offload.onload(parts.unet)  # LoRA is put into what is here.
    if config.training.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        if config.lora.train_text_encoder:
            parts.text_encoder.activation_checkpointing_enable()
    models = attach(parts, config, _trained_parts(config))
    learner = Learner(parts, config, images, class_images, models)
    unet, *text_encoder = (adapters.trainable_parameters(getattr(parts, part)) for part in models)
    optimizer, lr_scheduler = optim.build(config, unet, *text_encoder)
    scaled = parts.device.type == "cuda" and parts.dtype == torch.float16
    scaler = torch.amp.GradScaler(parts.device.type, enabled=scaled)
    state = TrainingState(models, optimizer, lr_scheduler, scaler)
    fast_path = _fast_path_here(start.fast_path or fingerprint.fast_path_of(config), parts)
    return Setup(config, parts, pipe, learner, state, group, "", None, start.history, fast_path)


def _offload(parts: Components, part: str, config: Config) -> None:
    offload.offload(getattr(parts, part), config.data_path.parent)


def take_turns(parts: Components, config: Config) -> None:
    """Have UNet and text encoder away while the VAE works, and these two while the UNet does."""
    trained = _trained_parts(config)

    def leave(*names: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for part in names:
                if part == "unet" or part not in trained:
                    _offload(parts, part, config)

        return hook

    for half in (parts.vae.encoder, parts.vae.decoder):
        half.register_forward_pre_hook(leave("unet", "text_encoder"))
    parts.vae.decoder.register_forward_hook(leave("vae"))
    parts.unet.register_forward_pre_hook(leave("vae", "text_encoder"))


def _idle(config: Config, images: EncodedImages) -> list[str]:
    """Return in lines which settings find nothing in the data to work on."""
    training, views = config.training, [view for views in images.views for view in views]
    near = any(view.zoomed for view in views)
    untold, unseen = images.names - set(config.looks), set(config.looks) - images.names
    said = {
        "training.caption_tag_dropout does nothing: no caption has a part, after a comma, that may be"
        " left out.": config.training.caption_tag_dropout and not images.has_parts,
        "preservation.share: the data say of nobody who is in a picture, so no name is taken out; the"
        " captions of its samples are empty, or the class_prompt.": (
            config.preservation.share and not images.names
        ),
        "zoom_on_faces does nothing: no picture has one name and one face, or faces that face_encoder"
        " tied to names.": config.zoom_on_faces and not near,
        "balance_characters does nothing: the data say of nobody who is in a picture.": (
            config.balance_characters and not images.names
        ),
        f"naming.share: of {', '.join(sorted(untold))} looks tell nothing, so these names are taught by"
        " pictures alone.": config.naming.share and untold,
        "training.timestep_bias_begin and timestep_bias_end do nothing with timestep_bias_multiplier:"
        " 1.": (
            training.timestep_bias_multiplier == 1
            and (training.timestep_bias_begin, training.timestep_bias_end) != (0, 1000)
        ),
        f"naming.lora_scale: names are taught for pictures at {config.naming.lora_scale:g}, and"
        f" sampling.lora_scale draws at {config.sampling.lora_scale:g}.": (
            config.naming.share and config.naming.lora_scale not in (0, config.sampling.lora_scale)
        ),
        f"looks: no picture is said to show {', '.join(sorted(unseen))}: taught by words alone.": (
            config.naming.share and unseen
        ),
        "mask_neighbours does nothing: no view from near is known to show somebody else.": (
            config.mask_neighbours and all(view.mask is None for view in views)
        ),
    }
    return [line for line, applies in said.items() if applies]


def _fast_path_here(chosen: str, parts: Components) -> str:
    """The main process chooses; another one's computer may have no compiler."""
    path = choice.read(chosen)
    reason = choice.why_not(parts.device, parts.dtype) if path.shapes else None
    if reason is None:
        return chosen
    print(f"Warning: this process computes attention as torch does, not natively: {reason}")
    return choice.write(path._replace(shapes=[]))


def _say(doubts: list[str]) -> None:
    for doubt in doubts:
        print(f"Validation prompts: {doubt}")


def say_doubts(config: Config, *, begun: bool) -> None:
    """What a setting would not do stops a new run; one that has begun with it goes on as it was.

    Raises:
        BunnyLoraError: a setting of a new run would do nothing.
    """
    for doubt in optim.doubts(config):
        if not begun:
            raise BunnyLoraError(doubt)
        if ranks.is_main_process():
            print(f"Warning: {doubt}")


def _load_state(state: TrainingState, start: Start, first_weights: LoRA) -> None:
    if start.folder is not None:
        checkpoint.load_checkpoint(start.folder, state)
    elif first_weights:
        adapters.start_from(state.models, first_weights)


def _start_from(parts: Components, config: Config) -> LoRA:
    """Return `lora.start_from`, read before anything that takes long."""
    if config.lora.start_from is None:
        return {}
    path = adapters.find_weights(paths.resolve(config.lora.start_from))
    return formats.read_lora(path, {part: getattr(parts, part) for part in adapters.PARTS})


def _trainable(parts: Components, models: Iterable[str]) -> list[torch.nn.Parameter]:
    found = [adapters.trainable_parameters(getattr(parts, part)) for part in models]
    return [parameter for parameters in found for parameter in parameters.values()]


def attach(parts: Components, config: Config, names: Iterable[str]) -> dict[str, PeftModel]:
    """Attach fresh LoRA to the parts of a base model that are named, by the run's configuration."""
    return {
        part: adapters.attach(
            getattr(parts, part),
            part,
            config.lora,
            base_model=config.base_model,
            seed=config.training.seed,
        )
        for part in names
    }


def _trained_parts(config: Config) -> tuple[str, ...]:
    return adapters.PARTS if config.lora.train_text_encoder else adapters.PARTS[:1]


def image_dataset(
    config: Config, parts: Components, samples: list[Sample], *, is_training: bool = True
) -> dataset.ImageDataset:
    """Return pictures as a run cuts them, whose captions fit the model's tokenizer."""
    return dataset.ImageDataset(
        samples,
        resolution=config.resolution,
        center_crop=config.center_crop,
        aspect_buckets=config.aspect_buckets and is_training,
        tokenizer=parts.tokenizer,
    )


def encode(
    config: Config, parts: Components, samples: list[Sample], place: Path, stream: str
) -> EncodedImages:
    """Return pictures as a run learns from them; what is encoded is kept in the folder `place`."""
    training, is_training = config.training, stream == "training"
    images = image_dataset(config, parts, samples, is_training=is_training)
    if config.face_encoder is not None and is_training:
        encoder = load_image_encoder(config.face_encoder, "face_encoder", str(parts.device))
        images.face_names = tie_faces(images, encoder)
    groups = _near_duplicates(images) if config.thin_duplicates and is_training else None
    return encode_dataset(
        parts.vae,
        images,
        place / "latents",
        random_flip=config.random_flip,
        zoom_on_faces=config.zoom_on_faces,
        mask_neighbours=config.mask_neighbours,
        tag_dropout=training.caption_tag_dropout if is_training else 0.0,
        caption_dropout=training.caption_dropout if is_training else 0.0,
        repeats=images.repeats(
            balance=config.balance_characters, zoom=config.zoom_on_faces, groups=groups
        ),
        num_workers=config.num_workers,
        pin_memory=config.pin_memory,
        stream=stream,
    )


def _near_duplicates(images: dataset.ImageDataset) -> list[int]:
    groups = shots.near_duplicates([sample.path for sample in images.samples])
    n_groups = len(set(groups))
    print(
        f"thin_duplicates: {len(groups)} pictures count as {n_groups}: neighbours that are nearly the"
        " same share the weight of one"
        if n_groups < len(groups)
        else "thin_duplicates does nothing: no neighbours are nearly the same picture."
    )
    return groups


def _class_data(
    parts: Components,
    pipe: StableDiffusionPipeline,
    config: Config,
    base_sha256: str,
    start: Start,
) -> tuple[EncodedImages | None, str | None]:
    """Draw the class images that are missing or stale, with the base model, and encode all."""
    if not config.prior_preservation.enabled:
        return None, None
    wanted = class_images.plan(pipe, config, base_sha256)
    class_sha256 = wanted.sha256()
    start.check_class_images(class_sha256)
    class_images.generate_missing(pipe, config, wanted)
    place = paths.resolve(config.prior_preservation.class_data_dir).parent
    return encode(config, parts, wanted.samples, place, "class"), class_sha256
