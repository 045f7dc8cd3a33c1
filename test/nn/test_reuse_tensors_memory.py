# Owner(s): ["module: nn"]
"""``load_state_dict(reuse_tensors=True)``: what memory is held, for how long, and by whom."""

import copy
import weakref

import torch
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils._python_dispatch import TorchDispatchMode


def linears(n, **kwargs):
    return nn.Sequential(*(nn.Linear(3, 2, **kwargs) for _ in range(n)))


def storage_of(tensor):
    return weakref.ref(tensor.untyped_storage())


class Override(nn.Linear):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that were made."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "empty" in str(func):
            out = func(*args, **(kwargs or {}))
            self.nbytes += out.nbytes
            return out
        return func(*args, **(kwargs or {}))


class Clones(TorchDispatchMode):
    """How often a tensor was cloned."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """Has operations of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class TestOldMemory(TestCase):
    def test_is_given_back_as_it_is_replaced(self):
        module, state_dict = linears(3), linears(3).state_dict()
        old = {p: p.data_ptr() for p in module.parameters()}
        left = []
        for parameter in module.parameters():
            weakref.finalize(
                parameter.untyped_storage(),
                lambda: left.append(sum(p.data_ptr() == i for p, i in old.items())),
            )
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(left, [5, 4, 3, 2, 1, 0])

    def test_is_held_until_the_last_post_hook_has_run(self):
        module, alive = linears(2), []
        old = [storage_of(p) for p in module.parameters()]
        module.register_load_state_dict_post_hook(
            lambda *_: alive.extend(ref() is not None for ref in old)
        )
        module.load_state_dict(linears(2).state_dict(), reuse_tensors=True)
        self.assertEqual(alive, [True] * 4)
        self.assertEqual([ref() for ref in old], [None] * 4)

    def test_is_held_while_code_from_elsewhere_may_raise(self):
        module, alive = nn.Sequential(nn.Linear(3, 2), Override(3, 2)), []
        old = [storage_of(p) for p in module[0].parameters()]
        pointers = [p.data_ptr() for p in module[0].parameters()]
        hook = module[1].register_load_state_dict_pre_hook(
            lambda *_: alive.extend(ref() is not None for ref in old)
        )
        state_dict = linears(2).state_dict()
        with self.assertRaisesRegex(RuntimeError, "Unexpected key"):
            module.load_state_dict(
                {**state_dict, "x": torch.ones(1)}, reuse_tensors=True
            )
        self.assertEqual([p.data_ptr() for p in module[0].parameters()], pointers)
        hook.remove()
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(alive, [True] * 2)
        self.assertEqual([ref() for ref in old], [None] * 2)

    def test_of_torchs_own_override_is_given_back_as_it_is_replaced(self):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        old = [storage_of(p) for p in module.parameters()]
        left = []
        weakref.finalize(
            module[2].bias.untyped_storage(),
            lambda: left.append(sum(ref() is not None for ref in old[:-1])),
        )
        other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertEqual(left, [0])

    def test_of_a_module_that_loads_itself_is_held_until_all_is_planned(self):
        module, seen = nn.Sequential(Override(3, 2), nn.Linear(3, 2)), []
        old = [storage_of(p) for p in module.parameters()]
        weakref.finalize(
            module[1].bias.untyped_storage(),
            lambda: seen.extend(ref() is not None for ref in old[:2]),
        )
        state_dict = linears(2).state_dict()
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(seen, [False, False])
        self.assertEqual([ref() for ref in old], [None] * 4)

    @parametrize("device", ["cpu", "meta"])
    def test_a_conversion_takes_no_more_memory_than_it_leaves(self, device):
        module, state_dict = linears(3, device=device), linears(3).double().state_dict()
        new = sum(p.nbytes for p in module.parameters()) if device == "meta" else 0
        # NB: what is measured at import is not to be counted.
        linears(1).load_state_dict(linears(1).state_dict(), reuse_tensors=True)
        with Allocations() as allocations:
            result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.converted, tuple(state_dict))
        one_element_each_way = 8 + 4
        self.assertLessEqual(allocations.nbytes, new + one_element_each_way)

    @parametrize("tied", [False, True])
    def test_on_meta_there_is_none_to_save(self, tied):
        """Also where the state dict's tensor has to be copied by its own ``copy_``."""
        module, state_dict = linears(2, device="meta"), linears(2).state_dict()
        if tied:
            module[1].bias = nn.Parameter(module[0].bias.data)
        odd = {key: tensor.as_subclass(Own) for key, tensor in state_dict.items()}
        with Clones() as clones:
            result = module.load_state_dict(odd, reuse_tensors=True)
        self.assertEqual(clones.count, 0)
        self.assertEqual(result.converted, tuple(state_dict))
        if tied:
            state_dict["0.bias"] = state_dict["1.bias"]
        self.assertEqual(module.state_dict(), state_dict)

    def test_that_was_taken_is_replaced_again(self):
        """Also if it is not torch's own, as that of a file; unless someone may see it."""
        module = nn.Linear(3, 2, bias=False)
        array = torch.zeros(2, 3).numpy()
        state_dict = {"weight": torch.from_numpy(array)}
        module.load_state_dict(state_dict, reuse_tensors=True)
        new = {"weight": torch.ones(2, 3)}
        result = module.load_state_dict(new, reuse_tensors=True)
        self.assertEqual(result.converted, ("weight",))  # state_dict may see it
        self.assertEqual(state_dict["weight"], new["weight"])
        del state_dict
        array[:] = 3
        result = module.load_state_dict(new, reuse_tensors=True)
        self.assertEqual(result.reused, ("weight",))
        self.assertEqual(torch.from_numpy(array), torch.full((2, 3), 3.0))


