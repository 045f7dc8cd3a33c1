"""A model of three levels, how often its modules are initialized, and processes that shard it; for tests next to it."""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.common_distributed import MultiProcContinuousTest


CPU = torch.device("cpu")
SEED = 7


class Level(nn.Module):
    """Parameters, buffers that are random and in no checkpoint, integers, and perhaps a level below."""

    def __init__(self, n, inner=None):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n))
        self.lin = nn.Linear(n, 2 * n + 1)
        self.norm = nn.BatchNorm1d(2 * n + 1)
        self.inner = inner
        self.out = nn.Linear(2 * n + 1, n)
        self.register_buffer("shift", torch.empty(n), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.gain)
        nn.init.uniform_(self.shift)

    def forward(self, x):
        x = x * self.gain + self.shift
        x = self.out(torch.tanh(self.norm(self.lin(x))))
        return x if self.inner is None else self.inner(x)


def levels(n=5):
    return Level(n, Level(n, Level(n)))


def on_meta(make=levels):
    with nn.utils.meta_init():
        return make()


def wrap_each_level(model, wrap):
    """Wrap the innermost level first; ``wrap`` may return the level itself."""
    model.inner.inner = wrap(model.inner.inner)
    model.inner = wrap(model.inner)
    return wrap(model)


class Resets(list):
    """The names of modules, in the order in which their ``reset_parameters`` are called; ``names``: of all that may."""

    def __init__(self, model):
        super().__init__()
        self.names = []
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                self.names.append(name)
                module.reset_parameters = self._counted(name, module.reset_parameters)

    def _counted(self, name, reset):
        def reset_parameters():
            self.append(name)
            reset()

        return reset_parameters


def reset_in_order(names, make=levels):
    """An unsharded model that is constructed on meta, and its modules initialized in that order."""
    model = on_meta(make).to_empty(device="cpu", skip_materialized=True)
    for name in names:
        model.get_submodule(name).reset_parameters()
    return model


def eager(make=levels):
    """The model as its constructor makes it, and where the generator is then."""
    torch.manual_seed(SEED)
    return make(), torch.get_rng_state()


def state(model):
    """Parameters and all buffers by name; those of DTensors whole."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name.replace("_fsdp_wrapped_module.", "")] = whole.detach().clone()
    return found


class MaterializeCase(MultiProcContinuousTest):
    @classmethod
    def backend_str(cls):
        return "gloo"

    @classmethod
    def device_type(cls):
        return "cpu"

    def assert_bits(self, got, expected):
        self.assertEqual(got.keys(), expected.keys())
        for name in expected:
            self.assertEqual(got[name], expected[name], rtol=0, atol=0, msg=name)

    def assert_once(self, resets, known="norm"):
        """Each module was reset once, but for those of which all values are known."""
        names = [n for n in resets.names if n.rpartition(".")[2] != known]
        self.assertEqual(sorted(resets), sorted(names))

    def train(self, model, steps=2):
        """Two steps on inputs that differ from rank to rank; the losses."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(self.rank)
        losses = []
        for _ in range(steps):
            x = torch.rand(4, 5, generator=generator)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    def train_ddp(self, model):
        """The same steps with DistributedDataParallel, on a copy of an unsharded model: losses and parameters."""
        model = copy.deepcopy(model)
        # NB: buffers differ from rank to rank with FSDP.
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        losses = self.train(ddp)
        return losses, {n: p.detach().clone() for n, p in model.named_parameters()}
