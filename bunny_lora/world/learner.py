"""A model in pretraining, with everything that going on after an interruption needs, in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bunny_lora.errors import BunnyLoraError
from bunny_lora.runs import atomic_path


def learning_rate(step: int, max_steps: int, peak: float, *, warmup_steps: int = 200) -> float:
    """Return the rate of a step: up to `peak`, level, then down to 0 over the last third."""
    warm = (step + 1) / warmup_steps
    cool = (max_steps - step) / max(1, max_steps // 3)
    return peak * min(1.0, warm, cool)


class Learner:
    """A model, its AdamW, the running average of its weights, and how many steps they have seen.

    `settings` are the choices that the numbers depend on; a state saved under others is refused.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any], ema_decay: float = 0.999):
        self.model, self.settings, self.ema_decay = model, dict(settings), ema_decay
        self.step = 0
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters: list[torch.Tensor] = list(self._named.values())
        self._average = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.99))

    def update(self, loss: torch.Tensor, rate: float) -> float:
        """Take one step down `loss` at learning rate `rate`; return the gradient's norm."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1 - decay)
        return float(norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model for the length of a block."""
        weights = [p.detach().clone() for p in self._parameters]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(weights)

    def save(self, path: Path) -> None:
        """Write the whole state as one safetensors file, atomically."""
        tensors: dict[str, torch.Tensor] = {}
        for (name, p), mean in zip(self._named.items(), self._average, strict=True):
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": mean}
            for key, value in self._optimizer.state[p].items():
                if key != "step":
                    tensors[f"{key}.{name}"] = value
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(self.step), "settings": json.dumps(self.settings)}
        with atomic_path(path) as part:
            save_file(contiguous, part, metadata)

    def load(self, path: Path) -> bool:
        """Go on from a saved state; False if there is none.

        Raises:
            BunnyLoraError: the state was made under other settings.
        """
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["settings"]) != json.loads(json.dumps(self.settings)):
                raise BunnyLoraError(
                    f"{path} was trained with other settings ({metadata['settings']}): choose another"
                    " output folder, or those settings."
                )
            self.step = int(metadata["step"])
            with torch.no_grad():
                for (name, p), mean in zip(self._named.items(), self._average, strict=True):
                    p.copy_(file.get_tensor(f"model.{name}"))
                    mean.copy_(file.get_tensor(f"ema.{name}"))
                    self._optimizer.state[p] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(p.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                    }
        return True

    def _fill(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, values)
