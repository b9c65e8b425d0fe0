"""Base against LoRA, in scores: what is drawn, how it is measured, what `eval.json` says."""

from bunny_lora.evaluation.choose import choose
from bunny_lora.evaluation.cutouts import images_of
from bunny_lora.evaluation.judge import evaluate

__all__ = ["choose", "evaluate", "images_of"]
