"""What the tests of sharded loading have in common: gloo processes, models, files, and who reads how much."""

import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.common_distributed import MultiProcContinuousTest


class ShardedTestCase(MultiProcContinuousTest):
    """Tests run in ``world_size`` processes at a time; ``self.path`` is the same in all of them."""

    world_size = 4

    def __init_subclass__(cls):
        super().__init_subclass__()
        # NB: pytest may import a file under a name that only it knows; processes look on the path.
        if cls.__module__ != "__main__":
            module = sys.modules[cls.__module__]
            cls.__module__ = cls.__module__.rpartition(".")[2]
            sys.modules.setdefault(cls.__module__, module)

    @classmethod
    def backend_str(cls):
        return "gloo"

    @classmethod
    def device_type(cls):
        return "cpu"

    @classmethod
    def _run_test_given_id(cls, test_id, **kwargs):
        folder = [tempfile.mkdtemp() if cls.rank == 0 else None]
        dist.broadcast_object_list(folder)
        cls.path = os.path.join(folder[0], "x.pt")
        try:
            super()._run_test_given_id(test_id, **kwargs)
        finally:
            dist.barrier()
            if cls.rank == 0:
                shutil.rmtree(folder[0])

    def save(self, value):
        """Saves it once for all ranks."""
        if self.rank == 0:
            torch.save(value, self.path)
        dist.barrier()
        return self.path

    def load(self, how):
        """Opens the file in one of ``WAYS``."""
        kwargs = {"deferred": {"lazy": True, "mmap": False}, "mapped": {"lazy": True}}
        return torch.load(self.path, **kwargs.get(how, {}))

    def outcomes(self, function, *args, **kwargs):
        """What ``function`` raises on each rank, as text; empty if nothing."""
        try:
            function(*args, **kwargs)
            text = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        texts = [None] * self.world_size
        dist.all_gather_object(texts, text.replace(os.path.dirname(self.path), ""))
        return texts


WAYS = ("plain", "mapped", "deferred")


class Model(nn.Module):
    """Uneven in every dimension, with a tie, a buffer of each kind, an override of the load, and a scalar."""

    def __init__(self, width=7):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3.0))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(self.norm(x))


def full_state(seed=0, **kwargs):
    """State dict of a model whose values are all different."""
    torch.manual_seed(seed)
    model = Model(**kwargs)
    with torch.no_grad():
        for i, tensor in enumerate(model.state_dict().values()):
            values = torch.arange(tensor.numel()) + 100 * i + 10000 * seed
            tensor.copy_(values.view(tensor.shape))
    return model.state_dict()


def local_of(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full_of(state_dict):
    """The full tensors of a sharded module's state dict."""
    return {
        key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for key, value in state_dict.items()
    }


@contextmanager
def counted_reads():
    """Context that tells how many bytes of files were read for deferred tensors."""
    from torch._load_lazy import _source

    counts = []

    def read_into(self, start, out):
        counts.append(len(out))
        real(self, start, out)

    real = _source.FileSource.read_into
    with mock.patch.object(_source.FileSource, "read_into", read_into):
        yield counts
