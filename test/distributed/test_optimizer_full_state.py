# Owner(s): ["oncall: distributed"]
"""Optimizer.load_state_dict of full tensors where the parameters are DTensors."""

import copy

import torch
from load_sharded_case import local_of, ShardedTestCase, WAYS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    distribute_tensor,
    DTensor,
    Partial,
    Replicate,
    Shard,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
    RowwiseParallel,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.1),
}


def new_model(dtype=torch.float32):
    """Uneven on two ranks in each dimension, with a scalar."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    return model.to(dtype)


def train(model, optimizer, steps):
    x = torch.arange(28.0).view(4, 7).to(next(model.parameters()).dtype) / 28
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def state_of(optimizer):
    # NB: a step is taken over as the tensor that it is, as in stock, and counted up in place.
    return copy.deepcopy(optimizer.state_dict())


class FullStateCase(ShardedTestCase):
    world_size = 2

    def trained(self, make, **kwargs):
        """An unsharded model and its optimizer after two steps."""
        model = new_model(**kwargs)
        optimizer = make(model.parameters())
        train(model, optimizer, 2)
        return model, optimizer

    def sharded(self, trained, mesh=None, **kwargs):
        """A sharded model with the values of another one."""
        model = new_model(**kwargs)
        model.load_state_dict(trained.state_dict())
        fully_shard(model, mesh=mesh or init_device_mesh("cpu", (self.world_size,)))
        return model

    def assert_same(self, sharded, model):
        for param, expected in zip(
            sharded.parameters(), model.parameters(), strict=True
        ):
            self.assertEqual(param.full_tensor(), expected)


@instantiate_parametrized_tests
class TestFullState(FullStateCase):
    @parametrize("name", list(OPTIMIZERS))
    def test_steps_are_those_of_the_unsharded_optimizer(self, name):
        model, optimizer = self.trained(OPTIMIZERS[name])
        sharded = self.sharded(model)
        loaded = OPTIMIZERS[name](sharded.parameters())
        with CommDebugMode() as communication:
            loaded.load_state_dict(state_of(optimizer))
        self.assertEqual(communication.get_total_counts(), 0)
        train(model, optimizer, 2)
        train(sharded, loaded, 2)
        self.assert_same(sharded, model)
        state = loaded.state_dict()["state"]
        for i, expected in optimizer.state_dict()["state"].items():
            for key, value in expected.items():
                got = state[i][key]
                if isinstance(value, torch.Tensor) and value.dim():
                    self.assertIsInstance(got, DTensor)
                    got = got.full_tensor()
                self.assertEqual(got, value)

    def test_memory_is_its_own(self):
        make = OPTIMIZERS["adam"]
        model, optimizer = self.trained(make)
        state_dict = state_of(optimizer)
        before = copy.deepcopy(state_dict)
        sharded = self.sharded(model)
        loaded = make(sharded.parameters())
        loaded.load_state_dict(state_dict)
        for param, state in loaded.state.items():
            average = state["exp_avg"]
            self.assertEqual(average.placements, param.placements)
            self.assertEqual(average.stride(), param.stride())
            local = average.to_local()
            self.assertEqual(local.shape, param.to_local().shape)
            self.assertEqual(local.untyped_storage().nbytes(), local.nbytes)
            self.assertFalse(average.requires_grad)
        train(sharded, loaded, 1)
        for i, state in before["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                self.assertEqual(state_dict["state"][i][key], state[key])

    @parametrize("how", WAYS)
    def test_from_a_file(self, how):
        make = OPTIMIZERS["adam"]
        model, optimizer = self.trained(make)
        self.save(state_of(optimizer))
        sharded = self.sharded(model)
        loaded = make(sharded.parameters())
        loaded.load_state_dict(self.load(how))
        train(model, optimizer, 1)
        train(sharded, loaded, 1)
        self.assert_same(sharded, model)

    def test_dtype_is_that_of_the_parameter(self):
        make = OPTIMIZERS["adam"]
        model, optimizer = self.trained(make)
        sharded = self.sharded(model, dtype=torch.bfloat16)
        loaded = make(sharded.parameters())
        loaded.load_state_dict(state_of(optimizer))
        for param, state in loaded.state.items():
            self.assertEqual(state["exp_avg"].dtype, torch.bfloat16)
            self.assertEqual(param.dtype, torch.bfloat16)
            self.assertEqual(state["step"].dtype, torch.float32)
            self.assertNotIsInstance(state["step"], DTensor)

    def test_other_placements(self):
        mesh = init_device_mesh("cpu", (2,))
        full = torch.arange(15.0).view(5, 3)
        for placement in (Shard(0), Shard(1), Replicate()):
            param = nn.Parameter(distribute_tensor(full, mesh, [placement]))
            value = torch.optim.Optimizer._process_value_according_to_param_policy(
                param, -full, 0, [{"params": [0]}], "exp_avg"
            )
            self.assertEqual(value.placements, (placement,))
            self.assertEqual(value.full_tensor(), -full)

    def test_what_stays_as_in_stock(self):
        mesh = init_device_mesh("cpu", (2,))
        full = torch.arange(15.0).view(5, 3)
        param = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))

        def process(param, value, key="exp_avg"):
            return torch.optim.Optimizer._process_value_according_to_param_policy(
                param, value, 0, [{"params": [0]}], key
            )

        row, step, sharded = torch.ones(5, 1), torch.tensor(3.0), param.detach()
        self.assertIs(process(param, row), row)
        self.assertIs(process(param, step, "step"), step)
        self.assertIs(process(param, sharded), sharded)
        self.assertIs(process(nn.Parameter(full.clone()), full), full)
        partial = DTensor.from_local(full, mesh, [Partial()])
        self.assertIs(process(partial, full), full)
        self.assertIs(process(local_of(partial), full), full)


class TestTensorParallel(FullStateCase):
    world_size = 4

    def models(self, width):
        """An unsharded model, and one under fully_shard on top of tensor parallelism."""
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, width), nn.Linear(width, 3))
        sharded = copy.deepcopy(model)
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(sharded, mesh["tp"], plan)
        fully_shard(sharded, mesh=mesh["dp"])
        return model, sharded

    def test_step(self):
        make = OPTIMIZERS["adam"]
        model, sharded = self.models(8)
        optimizer, loaded = make(model.parameters()), make(sharded.parameters())
        train(model, optimizer, 1)
        train(sharded, loaded, 1)
        other = make(sharded.parameters())
        other.load_state_dict(state_of(optimizer))
        for param, state in loaded.state.items():
            got = other.state[param]["exp_avg"]
            self.assertEqual(got.placements, param.placements)
            self.assertEqual(got.to_local(), state["exp_avg"].to_local())
        train(model, optimizer, 1)
        train(sharded, other, 1)
        self.assert_same(sharded, model)

    def test_uneven(self):
        # What does not divide evenly stays as in stock, rather than being cut otherwise than the parameter is.
        make = OPTIMIZERS["adam"]
        model, sharded = self.models(6)
        optimizer, loaded = make(model.parameters()), make(sharded.parameters())
        train(model, optimizer, 1)
        loaded.load_state_dict(state_of(optimizer))
        kinds = [
            isinstance(loaded.state[param]["exp_avg"], DTensor)
            for param in sharded.parameters()
        ]
        self.assertEqual(kinds, [False, False, True, True])


class TestOneRank(FullStateCase):
    world_size = 1

    def test_step(self):
        make = OPTIMIZERS["adam"]
        model, optimizer = self.trained(make)
        sharded = self.sharded(model)
        loaded = make(sharded.parameters())
        loaded.load_state_dict(state_of(optimizer))
        train(model, optimizer, 1)
        train(sharded, loaded, 1)
        self.assert_same(sharded, model)


if __name__ == "__main__":
    run_tests()
