"""What an exported LoRA tells of itself: metadata that other tools show, and a model card."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from bunny_lora import inference
from bunny_lora.config import Config, load_config
from bunny_lora.core import eval_result
from bunny_lora.core.eval_result import MEASURES, EvalResult, sees
from bunny_lora.core.files import read_json
from bunny_lora.core.values import split_revision
from bunny_lora.dataset import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.export.names import title_of
from bunny_lora.model import adapters, components, kinds
from bunny_lora.model.formats import BASE_REVISION, LoRA
from bunny_lora.prepare import read_split
from bunny_lora.training.checkpoint import STATE
from bunny_lora.training.handover import HANDOVER, read_handover

THUMBNAIL_PX = 256
# What the hub says of the models that are usually trained on; others are named "unknown".
BASE_LICENSES = {"nota-ai/bk-sdm-tiny": "creativeml-openrail-m", "bunny-world": "apache-2.0"}


@dataclass(frozen=True)
class About:
    """Facts about one trained LoRA, from its run folder; None and empty where none are recorded."""

    title: str
    base_model: str
    revision: str | None
    step: int | None
    config: Config | None
    characters: dict[str, int]
    n_images: int | None
    rank: int
    alpha: float
    scores: EvalResult | None
    drawn_with: str | None
    thumbnail: bytes | None
    base_identity: str | None
    weights_sha256: str | None
    is_sd2: bool
    prediction_type: str

    @classmethod
    def of_run(cls, weights: Path, base_model: str, lora: LoRA) -> About:
        """Read what the run that `weights` belong to recorded."""
        run = inference.run_folder(weights)
        base_folder = Path(components.resolve_base_model(base_model))
        config = load_config(run / "config.yaml") if run else None
        samples = _samples(config)
        characters = Counter(n for sample in samples for n in sample.characters).most_common()
        first = next(iter(next(iter(lora.values())).values()))
        name, revision = split_revision(base_model)
        return cls(
            title=title_of(weights, run, [name for name, _ in characters]),
            base_model=name,
            revision=revision,
            step=_step(weights),
            config=config,
            characters=dict(characters),
            n_images=len(samples) or None,
            rank=first.rank,
            alpha=first.alpha,
            scores=eval_result.find(run) if run else None,
            drawn_with=_drawn_with(run, weights) if run else None,
            thumbnail=_thumbnail(run) if run else None,
            base_identity=components.base_identity(base_model),
            weights_sha256=adapters.adapter_digest(weights),
            is_sd2=kinds.is_sd2(base_folder),
            prediction_type=kinds.prediction_type(base_folder),
        )

    def kohya_metadata(self, *, experimental: bool = False) -> dict[str, str]:
        """Return the header that A1111, ComfyUI's helpers and sd-scripts show; all values are text.

        Names: sd-scripts, `networks/lora.py` and `train_network.py`, and the modelspec of
        https://github.com/Stability-AI/ModelSpec.
        """
        metadata: dict[str, Any] = {
            "ss_v2": self.is_sd2,
            "ss_base_model_version": ("sd_v2" if self.is_sd2 else "sd_v1") + "_v" * self._predicts_v,
            "ss_network_module": "networks.lora",
            "ss_network_dim": self.rank,
            "ss_network_alpha": self.alpha,
            "ss_network_args": "{}",
            "ss_output_name": self.title,
            "ss_sd_model_name": self.base_model,
            **self._modelspec("/lora"),
        }
        if self.thumbnail:
            encoded = base64.b64encode(self.thumbnail).decode()
            metadata["modelspec.thumbnail"] = f"data:image/jpeg;base64,{encoded}"
        if experimental:
            metadata["modelspec.description"] = (
                "Experimental: trained on BK-SDM-Tiny, blocks renamed to those of Stable Diffusion 1.x."
            )
        if self.characters:
            metadata["ss_tag_frequency"] = json.dumps({"training": self.characters})
            metadata["ss_dataset_dirs"] = json.dumps(
                {"training": {"n_repeats": 1, "img_count": self.n_images}}
            )
        if self.config:
            metadata |= _training_metadata(self.config)
        known = {
            BASE_REVISION: self.revision,
            "ss_num_train_images": self.n_images,
            "ss_steps": self.step,
        }
        metadata |= {name: value for name, value in known.items() if value is not None}
        return {name: str(value) for name, value in metadata.items()}

    def checkpoint_metadata(self) -> dict[str, str]:
        """Return the header of a whole model with this LoRA merged in."""
        merged = {
            "base_model": self.base_model,
            "base_identity": self.base_identity,
            "lora": self.title,
            "lora_weights_sha256": self.weights_sha256,
            "lora_steps": self.step,
        }
        metadata = {"format": "pt"} | self._modelspec("") | merged
        return {name: str(value) for name, value in metadata.items() if value is not None}

    @property
    def _predicts_v(self) -> bool:
        return self.prediction_type == "v_prediction"

    def _modelspec(self, kind: str) -> dict[str, str]:
        second = "stable-diffusion-v2-768-v" if self._predicts_v else "stable-diffusion-v2-512"
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": (second if self.is_sd2 else "stable-diffusion-v1") + kind,
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": ", ".join(self.characters),
            "modelspec.prediction_type": "v" if self._predicts_v else self.prediction_type,
        }


def _training_metadata(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "ss_learning_rate": training.learning_rate,
        "ss_lr_scheduler": training.lr_scheduler,
        "ss_lr_warmup_steps": training.lr_warmup_steps,
        "ss_lr_scheduler_num_cycles": training.lr_num_cycles,
        "ss_lr_scheduler_power": training.lr_power,
        "ss_max_train_steps": training.max_train_steps,
        "ss_batch_size_per_device": training.batch_size,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_max_grad_norm": training.max_grad_norm,
        "ss_seed": training.seed,
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
    }


def _step(weights_dir: Path) -> int | None:
    """Return a checkpoint's step from its state; `final/` has none, and the run hands its step on."""
    if (weights_dir / STATE).is_file():
        return int(read_json(weights_dir / STATE)["step"])
    handed_on = weights_dir.name == "final" and (weights_dir.parent / HANDOVER).is_file()
    return read_handover(weights_dir.parent).step if handed_on else None


