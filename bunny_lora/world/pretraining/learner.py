"""A model in pretraining, with everything that going on after an interruption needs, in one file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bunny_lora.core.files import atomic_path, sha256
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.quiet import quiet


def learning_rate(step: int, max_steps: int, peak: float, *, warmup_steps: int = 200) -> float:
    """Return the rate of a step: up to `peak`, level, then down to 0 over the last two thirds."""
    warm = (step + 1) / warmup_steps
    cool = (max_steps - step) / max(1, max_steps * 2 // 3)
    return peak * min(1.0, warm, cool)


@quiet()
def load_weights(model: Any, folder: Path) -> str:
    """Fill a model of diffusers or transformers with the weights in `folder`; return a hash of them.

    Raises:
        BunnyLoraError: there is no such model, or it is of another shape.
    """
    known = {key: tensor.shape for key, tensor in model.state_dict().items()}
    try:
        weights = type(model).from_pretrained(folder, local_files_only=True).state_dict()
    except OSError as error:
        raise BunnyLoraError(
            f"There is no {type(model).__name__} in {folder} to start from."
        ) from error
    if known != {key: tensor.shape for key, tensor in weights.items()}:
        raise BunnyLoraError(
            f"{folder} is of another shape than the model to train: start from a folder that"
            " `bunny-lora world pretrain` wrote with the same settings."
        )
    model.load_state_dict(weights)
    return "".join(sha256(file) for file in sorted(folder.glob("*.safetensors")))


@dataclass(frozen=True)
class Progress:
    """What has been learnt since the last report: the loss of every step, and how fast."""

    losses: list[torch.Tensor]
    images_per_sec: float

    @property
    def mean_loss(self) -> float:
        """The mean over all steps since the last report."""
        return sum(float(loss) for loss in self.losses) / len(self.losses)


class TrainState:
    """A model, its optimisers, the running average of its weights, and how many steps they have seen.

    Matrices and convolution kernels (as matrices, a row an output channel) learn with Muon, which
    makes the most of few pictures; embeddings, gains and biases with AdamW. Muon's updates are scaled
    to the size of AdamW's, so that one learning rate does for both.
    Muon: https://kellerjordan.github.io/posts/muon/; the scale: https://arxiv.org/abs/2502.16982.

    `settings` are the choices that the numbers depend on; a state saved under others is refused.
    Without `muon` AdamW does all: Muon counts in bfloat16, and where that is emulated, one of its steps
    costs more than the pictures.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        ema_decay: float = 0.999,
        *,
        muon: bool = True,
    ):
        self.model, self.settings, self.ema_decay = model, dict(settings), ema_decay
        self.step = 0
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters: list[torch.Tensor] = list(self._named.values())
        self._average = [p.detach().clone() for p in self._parameters]
        # the same memory, seen as a matrix: Muon takes nothing else
        self._matrices = {
            name: nn.Parameter(p.detach().view(len(p), -1))
            for name, p in self._named.items()
            if muon and p.ndim >= 2 and "embedding" not in name
        }
        self._rest = {n: p for n, p in self._named.items() if n not in self._matrices}
        self._adamw = torch.optim.AdamW(
            self._rest.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._optimizers: list[torch.optim.Optimizer] = [self._adamw]
        if muon:
            self._muon = torch.optim.Muon(
                self._matrices.values(), lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self._optimizers.insert(0, self._muon)

    def train(
        self,
        loss_of: Callable[[int], torch.Tensor],
        file: Path,
        *,
        max_steps: int,
        peak_rate: float,
        images_per_step: int,
        evaluate_every: int,
        save_every: int | None = None,
        stop_at: int | None = None,
        warmup_steps: int = 200,
    ) -> Iterator[Progress]:
        """Take the steps that are left, and pause with a report whenever it is time to evaluate.

        Args:
            loss_of: the loss of a step, by its number; all chance in it comes from that number, so that
                going on equals never having stopped.
            file: the state to go on from, and where it is kept.
            max_steps: length of the whole training; the learning rate ends at 0 there.
            peak_rate: see `learning_rate`.
            images_per_step: for the speed.
            evaluate_every: steps between pauses; the last step is always followed by one.
            save_every: steps between saves; by default, at every pause.
            stop_at: stop at this step already, as an interruption would.
            warmup_steps: see `learning_rate`.

        Raises:
            BunnyLoraError: the state was made under other settings.
        """
        self.load(file)
        last = min(max_steps, stop_at or max_steps)
        losses, since = [], time.monotonic()
        while self.step < last:
            loss = loss_of(self.step)
            rate = learning_rate(self.step, max_steps, peak_rate, warmup_steps=warmup_steps)
            self.update(loss, rate)
            losses.append(loss.detach())

            # once in a while
            if self.step % (save_every or evaluate_every) == 0 or self.step == last:
                self.save(file)
            if self.step % evaluate_every == 0 or self.step == last:
                speed = len(losses) * images_per_step / (time.monotonic() - since)
                yield Progress(losses, speed)
                losses, since = [], time.monotonic()

    def update(self, loss: torch.Tensor, rate: float) -> float:
        """Take one step down `loss` at learning rate `rate`; return the gradient's norm."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for name, matrix in self._matrices.items():
            gradient = self._named[name].grad
            matrix.grad = None if gradient is None else gradient.view_as(matrix)
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
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
        for name, matrix in self._matrices.items():
            tensors |= {f"{key}.{name}": value for key, value in self._muon.state[matrix].items()}
        for name, p in self._rest.items():
            for key, value in self._adamw.state[p].items():
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
                for name, matrix in self._matrices.items():
                    momentum = file.get_tensor(f"momentum_buffer.{name}").to(matrix.device)
                    self._muon.state[matrix] = {"momentum_buffer": momentum}
                for name, p in self._rest.items():
                    self._adamw.state[p] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(p.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                    }
        return True

    def _fill(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, values)
