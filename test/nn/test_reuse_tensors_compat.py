# Owner(s): ["module: nn"]
"""``load_state_dict(reuse_tensors=True)`` and what modules do in their own way."""

import copy
import unittest

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
    TestCase,
)


def named_tensors(module):
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def plain(state_dict):
    """What can be compared; packed weights of quantized modules cannot."""
    return {k: v for k, v in state_dict.items() if isinstance(v, torch.Tensor)}


class ReuseTensorsTestCase(TestCase):
    def assert_law(self, observed, expected, state_dict):
        """Load both ways; compare what is in the modules, and who is."""
        before = {name: id(tensor) for name, tensor in named_tensors(observed)}
        expected_result = expected.load_state_dict(state_dict)
        result = observed.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(tuple(result), tuple(expected_result))
        after = dict(named_tensors(observed))
        self.assertEqual({name: id(t) for name, t in after.items()}, before)
        seen, to_see = observed.state_dict(), expected.state_dict()
        self.assertEqual(list(seen), list(to_see))
        self.assertEqual(plain(seen), plain(to_see), exact_device=True)
        for name, tensor in named_tensors(expected):
            self.assertIs(type(after[name]), type(tensor))
            self.assertEqual(after[name].requires_grad, tensor.requires_grad)
            self.assertEqual(after[name].stride(), tensor.stride())
        keys = set(result.reused) | set(result.converted)
        self.assertLessEqual(keys, set(after))
        for key in set(result.reused) & set(state_dict):
            self.assertEqual(after[key].data_ptr(), state_dict[key].data_ptr())
        return result


def examples_of(info):
    """Each way in which the module database builds this module."""
    for example in info.module_inputs_func(
        info, device="cpu", dtype=torch.float, requires_grad=False, training=True
    ):
        yield example.constructor_input


def build(info, how, seed):
    torch.manual_seed(seed)
    return info.module_cls(*how.args, **how.kwargs)


class TestEveryModule(ReuseTensorsTestCase):
    @parametrize(
        "info", [subtest(info, name=info.formatted_name) for info in module_db]
    )
    def test_obeys_the_law(self, info):
        for how in examples_of(info):
            module = build(info, how, 0)
            if any(nn.parameter.is_lazy(t) for _, t in named_tensors(module)):
                return  # has no values to compare; see TestOddModules
            state_dict = build(info, how, 1).state_dict()
            expected = build(info, how, 0)
            self.assert_law(module, expected, state_dict)
            on_meta = copy.deepcopy(module).to("meta")
            result = self.assert_law(
                on_meta, expected, build(info, how, 2).state_dict()
            )
            self.assertEqual(result.still_meta, ())


class Shouting(torch.Tensor):
    """Does its own thing in ``copy_``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.copy_:
            args[0].copies = getattr(args[0], "copies", 0) + 1
        return out


class Loading(torch.Tensor):
    """Knows how it is loaded from, as pytorch's quantized tensors do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.module_load:
            return (args[0].as_subclass(torch.Tensor) * 0 + args[1]).as_subclass(cls)
        return super().__torch_function__(func, types, args, kwargs or {})


class Slotted(nn.Parameter):
    __slots__ = ("scale",)


class NoNewKeyword(nn.Linear):
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict)


