"""The explorer of a run, in a notebook: sliders over checkpoints and scales, base and LoRA wiped.

What was drawn already appears at once, what is missing is drawn on demand. A click on a cell of the
table of who is seen shows its pictures.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from bunny_lora.config import Config
from bunny_lora.core import eval_result, paths
from bunny_lora.core.eval_result import EvalResult, ImageScores
from bunny_lora.core.progress import is_watched
from bunny_lora.data.images import open_rgb
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation.by_hand import hand_on
from bunny_lora.evaluation.explored import BASE, NOBODIES, Studio, Wanted
from bunny_lora.report.confusion import Confusion, confusion
from bunny_lora.report.grids import picture_grid
from bunny_lora.report.plot import Plot

SHOWN_PX = 512  # the longer side of the picture
MAX_SHOWN = 24  # pictures of a cell
CELL_SHADE = 0.55  # at most, so that the number can be read
STATIC = "Nobody has this notebook open, so there is no explorer: `make lab` opens it with one."
N_STATIC = 4  # characters of the figure that stands in its place


def explore(run_dir: Path, config: Config) -> widgets.VBox | Plot:
    """Return the explorer of a run; where nobody looks at the notebook live, a figure in its place.

    Args:
        run_dir: a run that was trained to its end.
        config: how its evaluation draws.

    Raises:
        BunnyLoraError: no such run, or its files are damaged.
    """
    studio = Studio.of(run_dir, config)
    if not is_watched():
        print(STATIC)
        return static_figure(studio)
    return Explorer(studio, eval_result.find(run_dir)).box


def static_figure(studio: Studio) -> Plot:
    """Return what the explorer shows first, of a few characters: base, half and half, LoRA."""
    cells, labels = [], []
    for name in studio.characters[:N_STATIC]:
        prompt, seed = studio.prompts(name)[0], studio.seeds(0)[0]
        base, lora = (_opened(studio, Wanted(model, prompt, seed)) for model in (BASE, "final"))
        if base or lora:
            cells.append([base, wiped(base, lora, 0.5), lora])
            labels.append(prompt)
    if not cells:
        return Plot(0.7, "No pictures yet", "evaluate draws them")
    heads = [("", ["base model", "half and half", "with LoRA"])]
    return picture_grid(("Base model and LoRA", "the same seed"), labels, heads, cells)


def _opened(studio: Studio, wanted: Wanted) -> Image.Image | None:
    path = studio.find(wanted)
    return open_rgb(path) if path else None


def wiped(base: Image.Image | None, lora: Image.Image | None, share: float) -> Image.Image | None:
    """Return a picture that is the base model's left of `share` of its width, and the LoRA's right."""
    if base is None or lora is None:
        return base or lora
    picture, edge = lora.copy(), round(share * lora.width)
    picture.paste(base.crop((0, 0, edge, base.height)), (0, 0))
    if 0 < edge < picture.width:
        picture.paste("white", (max(0, edge - 1), 0, edge + 1, picture.height))
    return picture


class Explorer:
    """The widgets of one run; `box` holds them all."""

    def __init__(self, studio: Studio, result: EvalResult | None) -> None:
        self.studio, self.result = studio, result
        weights = [name for name in studio.models if name != BASE]
        who = [(name, name) for name in studio.characters] + list(NOBODIES.items())
        wide, half = widgets.Layout(width="98%"), widgets.Layout(width="16rem")
        style = {"description_width": "6rem"}
        self.checkpoint = widgets.Dropdown(
            options=[(name.replace("checkpoint-", "step "), name) for name in weights],
            value=weights[-1], description="checkpoint", style=style, layout=half,
        )  # fmt: skip
        self.character = widgets.Dropdown(
            options=who, description="character", style=style, layout=half
        )
        self.scene = widgets.Dropdown(description="scene", style=style, layout=wide)
        self.prompt = widgets.Text(
            description="prompt", style=style, layout=wide, continuous_update=False,
            placeholder="a prompt of your own, then Enter",
        )  # fmt: skip
        self.take = widgets.Dropdown(description="take", style=style, layout=half)
        self.seed = widgets.BoundedIntText(
            description="seed", min=0, max=2**53 - 1, style=style, layout=half
        )
        self.scale = widgets.FloatSlider(
            value=studio.config.sampling.lora_scale, min=0.0, max=2.0, step=0.05,
            description="LoRA scale", style=style, continuous_update=False,
        )  # fmt: skip
        self.wipe = widgets.IntSlider(
            value=50, min=0, max=100, description="base | LoRA", readout=False, style=style,
            layout=widgets.Layout(width=f"{SHOWN_PX}px"),
        )  # fmt: skip
        self.draw = widgets.Button(description="Draw what is missing", layout=half)
        self.hand_on = widgets.Button(description="Hand on this checkpoint", layout=half)
        self.progress = widgets.IntProgress(layout=widgets.Layout(visibility="hidden", width="16rem"))
        self.picture, self.status, self.shown = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.cells: dict[tuple[str, str], widgets.Button] = {}
        self.box = widgets.VBox(self._rows())
        self._listen()
        self._fill_scenes()

    def _rows(self) -> list[Any]:
        row = widgets.HBox
        rows = [
            row([self.checkpoint, self.character, self.scale]),
            self.scene,
            self.prompt,
            row([self.take, self.seed]),
            row([self.draw, self.hand_on, self.progress]),
            self.status,
            self.picture,
            self.wipe,
        ]
        table = confusion(self.result) if self.result else None
        return [*rows, *(self._heat_map(table) if table else [])]

    def _listen(self) -> None:
        for widget, react in (
            (self.character, self._fill_scenes),
            (self.scene, self._fill_prompt),
            (self.take, self._fill_seed),
        ):
            widget.observe(lambda _, react=react: react(), names="value")
        for widget in (self.checkpoint, self.prompt, self.seed, self.scale, self.wipe):
            widget.observe(lambda _: self._guarded(self.show), names="value")
        self.draw.on_click(lambda _: self._guarded(self.draw_missing))
        self.hand_on.on_click(lambda _: self._guarded(self.hand_on_these))

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BunnyLoraError as error:
            self.say(str(error))

    # ---------------------------------------------------------------- what is wanted

    def _fill_scenes(self) -> None:
        prompts = self.studio.prompts(self.character.value)
        self.scene.options = [(prompt, place) for place, prompt in enumerate(prompts)]
        self.scene.value = 0
        self._fill_prompt()

    def _fill_prompt(self) -> None:
        if self.scene.value is None:
            return
        seeds = self.studio.seeds(self.scene.value)
        self.take.options = [(f"{n} of {len(seeds)}", seed) for n, seed in enumerate(seeds, start=1)]
        self.prompt.value = self.scene.options[self.scene.value][0]
        self.take.value = seeds[0]
        self._fill_seed()

    def _fill_seed(self) -> None:
        if self.take.value is not None:
            self.seed.value = self.take.value
        self.show()

    def wanted(self) -> list[Wanted]:
        """Return the two pictures that are asked for: the base model's and the LoRA's."""
        prompt, seed = self.prompt.value, self.seed.value
        lora = Wanted(self.checkpoint.value, prompt, seed, round(self.scale.value, 2))
        return [Wanted(BASE, prompt, seed), lora]

    # ---------------------------------------------------------------- what is shown

    def show(self) -> None:
        """Show what is there of what is wanted, and say what is missing."""
        base, lora = (_opened(self.studio, wanted) for wanted in self.wanted())
        picture = wiped(base, lora, self.wipe.value / 100)
        missing = [name for name, one in (("base model", base), ("LoRA", lora)) if one is None]
        self.draw.disabled = not missing
        alt = f"Left the base model, right the LoRA: {self.prompt.value}, seed {self.seed.value}"
        self.picture.value = _img(picture, alt, SHOWN_PX) if picture else "<p>Not drawn yet.</p>"
        self.say(f"Not drawn yet: {' and '.join(missing)}.{self._takes()}" if missing else "")

    def _takes(self) -> str:
        if self.result is None:
            return ""
        return f" Drawing takes about {self.result.seconds_per_image:.0f} s a picture."

    def say(self, text: str) -> None:
        """Write one line below the buttons."""
        self.status.value = f"<p>{html.escape(text)}</p>" if text else ""

    def draw_missing(self) -> None:
        """Draw what is wanted and not there, with a bar that counts denoising steps."""
        missing = [wanted for wanted in self.wanted() if self.studio.find(wanted) is None]
        doubts = self.studio.doubts(self.prompt.value)
        n_steps = self.studio.config.sampling.num_inference_steps
        self.progress.max, self.progress.value = n_steps * len(missing), 0
        self.progress.layout.visibility = "visible"
        self.draw.disabled = True
        self.say("Drawing. The first picture of a checkpoint takes longer: its weights are loaded.")
        try:
            for place, wanted in enumerate(missing):
                self.studio.draw(wanted, partial(self._tick, place * n_steps))
        finally:
            self.progress.layout.visibility = "hidden"
        self.show()
        if doubts:
            self.say(" ".join(doubts))

    def _tick(self, n_before: int, step: int) -> None:
        self.progress.value = n_before + step

    def hand_on_these(self) -> None:
        """Have the run drawn with this checkpoint and LoRA scale from now on."""
        choice = hand_on(self.studio.run_dir, self.checkpoint.value, round(self.scale.value, 2))
        where = paths.relative(self.studio.run_dir / "handover.json")
        self.say(f"{choice.best.label} is handed on: {where} says so to whoever draws with this run.")

    # ---------------------------------------------------------------- who is seen

    def _heat_map(self, table: Confusion) -> list[Any]:
        columns = table.columns
        head = [widgets.HTML(f"<b>{html.escape(name)}</b>") for name in columns]
        items: list[Any] = [widgets.HTML("asked for"), *head]
        for row, shares in table.shares().items():
            items.append(widgets.HTML(f"<b>{html.escape(row)}</b>"))
            for column, share in zip(columns, shares, strict=True):
                items.append(self._cell(table, row, column, share or 0.0))
        template = f"8rem repeat({len(columns)}, 6rem)"
        grid = widgets.GridBox(items, layout=widgets.Layout(grid_template_columns=template))
        title = (
            f"<h4>Who was asked for, and who is seen</h4><p>{html.escape(table.about)}. A click on a"
        )
        return [widgets.HTML(f"{title} cell shows its pictures.</p>"), grid, self.shown]

    def _cell(self, table: Confusion, row: str, column: str, share: float) -> widgets.Button:
        images = table.cells.get((row, column), [])
        counted = f"{len(images)} picture{'s' * (len(images) != 1)}"
        button = widgets.Button(
            description=f"{share:.0%}", disabled=not images, layout=widgets.Layout(width="auto"),
            tooltip=f"{row} was asked for, {column} is seen: {counted}",
        )  # fmt: skip
        button.style.button_color, button.style.text_color = _shade(share), "#222222"
        button.on_click(lambda _: self._show_cell(button.tooltip, images))
        self.cells[row, column] = button
        return button

    def _show_cell(self, title: str, images: list[ImageScores]) -> None:
        folder = self.studio.run_dir / "evaluation"
        parts = []
        for image in images[:MAX_SHOWN]:
            path = folder / image.file
            drawn = _img(open_rgb(path), image.prompt, 160) if path.is_file() else "no picture"
            parts.append(
                f'<figure style="display:inline-block;width:160px;margin:4px">{drawn}'
                f"<figcaption>{html.escape(image.prompt)}</figcaption></figure>"
            )
        more = f", the first {MAX_SHOWN}" if len(images) > MAX_SHOWN else ""
        self.shown.value = f"<p>{html.escape(title)}{more}</p>{''.join(parts)}"


def _shade(share: float) -> str:
    """Return a blue as strong as a share, over white."""
    white, blue = (255, 255, 255), (0, 114, 178)
    mixed = (round(w + (b - w) * CELL_SHADE * share) for w, b in zip(white, blue, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _img(picture: Image.Image, alt: str, side_px: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    wide = side_px * picture.width // max(picture.size)
    return (
        f'<img alt="{html.escape(alt, quote=True)}" style="width:{wide}px;max-width:100%"'
        f' src="data:image/jpeg;base64,{data}">'
    )
