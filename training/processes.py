"""Several processes that train one model (`torchrun`): each learns from some rows of every batch.

A batch, its weight and its order are those of a single process; gradients are added up before each step, so that the
loss curve is the same to rounding. One process is a group of one, which talks to nobody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(hours=6)
"""how long the others wait for the one that scores the test part"""


@dataclass(frozen=True)
class Group:
    """This process among all that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is this process that evaluates, speaks and writes."""
        return self.rank == 0

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """What is fetched and kept in a folder is fetched once."""
        if not self.leads:
            dist.barrier()
        yield
        if self.leads and self.size > 1:
            dist.barrier()

    def share(self, rows: int) -> slice:
        """The rows of a batch that are this process's own, one after another."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Put the sum over all processes into each tensor; one exchange for all."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().cpu() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def join(self, part: Tensor, place: slice, size: int, dim: int = 0) -> Tensor:
        """Every process's part in its place along `dim`, which is `size` long in all."""
        if self.size == 1:
            return part
        whole = torch.zeros(*part.shape[:dim], size, *part.shape[dim + 1 :], dtype=torch.float64)
        whole.narrow(dim, place.start, place.stop - place.start).copy_(part)
        dist.all_reduce(whole)
        return whole.to(part.dtype)

    def agree(self, fraction: float, save: bool, stop: bool) -> tuple[float, bool, bool]:
        """The leader's clock and wish to save, and whether anybody wants to stop: all do the same after each step."""
        if self.size == 1:
            return fraction, save, stop
        clock = (fraction, float(save)) if self.leads else (0.0, 0.0)
        said = torch.tensor([*clock, float(stop)], dtype=torch.float64)
        dist.all_reduce(said)
        return float(said[0]), bool(said[1]), bool(said[2])


@contextmanager
def together() -> Iterator[Group]:
    """The group that `torchrun` started this process in, or a group of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=WAIT)
    try:
        group = Group(dist.get_rank(), size)
        yield group
        dist.barrier()
        if not group.leads:
            # It has written nothing, and torch's threads now and then abort a process that ends in the usual way.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    finally:
        dist.destroy_process_group()
