# Owner(s): ["module: nn"]
import gc
import weakref

import torch
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


def error_of(module, state_dict, **kwargs):
    try:
        module.load_state_dict(state_dict, **kwargs)
    except RuntimeError as e:
        return str(e)


class TestReuseTensors(TestCase):
    def setUp(self):
        super().setUp()
        self.state_dict = nn.Linear(3, 2).state_dict()

    def assert_reused(self, module, state_dict):
        named = dict(module.named_parameters(remove_duplicate=False))
        for key, value in state_dict.items():
            self.assertEqual(named[key].data_ptr(), value.data_ptr())

    @parametrize("device", ["cpu", "meta"])
    def test_memory_is_the_state_dicts(self, device):
        module = nn.Linear(3, 2, device=device)
        versions = [t._version for t in self.state_dict.values()]
        result = module.load_state_dict(self.state_dict, reuse_tensors=True)
        self.assert_reused(module, self.state_dict)
        self.assertEqual(result.reused, ("weight", "bias"))
        self.assertEqual((result.converted, result.still_meta), ((), ()))
        self.assertEqual([t._version for t in self.state_dict.values()], versions)

    def test_is_optional(self):
        module = nn.Linear(3, 2)
        pointer = module.weight.data_ptr()
        result = module.load_state_dict(self.state_dict)
        self.assertEqual(module.weight.data_ptr(), pointer)
        self.assertFalse(hasattr(result, "reused"))

    def test_not_with_assign(self):
        with self.assertRaisesRegex(ValueError, "only one of assign and reuse_tensors"):
            nn.Linear(3, 2).load_state_dict(
                self.state_dict, assign=True, reuse_tensors=True
            )

    @parametrize("device", ["cpu", "meta"])
    def test_who_refers_to_a_parameter_still_does(self, device):
        module = nn.Linear(3, 2, device=device)
        weight, calls = module.weight, []
        weight.mark = "mine"
        refs = [weight], weakref.ref(weight)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        hook = weight.register_hook(lambda grad: calls.append("hook"))
        weight.register_post_accumulate_grad_hook(lambda p: calls.append("post"))
        module.load_state_dict(self.state_dict, reuse_tensors=True)
        self.assertIs(refs[0][0], module.weight)
        self.assertIs(refs[1](), module.weight)
        self.assertEqual(module.weight.mark, "mine")
        before = module.weight.detach().clone()
        module(torch.ones(1, 3)).sum().backward()
        self.assertEqual(calls, ["hook", "post"])
        optimizer.step()
        self.assertEqual(module.weight.detach(), before - 1)
        hook.remove()
        module(torch.ones(1, 3)).sum().backward()
        self.assertEqual(calls, ["hook", "post", "post"])

    def test_lstm_on_meta_runs(self):
        other = nn.LSTM(2, 3)
        module = nn.LSTM(2, 3, device="meta")
        module.load_state_dict(other.state_dict(), reuse_tensors=True)
        x = torch.randn(4, 1, 2)
        self.assertEqual(module(x)[0], other(x)[0])
        self.assert_reused(module, other.state_dict())

    def test_backward_through_an_older_graph_fails_as_after_a_copy(self):
        module = nn.Linear(3, 2)
        loss = module.weight.square().sum()
        module.load_state_dict(self.state_dict, reuse_tensors=True)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            loss.backward()

    @parametrize("see", ["detach", "numpy", "view", "storage", "shared", "from_numpy"])
    def test_memory_that_others_see_is_written_to(self, see):
        module = nn.Linear(3, 2)
        if see == "from_numpy":
            module.weight = nn.Parameter(torch.from_numpy(torch.zeros(2, 3).numpy()))
        weight = module.weight
        seen = {
            "detach": weight.detach,
            "numpy": lambda: weight.detach().numpy(),
            "view": lambda: weight.view(-1),
            "storage": weight.untyped_storage,
            "shared": weight.share_memory_,
            "from_numpy": lambda: None,
        }[see]()
        pointer = weight.data_ptr()
        result = module.load_state_dict(self.state_dict, reuse_tensors=True)
        self.assertEqual(weight.data_ptr(), pointer)
        self.assertEqual(weight, self.state_dict["weight"])
        self.assertEqual((result.reused, result.converted), (("bias",), ("weight",)))
        del seen

    def test_two_modules_tensors_never_share_one(self):
        value = torch.ones(2, 3)
        module = nn.ParameterList(nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        state_dict = {"0": value, "1": value, "2": value[:]}
        result = module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual((result.reused, result.converted), (("0",), ("1", "2")))
        self.assertEqual(len({p.data_ptr() for p in module}), 3)

    def test_converts_to_the_modules_dtype(self):
        module = nn.Linear(3, 2, device="meta", dtype=torch.bfloat16)
        module.bias = nn.Parameter(module.bias.float())
        result = module.load_state_dict(self.state_dict, reuse_tensors=True)
        self.assertEqual((result.reused, result.converted), (("bias",), ("weight",)))
        self.assertEqual(module.weight, self.state_dict["weight"].bfloat16())

    def test_nothing_to_load_is_an_error_if_strict(self):
        module = nn.Linear(3, 2, device="meta")
        state_dict = nn.Linear(3, 2, device="meta").state_dict()
        result = module.load_state_dict(state_dict, strict=False, reuse_tensors=True)
        self.assertEqual(result.still_meta, ("weight", "bias"))
        with self.assertRaisesRegex(
            RuntimeError, 'Expected "weight" to have data after'
        ):
            module.load_state_dict(state_dict, reuse_tensors=True)

    def test_one_error_names_all_problems(self):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        state_dict = module.state_dict()
        state_dict["0.bias"] = torch.ones(3)
        state_dict["1.bias"] = "text"
        state_dict["other"] = state_dict.pop("0.weight")
        with self.assertRaises(RuntimeError) as error:
            module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertExpectedInline(
            str(error.exception),
            """\
Error(s) in loading state_dict for Sequential:
	Missing key(s) in state_dict: "0.weight". 
	Unexpected key(s) in state_dict: "other". 
	size mismatch for 0.bias: copying a param with shape torch.Size([3]) from checkpoint, the shape in current model is torch.Size([2]).
	While copying the parameter named "1.bias", expected torch.Tensor or Tensor-like object from checkpoint but received <class 'str'>""",  # noqa: E501, W291
        )

    def test_post_hooks_see_the_keys_that_they_used_to(self):
        def run(**kwargs):
            module = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
            calls = []
            for m in module.modules():
                m.register_load_state_dict_post_hook(
                    lambda _, keys: calls.append(keys.missing_keys[:])
                )
            module[0].register_load_state_dict_post_hook(
                lambda _, keys: keys.missing_keys.clear()
            )
            return calls, error_of(module, {"0.bias": torch.ones(2)}, **kwargs)

        self.assertEqual(run(reuse_tensors=True), run())

    def test_lazy_module(self):
        module, other = nn.LazyLinear(2), nn.Linear(3, 2)
        weight = module.weight
        with self.assertRaisesRegex(RuntimeError, "Missing key"):
            module.load_state_dict({"weight": other.weight}, reuse_tensors=True)
        self.assertIs(type(weight), nn.UninitializedParameter)
        module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertIs(module.weight, weight)
        self.assert_reused(module, other.state_dict())
        self.assertEqual(module(torch.ones(1, 3)), other(torch.ones(1, 3)))

    def test_in_any_mode(self):
        module = nn.Linear(3, 2, device="meta")
        with torch.inference_mode(), torch.device("meta"):
            module.load_state_dict(self.state_dict, reuse_tensors=True)
        self.assert_reused(module, self.state_dict)
        self.assertFalse(module.weight.is_inference())
        module(torch.ones(1, 3)).sum().backward()

    def test_metadata_of_an_assigning_load_is_ignored(self):
        state_dict = nn.BatchNorm1d(3).state_dict()
        nn.BatchNorm1d(3).load_state_dict(state_dict, assign=True)
        module = nn.BatchNorm1d(3)
        weight = module.weight
        module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertIs(module.weight, weight)

    def test_old_memory_is_given_back(self):
        module = nn.Linear(3, 2)
        old = weakref.ref(module.weight.untyped_storage())
        module.load_state_dict(self.state_dict, reuse_tensors=True)
        gc.collect()
        self.assertIsNone(old())


instantiate_parametrized_tests(TestReuseTensors)


if __name__ == "__main__":
    run_tests()