class TestStateDict(TestCase):
    @parametrize("device", ["cpu", "meta"])
    def test_has_a_version_counter_of_its_own(self, device):
        module, state_dict = linears(1, device=device), linears(1).state_dict()
        versions = [t._version for t in state_dict.values()]
        module.load_state_dict(state_dict, reuse_tensors=True)
        with torch.no_grad():
            module[0].weight.add_(1)
        self.assertEqual([t._version for t in state_dict.values()], versions)

    @parametrize("earlier", [False, True])
    def test_is_not_written_to_by_an_override_that_finds_it_loaded_already(
        self, earlier
    ):
        class Writes(nn.Linear):
            def _load_from_state_dict(self, *args):
                super()._load_from_state_dict(*args)
                with torch.no_grad():
                    self.weight.view(-1)[:1] = 7

        first = nn.Linear(2, 2) if earlier else nn.Identity()
        module = nn.Sequential(first, Writes(2, 2))
        if earlier:  # one Parameter, one memory, two keys
            module[1].weight = first.weight
        state_dict = copy.deepcopy(module).state_dict()
        saved = copy.deepcopy(state_dict)
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(state_dict, saved)
        self.assertEqual(module[1].weight.view(-1)[0], 7)

    @parametrize("device", ["cpu", "meta"])
    def test_is_not_written_to_by_a_second_name_that_has_to_be_copied_to(self, device):
        module = linears(2, device=device)
        module.append(module[0])
        state_dict = linears(3).state_dict()
        with torch.inference_mode():
            state_dict["2.bias"] = torch.full((2,), 7.0)
        saved = copy.deepcopy(state_dict)
        result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(state_dict, saved)
        self.assertEqual(module[0].bias.tolist(), [7.0, 7.0])
        self.assertEqual(result.reused[-1:], ("2.weight",))

    @parametrize("device", ["cpu", "meta"])
    def test_of_several_keys_of_a_parameter_the_last_one_wins(self, device):
        module = nn.Sequential(
            nn.Linear(1, 2), Override(1, 2), nn.Linear(1, 2), nn.Linear(1, 2)
        ).to(device)
        module[2].weight = module[3].weight = module[0].weight
        state_dict = linears(0).state_dict()
        for i in range(4):
            state_dict[f"{i}.bias"] = torch.ones(2)
            state_dict[f"{i}.weight"] = torch.tensor([[1.0], [2.0]])
        state_dict["3.weight"] = state_dict["0.weight"]
        state_dict["2.weight"] = torch.zeros(1).expand(2, 1)
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(module[0].weight, state_dict["3.weight"])
        self.assertEqual(module[0].weight.tolist(), [[1.0], [2.0]])


class Tied(nn.Module):
    """Three Parameters in one memory, one of them in a part of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.same = nn.Parameter(self.weight.data)
        self.part = nn.Parameter(self.weight.data[1:3], requires_grad=False)

    def assert_tied(self):
        assert self.weight.data_ptr() == self.same.data_ptr()
        assert self.part.data_ptr() == self.weight[1:].data_ptr()


class TestTiesOnMeta(TestCase):
    def load(self, state_dict, **kwargs):
        with torch.device("meta"):
            module = Tied()
        result = module.load_state_dict(state_dict, reuse_tensors=True, **kwargs)
        module.assert_tied()
        expected = Tied()
        expected.load_state_dict(state_dict, **kwargs)
        self.assertEqual(module.state_dict(), expected.state_dict())
        self.assertFalse(module.part.requires_grad)
        return module, result

    def test_take_memory_that_is_tied_alike(self):
        state_dict = Tied().state_dict()
        module, result = self.load(state_dict)
        self.assertEqual(result.reused, ("weight", "same", "part"))
        self.assertEqual(module.part.data_ptr(), state_dict["part"].data_ptr())

    def test_take_the_last_one_that_has_it_all(self):
        state_dict = {k: v.clone() for k, v in Tied().state_dict().items()}
        del state_dict["part"]
        module, result = self.load(state_dict, strict=False)
        self.assertEqual((result.reused, result.converted), (("same",), ("weight",)))
        self.assertEqual(module.weight.data_ptr(), state_dict["same"].data_ptr())
        self.assertEqual(result.missing_keys, ["part"])
        self.assertEqual(result.still_meta, ())

    def test_are_copied_if_a_part_comes_later(self):
        state_dict = {k: v.clone() for k, v in Tied().state_dict().items()}
        saved = {k: v.clone() for k, v in state_dict.items()}
        _, result = self.load(state_dict)
        self.assertEqual(result.converted, ("weight", "same", "part"))
        self.assertEqual(state_dict, saved)

    def test_are_copied_if_another_module_has_the_memory(self):
        state_dict = Tied().state_dict()
        module, _ = self.load(state_dict)
        _, result = self.load(state_dict)
        self.assertEqual(result.converted, ("weight", "same", "part"))
        del module


class Swallows(nn.Linear):
    def _load_from_state_dict(self, *args):
        pass


class Quantized(nn.Parameter):
    """A class with operations of its own, as bitsandbytes' Params4bit: its ``copy_`` does nothing on meta."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class QuantizedLinear(nn.Linear):
    pass


