"""What all figures share, and how other tests look at a figure."""

from itertools import combinations

import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bunny_lora.report import fonts, plot


def texts(figure):
    """All texts that a figure shows."""
    shown = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        shown += [text.get_text() for text in axes.texts]
        shown += [axes.get_title(loc="left"), *(t.get_text() for t in axes.get_yticklabels())]
    return shown


def n_pictures(figure):
    return sum(bool(axes.images) for axes in figure.axes)


def assert_readable(figure):
    """The figure shows itself without pyplot; no text is cut off at its edge or lies on another."""
    assert isinstance(figure, Figure)
    assert figure.as_png().startswith(b"\x89PNG")
    assert not _pylab_helpers.Gcf.figs
    renderer, width, height = figure.canvas.get_renderer(), *figure.bbox.size
    hidden = beyond_the_limits(figure)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown if t.get_text().strip()]
    assert not [t for t, box in boxes if box.x0 < 0 or box.x1 > width or box.y0 < 0 or box.y1 > height]
    pairs = combinations(boxes, 2)
    assert not [(a, b) for (a, one), (b, other) in pairs if one.padded(-1).overlaps(other.padded(-1))]


def beyond_the_limits(figure):
    """Labels of ticks that are there but not drawn."""
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = [
        (tick, *sorted(axis.get_view_interval())) for axis in axes for tick in axis.get_major_ticks()
    ]
    hidden = [tick for tick, low, high in ticks if not low <= tick.get_loc() <= high]
    return {label for tick in hidden for label in (tick.label1, tick.label2)}


def test_figures_are_saved_whole(tmp_path):
    path = plot.save_figure(plot.Plot(1.5, "a title"), tmp_path / "new" / "loss.png")
    with Image.open(path) as image:
        assert image.width == 1100
    assert [p.name for p in path.parent.iterdir()] == ["loss.png"]


def test_a_notebook_keeps_pictures_as_jpeg_and_charts_as_png():
    chart, grid = plot.Plot(2, "A chart"), plot.Plot(2, "Pictures")
    chart.panel(1, 1, 2, 1).plot([1, 2])
    noise = Image.effect_noise((512, 512), 80).convert("RGB")
    plot.show(grid.panel(1, 0.5, 4, 1.4), noise)
    (data, about), (picture, said) = chart._repr_mimebundle_(), grid._repr_mimebundle_()
    assert list(data) == list(about) == ["image/png"]
    assert list(picture) == list(said) == ["image/jpeg"] and said["image/jpeg"]["alt"] == "Pictures"
    kept, _ = DisplayFormatter().format(grid)
    assert [kind for kind in kept if kind.startswith("image/")] == ["image/jpeg"]
    assert len(picture["image/jpeg"]) < len(grid.as_png())


def test_text_that_lies_on_text_or_beyond_the_edge_is_found():
    assert_readable(figure := plot.Plot(1.5, "a title", "a subtitle"))
    figure.label(0.2, 0.4, "on the subtitle")
    with pytest.raises(AssertionError, match="on the subtitle"):
        assert_readable(figure)
    with pytest.raises(AssertionError, match="endless"):
        assert_readable(plot.Plot(1.5, "an endless title " * 20))


@pytest.mark.parametrize("n_bytes", [4, 3000])
def test_a_damaged_picture_leaves_a_note_and_no_open_file(tmp_path, n_bytes):
    Image.effect_noise((100, 100), 50).save(tmp_path / "whole.png")
    path = tmp_path / "cut.png"
    path.write_bytes((tmp_path / "whole.png").read_bytes()[:n_bytes])
    figure = plot.Plot(1.5, "")
    plot.show(figure.panel(1, 0.5, 0.9, 0.9), path)
    assert "no picture" in texts(figure)


@pytest.mark.parametrize(("n", "chosen"), [(9, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (2, [0, 4]), (1, [0])])
def test_items_are_spread_from_first_to_last(n, chosen):
    assert plot.spread(range(5), n) == chosen


def test_long_text_is_shortened_with_an_ellipsis():
    assert plot.wrap("one two three four", 9, 2) == "one two\nthree …"
    assert plot.cut("abcdef", 4) == "abc…" and plot.cut("abcd", 4) == "abcd"


def test_letters_are_drawn_with_a_font_that_has_them(capsys):
    letter = "\N{LATIN SMALL LETTER D WITH PALATAL HOOK}"  # in STIX, which matplotlib brings
    figure = plot.Plot(1.5, f"ellie {letter}")
    assert_readable(figure)
    assert len(figure.texts[0].get_fontfamily()) == 2
    assert not capsys.readouterr().out


def test_letters_that_no_font_has_are_said_to_be_boxes_once(capsys, monkeypatch, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    broken = ("broken", str(tmp_path / "broken.ttf"))
    monkeypatch.setattr(fonts, "_regular_fonts", lambda: [broken])
    figure = plot.Plot(1.5, "兔 waving")
    figure.label(1, 1, "兔 again")
    for _ in range(2):
        plot.save_figure(figure, tmp_path / "figure.png")
    assert capsys.readouterr().out.count("No font on this computer has 兔: boxes") == 1


def test_wide_letters_take_two_places_of_a_line():
    assert plot.wrap("兔兔兔兔 abc", 4, 3) == "兔兔\n兔兔\nabc"
