import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import features, metrics, palette

SKIES = ["#87ceeb", "#c8e6a0", "#f5deb3", "#dddddd"]


def cartoon(fur, sky="#87ceeb", dx=0, size=(96, 96)):
    """A round face with two eyes and ears, on a flat background."""
    image = Image.new("RGB", (96, 96), sky)
    draw = ImageDraw.Draw(image)
    for x in (32, 54):
        draw.ellipse([x + dx, 4, x + 10 + dx, 44], fill=fur)
    draw.ellipse([20 + dx, 24, 76 + dx, 86], fill=fur, outline="black", width=2)
    for x in (36, 54):
        draw.ellipse([x + dx, 44, x + 6 + dx, 52], fill="black")
    return image.resize(size)


def test_rows_are_unit_vectors_alone_or_in_company_and_repeatable():
    images = [cartoon(fur) for fur in ("#cc3333", "#3366cc", "#33aa55")] * 7
    extractor = features.load_feature_extractor("palette")
    rows = extractor(images)
    assert extractor.name == "palette"
    assert rows.dtype == torch.float32 and rows.shape[0] == 21
    assert torch.allclose(rows.norm(dim=1), torch.ones(21), atol=1e-6)
    assert torch.equal(extractor(images[20:]), rows[20:])
    assert torch.equal(features.load_feature_extractor("palette")(images), rows)


@pytest.mark.parametrize("colour", ["black", "white", "#808080", "#777777", "#ff0000", "#0000ff"])
def test_an_image_without_edges_or_colour_has_a_direction_too(colour):
    images = [Image.new("RGB", (40, 30), colour), Image.new("L", (1, 1), 119)]
    rows = features.load_feature_extractor("palette")(images)
    assert rows.isfinite().all()
    assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-6)


def test_characters_of_different_colours_are_told_apart_whatever_the_background():
    furs = ["#cc3333", "#3366cc", "#e0a020", "#8844aa"]
    extractor = features.load_feature_extractor("palette")
    crops = [extractor([cartoon(fur, sky, dx) for sky in SKIES[:2] for dx in (-6, 6)]) for fur in furs]
    seen = extractor([cartoon(fur, sky) for fur in furs for sky in SKIES[2:]])
    labels = torch.arange(4).repeat_interleave(2)
    assert metrics.separation(seen, labels, crops).mean() == 1


def test_similarity_falls_with_colour_and_hardly_with_a_small_change_of_light():
    extractor = features.load_feature_extractor("palette")
    red, darker, blue = extractor([cartoon("#cc3333"), cartoon("#c63030"), cartoon("#3366cc")])
    assert red @ darker > 0.98
    assert red @ blue < 0.8


def test_lab_agrees_with_published_values():
    """White, black and the primaries under D65, http://www.brucelindbloom.com, to one decimal."""
    rgb = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    expected = [[100, 0, 0], [0, 0, 0], [53.2, 80.1, 67.2], [87.7, -86.2, 83.2], [32.3, 79.2, -107.9]]
    assert palette.srgb_to_lab(rgb) == pytest.approx(np.array(expected), abs=0.06)


def test_histograms_hold_what_they_promise():
    lab = palette.srgb_to_lab(np.random.default_rng(0).random((64, 64, 3)))
    assert (palette.colour_histogram(lab) ** 2).sum() == pytest.approx(1)
    upright_edge = np.zeros((64, 64))
    upright_edge[:, 20:] = 100
    cells = palette.edge_histogram(upright_edge).reshape(4, 4, 9)
    assert cells[:, 1, 0].min() > 1  # a gradient along x has direction 0
    assert cells[..., 1:8].max() == 0


def test_no_images_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        features.load_feature_extractor("palette")([])
    with pytest.raises(BunnyLoraError, match="choose palette"):
        features.load_feature_extractor("pallette")
    with pytest.raises(BunnyLoraError, match=r"Could not load evaluation.features"):
        features.load_feature_extractor(str(tmp_path))


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SIDE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(
        vision_config=VISION,
        text_config={**SMALL, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE).save_pretrained(folder)
    return folder


def test_a_relative_clip_folder_starts_at_the_project_root(tiny_clip, project, monkeypatch):
    (project / "models").mkdir()
    (project / "models" / "clip").symlink_to(tiny_clip)
    (project / "mine").symlink_to(tiny_clip)
    monkeypatch.chdir(project / "notebooks")
    for name in ("models/clip", "mine"):
        extractor = features.load_feature_extractor(name)
        assert extractor.name == name and extractor([cartoon("#cc3333")]).shape == (1, 12)


def test_clip_gives_the_projected_embedding_of_the_model(tiny_clip):
    images = [cartoon("#cc3333", size=(120, 80)), cartoon("#3366cc", size=(50, 90))]
    rows = features.load_feature_extractor(str(tiny_clip))(images)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=images, return_tensors="pt")
    with torch.inference_mode():
        seen = model.visual_projection(model.vision_model(pixels["pixel_values"]).pooler_output)
    assert rows.shape == (2, 12)
    assert torch.allclose(rows, torch.nn.functional.normalize(seen, dim=1), atol=1e-6)


@pytest.mark.parametrize(
    "model, processor, pooled",
    [
        (
            Dinov2Model(Dinov2Config(**VISION)),
            BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE),
            lambda output: output.last_hidden_state[:, 0],
        ),
        (
            SiglipVisionModel(SiglipVisionConfig(**VISION)),
            SiglipImageProcessorPil(size=SIDE),
            lambda output: output.pooler_output,
        ),
        (  # Published without its pooling layer: what stands in for that is random and not looked at.
            ViTModel(ViTConfig(**VISION), add_pooling_layer=False),
            ViTImageProcessorPil(size=SIDE),
            lambda output: output.last_hidden_state[:, 0],
        ),
    ],
    ids=["dinov2", "siglip", "vit"],
)
def test_any_image_encoder_is_loaded_with_its_own_processor(model, processor, pooled, tmp_path):
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = [cartoon("#cc3333", size=(120, 80)), cartoon("#3366cc", size=(50, 90))]
    rows = features.load_feature_extractor(str(tmp_path))(images)
    with torch.inference_mode():
        seen = pooled(model(processor(images=images, return_tensors="pt")["pixel_values"]))
    assert rows.shape == (2, 16)
    assert torch.allclose(rows, torch.nn.functional.normalize(seen, dim=1), atol=1e-6)


def test_what_is_no_image_encoder_is_called_by_its_name(tmp_path):
    BertModel(BertConfig(**SMALL, vocab_size=9)).save_pretrained(tmp_path / "text")
    with pytest.raises(BunnyLoraError, match=r"is no image encoder: it is a Bert model. It takes an"):
        features.load_feature_extractor(str(tmp_path / "text"))
    torch.save({}, tmp_path / "text" / "pytorch_model.bin")
    Dinov2Config(**VISION).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    with pytest.raises(BunnyLoraError, match=r"no file named model.safetensors"):
        features.load_feature_extractor(str(tmp_path / "text"))
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path / "half")
    Dinov2Config(**VISION).save_pretrained(tmp_path / "half")
    with pytest.raises(BunnyLoraError, match=r"its weights lack .* layers"):
        features.load_feature_extractor(str(tmp_path / "half"))
