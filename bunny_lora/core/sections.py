"""The sections of a configuration, each key with its type, its limits, its default and its meaning."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bunny_lora.core.values import (
    MAX_NUMBER,
    AnyTexts,
    LayerNames,
    OwnFolder,
    Recorded,
    Texts,
    is_text,
    kinds_of,
    no_text_in,
    shown,
)

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Sampler = Literal["own", "pndm", "ddim", "euler", "unipc", "dpm++-2m", "dpm++-2m-karras"]

Scale = Annotated[float, Field(ge=0, le=2)]
Guidance = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no infinities, never changed after reading.

    The text below a key is its description in `bunny-lora config` and in `params/schema.json`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be taken for something else, or could not be written down again."""
        kinds = kinds_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and kinds & {int, float}:
            or_null = " or null" if NoneType in kinds else ""
            raise ValueError(f"should be a number{or_null} (got {value})")
        if wrong := no_text_in(value, kinds):
            raise ValueError(f"should be text, in quotes if need be (got {shown(wrong[0])})")
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise ValueError(f"should be a smaller number (got {shown(value)})")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not is_text(text) for text in texts):
            raise ValueError(f"has control characters or halves of characters in it: {shown(value)}")
        return value


class LoRASection(Section):
    """Low-rank adapters, https://arxiv.org/abs/2106.09685: (alpha / rank) B A is added to a weight."""

    rank: int = Field(8, ge=1, le=4096)
    """Width of A and B: more learns finer traits, and overfits few pictures sooner."""
    alpha: float = Field(16.0, gt=0)
    """Strength, divided by rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """How likely each input of an adapter is zeroed in training."""
    target_modules: LayerNames = Field(["to_k", "to_q", "to_v", "to_out.0"])
    """Layers of the UNet that learn, by the ends of their names, by default attention alone. Or a kind:
    attention, attention+ff, all (convolutions, projections and embeddings too)."""
    train_text_encoder: bool = False
    """Let the text encoder learn too: a character's name is a new word to it."""
    text_encoder_target_modules: LayerNames = Field(["q_proj", "k_proj", "v_proj", "out_proj"])
    """Those of the text encoder: by default, attention alone; fc1 and fc2 are its feed-forward ones."""
    start_from: Recorded | None = None
    """A LoRA to begin with instead of none, in any format that `generate` draws with."""