class TestStillOnMeta(TestCase):
    def error_of(self, module, state_dict):
        before = [(id(p), p.device) for p in module.parameters()]
        with self.assertRaises(RuntimeError) as error:
            module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual([(id(p), p.device) for p in module.parameters()], before)
        return str(error.exception)

    def test_is_an_error_that_tells_what_to_do(self):
        module = nn.Sequential(nn.Linear(3, 2), Swallows(3, 2)).to("meta")
        self.assertExpectedInline(
            self.error_of(module, linears(2).state_dict()),
            """\
Error(s) in loading state_dict for Sequential:
	Expected the load of "1.weight" by Swallows to give it data, got a Parameter that is still on the meta device. Construct it on a real device, or call to_empty(skip_materialized=True) first.
	Expected the load of "1.bias" by Swallows to give it data, got a Parameter that is still on the meta device. Construct it on a real device, or call to_empty(skip_materialized=True) first.""",  # noqa: E501
        )

    def test_a_class_whose_copy_does_nothing_on_meta_is_named(self):
        module = QuantizedLinear(3, 2).to("meta")
        module.weight = Quantized(module.weight.data)
        state_dict = linears(1).state_dict()
        self.assertExpectedInline(
            self.error_of(nn.Sequential(module), state_dict),
            """\
Error(s) in loading state_dict for Sequential:
	Expected the load of "0.weight" by QuantizedLinear to give it data, got a Quantized that is still on the meta device. Construct it on a real device, or call to_empty(skip_materialized=True) first.""",  # noqa: E501
        )
        module.to_empty(device="cpu", skip_materialized=True)
        nn.Sequential(module).load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(type(module.weight), Quantized)
        self.assertEqual(module.weight, state_dict["0.weight"])

    def test_a_state_dict_that_is_on_meta_is_blamed(self):
        module = linears(1, device="meta")
        state_dict = {key: t.to("meta") for key, t in linears(1).state_dict().items()}
        self.assertIn(
            "load a state dict that is not on the meta",
            self.error_of(module, state_dict),
        )

    def test_a_module_below_itself_is_an_error_as_in_stock(self):
        module = nn.Linear(3, 2)
        state_dict = copy.deepcopy(module.state_dict())
        module.register_module("again", module)
        before = module.weight.data_ptr()
        for reuse_tensors in (False, True):
            with self.assertRaises(RecursionError):
                module.load_state_dict(
                    state_dict, strict=False, reuse_tensors=reuse_tensors
                )
        self.assertEqual(module.weight.data_ptr(), before)

    def test_is_an_error_if_a_hook_forgave_the_missing_key(self):
        module, state_dict = linears(1, device="meta"), linears(1).state_dict()
        del state_dict["0.bias"]
        module.register_load_state_dict_post_hook(
            lambda _, keys: keys.missing_keys.clear()
        )
        self.assertIn('Expected "0.bias" to have', self.error_of(module, state_dict))

    def test_is_no_error_if_it_is_loaded_under_another_name(self):
        module = linears(2, device="meta")
        module[1].bias = module[0].bias
        state_dict = linears(2).state_dict()
        del state_dict["1.bias"]
        module.register_load_state_dict_post_hook(
            lambda _, keys: keys.missing_keys.clear()
        )
        result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.still_meta, ())

    def test_is_reported_if_not_persistent_or_not_strict(self):
        module = linears(1, device="meta")
        module.register_buffer("freq", torch.ones(1, device="meta"), persistent=False)
        state_dict = linears(1).state_dict()
        result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.still_meta, ("freq",))
        module, _ = linears(1, device="meta"), state_dict.popitem()
        result = module.load_state_dict(state_dict, strict=False, reuse_tensors=True)
        self.assertEqual(result.still_meta, ("0.bias",))


instantiate_parametrized_tests(TestOldMemory)
instantiate_parametrized_tests(TestStateDict)


if __name__ == "__main__":
    run_tests()
