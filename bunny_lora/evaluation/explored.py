"""Any picture of a run, on demand: found where it was drawn already, else drawn and kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bunny_lora import inference
from bunny_lora.config import Config
from bunny_lora.core import eval_result
from bunny_lora.core.image_file import ImageSettings, add_metadata, is_current, save_image
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import protocol
from bunny_lora.evaluation.protocol import NEUTRAL, OTHERS, SUBJECT, ImageSpec, Model
from bunny_lora.model import components
from bunny_lora.model.prompts import doubts
from bunny_lora.prepare import read_split

FOLDER = "explored"  # below `<run>/evaluation/`: what no evaluation asked for
BASE = "base"


@dataclass(frozen=True)
class Wanted:
    """One picture: `model` is base, checkpoint-<step> or final; `lora_scale` None the run's own."""

    model: str
    prompt: str
    seed: int
    lora_scale: float | None = None


@dataclass
class Studio:
    """Finds and draws pictures of one run; one model at a time stays in memory.

    Attributes:
        run_dir: the run's folder.
        config: how pictures are drawn, and the prompts of its evaluation.
        models: base, every checkpoint by step, and final.
        characters: whom the evaluation draws, the most frequent first.
    """

    run_dir: Path
    config: Config
    models: dict[str, Model]
    characters: list[str]
    _loaded: tuple[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, run_dir: Path, config: Config) -> Studio:
        """Return the studio of a run.

        Raises:
            BunnyLoraError: it was not trained to its end, or its files are damaged.
        """
        models = {model.name: model for model in protocol.find_models(run_dir, config)}
        return cls(run_dir, config, models, _characters(run_dir, config))

    def prompts(self, character: str) -> list[str]:
        """Return what the evaluation draws of a character, or of nobody."""
        return protocol.prompts_of(self.config, character)

    def seeds(self, prompt_index: int) -> list[int]:
        """Return the seeds from which the evaluation draws a prompt."""
        evaluation = self.config.evaluation
        images = range(evaluation.num_images_per_prompt)
        return [protocol.image_seed(evaluation.seed, prompt_index, image) for image in images]

    def find(self, wanted: Wanted) -> Path | None:
        """Return a picture if it is there from the same weights and settings; else None."""
        model, settings = self._made_by(wanted)
        for path in self._places(wanted, settings, model):
            if is_current(path, settings, model.identity):
                return path
        return None

    def draw(self, wanted: Wanted, on_step: Callable[[int], None] | None = None) -> Path:
        """Draw a picture, keep it and return its file.

        Args:
            wanted: what to draw.
            on_step: told each denoising step that is done, from 1.

        Raises:
            BunnyLoraError: the weights are gone, or the settings are out of range.
        """
        model, settings = self._made_by(wanted)
        pipe = self._pipe(model)
        # Without its adapters a model is the base model, to the bit: no need to load it apart.
        drawn = settings if model.folder else settings.model_copy(update={"lora_scale": 0.0})
        image = components.generate(pipe, drawn, on_step)
        path = self._places(wanted, settings, model)[-1]
        save_image(add_metadata(image, settings.model_dump() | model.identity), path)
        return path

    def doubts(self, prompt: str) -> list[str]:
        """Return what in a prompt is not what it seems: words beyond the limit, other tools' syntax."""
        tokenizer = components.load_tokenizer(self.models[BASE].identity["base_model"])
        return list(doubts([prompt], tokenizer))

    def _made_by(self, wanted: Wanted) -> tuple[Model, ImageSettings]:
        model = self.models[wanted.model]
        spec = ImageSpec(wanted.model, "", 0, wanted.prompt, wanted.seed, wanted.lora_scale)
        return model, protocol.generation_settings(spec, self.config)

    def _places(self, wanted: Wanted, settings: ImageSettings, model: Model) -> list[Path]:
        """Return where the evaluation would have put a picture, and where the studio puts it."""
        folder = self.run_dir / "evaluation"
        specs = [
            spec
            for character in [*self.characters, *protocol.NOBODY]
            for spec in protocol.specs_of(self.config, wanted.model, character)
            if (spec.prompt, spec.seed) == (wanted.prompt, wanted.seed)
        ]
        own = wanted.model == BASE or settings.lora_scale == self.config.sampling.lora_scale
        scale = None if own else settings.lora_scale
        named = [folder / replace(spec, lora_scale=scale).file for spec in specs]
        made_by = json.dumps(settings.model_dump() | model.identity, sort_keys=True)
        digest = hashlib.sha256(made_by.encode()).hexdigest()[:20]
        return [*named, folder / FOLDER / f"{digest}.png"]

    def _pipe(self, model: Model) -> Any:
        """Return a pipeline with a model's weights; any one will do for the base model."""
        if self._loaded is not None and self._loaded[0] != model.name and model.folder:
            self._loaded = None
        if self._loaded is None:
            drawing = model if model.folder else self.models["final"]
            identity = drawing.identity
            pipe = inference.load_lora_pipeline(
                identity["base_model"],
                drawing.folder,
                identity["device"],
                getattr(torch, identity["dtype"]),
            )
            self._loaded = (drawing.name, pipe)
        return self._loaded[1]


def _characters(run_dir: Path, config: Config) -> list[str]:
    try:
        if result := eval_result.find(run_dir):
            return list(result.settings.characters)
        samples, _ = read_split(config)
    except BunnyLoraError:  # damaged, or the data did not come along: prompts can still be typed
        return [SUBJECT]
    counts = Counter(name for sample in samples for name in sample.characters)
    return sorted(counts, key=lambda name: (-counts[name], name)) or [SUBJECT]


NOBODIES = {"nobody": NEUTRAL, "another subject": OTHERS}
