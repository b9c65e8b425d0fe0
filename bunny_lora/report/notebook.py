"""What the notebooks show as HTML, where a figure or plain text would not do."""

from __future__ import annotations

import html
from typing import Any

from IPython.display import HTML

from bunny_lora import stage4
from bunny_lora.config import Config
from bunny_lora.report.data_figures import dropped_table


def config_details(config: Config) -> HTML:
    """Fold the resolved configuration away: what was set, and every key with what it means."""
    texts = {
        "What was set": config.user_yaml(),
        "Every key, and what it means": config.to_yaml(comments=True),
    }
    folded = "<details><summary>{}</summary><pre>{}</pre></details>"
    return HTML("".join(folded.format(name, html.escape(text)) for name, text in texts.items()))


def left_out(summary: dict[str, Any], config: Config) -> HTML:
    """Show every frame that was left out, with its picture where there is one, and the reason."""
    return HTML(dropped_table(summary, stage4.find_source(config.source).parent))