class TrainingSection(Section):
    """One step is one optimiser step on batch_size x gradient_accumulation_steps images."""

    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW: how far a step moves the weights."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """The text encoder's own; null: the same."""
    lora_plus_ratio: float = Field(1.0, gt=0)
    """LoRA+, https://arxiv.org/abs/2402.12354, where it is 16: B learns so many times as fast as A,
    which wants a lower learning_rate. 1: as fast."""
    lr_scheduler: Scheduler = "constant"
    """How the learning rate changes up to max_train_steps, as diffusers calls it."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0; plain `constant` has no such rise."""
    lr_num_cycles: int = Field(1, ge=1)
    """How often `cosine_with_restarts` begins anew, as diffusers' num_cycles."""
    lr_power: float = Field(1.0, gt=0)
    """Of `polynomial`: above 1 the learning rate falls early, below 1 late."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW, torch's default: how fast weights shrink that no gradient holds up."""
    max_train_steps: int = Field(500, ge=1)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(1, ge=1)
    """Images at a time; memory grows with it."""
    gradient_accumulation_steps: int = Field(4, ge=1)
    """Batches a step: more make steadier steps, each longer by as much."""
    gradient_checkpointing: bool = False
    """Compute parts twice instead of keeping them: less memory, more time."""
    low_memory: bool = False
    """Of UNet, text encoder and VAE only what computes is in memory, the others wait on the disk: the
    same bytes, a little slower, below 2 GB for BK-SDM-Tiny at 512 px in bf16."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this length."""
    caption_tag_dropout: float = Field(0.0, ge=0, lt=1)
    """How likely each part of a caption, between commas, is left out; the first one and those with a
    character's name always stay."""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """How likely a whole caption is left out: guidance starts from what an empty prompt gives."""
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "auto"
    """auto: bf16 where the hardware multiplies it natively, fp16 on older GPUs, else no (float32)."""
    fast_path: Literal["auto", "on", "off"] = "off"
    """On a CPU, the same to rounding. auto: native attention where a trial on this machine finds it
    faster than torch's, and in bf16 LoRA without casts to float32, which a run that goes on keeps; on:
    both everywhere; off: as diffusers and PEFT compute."""
    pooled_attention: int | None = Field(None, ge=2, le=4)
    """An approximation, in training alone: 2 averages keys and values of the largest self-attention
    over 2 x 2 tokens, which takes a quarter of its work. `bunny-lora plan` says how far that moves what
    is learnt. null: exact."""
    snr_gamma: float | None = Field(None, gt=0)
    """Weights of min(SNR, gamma), https://arxiv.org/abs/2303.09556, where it is 5. null: all alike."""
    timestep_bias_multiplier: float = Field(1.0, gt=0)
    """How many times as often as the others the timesteps from `timestep_bias_begin` on, and below
    `timestep_bias_end`, are drawn for pictures, as diffusers' scripts for SDXL can. 1: all alike."""
    timestep_bias_begin: int = Field(0, ge=0, lt=1000)
    """The first of them, of 1000: below, noise hides nothing that words or names could tell."""
    timestep_bias_end: int = Field(1000, ge=1, le=1000)
    """The first above them: `preservation.from_timestep`, where that is set."""
    seed: int = Field(42, ge=0)
    """Of everything that is random in training and in the validation pictures."""
    save_steps: int = Field(100, ge=1)
    """Steps between checkpoints: fewer lose less when the power goes, and draw more samples."""
    save_minutes: float | None = Field(10.0, gt=0)
    """Minutes between further checkpoints to go on from; the newest two of them stay. null: none."""
    keep_checkpoints: int | None = Field(None, ge=1)
    """How many checkpoints of save_steps stay; null: all. Those marked by a file `keep` always do."""
    logging_steps: int = Field(10, ge=1)
    """Steps between lines on the screen; log.jsonl has every step."""
    validation_prompt: str | list[str] = Field(default_factory=list)
    """One prompt or several, drawn at every checkpoint of save_steps."""
    num_validation_images: int = Field(2, ge=0)
    """Pictures a validation prompt."""
    trackers: list[Tracker] = Field(default_factory=list)
    """Programs that are told of every step and sample: tensorboard (in the run's folder), wandb,
    mlflow, trackio. Each needs its package; none is told anything unless it is named."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `no` as false; here it is one of the precisions."""
        return "no" if value is False else value

    @field_validator("fast_path", mode="before")
    @classmethod
    def _yaml_on_and_off_are_words(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `on` as true, `off` as false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _bias_has_timesteps(self) -> TrainingSection:
        if self.timestep_bias_begin >= self.timestep_bias_end:
            raise ValueError("timestep_bias_begin has to lie below timestep_bias_end")
        return self

    @property
    def validation_prompts(self) -> list[str]:
        """The validation prompts as a list, however they were written."""
        prompts = self.validation_prompt
        return [prompts] if isinstance(prompts, str) else prompts


class PriorPreservationSection(Section):
    """DreamBooth's prior preservation, https://arxiv.org/abs/2208.12242, section 4.2."""

    enabled: bool = False
    """Train on pictures of the class too, so that it keeps looking as before."""
    num_class_images: int = Field(100, ge=1)
    """How many of them; the base model draws those that class_data_dir does not have."""
    class_prompt: str = Field("cartoon character", min_length=1)
    """What the class is called; preservation, and evaluation without a name, ask for it too."""
    class_data_dir: OwnFolder = "training_data/class_images"
    """Their folder; pictures of your own in it are used first."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """How much their loss counts; 1: as much as that of your pictures."""


class PreservationSection(Section):
    """Output preservation: where nobody is named, the model goes on drawing as without the LoRA.

    Some samples have the names taken out of their captions, and learn what the same model predicts with
    the LoRA off: of these captions some are empty, and some the class_prompt of prior_preservation.
    """

    share: float = Field(0.0, ge=0, lt=1)
    """How many of each step's samples, from 0 to below 1. 0: none, off."""
    from_timestep: int | None = Field(None, ge=1, lt=1000)
    """All samples from this timestep on, of 1000, too, names and all: so noisy, pose and place are
    settled, and few frames are soon known by heart. With `naming`, names as if their looks were told.
    null: none."""
    weight: float = Field(1.0, gt=0)
    """How much the loss of each counts; 1: as much as that of any other."""


class NamingSection(Section):
    """Names come to mean looks: of a caption that gives a name alone, some samples learn what the model
    itself predicts of the same caption with what `looks` say of the bearer."""

    share: float = Field(0.0, ge=0, lt=1)
    """How many of each step's samples, from 0 to below 1. 0: none, off."""
    lora_scale: Scale = 0.7
    """At which scale the LoRA predicts what is learnt, and learns it: that of `sampling`, best. 0: the
    base model alone predicts."""
    weight: float = Field(5.0, gt=0)
    """How much the loss of each counts; 1: as much as that of any other."""


class SamplingSection(Section):
    """How pictures are drawn for validation, class images and evaluation."""

    num_inference_steps: int = Field(25, ge=1)
    """Denoising steps a picture; time grows with them."""
    sampler: Sampler = "own"
    """What denoises: the model's own, or another. dpm++-2m-karras needs about half as many steps."""
    guidance_scale: float = Field(7.5, ge=0)
    """How closely a picture follows its prompt; up to 1, half the time and no negative prompt."""
    lora_scale: Scale = 1.0
    """How strongly the LoRA counts, 1: as trained; less gives back poses and places that it cost."""
    preview_decoder: Recorded | None = None
    """What decodes the validation pictures of a run, sooner and softer than the model's own:
    madebyollin/taesd or another of its kind, folder or hub name. null: the model's own."""


class ChooseSection(Section):
    """What `bunny-lora choose` tries: every checkpoint by its loss in seconds, a few by their pictures.

    These are `evaluation.prompts`, and the same without a name, drawn with each checkpoint of the
    shortlist at each LoRA scale and guidance.
    """

    n_shortlist: int = Field(3, ge=1)
    """How many checkpoints are drawn with: those of the lowest loss on held-out frames, and the last;
    where no frames are held out, checkpoints evenly spaced."""
    checkpoints: list[int] = Field(default_factory=list)
    """Steps of the checkpoints to draw with, instead of a shortlist by loss."""
    scales: list[Scale] = Field([0.8, 1.0], min_length=1)
    """LoRA scales, 0: the base model, 1: as trained."""
    guidances: list[Guidance] = Field(default_factory=list)
    """Guidance scales; none: the one of `sampling`."""


class EvaluationSection(Section):
    """Notebook 03. In `prompts`, `{name}` stands for each character in turn, `{looks}` for what the
    configuration's `looks` say of it."""

    prompts: Texts = Field(
        ["{name}, cartoon character, standing in a forest", "{name}, cartoon character, portrait"]
    )
    """What is drawn of every character, before and after."""
    num_images_per_prompt: int = Field(2, ge=1)
    """Pictures a prompt and character, each from a seed of its own."""
    num_drift_images: int = Field(16, ge=1)
    """Pictures, at least, of each kind of prompt that names nobody: `prompts` without the name,
    other_prompts, the empty one. What training changed in them is drift."""
    other_prompts: Texts = Field(
        ["a dog on a lawn", "a wooden house by a lake", "a bowl of fruit", "an old man, reading"]
    )
    """Other subjects, which training should leave as they are."""
    pair_prompts: AnyTexts = Field(default_factory=list)
    """What is drawn of every two characters, {first} and {second}, of six pairs at most: is each of
    them there? None: nothing."""
    seed: int = Field(1000, ge=0)
    """Of the evaluation alone, apart from training's."""
    traits: dict[str, dict[str, str]] = Field(default_factory=dict)
    """What each character of Bunny World is like, `ellie: {fur: lilac, mark: heart}`: its own reader
    then tells identity trait by trait."""
    checklist: dict[str, list[str]] = Field(default_factory=dict)
    """What a person is to look for, `ellie: [a bent left ear, a yellow bow]`: evaluation/checklist.md
    is a sheet of all pictures to tick it on."""
    features: str = "palette"
    """What measures similarity: palette (sees colours only), bunny-world, or an image encoder (DINOv2,
    CLIP, SigLIP), folder or hub name."""
    prompt_features: str | None = None
    """What tells whether a picture shows what its prompt asks for: bunny-world, or a CLIP or SigLIP,
    folder or hub name. null: nothing does."""
    ceiling_shots: int = Field(8, ge=0)
    """Identity is told between a floor and a ceiling: so many shots of each character, one by one, are
    compared with the others, as the autoencoder gives them back. 0: no floor and ceiling."""
    choose: ChooseSection = ChooseSection()

    @field_validator("pair_prompts")
    @classmethod
    def _names_two(cls, value: list[str]) -> list[str]:
        for prompt in value:
            if "{first}" not in prompt or "{second}" not in prompt:
                raise ValueError(f"takes prompts with {{first}} and {{second}} (got {shown(prompt)})")
        return value
