"""Several processes that train one model, each on its share of every batch: what `torchrun` starts.

Each has all weights and moments; gradients are added up over the processes after every batch, so that a run is the same
on any number of them, up to the order of sums, and its state file too. A model too large for that is sharded: each
process holds its share of every weight and moment (`shard`, PyTorch's FSDP), and files are those of a whole model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that `torchrun` started, for this block; nothing where there is one, or they have joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_batch(images: int) -> None:
    """ValueError for a batch, or a part of one, without an image for each process."""
    if images < world():
        raise ValueError(
            f"each part of a batch has {images} images; expected at least one for each of {world()} processes"
        )


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs this block before the others do: what it writes they find."""
    if rank():
        dist.barrier()
    yield
    if not rank() and world() > 1:
        dist.barrier()


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one message; all have the same shapes in the same order."""
    if world() == 1:
        return
    flat = torch.cat([tensor.detach().ravel() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(values.view_as(tensor))


def any_of(flag: bool, device: torch.device) -> bool:
    """Is it so in any of the processes?"""
    if world() == 1:
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return bool(count.item())


def shard(model: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
    """Leave each process its share of every parameter; a block is whole while it runs, in all of them at once.

    Gradients are averaged over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # half a second, for those who shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shares, in every process; called by all of them."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Write into a tensor, or a process's share of one, from all its values."""
    if _is_shared(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def _is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Is it a DTensor, of which each process has a share?"""
    return hasattr(tensor, "full_tensor")
