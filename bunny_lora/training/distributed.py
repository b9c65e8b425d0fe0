"""The processes that share one run: one, or as many as `accelerate launch` started.

A step's micro-batches are dealt out in turn, their gradients added up, and every process takes the same
update, so how many there are shows in the last bits of the result only. LoRA's gradients are a few MB:
they travel once a step, in one piece, and DDP's wrapped models and hooks would gain nothing.

One process, the main one, writes and talks. Who waits for another watches a pulse that all keep up: a
process that has died, or a computer that is gone, is noticed within a minute, though a wait as such,
while the main process draws its samples for one, may take hours.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bunny_lora.core import interrupts, ranks
from bunny_lora.errors import BunnyLoraError, FollowerError, LostProcessError

T = TypeVar("T")
R = TypeVar("R")

HEARTBEAT_SEC = 3.0
LOST_AFTER_SEC = 40.0
_POLL_SEC = 0.002
_NO_LIMIT = timedelta(days=365)


class ProcessGroup:
    """This process among those of its run, see `process_group`. Alone, everything here is for free."""

    def __init__(
        self, rank: int = 0, count: int = 1, local_rank: int = 0, device: torch.device | None = None
    ) -> None:
        self.rank, self.count, self.local_rank, self.device = rank, count, local_rank, device
        self.is_main = rank == 0
        self.lost: object = None

    def local_shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of work that is the same list everywhere."""
        return items[self.rank :: self.count]

    def share(self, items: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
        """Yield every item with what `work` makes of it, in order and in every process.

        Each does its part of the work, one item after the other; `items` are the same list everywhere.
        """
        for first in range(0, len(items), self.count):
            shard = items[first : first + self.count]
            result = work(shard[self.rank]) if self.rank < len(shard) else None
            yield from zip(shard, cast("list[R]", self.all_gather(result)), strict=False)

    def check(self) -> None:
        """Raise LostProcessError if another process has gone."""
        if self.lost is not None:
            raise LostProcessError(self.lost)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all processes.

        Raises:
            LostProcessError: one of them has gone.
            StopRequest: a stop came from outside while this one waited.
        """
        if self.count == 1:
            return
        with interrupts.stoppable(), _watched():
            work = dist.all_reduce(tensor, async_op=True)
            while not work.is_completed():
                self.check()
                time.sleep(_POLL_SEC)
            work.wait()

    def all_reduce_many(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace float tensors of one device by their sums over all processes, in one piece."""
        if self.count == 1:
            return
        vector = parameters_to_vector(tensors)
        self.all_reduce(vector)
        vector_to_parameters(vector, tensors)

    def barrier(self) -> None:
        """Return when all processes have come here."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """Have the main process do something, and return in all of them what it returned.

        Raises:
            BunnyLoraError: as `work` did; in the other processes a `FollowerError`.
        """
        if self.count == 1:
            return work()
        message: list[Any] = [None, False]
        mistake: BunnyLoraError | None = None
        if self.is_main:
            try:
                message[0] = work()
            except BunnyLoraError as error:
                mistake, message[1] = error, True
        self.barrier()
        with _watched():
            dist.broadcast_object_list(message, src=0)
        if mistake is not None:
            raise mistake
        if message[1]:
            raise FollowerError(f"Process {self.rank} has stopped with the main process.")
        return message[0]

    def all_gather(self, item: T) -> list[T]:
        """Return the item of every process, by rank."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        self.barrier()
        with _watched():
            dist.all_gather_object(items, item)
        return items

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process go first, then one on each other computer, then the rest.

        So what one prepares is found by the others, on a disk that all share or on each computer's own.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(turn, 3):
            self.barrier()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that were launched with this one, for the length of a block.

    Every process must enter the block and do the same in it. On CPUs they talk over gloo, on GPUs over
    NCCL; a process's GPU is torch's current device.

    Args:
        device: where they compute.
    """
    if ranks.n_processes() == 1:
        yield ProcessGroup()
        return
    state = PartialState(cpu=device.type == "cpu", timeout=_NO_LIMIT)
    group = ProcessGroup(
        state.process_index, state.num_processes, state.local_process_index, state.device
    )
    atexit.unregister(dist.destroy_process_group)  # After a failure it might wait for ever.
    with ranks.quiet_unless_main(), _heartbeat(group):
        yield group
    atexit.register(dist.destroy_process_group)


@contextlib.contextmanager
def _heartbeat(group: ProcessGroup) -> Iterator[None]:
    """Exchange a sign of life every few seconds, in a thread; end it when all have come to the end."""
    over, failed = threading.Event(), False
    line = dist.new_group(backend="gloo", timeout=timedelta(seconds=LOST_AFTER_SEC))

    def beat() -> None:
        try:
            while True:
                is_done = over.is_set()
                if failed:  # The others must not take a pulse for work.
                    return
                n_done = torch.tensor([float(is_done)])
                dist.all_reduce(n_done, group=line)
                if n_done.item() == group.count:
                    return
                over.wait(HEARTBEAT_SEC)
        except RuntimeError as error:
            group.lost = error

    thread = threading.Thread(target=beat, daemon=True, name="bunny_lora pulse")
    thread.start()
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        over.set()
        # A thread of gloo's that needs Python when Python ends would abort the process.
        thread.join()
        dist.destroy_process_group(line)
    group.check()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Say of a broken connection what it means."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(error) from error
