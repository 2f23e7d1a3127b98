"""More than one process: `torchrun --nproc-per-node=N -m fastllm …`, or any script that calls `fit`.

Every process reads the same data and computes its share of a step's batches. Parameters, gradients and moments lie in shards
over the processes (FSDP2: torch.distributed.fsdp.fully_shard): the parameters of a layer are whole while it runs. Gradients are
summed; they are divided by the weight of all predictions before. On a CPU the processes talk by gloo, on GPUs by NCCL.
"""

import atexit
import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
LEAST = (2, 9)  # of torch: the first that can sum gradients on a CPU and write shards as safetensors


@dataclass(frozen=True)
class Processes:
    """Those of a run, this one being number `rank` of `count`. What is asked of all of them, all must ask."""

    rank: int = 0
    count: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return self.sum([float(flag)])[0] > 0

    def first(self, action: Callable[[], T]) -> T:
        """What the first process gets from `action`, or what it raises there, in all of them. The others wait."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def start() -> Processes:
    """The processes of this run: of a group that is there, or those that torchrun started, which meet here on the first call;
    else this one alone. RuntimeError: a torch that is too old for several."""
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if any(name not in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
            return Processes()
        if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST:
            raise RuntimeError(f"several processes need torch 2.9 or later, this is {torch.__version__}; start one")
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(stop)
    return Processes(dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Leaves the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where numbers must lie to be summed."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


# --------------------------------------------------------------------------------------------------------------- shards


class Share(nn.Module):
    """The loss of a batch as this process computes it: share(batch) -> a scalar to be differentiated.

    `model` is what it computes with: the model itself, or a twin of it whose parameters are shards. The model that was given
    then has no values, but within `whole` and after `fill`, so that nothing is held twice.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], processes: Processes, compiled: bool = False
    ):
        super().__init__()
        self.loss = torch.compile(loss) if compiled else loss
        self.given = (model,)  # in a tuple: no part of this module
        self.model = model if processes.count == 1 else _shared_twin(model)
        if processes.count > 1:
            _shard(self)
            self._release()

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model that was given, with its values, in every process."""
        self.fill()
        try:
            yield self.given[0]
        finally:
            self._release()

    @torch.no_grad()
    def fill(self) -> None:
        """Gives it its values."""
        for given, own in self._pairs():
            _set(given, own.full_tensor())

    def _release(self) -> None:
        for given, _ in self._pairs():
            _set(given, given.new_empty(0))

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Any]]:
        """Each parameter of the model that was given, and its shards."""
        if self.model is not self.given[0]:
            yield from zip(self.given[0].parameters(), self.model.parameters(), strict=True)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value
    torch.autograd.graph.increment_version(parameter)  # for what was made of the values before


def _shared_twin(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same values, those of the first process."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
    shared: dict[int, Any] = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared)


def _shard(share: Share) -> None:
    """Layers (what lies in lists) one by one, and all the rest together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(share.model.parameters()).device
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = any(p.dtype.itemsize < 4 for p in share.model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    layers = [layer for each in share.model.modules() if isinstance(each, nn.ModuleList) for layer in each]
    for module in (*reversed(layers), share):  # the innermost first
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def norm_over_processes(norm: Tensor, of: Tensor) -> Tensor:
    """The 2-norm of all shards from that of this process's, `of` being one of those that were normed."""
    if not hasattr(of, "device_mesh"):
        return norm
    square = norm.double().square()
    dist.all_reduce(square, group=of.device_mesh.get_group())
    return square.sqrt().float()