def _drawn_with(run_dir: Path, weights: Path) -> str | None:
    """Return how a run's own weights are to be drawn with, if it hands on these."""
    if not (run_dir / HANDOVER).is_file():
        return None
    handover = read_handover(run_dir)
    if (run_dir / handover.weights).resolve() != weights.resolve():
        return None
    how = handover.recommended
    said = f"LoRA scale {how.lora_scale:g}, guidance {how.guidance_scale:g} and"
    said += f" {how.num_inference_steps} steps of {how.sampler} at {how.width} x {how.height}"
    return said + (", as `choose` found" if handover.why else ", as the run's own samples were drawn")


def _samples(config: Config | None) -> list[Sample]:
    try:
        return read_split(config)[0] if config else []
    except BunnyLoraError:
        return []  # the training data did not come along


def _thumbnail(run_dir: Path) -> bytes | None:
    """Return a small JPEG of the first picture that the evaluation, or training, drew with the LoRA."""
    drawn = sorted((run_dir / "evaluation" / "images" / "final").glob("*.png"))
    drawn += sorted((run_dir / "samples").glob("step-*/*.png"))[-1:]
    if not drawn:
        return None
    with Image.open(drawn[0], formats=["PNG"]) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


# ---------------------------------------------------------------------------- model card


def model_card(about: About, files: list[str]) -> str:
    """Return `README.md` with the front matter that the hub reads."""
    front: dict[str, Any] = {
        "license": BASE_LICENSES.get(about.base_model, "unknown"),
        "library_name": "diffusers",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "lora"],
    }
    on_the_hub = inference.ON_THE_HUB.fullmatch(about.base_model)
    if on_the_hub and not components.folder_here(about.base_model):
        front = {"base_model": about.base_model} | front  # The hub refuses what is no name on it.
    if about.characters:
        front["instance_prompt"] = next(iter(about.characters))
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    text = f"---\n{head}---\n\n# {_plain(about.title)}\n\nLoRA of rank {about.rank} and alpha"
    text += f" {about.alpha:g} for {_plain(about.base_model)}, trained with bunny_lora"
    text += f" for {about.step} steps" if about.step else ""
    text += f" on {about.n_images} images" if about.n_images else ""
    text += ".\n\n"
    if about.characters:
        rows = "".join(f"| {_plain(name)} | {count} |\n" for name, count in about.characters.items())
        text += f"| trigger word | training images |\n|---|---|\n{rows}\n"
    text += "Files: " + ", ".join(f"`{name}`" for name in files) + ".\n"
    if about.drawn_with:
        text += f"\nDraw with {about.drawn_with}.\n"
    if about.scores:
        text += "\n" + _score_table(about.scores)
    return text


def _plain(text: str) -> str:
    """Return a text as Markdown shows it unchanged, in one line and in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(text.split()))


def _score_table(result: EvalResult) -> str:
    scores = result.means()
    text = f"Judged with the features {_plain(sees(scores.features))}, mean over all pictures:\n\n"
    text += "| | base model | with the LoRA |\n|---|---|---|\n"
    for name in MEASURES:
        values = [getattr(side, name) for side in (scores.base, scores.final)]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        text += f"| {name} | {cells[0]} | {cells[1]} |\n"
    return text + (f"\n{scores.warning}\n" if scores.warning else "")
