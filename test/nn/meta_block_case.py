# Owner(s): ["module: nn"]
"""Laws of a meta block; a subclass says which: ``meta_init()``, or ``torch.device("meta")`` where that is patched."""

import copy
import io
import pickle

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Rotary(nn.Module):
    """Non-persistent buffers of all origins, a random parameter, a constant one, and a plain attribute."""

    def __init__(self, file):
        super().__init__()
        steps = torch.arange(0, 8, 2, dtype=torch.int64).float()
        inv_freq = 1.0 / (10000 ** (steps / 8))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("ids", torch.arange(16).expand((1, -1)), persistent=False)
        mask = torch.full((4, 4), float("-inf"), device="cpu").triu(1)
        self.register_buffer("mask", mask, persistent=False)
        table = torch.from_numpy(np.linspace(0, 1, 6, dtype=np.float32))
        self.register_buffer("table", table.view(2, 3).t(), persistent=False)
        file.seek(0)
        mean = torch.load(file)["mean"]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", mean.double() * 2, persistent=False)
        self.register_buffer("legacy", torch.FloatTensor([1, 2]), persistent=False)
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.ones(3) * 2)
        self.cached = [self.mask[0], torch.tensor([3])]

    def tensors(self):
        named = [*self.named_parameters(), *self.named_buffers()]
        return [*named, *(("cached", t) for t in self.cached)]


def statistics():
    file = io.BytesIO()
    torch.save({"mean": torch.arange(5.0)}, file)
    return file


