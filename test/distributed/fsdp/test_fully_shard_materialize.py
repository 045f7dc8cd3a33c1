# Owner(s): ["oncall: distributed"]
"""materialize_module and to_empty(skip_materialized=True) of what fully_shard and distribute_tensor sharded on meta."""

import unittest
import weakref

import torch
from materialize_case import (
    eager,
    Level,
    levels,
    MaterializeCase,
    on_meta,
    reset_in_order,
    Resets,
    SEED,
    state,
    wrap_each_level,
)
from test_fsdp_materialize import FSDPLaws
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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
    RowwiseParallel,
)
from torch.nn import utils
from torch.testing._internal.common_utils import IS_LINUX, run_tests


def sharded(model, **kwargs):
    return wrap_each_level(model, lambda m: fully_shard(m, **kwargs))


def deferred(make=levels):
    torch.manual_seed(SEED)
    return utils.deferred_init(make)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Mlp(nn.Module):
    def __init__(self, n=6, hidden=10):
        super().__init__()
        self.up = nn.Linear(n, hidden)
        self.down = nn.Linear(hidden, n)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embedding.weight


class Big(nn.Module):
    def __init__(self):
        super().__init__()
        for i in range(4):  # 40 MiB each, which malloc gives back at once
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(2560, 4096)))


class FullyShardLaws:
    def assert_materialized(self, model, expected=None):
        """Every rank has its part of the eager model, in the parameters that it had, and the generator is there."""
        expected, generator_after = expected or eager()
        before = dict(model.named_parameters())
        cut = {n: local(p).size() for n, p in before.items()}
        self.assertTrue(utils.is_deferred(model))
        self.assertIs(utils.materialize_module(model), model)
        self.assertFalse(utils.is_deferred(model))
        self.assertEqual(torch.get_rng_state(), generator_after)
        for name, parameter in model.named_parameters():
            self.assertIs(parameter, before[name])
            self.assertEqual(local(parameter).size(), cut[name])
            self.assertEqual(parameter.device.type, "cpu")
        self.assert_bits(state(model), state(expected))

    def test_fully_shard_deferred_init_gives_the_eager_shards(self):
        model = sharded(deferred())
        self.assert_materialized(model)
        # The rank's slice itself, too. Five rows leave ranks with less, or nothing.
        rows = eager()[0].lin.weight.chunk(self.world_size)
        expected = rows[self.rank] if self.rank < len(rows) else rows[0][:0]
        self.assertEqual(model.lin.weight.to_local(), expected, rtol=0, atol=0)
        gains = eager()[0].gain.chunk(self.world_size)
        expected = gains[self.rank] if self.rank < len(gains) else gains[0][:0]
        self.assertEqual(model.gain.to_local(), expected, rtol=0, atol=0)

    def test_fully_shard_meta_initializes_each_module_once(self):
        model = on_meta()
        resets = Resets(model)
        model = sharded(model)
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(SEED)
        utils.materialize_module(model)
        after = torch.get_rng_state()
        self.assert_once(resets)
        torch.manual_seed(SEED)
        expected = reset_in_order(resets)
        # NB: not through DTensor's random ops, which draw and move the generator in another way.
        self.assertEqual(torch.get_rng_state(), after)
        self.assert_bits(state(model), state(expected))
        for held, (name, parameter) in zip(
            optimizer.param_groups[0]["params"], model.named_parameters(), strict=True
        ):
            self.assertIs(parameter, parameters[name])
            self.assertIs(parameter, held)
        utils.materialize_module(model)
        self.assert_once(resets)

    def test_fully_shard_training_equals_ddp(self):
        expected, _ = eager()
        recorded = utils.materialize_module(sharded(deferred()))
        model = on_meta()
        resets = Resets(model)
        reset = sharded(model)
        torch.manual_seed(SEED)
        utils.materialize_module(reset)
        torch.manual_seed(SEED)
        for model, unsharded in (recorded, expected), (reset, reset_in_order(resets)):
            losses, parameters = self.train_ddp(unsharded)
            self.assertEqual(self.train(model), losses)
            trained = state(model)
            for name, parameter in parameters.items():
                self.assertEqual(trained[name], parameter, msg=name)

    def test_tensor_parallel(self):
        mesh = init_device_mesh("cpu", (self.world_size,))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for source in (0, None):
            model = deferred(Mlp)
            parallelize_module(model, mesh, plan, src_data_rank=source)
            self.assertEqual(model.up.weight.placements, (Shard(0),))
            self.assertEqual(model.down.weight.placements, (Shard(1),))
            self.assert_materialized(model, eager(Mlp))


