"""Does an image show what its prompt asks for, and are its colours right?"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from bunny_lora.core.image_file import save_image
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import following, protocol
from bunny_lora.evaluation.protocol import ImageSpec
from bunny_lora.model.image_encoder import FeatureExtractor
from bunny_lora.world.asked import render_as_asked

PROMPTS = ["{name}, in the red", "{name}, in the green", "{name}, in the blue"]
ELLIE = {"species": "bunny", "fur": "lilac", "outfit": "bow", "outfit_colour": "yellow"}
COLOURS = {"red": 0, "green": 1, "blue": 2}


def mean_colour(images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([one.resize((1, 1)).getpixel((0, 0)) for one in images]).float()


def texts(prompts: list[str]) -> torch.Tensor:
    return torch.eye(3)[[COLOURS[prompt.split()[-1]] for prompt in prompts]]


def drawn(folder: Path, colours: dict[str, list[str]]) -> list[ImageSpec]:
    plan = []
    for model, shown in colours.items():
        for index, colour in enumerate(shown):
            spec = ImageSpec(model, "rex", index, PROMPTS[index].replace("{name}", "rex"), index)
            save_image(Image.new("RGB", (8, 8), colour), folder / "evaluation" / spec.file)
            plan.append(spec)
    return plan


def test_what_a_prompt_asks_is_told_beside_what_other_prompts_ask(tmp_path: Path) -> None:
    reader = SimpleNamespace(images=FeatureExtractor("colours", mean_colour), texts=texts)
    plan = drawn(tmp_path, {"base": ["red", "lime", "blue"], "final": ["red", "red", "red"]})
    config = tiny_config("random-tiny", evaluation={"prompts": PROMPTS})
    axis, places = following.following(tmp_path, config, plan, reader)
    assert axis.features == "colours"
    assert (axis.models["base"].mean, axis.models["final"].mean) == (1, pytest.approx(1 / 3, abs=1e-4))
    assert axis.change.mean == pytest.approx(-2 / 3, abs=1e-4) and axis.change.high <= 0
    assert axis.reference == pytest.approx(1 / 6, abs=1e-4)
    assert [places[spec.file] for spec in plan] == [1, 1, 1, 1, 0, 0]
    assert following.following(tmp_path, config, plan, None) == (None, {})


def test_colours_are_told_whatever_the_features_are(tmp_path: Path) -> None:
    plan = drawn(tmp_path, {"base": ["blue", "blue", "blue"], "final": ["red", "red", "red"]})
    crops = {"rex": [Image.new("RGB", (8, 8), colour) for colour in ("red", "#f80808")]}
    axis = following.colour(tmp_path, plan, crops)
    assert axis.features == "palette" and axis.reference > 0.9
    assert axis.models["final"].mean > 0.95 > axis.models["base"].mean and axis.change.low > 0


def test_a_clip_tells_where_a_character_is(tmp_path: Path) -> None:
    reader = following.PromptReader("bunny-world", "cpu")
    places = ["beach", "forest", "snow", "bedroom"]
    images = [
        render_as_asked(ELLIE, {"place": place}, camera="medium", number=n, size_px=128)
        for n, place in enumerate(places)
    ]
    asked = reader.texts([protocol.without_name("{name}, on the beach", "a"), *places[1:]])
    cosines = reader.images(images) @ asked.T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]


def test_long_prompts_are_said_to_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    following.PromptReader("bunny-world", "cpu").texts(["on the beach", "in the forest, " * 30])
    assert "1 of 2 prompts are longer than it reads" in capsys.readouterr().out


def test_what_reads_no_text_cannot_tell(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path)
    with pytest.raises(BunnyLoraError, match="no space that text and images share: name a CLIP"):
        following.PromptReader(str(tmp_path), "cpu")