class MetaBlockLaws:
    def block(self):
        raise NotImplementedError

    def built(self, make):
        with self.block():
            return make()

    def assertSame(self, module, expected):
        self.assertEqual(len(module.tensors()), len(expected.tensors()))
        for (name, got), (_, want) in zip(
            module.tensors(), expected.tensors(), strict=True
        ):
            self.assertEqual(got.device.type, "cpu", name)
            self.assertEqual((got.dtype, got.stride()), (want.dtype, want.stride()))
            self.assertEqual(got, want, rtol=0, atol=0, msg=name)

    def assertOutside(self):
        self.assertEqual(torch.empty(1, device="cpu").device.type, "cpu")
        self.assertEqual(torch.Tensor(1).device.type, "cpu")
        module = nn.Module()
        module.register_buffer("real", torch.empty(1))
        self.assertFalse(module.real.is_meta)
        self.assertEqual(torch._C._len_torch_dispatch_stack(), 0)
        self.assertEqual(torch._C._len_torch_function_stack(), 0)

    # -- what is known is kept

    def test_a_loaded_module_is_whole_after_materialize_module(self):
        file = statistics()
        eager = Rotary(file)
        module = self.built(lambda: Rotary(file))
        self.assertTrue(all(t.is_meta for _, t in module.tensors()))
        self.assertTrue(nn.utils.is_deferred(module))
        module.load_state_dict(copy.deepcopy(eager.state_dict()), assign=True)
        self.assertIs(nn.utils.materialize_module(module), module)
        self.assertSame(module, eager)
        self.assertFalse(nn.utils.is_deferred(module))
        self.assertEqual(module.cached[0].data_ptr(), module.mask.data_ptr())

    def test_to_empty_fills_what_is_known(self):
        file = statistics()
        eager = Rotary(file)
        module = self.built(lambda: Rotary(file))
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertEqual(module.lin.weight.device.type, "cpu")
        module.load_state_dict(eager.state_dict())
        nn.utils.materialize_module(module)  # attributes, which to_empty does not see
        self.assertSame(module, eager)

    def test_what_nobody_knows_is_named(self):
        file = statistics()
        module = self.built(lambda: Rotary(file))
        inv_freq = module.inv_freq
        with self.assertRaisesRegex(RuntimeError, "lin.weight, lin.bias. Random"):
            nn.utils.materialize_module(module)
        self.assertTrue(inv_freq.is_meta and module.lin.weight.is_meta)
        nn.utils.materialize_module(module, buffers_only=True)
        self.assertEqual(inv_freq.device.type, "cpu")
        self.assertTrue(module.gain.is_meta)

    def test_computed_of_random_values_is_not_known(self):
        def make():
            module = nn.Module()
            module.weight = nn.Parameter(torch.randn(3) * 2)
            module.copied = nn.Parameter(torch.ones(3))
            with torch.no_grad():
                module.copied.copy_(module.weight)
            return module

        with self.assertRaisesRegex(RuntimeError, "any: weight, copied"):
            nn.utils.materialize_module(self.built(make))

    def test_what_a_call_writes_of_unknown_values_is_not_known(self):
        def make():
            module = nn.Module()
            for name in ("norm", "out", "item", "view", "read"):
                module.register_buffer(name, torch.zeros(4))
            unknown = torch.randn(3, 4)
            nn.functional.batch_norm(unknown, module.norm, torch.ones(4), training=True)
            torch.mul(unknown[0], 2, out=module.out)
            module.item[1] = unknown[0, 0]
            module.view[2:] += unknown[0, 2:]
            for _ in range(2):
                module.read.add(unknown[0]).mul_(module.read)
            return module

        with self.assertRaisesRegex(RuntimeError, "any: norm, out, item, view. Random"):
            nn.utils.materialize_module(self.built(make))

    def test_numbers(self):
        cases = [(0, torch.long), (1, None), (-2, torch.int32), (3, torch.float32)]
        cases += [(2.5, None), (True, None), (-0.0, None), (0.1, torch.float16)]
        cases += [(1j, None), (2**63 - 1, None), (float("nan"), None)]

        def make():
            module = nn.Module()
            for i, (number, dtype) in enumerate(cases):
                module.register_buffer(f"b{i}", torch.tensor(number, dtype=dtype))
            module.b0 += 1
            return module

        module = nn.utils.materialize_module(self.built(make))
        for actual, expected in zip(module.buffers(), make().buffers(), strict=True):
            self.assertEqual(repr(actual), repr(expected))

    def test_an_uninitialized_buffer_gets_memory(self):
        def make():
            module = nn.Module()
            module.register_buffer("cache", torch.empty(2, 3), persistent=False)
            return module

        module = nn.utils.materialize_module(self.built(make))
        self.assertEqual(
            (module.cache.device.type, module.cache.shape), ("cpu", (2, 3))
        )

    def test_init_fn_may_replace_what_is_known(self):
        def init(module):
            for parameter in module.parameters(recurse=False):
                nn.init.constant_(parameter, 5)

        file = statistics()
        module = self.built(lambda: Rotary(file))
        nn.utils.materialize_module(module, device="cpu", init_fn=init)
        self.assertTrue(all((p == 5).all() for p in module.parameters()))
        self.assertEqual(module.inv_freq, Rotary(statistics()).inv_freq)

    def test_a_tensor_from_outside_is_shared_as_in_eager_construction(self):
        array = np.ones(3)

        def make():
            module = nn.Module()
            module.register_buffer("shared", torch.from_numpy(array))
            module.register_buffer("tied", module.shared)
            return module

        module = nn.utils.materialize_module(self.built(make))
        self.assertIs(module.tied, module.shared)
        array[0] = 7
        self.assertEqual(module.shared.tolist(), [7, 1, 1])

    # -- what comes from outside is real

    def test_outside_is_real(self):
        x = torch.arange(3.0)
        array = np.arange(3.0)
        file = statistics()
        with self.block():
            file.seek(0)
            loaded = torch.load(file)["mean"]
            unpickled = pickle.loads(pickle.dumps(x))
            computed = x * 2 + torch.from_numpy(array)
            self.assertEqual(computed.numpy()[1], 3.0)
        for tensor in (loaded, unpickled, computed):
            self.assertEqual(tensor.device.type, "cpu")
        self.assertEqual(loaded, torch.arange(5.0))

    def test_real_and_known(self):
        real = torch.zeros(3)
        with self.block():
            made = torch.ones(3, device="cpu") + real
            self.assertEqual(made.tolist(), [1, 1, 1])
            real.add_(made)
            with self.assertRaisesRegex(
                RuntimeError, "meta_block_case.py.*real tensor"
            ):
                real.copy_(torch.rand(3))
        self.assertTrue(made.is_meta)
        self.assertEqual(real, torch.ones(3))

    # -- where it ends

    def test_however_it_is_left(self):
        with self.assertRaises(RuntimeError), self.block():
            nn.Linear(-1, 2)
        self.assertOutside()
        try:
            with self.block():
                torch.empty(-1)
        except RuntimeError:
            self.assertOutside()  # though its traceback is there
        for _ in range(3):
            with self.block(), self.block():
                nn.Linear(2, 2)
        self.assertOutside()

    def test_a_suspended_generator(self):
        def suspended():
            with self.block():
                yield torch.empty(1)

        generator = suspended()
        self.assertTrue(next(generator).is_meta)
        generator.close()
        self.assertOutside()

    def test_random_numbers_are_not_read(self):
        state = torch.get_rng_state()
        with self.block():
            with self.assertRaisesRegex(
                RuntimeError, "result of rand.*deferred_init.*item"
            ):
                torch.rand(2)[0].item()
            with self.assertRaisesRegex(RuntimeError, "unknown values.*tolist, called"):
                (torch.rand(2) + 1).tolist()
        self.assertEqual(torch.get_rng_state(), state)

    # -- inside of other contexts, and around them

    def test_inside_of_deferred_init(self):
        def make():
            with self.block():
                temporary = nn.Linear(2, 2)
                rates = [r.item() for r in torch.linspace(0, 1, 3, device="cpu")]
                scale = torch.ones(2)
            module = nn.Linear(2, 2)
            module.shape, module.rates = temporary.weight.shape, rates
            module.scale, module.temporary = scale, temporary
            return module

        torch.manual_seed(3)
        eager, after = make(), torch.get_rng_state()
        torch.manual_seed(3)
        module = nn.utils.materialize_module(nn.utils.deferred_init(make))
        self.assertEqual(torch.get_rng_state(), after)
        self.assertEqual(module.weight, eager.weight, rtol=0, atol=0)
        self.assertEqual(module.rates, eager.rates)
        self.assertTrue(module.scale.is_meta and module.temporary.weight.is_meta)

    def test_around_deferred_init(self):
        torch.manual_seed(3)
        eager = nn.Linear(2, 2)
        torch.manual_seed(3)
        with self.block():
            module = nn.utils.deferred_init(nn.Linear, 2, 2)
            self.assertTrue(torch.empty(1, device="cpu").is_meta)
        self.assertEqual(nn.utils.materialize_module(module).weight, eager.weight)

    def test_inside_of_itself(self):
        with self.block():
            constant = torch.arange(3)
            with self.block():
                self.assertEqual(constant.tolist(), [0, 1, 2])
                inner = constant + 1
            self.assertEqual(inner.tolist(), [1, 2, 3])
        self.assertOutside()

    def test_other_modes_see_the_calls(self):
        class Log(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen = []
        with self.block(), Log():
            x = torch.rand(2)
            x.sin()
        self.assertEqual(seen, [torch.rand, torch.Tensor.sin])
