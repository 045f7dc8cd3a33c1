# Owner(s): ["module: nn"]
"""Each line of the tables of ``load_state_dict(reuse_tensors=True)``, by its number in RFC-0002."""

import doctest

import torch
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


class Own(torch.Tensor):
    """Has operations of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Module(nn.Module):
    """One parameter, and perhaps others that are tied to it by memory."""

    def __init__(self, *tensors):
        super().__init__()
        for name, tensor in zip("abc", tensors, strict=False):
            self.register_parameter(name, nn.Parameter(tensor))


def zeros(device="cpu", **kwargs):
    return torch.zeros(2, 3, device=device, **kwargs)


def numbers(dtype=torch.float32):
    return torch.arange(1.0, 7.0).view(2, 3).to(dtype)


def strided(values):
    return torch.stack([values, values], -1)[..., 0]


def inference(values):
    with torch.inference_mode():
        return values.clone()


class TestTable(TestCase):
    def load(self, target, source, **kwargs):
        """Load one tensor and compare with the copying load into one that is not on meta."""
        module = Module(target)
        parameter = module.a
        result = module.load_state_dict({"a": source}, reuse_tensors=True, **kwargs)
        self.assertIs(module.a, parameter)
        if not parameter.is_meta:
            twin = torch.empty_strided(
                target.size(), target.stride(), dtype=target.dtype
            )
            expected = Module(twin)
            expected.load_state_dict({"a": source})
            self.assertEqual(parameter.as_subclass(torch.Tensor), expected.a)
            self.assertEqual(parameter.stride(), expected.a.stride())
        return parameter, result

    def assert_reused(self, target, source):
        parameter, result = self.load(target, source)
        self.assertEqual(parameter.data_ptr(), source.data_ptr())
        self.assertEqual((result.reused, result.converted), (("a",), ()))

    def assert_converted(self, target, source, *, into=None):
        parameter, result = self.load(target, source)
        self.assertNotEqual(parameter.data_ptr(), source.data_ptr())
        self.assertEqual((result.reused, result.converted), ((), ("a",)))
        if into is not None:
            self.assertEqual(parameter.data_ptr(), into)
        return parameter

    def assert_error_as_stock(self, target, source):
        def error_of(**kwargs):
            with self.assertRaises(RuntimeError) as error:
                Module(target).load_state_dict({"a": source}, **kwargs)
            return str(error.exception)

        self.assertEqual(error_of(reuse_tensors=True), error_of())

    @parametrize("device", ["cpu", "meta"])
    def test_row_01_no_tensor_or_another_shape(self, device):
        self.assert_error_as_stock(zeros(device), "text")
        self.assert_error_as_stock(zeros(device), torch.ones(3, 2))

    def test_row_02_from_meta(self):
        self.assert_error_as_stock(zeros(), zeros("meta"))

    def test_row_03_from_meta_to_meta(self):
        parameter, result = self.load(zeros("meta"), zeros("meta"), strict=False)
        self.assertTrue(parameter.is_meta)
        self.assertEqual(result.still_meta, ("a",))
        self.assertEqual((result.reused, result.converted), ((), ()))
        with self.assertRaisesRegex(RuntimeError, 'Expected "a" to have data'):
            self.load(zeros("meta"), zeros("meta"))

    def test_row_04_its_own_memory(self):
        target = numbers()
        version = target._version
        self.assert_reused(target, target.detach())
        self.assertEqual(target._version, version)

    def test_row_05_operations_of_its_own(self):
        target = zeros().as_subclass(Own)
        self.assert_converted(target, numbers(), into=target.data_ptr())
        self.assert_converted(zeros(), numbers().as_subclass(Own))
        self.assert_converted(zeros("meta"), numbers().as_subclass(Own))

    @parametrize("see", ["view", "detach", "numpy", "share_memory_"])
    def test_row_06_memory_that_others_see(self, see):
        target = zeros()
        seen = target.view(-1) if see == "view" else getattr(target, see)()
        self.assert_converted(target, numbers(), into=target.data_ptr())
        self.assertEqual(torch.as_tensor(seen).view(2, 3), numbers())

    def test_row_07_gaps(self):
        target = strided(zeros())
        self.assert_converted(target, strided(numbers()), into=target.data_ptr())

    @parametrize("column_major", [False, True])
    def test_row_08_alike(self, column_major):
        target, source = zeros(), numbers()
        if column_major:
            target, source = zeros().t().clone().t(), numbers().t().clone().t()
        module = Module(target)
        del target
        result = module.load_state_dict({"a": source}, reuse_tensors=True)
        self.assertEqual(result.reused, ("a",))
        self.assertEqual(module.a.data_ptr(), source.data_ptr())

    @parametrize(
        "source", [numbers(torch.float64), strided(numbers()), inference(numbers())]
    )
    def test_row_09_otherwise(self, source):
        target = zeros()
        self.assert_converted(target, source, into=target.data_ptr())

    def test_row_10_tied_on_meta_to_one_that_covers_it(self):
        whole = zeros("meta")
        module, source = Module(whole, whole[1:]), numbers()
        result = module.load_state_dict(
            {"a": source, "b": source[1:]}, reuse_tensors=True
        )
        self.assertEqual(result.reused, ("a", "b"))
        self.assertEqual(module.a.data_ptr(), source.data_ptr())
        self.assertEqual(module.b.data_ptr(), source[1:].data_ptr())

    def test_row_11_tied_on_meta(self):
        whole = zeros("meta")
        module, source = Module(whole, whole[1:]), numbers()
        state_dict = {"a": source, "b": torch.ones(1, 3)}
        result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.converted, ("a", "b"))
        self.assertEqual(module.b.data_ptr(), module.a[1:].data_ptr())
        self.assertEqual(module.a[1:], state_dict["b"])
        self.assertEqual(source, numbers())

    def test_row_12_alike_on_meta(self):
        self.assert_reused(zeros("meta"), numbers())
        self.assert_reused(zeros("meta").t(), numbers().t())

    @parametrize(
        "source",
        [
            numbers(torch.float64),
            strided(numbers()),
            torch.ones(3).expand(2, 3),
            inference(numbers()),
        ],
    )
    def test_row_13_otherwise_on_meta(self, source):
        self.assert_converted(zeros("meta"), source)

    @parametrize("source", [numbers(), strided(numbers()), numbers(torch.float64)])
    def test_row_13_gaps_on_meta(self, source):
        target = strided(zeros("meta"))
        parameter = self.assert_converted(target, source)
        self.assertEqual(parameter.stride(), target.stride())

    def test_row_13_elements_in_one_place_on_meta(self):
        expanded = torch.zeros(3).expand(2, 3)
        with self.assertRaisesRegex(RuntimeError, "more than one element") as error:
            Module(expanded).load_state_dict({"a": numbers()})
        module = Module(expanded.to("meta"))
        module.a.data = module.a.data[:1].expand(2, 3)
        with self.assertRaises(RuntimeError) as raised:
            module.load_state_dict({"a": numbers()}, reuse_tensors=True)
        self.assertEqual(str(raised.exception), str(error.exception))
        self.assertTrue(module.a.is_meta)

    @parametrize("device", ["cpu", "meta"])
    def test_rows_08_12_memory_is_handed_over_once(self, device):
        first, source = Module(zeros()), numbers()
        first.load_state_dict({"a": source}, reuse_tensors=True)
        second = self.assert_converted(zeros(device), source)
        with torch.no_grad():
            second.zero_()
        self.assertEqual(first.a, numbers())
        del first
        self.assert_reused(zeros("meta"), source)

    @parametrize("dtype", [torch.float32, torch.float64])
    def test_row_14_uninitialized(self, dtype):
        module, source = nn.LazyLinear(2, bias=False), numbers(dtype)
        weight = module.weight
        result = module.load_state_dict({"weight": source}, reuse_tensors=True)
        self.assertIs(module.weight, weight)
        self.assertEqual(weight, numbers())
        shared = weight.data_ptr() == source.data_ptr()
        self.assertEqual(shared, dtype is torch.float32)
        self.assertEqual(result.reused if shared else result.converted, ("weight",))

    @parametrize("device", ["cpu", "meta"])
    def test_row_15_absent(self, device):
        module = Module(zeros(device))
        with self.assertRaisesRegex(RuntimeError, r'Missing key\(s\).*: "a"'):
            module.load_state_dict({}, reuse_tensors=True)
        result = module.load_state_dict({}, strict=False, reuse_tensors=True)
        self.assertEqual(result.missing_keys, ["a"])
        self.assertEqual(result.still_meta, ("a",) if device == "meta" else ())


class TestDocstring(TestCase):
    def test_example(self):
        doc = nn.Module.load_state_dict.__doc__
        example = doctest.DocTestParser().get_doctest(
            doc, {"torch": torch}, "load_state_dict", None, None
        )
        sources = "".join(e.source for e in example.examples)
        self.assertIn("reuse_tensors=True", sources)
        lines = []
        doctest.DocTestRunner().run(example, out=lines.append)
        self.assertEqual("".join(lines), "")


class TestArguments(TestCase):
    def test_both_are_refused(self):
        with self.assertRaisesRegex(ValueError, "only one of assign and reuse_tensors"):
            Module(zeros()).load_state_dict(
                {"a": numbers()}, assign=True, reuse_tensors=True
            )

    def test_neither_copies(self):
        module, source = Module(zeros()), numbers()
        result = module.load_state_dict({"a": source})
        self.assertNotEqual(module.a.data_ptr(), source.data_ptr())
        self.assertFalse(hasattr(result, "reused"))

    def test_assign_replaces(self):
        module, source = Module(zeros("meta")), numbers()
        parameter = module.a
        result = module.load_state_dict({"a": source}, assign=True)
        self.assertIsNot(module.a, parameter)
        self.assertEqual(module.a.data_ptr(), source.data_ptr())
        self.assertFalse(hasattr(result, "reused"))

    def test_is_keyword_only(self):
        with self.assertRaisesRegex(TypeError, "positional argument"):
            Module(zeros()).load_state_dict({"a": numbers()}, True, False, True)

    @parametrize("mode", ["inference_mode", "no_grad", "device"])
    def test_no_mode_matters(self, mode):
        module, source = Module(zeros("meta")), numbers()
        context = {
            "inference_mode": torch.inference_mode,
            "no_grad": torch.no_grad,
            "device": lambda: torch.device("meta"),
        }[mode]()
        with context:
            module.load_state_dict({"a": source}, reuse_tensors=True)
        self.assertFalse(module.a.is_inference())
        self.assertEqual(module.a.data_ptr(), source.data_ptr())


instantiate_parametrized_tests(TestTable)
instantiate_parametrized_tests(TestArguments)


if __name__ == "__main__":
    run_tests()