class TestFullyShardMaterialize2(FullyShardLaws, MaterializeCase):
    world_size = 2

    def test_parts_in_any_order(self):
        expected, generator_after = eager()
        model = sharded(deferred())
        for module in (model.out, model.inner.inner, model.inner.lin):
            utils.materialize_module(module)
        utils.materialize_tensor(model.inner.gain)
        utils.materialize_module(model)
        self.assert_bits(state(model), state(expected))
        self.assertEqual(torch.get_rng_state(), generator_after)

    def test_what_has_values_keeps_them(self):
        model = sharded(deferred())
        weight = torch.full((11, 5), 3.0)
        cut = distribute_tensor(weight, model.lin.weight.device_mesh, [Shard(0)])
        model.load_state_dict({"lin.weight": cut}, strict=False, assign=True)
        loaded = model.lin.weight
        before = loaded, loaded.to_local().data_ptr(), loaded._version
        utils.materialize_module(model)
        loaded = model.lin.weight
        self.assertIs(loaded, before[0])
        self.assertEqual((loaded.to_local().data_ptr(), loaded._version), before[1:])
        self.assert_bits(state(model), {**state(eager()[0]), "lin.weight": weight})

    def test_meta_that_is_loaded_in_part(self):
        model = on_meta()
        resets = Resets(model)
        model = sharded(model)
        mesh = model.lin.weight.device_mesh
        loaded = {
            "lin.weight": torch.full((11, 5), 3.0),
            "lin.bias": torch.full((11,), 4.0),
            "out.weight": torch.full((5, 11), 5.0),
        }
        cut = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in loaded.items()}
        model.load_state_dict(cut, strict=False, assign=True)
        utils.materialize_module(model)
        resets.names.remove("lin")
        self.assert_once(resets)
        after = state(model)
        self.assert_bits({k: after[k] for k in loaded}, loaded)
        self.assertLess(after["out.bias"].abs().max(), 1.0)

    def test_init_fn(self):
        model = sharded(on_meta())
        seen = []

        def init(module):
            seen.append(module)
            for p in module.parameters(recurse=False):
                self.assertNotIsInstance(p, DTensor)
                nn.init.constant_(p, len(seen))
            for b in module.buffers(recurse=False):
                b.fill_(len(seen))

        utils.materialize_module(model, init_fn=init)
        for turn, module in enumerate(seen, 1):
            for tensor in (*module.parameters(False), *module.buffers(False)):
                self.assertTrue((local(tensor) == turn).all())
        self.assertEqual(len(seen), 12)

    def test_ties(self):
        model = fully_shard(deferred(Tied))
        self.assertIs(model.head.weight, model.embedding.weight)
        self.assert_materialized(model, eager(Tied))
        self.assertIs(model.head.weight, model.embedding.weight)
        model = on_meta(Tied)
        resets = Resets(model)
        fully_shard(model)
        torch.manual_seed(SEED)
        utils.materialize_module(model)
        self.assertEqual(resets, ["embedding", "head"])
        self.assertIs(model.head.weight, model.embedding.weight)
        torch.manual_seed(SEED)
        expected = nn.Embedding(7, 3).weight
        self.assertEqual(model.head.weight.full_tensor(), expected, rtol=0, atol=0)

    def test_from_local(self):
        mesh = init_device_mesh("cpu", (self.world_size,))
        torch.manual_seed(SEED)
        part = DTensor.from_local(
            utils.deferred_init(torch.rand, 2, 3), mesh, [Shard(0)]
        )
        utils.materialize_tensor(part)
        torch.manual_seed(SEED)
        self.assertEqual(part.to_local(), torch.rand(2, 3), rtol=0, atol=0)

        module = nn.Module()
        part = DTensor.from_local(torch.empty(2, 3, device="meta"), mesh, [Shard(0)])
        module.weight = nn.Parameter(part)
        module.reset_parameters = lambda: None
        with self.assertRaisesRegex(RuntimeError, "cut by fully_shard or distribute"):
            utils.materialize_module(module)

    def test_dtype(self):
        model = utils.materialize_module(sharded(deferred()), dtype=torch.bfloat16)
        expected = state(eager()[0].bfloat16())
        self.assert_bits(state(model), expected)
        self.assertEqual(model.lin.weight._spec.tensor_meta.dtype, torch.bfloat16)
        model(torch.rand(4, 5).bfloat16()).sum().backward()
        self.assertEqual(model.lin.weight.grad.dtype, torch.bfloat16)
        with self.assertRaisesRegex(ValueError, "Expected dtype=None"):
            utils.materialize_module(sharded(on_meta()), dtype=torch.bfloat16)

    def test_errors_leave_it_on_meta(self):
        class NoReset(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.empty(3))

        model = fully_shard(on_meta(lambda: nn.Sequential(Level(3), NoReset())))
        resets = Resets(model)
        with self.assertRaises(RuntimeError) as raised:
            utils.materialize_module(model)
        self.assertExpectedInline(
            str(raised.exception),
            """\
Expected modules that have parameters or buffers of their own on meta to have a reset_parameters() method, got none of \
1 (NoReset). (Did you mean to pass init_fn, or to use deferred_init?)""",
        )
        self.assertEqual(resets, [])

        def init(module):
            if len(seen) == 3:
                raise KeyError("init")
            seen.append(module)

        seen = []
        tensors = [*model.parameters(), *model.buffers()]
        with self.assertRaisesRegex(KeyError, "init"):
            utils.materialize_module(model, init_fn=init)
        self.assertEqual(
            [id(t) for t in (*model.parameters(), *model.buffers())],
            [id(t) for t in tensors],
        )
        for tensor in tensors:
            self.assertTrue(tensor.is_meta and local(tensor).is_meta)
        seen = [None] * 4
        utils.materialize_module(model, init_fn=init)
        self.assertTrue(all(not local(p).is_meta for p in model.parameters()))

    def test_what_is_on_meta_on_purpose_stays(self):
        model = deferred(Mlp)
        model.register_buffer("hint", torch.empty(3, device="meta"))
        utils.materialize_module(fully_shard(model))
        utils.materialize_module(model)
        self.assertTrue(model.hint.is_meta)
        model = on_meta(Mlp)
        with self.assertRaisesRegex(RuntimeError, "on meta without any: up.weight"):
            utils.materialize_module(model)

    def test_to_empty_keeps_sharded_parameters(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(2, 3)
                self.lin = nn.Linear(3, 3)

        for swap in (False, True):
            torch.__future__.set_swap_module_params_on_conversion(swap)
            self.addCleanup(
                torch.__future__.set_swap_module_params_on_conversion, False
            )
            model = fully_shard(on_meta(Recurrent))
            weight, calls = model.lin.weight, []
            weight.mark = "mine"
            weight.register_hook(lambda grad, calls=calls: calls.append("hook"))
            reference = weakref.ref(weight)
            before = dict(model.named_parameters())
            model.to_empty(device="cpu", skip_materialized=True)
            for name, parameter in model.named_parameters():
                self.assertIs(parameter, before[name])
                self.assertEqual(parameter.device.type, "cpu")
                self.assertEqual(parameter.to_local().device.type, "cpu")
            self.assertIs(reference(), weight)
            self.assertEqual(weight.mark, "mine")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.to_local().fill_(1.0)
            places = [(p.to_local().data_ptr(), p._version) for p in model.parameters()]
            model.to_empty(device="cpu", skip_materialized=True)
            self.assertEqual(
                [(p.to_local().data_ptr(), p._version) for p in model.parameters()],
                places,
            )
            weight.sum().backward()
            self.assertEqual(calls, ["hook"])

    def test_distribute_tensor(self):
        mesh = init_device_mesh("cpu", (self.world_size,))
        for placement in (Shard(0), Shard(1), Shard(-1), Replicate()):
            for source in (0, None):
                torch.manual_seed(SEED)
                whole = torch.rand(7, 5)
                torch.manual_seed(SEED)
                deferred = utils.deferred_init(torch.rand, 7, 5)
                part = distribute_tensor(
                    deferred, mesh, [placement], src_data_rank=source
                )
                expected = distribute_tensor(
                    whole, mesh, [placement], src_data_rank=source
                )
                self.assertTrue(utils.is_deferred(part))
                self.assertIs(utils.materialize_tensor(part), part)
                self.assertEqual(part._spec, expected._spec)
                self.assertEqual(part.to_local(), expected.to_local(), rtol=0, atol=0)
                self.assertTrue(deferred.is_meta)
                self.assertEqual(
                    utils.materialize_tensor(deferred), whole, rtol=0, atol=0
                )

    def test_distribute_tensor_of_what_a_meta_block_knows(self):
        def made():
            whole = torch.tensor([1.0, 2.0, 3.0], device="cpu")
            sharded = distribute_tensor(whole, mesh, [Shard(0)])
            return [sharded.to_local().tolist(), sharded.full_tensor().tolist()]

        mesh = init_device_mesh("cpu", (self.world_size,))
        expected = made()
        with utils.meta_init():
            self.assertEqual(made(), expected)
        with utils.deferred_init():
            self.assertEqual(made(), expected)

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_memory(self):
        def peak():
            with open("/proc/self/status") as file:
                return next(int(x.split()[1]) for x in file if x.startswith("VmHWM"))

        model = fully_shard(deferred(Big))
        torch.randn(16)  # what is allocated once
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = peak()
        utils.materialize_module(model)
        grown = (peak() - before) / 1024
        shards = sum(p.to_local().nbytes for p in model.parameters()) / 2**20
        self.assertLess(grown, shards + 40 + 16)  # MiB: one whole tensor, and slack


class TestMaterialize4(FSDPLaws, FullyShardLaws, MaterializeCase):
    world_size = 4

    def test_hybrid_shard(self):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = sharded(deferred(), mesh=mesh)
        self.assertEqual(model.lin.weight.placements, (Replicate(), Shard(0)))
        self.assert_materialized(model)
        losses, _ = self.train_ddp(eager()[0])
        self.assertEqual(self.train(model), losses)
        model = on_meta()
        resets = Resets(model)
        utils.materialize_module(sharded(model, mesh=mesh))
        self.assert_once(resets)

    def test_fsdp_of_tensor_parallel(self):
        # Ten rows are five a rank, of which the data-parallel ranks have three and two.
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for make in (lambda: Mlp(6, 8), Mlp):
            whole, generator_after = eager(make)
            for model in (deferred(make), on_meta(make)):
                resets = Resets(model)
                parallelize_module(model, mesh["tp"], plan)
                fully_shard(model, mesh=mesh["dp"])
                torch.manual_seed(SEED)
                utils.materialize_module(model)
                self.assertEqual(torch.get_rng_state(), generator_after)
                self.assertIn(len(resets), (0, 2))
                dp, tp = mesh.get_coordinate()
                for name, dim in (("up", 0), ("down", 1)):
                    part = whole.get_submodule(name).weight.chunk(2, dim)[tp]
                    part = part.chunk(2, 0)[dp]
                    got = model.get_submodule(name).weight.to_local()
                    self.assertEqual(got, part, rtol=0, atol=0)
            x = torch.rand(2, 6)
            self.assertEqual(model(x), whole(x))

    def test_distribute_tensor_on_two_dimensions(self):
        mesh = init_device_mesh("cpu", (2, 2))
        for placements in (
            (Shard(0), Shard(0)),
            (Shard(0), Shard(1)),
            (Shard(1), Replicate()),
            (Replicate(), Shard(0)),
        ):
            torch.manual_seed(SEED)
            whole = torch.rand(7, 5)
            torch.manual_seed(SEED)
            part = utils.deferred_init(torch.rand, 7, 5)
            part = distribute_tensor(part, mesh, placements)
            utils.materialize_tensor(part)
            expected = distribute_tensor(whole, mesh, placements).to_local()
            self.assertEqual(part.to_local(), expected, rtol=0, atol=0)
        part = utils.deferred_init(torch.rand, 7, 5)
        part = distribute_tensor(part, mesh, [Partial(), Replicate()])
        self.assertFalse(utils.is_deferred(part))


if __name__ == "__main__":
    run_tests()