class Versioned(nn.Linear):
    """Its weight was saved transposed once."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        if metadata.get("version", 1) < 2:
            key = prefix + "weight"
            state_dict[key] = state_dict[key].t()
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


class WithExtra(nn.Linear):
    extra = "none"

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class TestOddModules(ReuseTensorsTestCase):
    @parametrize("reuse_tensors", [False, True])
    def test_recipe_for_other_shapes(self, reuse_tensors):
        # As the RFC prints it: each key of another shape gets the module's own value.
        def with_head(size):
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, size))

        sd, model = with_head(5).state_dict(), with_head(7)
        before = copy.deepcopy(model.state_dict())
        own, kept = model.state_dict(), copy.copy(sd)
        kept.update(
            {k: own[k] for k, v in sd.items() if k in own and v.shape != own[k].shape}
        )
        self.assertEqual(kept._metadata, sd._metadata)
        model.load_state_dict(kept, reuse_tensors=reuse_tensors)
        for key, value in model.state_dict().items():
            self.assertEqual(value, (before if key[0] == "2" else sd)[key])
        # A misspelt key is still an error.
        kept["0.wieght"] = kept.pop("0.weight")
        with self.assertRaisesRegex(RuntimeError, "Missing.*0.weight"):
            model.load_state_dict(kept, reuse_tensors=reuse_tensors)
        if reuse_tensors:
            with torch.device("meta"):
                model = with_head(7)
            own, kept = model.state_dict(), copy.copy(sd)
            kept.update({k: own[k] for k, v in sd.items() if v.shape != own[k].shape})
            result = model.load_state_dict(kept, strict=False, reuse_tensors=True)
            self.assertEqual(result.still_meta, ("2.weight", "2.bias"))

    @parametrize("device", ["cpu", "meta"])
    def test_uninitialized_parameters(self, device):
        module, other = nn.LazyLinear(2, device=device), nn.Linear(3, 2)
        weight = module.weight
        module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertIs(module.weight, weight)
        self.assertIs(type(weight), nn.Parameter)
        self.assertEqual(weight, other.weight)
        self.assertEqual(module(torch.ones(1, 3)), other(torch.ones(1, 3)))
        self.assertIs(type(module), nn.Linear)

    @parametrize("device", ["cpu", "meta"])
    def test_parametrizations(self, device):
        def make(seed):
            torch.manual_seed(seed)
            linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
            return nn.utils.parametrizations.spectral_norm(linear, "bias")

        observed = make(0).to(device)
        state_dict = make(1).state_dict()
        result = self.assert_law(observed, make(0), state_dict)
        self.assertEqual(set(result.reused), set(state_dict))

    @parametrize("device", ["cpu", "meta"])
    def test_attention(self, device):
        other = nn.MultiheadAttention(4, 2, kdim=3)
        module = nn.MultiheadAttention(4, 2, kdim=3, device=device)
        self.assert_law(module, nn.MultiheadAttention(4, 2, kdim=3), other.state_dict())
        q, k, v = torch.ones(1, 4), torch.ones(1, 3), torch.ones(1, 4)
        self.assertEqual(module(q, k, v), other(q, k, v))

    @parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
    @parametrize("device", ["cpu", "meta"])
    def test_rnn_with_flat_weights(self, cls, device):
        other, module = cls(2, 3, num_layers=2), cls(2, 3, num_layers=2, device=device)
        weight = module.weight_ih_l1
        self.assert_law(module, cls(2, 3, num_layers=2), other.state_dict())
        self.assertIs(module._flat_weights[4], weight)
        self.assertIs(module._flat_weight_refs[4](), weight)
        x = torch.ones(4, 1, 2)
        self.assertEqual(module(x)[0], other(x)[0])
        module(x)[0].sum().backward()
        self.assertIsNotNone(weight.grad)

    @unittest.skipIf(
        "fbgemm" not in torch.backends.quantized.supported_engines, "needs fbgemm"
    )
    def test_quantized_module(self):
        def make(seed):
            torch.manual_seed(seed)
            module = torch.ao.nn.quantized.Linear(3, 2)
            weight = torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.qint8)
            module.set_weight_bias(weight, torch.randn(2))
            return nn.Sequential(nn.Linear(3, 3), module)

        observed, other = make(0), make(1)
        self.assert_law(observed, make(0), other.state_dict())
        self.assertEqual(observed[1].weight(), other[1].weight())
        x = torch.quantize_per_tensor(torch.ones(1, 3), 0.1, 0, torch.quint8)
        self.assertEqual(observed[1](x), other[1](x))

    @parametrize("device", ["cpu", "meta"])
    def test_script_module(self, device):
        other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
        scripted = torch.jit.script(module)
        scripted.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertEqual(scripted.state_dict(), other.state_dict())
        x = torch.randn(4, 3)
        self.assertEqual(scripted.eval()(x), other.eval()(x))

    @parametrize("device", ["cpu", "meta"])
    def test_compiled_module(self, device):
        other = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        module = nn.Sequential(nn.Linear(3, 2, device=device), nn.ReLU())
        compiled, x = torch.compile(module, backend="eager"), torch.ones(1, 3)
        if device == "cpu":
            compiled(x)
        state_dict = torch.compile(other, backend="eager").state_dict()
        result = compiled.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(set(result.reused), set(state_dict))
        self.assertEqual(compiled(x), other(x))

    def test_an_override_that_knows_no_new_keyword(self):
        other = NoNewKeyword(3, 2)
        state_dict = other.state_dict()
        with self.assertRaisesRegex(TypeError, "unexpected keyword argument 'reuse"):
            NoNewKeyword(3, 2).load_state_dict(state_dict, reuse_tensors=True)
        module = NoNewKeyword(3, 2)
        nn.Module.load_state_dict(module, state_dict, reuse_tensors=True)
        self.assertEqual(module.weight.data_ptr(), other.weight.data_ptr())
        parent, state_dict = nn.Sequential(NoNewKeyword(3, 2)), NoNewKeyword(3, 2)
        state_dict = nn.Sequential(state_dict).state_dict()
        result = parent.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.reused, ("0.weight", "0.bias"))

    @parametrize("device", ["cpu", "meta"])
    def test_parameter_with_slots(self, device):
        module, other = nn.Linear(3, 2, device=device), nn.Linear(3, 2)
        module.weight = weight = Slotted(module.weight)
        weight.scale = 7
        result = module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertEqual(result.reused, ("weight", "bias"))
        self.assertIs(module.weight, weight)
        self.assertEqual((type(weight), weight.scale), (Slotted, 7))
        self.assertEqual(weight, other.weight, exact_dtype=True)

    def test_subclass_with_operations_of_its_own_is_copied_to(self):
        module, other = nn.Linear(3, 2), nn.Linear(3, 2)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Shouting))
        weight = module.weight
        result = module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertEqual((result.reused, result.converted), (("bias",), ("weight",)))
        self.assertIs(module.weight, weight)
        self.assertEqual(weight.copies, 1)
        self.assertEqual(weight.as_subclass(torch.Tensor), other.weight)

    def test_subclass_with_module_load(self):
        def make(seed):
            torch.manual_seed(seed)
            module = nn.Linear(3, 2)
            loading = module.weight.detach().as_subclass(Loading)
            module.weight = nn.Parameter(loading)
            return module

        state_dict = nn.Linear(3, 2).state_dict()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            observed, expected = make(0), make(0)
            expected.load_state_dict(state_dict)
            observed.load_state_dict(state_dict, reuse_tensors=True)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        self.assertIs(type(observed.weight), type(expected.weight))
        for module in (observed, expected):
            weight = module.weight.as_subclass(torch.Tensor)
            self.assertEqual(weight, state_dict["weight"])

    @parametrize("saved", [1, 2])
    @parametrize("device", ["cpu", "meta"])
    def test_version_of_an_override(self, saved, device):
        old = nn.Linear(2, 2) if saved == 1 else Versioned(2, 2)
        state_dict = nn.Sequential(old).state_dict()
        observed = nn.Sequential(Versioned(2, 2)).to(device)
        self.assert_law(observed, nn.Sequential(Versioned(2, 2)), state_dict)
        weight = old.weight.t() if saved == 1 else old.weight
        self.assertEqual(observed[0].weight, weight)

    @parametrize("device", ["cpu", "meta"])
    def test_batch_norm_saved_before_it_counted(self, device):
        state_dict = nn.BatchNorm1d(3).state_dict()
        del state_dict["num_batches_tracked"]
        state_dict._metadata[""]["version"] = 1
        module = nn.BatchNorm1d(3, device=device)
        tracked = module.num_batches_tracked
        self.assert_law(module, nn.BatchNorm1d(3), state_dict)
        self.assertEqual(module.num_batches_tracked, 0)
        self.assertIs(module.num_batches_tracked, tracked)

    def test_extra_state(self):
        other = WithExtra(3, 2)
        other.extra = "new"
        module = WithExtra(3, 2)
        result = module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertEqual(module.extra, "new")
        self.assertEqual(result.reused, ("weight", "bias"))


@unittest.skipIf(not dist.is_available(), "needs torch.distributed")
class TestDTensor(ReuseTensorsTestCase):
    def setUp(self):
        super().setUp()
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.addCleanup(dist.destroy_process_group)

    def distributed(self, seed):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_module

        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (1,))
        return distribute_module(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), mesh)

    def test_from_dtensors(self):
        observed, other = self.distributed(0), self.distributed(1)
        weight = observed[0].weight
        observed.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertIs(observed[0].weight, weight)
        for name, tensor in other.named_parameters():
            seen = observed.get_parameter(name)
            self.assertIs(type(seen.data), type(tensor.data))
            self.assertEqual(seen.full_tensor(), tensor.full_tensor())

    def test_into_a_plain_module_fails_as_the_copying_load_does(self):
        state_dict = self.distributed(0).state_dict()

        def error_of(**kwargs):
            try:
                plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
                plain.load_state_dict(state_dict, **kwargs)
            except RuntimeError as e:
                return str(e)

        self.assertIn("mixed torch.Tensor and DTensor", error_of())
        self.assertEqual(error_of(reuse_tensors=True), error_of())


instantiate_parametrized_tests(TestEveryModule)
instantiate_parametrized_tests(TestOddModules)


if __name__ == "__main__":
    run_tests()
