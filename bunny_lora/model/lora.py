"""A LoRA in the neutral form that every file format is read into and written from.

Names of modules are the model's own: `down_blocks.0.attentions.0.….attn1.to_q`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PARTS = ("unet", "text_encoder")
KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
# Around CLIP's encoder, before transformers 5.6 and in every format but PEFT's.
WRAPPER = "text_model."


@dataclass(frozen=True)
class Module:
    """The change of one layer, ΔW = alpha / rank · up · down (https://arxiv.org/abs/2106.09685).

    Attributes:
        down: A, float32 [rank, in], of a convolution [rank, in, h, w].
        up: B, float32 [out, rank], of a convolution [out, rank, 1, 1].
        alpha: the strength at which it was trained; rank-stabilised scaling is folded in.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]

    def change(self) -> torch.Tensor:
        """Return ΔW, float32, of the shape of the layer's weight."""
        flat = self.alpha / self.rank * self.up.flatten(1) @ self.down.flatten(1)
        return flat.view(len(flat), *self.down.shape[1:])


LoRA = dict[str, dict[str, Module]]
"""By part ("unet", "text_encoder"), then by name of the module."""


def combined(loras: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Return one LoRA that changes the weights as all of them do together, each times its weight.

    Σ wₖ·Bₖ·Aₖ is the product of the Bs side by side and the As one below the other: nothing is lost,
    the rank is the sum of the ranks. One LoRA of weight 1 comes back as it is.
    """
    if len(loras) == 1 and loras[0][1] == 1:
        return loras[0][0]
    found: LoRA = {}
    for part in PARTS:
        names = dict.fromkeys(name for lora, _ in loras for name in lora.get(part, {}))
        for name in names:
            own = [(lora[part][name], w) for lora, w in loras if name in lora.get(part, {})]
            down = torch.cat([module.down for module, _ in own])
            up = torch.cat([w * module.alpha / module.rank * module.up for module, w in own], dim=1)
            found.setdefault(part, {})[name] = Module(down, up, float(len(down)))
    return found
