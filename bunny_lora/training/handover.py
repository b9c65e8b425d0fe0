"""`handover.json`: what the next stage must know to draw with a run, and nothing that may change later.

The schema is documented in docs/handover.md; `schema_version` goes up when a reader of the old one
would go wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bunny_lora.config import Config
from bunny_lora.core import choice, files, paths
from bunny_lora.core.choice import Choice
from bunny_lora.core.eval_result import MeanScores
from bunny_lora.core.values import split_revision
from bunny_lora.data.captions import count_tokens
from bunny_lora.dataset import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, samplers
from bunny_lora.prepare import read_split
from bunny_lora.training import checkpoint

HANDOVER = "handover.json"
SCHEMA_VERSION: Literal[2] = 2  # 1 called `memorisation` of the scores `max_copy`


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TriggerWord(_Part):
    """A name that the weights know: in how many training images, and what it takes of the budget."""

    word: str
    training_images: int
    tokens: int


class TokenBudget(_Part):
    """Tokens of a prompt: what the text encoder takes in, and what is left beside start and end."""

    total: int
    for_prompt: int


class Recommended(_Part):
    """How to draw: as training and evaluation did. `sampler` is the name of diffusers' class.

    `sampler_options` are what it takes beside the configuration of the model's own.
    """

    lora_scale: float
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str
    sampler_options: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """Return what of an image's settings it says, the sampler as images record it."""
        sampler = samplers.called(self.sampler, self.sampler_options)
        return self.model_dump(exclude={"sampler_options"}) | {"sampler": sampler}


class Handover(_Part):
    """A run, ready to be drawn with. Paths start at the folder of the file."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    base_model: str
    base_revision: str | None = None
    weights: str
    weights_sha256: str
    format: Literal["peft"] = "peft"
    precision: str | None = None
    step: int
    trigger_words: list[TriggerWord]
    token_budget: TokenBudget
    recommended: Recommended
    scores: MeanScores | None = None
    final_sha256: str | None = None
    why: str | None = None


def write_handover(run_dir: Path, config: Config, scores: MeanScores | None = None) -> Path:
    """Write `handover.json` about the weights that were chosen, or else `run_dir/final`.

    Scores that are known of the same `final` stay, and so does a choice among these weights.

    Args:
        run_dir: the run's folder.
        config: the run's configuration.
        scores: mean of each measure over all characters, and the features that measured.
    """
    digest = str(adapters.adapter_digest(run_dir / "final"))
    if scores is None and (known := _known(run_dir)):
        same = digest == (known.final_sha256 or known.weights_sha256)
        scores = known.scores if same else None
    chosen = _chosen(run_dir, digest)
    recommended, step = recommended_by(config), config.training.max_train_steps
    if chosen is not None:
        how = {"lora_scale": chosen.best.lora_scale, "guidance_scale": chosen.best.guidance_scale}
        recommended, step = recommended.model_copy(update=how), chosen.best.step
    tokenizer = components.load_tokenizer(config.base_model)
    counts = Counter(name for sample in _samples(config) for name in sample.characters)
    handover = Handover(
        base_model=split_revision(config.base_model)[0],
        base_revision=components.base_commit(config.base_model),
        weights=chosen.best.model if chosen else "final",
        weights_sha256=chosen.weights_sha256 if chosen else digest,
        precision=_newest_precision(run_dir),
        step=step,
        trigger_words=[
            TriggerWord(word=name, training_images=n, tokens=count_tokens(name, tokenizer) - 2)
            for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ],
        token_budget=TokenBudget(
            total=tokenizer.model_max_length, for_prompt=tokenizer.model_max_length - 2
        ),
        recommended=recommended,
        scores=scores,
        final_sha256=digest,
        why=chosen.why if chosen else None,
    )
    files.write_json(run_dir / HANDOVER, handover.model_dump(mode="json"))
    return run_dir / HANDOVER


def _chosen(run_dir: Path, final_sha256: str) -> Choice | None:
    """Return what was chosen for a run, if all weights are still those that were chosen among."""
    found = choice.find(run_dir)
    if found is None:
        return None
    now = adapters.adapter_digest(run_dir / found.best.model)
    if (now, final_sha256) == (found.weights_sha256, found.final_sha256):
        return found
    print(
        f"{found.best.label} was chosen among other weights than there are now, so {HANDOVER} names"
        " final/: run `bunny-lora choose` again."
    )
    return None


def chosen_weights(run_dir: Path) -> Path:
    """Return the folder of the weights that a run hands on, which is said where it is not `final/`."""
    found = _known(run_dir) if (run_dir / HANDOVER).is_file() else None
    if found is None or found.weights == "final":
        return run_dir / "final"
    print(f"{found.weights} of {paths.relative(run_dir)}, as `choose` found: {found.why}")
    return run_dir / found.weights


def recommended_by(config: Config) -> Recommended:
    """Return how to draw with a run: as its samples and its evaluation are drawn."""
    name = components.sampler_name(config.base_model, config.sampling.sampler)
    sampler, options = samplers.described(name)
    return Recommended(
        lora_scale=config.sampling.lora_scale,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
        width=config.resolution,
        height=config.resolution,
        sampler=sampler,
        sampler_options=options,
    )


def read_handover(run_dir: str | Path) -> Handover:
    """Return what a run hands on.

    Raises:
        BunnyLoraError: there is no `handover.json`, it is damaged, or of a later schema.
    """
    path = paths.resolve(run_dir) / HANDOVER
    if not path.is_file():
        raise BunnyLoraError(
            f"There is no {HANDOVER} in {path.parent}: name the folder of a run that was trained to its"
            " end, such as outputs/lora_weights."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise BunnyLoraError(f"{path} is damaged; run `bunny-lora train` again to write it.") from None
    if version not in (1, SCHEMA_VERSION):
        raise BunnyLoraError(
            f"{path} has schema_version {version}, and this bunny_lora reads up to {SCHEMA_VERSION}:"
            " use the version that wrote it, or train with this one."
        )
    try:
        return Handover.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BunnyLoraError(f"{path} is damaged: {where}: {first['msg']}.") from None


def recorded_precision(run_dir: Path, weights: Path) -> str | None:
    """Return the precision that some of a run's weights were trained in; None if it recorded none.

    A checkpoint says so itself; else it is in `handover.json`, or in the newest checkpoint beside.
    """
    handed_over = read_handover(run_dir).precision if (run_dir / HANDOVER).is_file() else None
    return checkpoint.recorded_precision(weights) or handed_over or _newest_precision(run_dir)


def _newest_precision(run_dir: Path) -> str | None:
    newest = list(checkpoint.list_checkpoints(run_dir).values())[-1:]
    return checkpoint.recorded_precision(newest[0]) if newest else None


def _known(run_dir: Path) -> Handover | None:
    try:
        return read_handover(run_dir)
    except BunnyLoraError:
        return None


def _samples(config: Config) -> list[Sample]:
    try:
        return read_split(config)[0]
    except BunnyLoraError:
        return []  # the training data did not come along
