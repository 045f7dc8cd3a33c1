"""The published strategies: they draw what they promise, and what they are for refuses what is wrong."""

import doctest
import importlib
import pkgutil
import random
import warnings

import hypothesis.strategies as st
import torch
from hypothesis import find, given, HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from processes import python
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)

import torch_ext.testing
from torch_ext.testing import (
    assert_loads_as_copy,
    copying_load,
    differences,
    EDITS,
    HARMFUL,
    HARMLESS,
    identities,
    KINDS,
    model_of,
    ModuleMachine,
    named_tensors,
    observe,
    observe_state_dict,
    overlaps,
    PLAIN,
    Recipe,
    recipes,
    state_dict_recipes,
    StateDictRecipe,
    Tie,
)


QUICK = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("quick", QUICK)
SEARCH = settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
LINEAR = Recipe(("linear", "norm"), optimizer="sgd", steps=1)


def modules_of_testing():
    found = pkgutil.iter_modules(torch_ext.testing.__path__, "torch_ext.testing.")
    return ["torch_ext.testing", *sorted(module.name for module in found)]


class TestExamples(TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(settings.load_profile, settings.get_current_profile_name())
        settings.load_profile("quick")

    @parametrize("name", modules_of_testing())
    def test_run(self, name):
        module = importlib.import_module(name)
        names = {**vars(torch_ext.testing), **vars(module), "torch": torch}
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        for example in doctest.DocTestFinder(recurse=True).find(
            module, extraglobs=names
        ):
            lines = []
            runner = doctest.DocTestRunner(optionflags=flags)
            runner.run(example, out=lines.append)
            self.assertEqual("".join(lines), "")

    def test_what_is_public_has_one(self):
        for name in torch_ext.testing.__all__:
            value = getattr(torch_ext.testing, name)
            if callable(value):
                self.assertTrue(value.__doc__, name)

    def test_import_patches_nothing(self):
        code = """
import torch, torch_ext.testing
assert not torch_ext.enabled()
"""
        python("-c", code, check=True)


class TestRecipes(TestCase):
    @given(recipes(), st.integers(0, 9))
    @QUICK
    def test_twins_are_alike(self, recipe, seed):
        state = torch.get_rng_state()
        one, other = recipe.build(seed), recipe.build(seed)
        self.assertEqual(torch.get_rng_state(), state)
        self.assertEqual(differences(observe(one), observe(other)), [])
        self.assertEqual(
            eval(repr(recipe), vars(torch_ext.testing) | {"torch": torch}), recipe
        )

    @given(recipes())
    @QUICK
    def test_twins_on_other_devices_have_the_same_names_and_ties(self, recipe):
        there, here = (recipe.on(d).build().module for d in ("meta", "cpu"))
        names = [[name for name, _ in named_tensors(m)] for m in (there, here)]
        self.assertEqual(names[0], names[1])
        self.assertEqual(identities(there), identities(here))
        self.assertTrue(all(t.is_meta for _, t in named_tensors(there)))
        self.assertFalse(any(t.is_meta for _, t in named_tensors(here)))

    @parametrize("kind", sorted(KINDS))
    def test_each_kind(self, kind):
        for device in ("cpu", "meta"):
            subject = Recipe((kind,), optimizer="adam").on(device).build()
            self.assertTrue(list(named_tensors(subject.module)))
        values = StateDictRecipe(Recipe((kind,)), seed=1)
        assert_loads_as_copy(copying_load, Recipe((kind,)), values)

    @parametrize(
        "what",
        {
            "tied objects": lambda m: identities(m) != [],
            "tied memory": lambda m: len(overlaps(m)) > len(identities(m)),
            "across modules": lambda m: any(
                a.split(".")[0] != b.split(".")[0] for a, b in overlaps(m)
            ),
            "a module twice": lambda m: (
                len(list(m.modules()))
                < len(list(m.named_modules(remove_duplicate=False)))
            ),
            "mixed": lambda m: len({t.is_meta for _, t in named_tensors(m)}) == 2,
            "dtypes": lambda m: len({p.dtype for p in m.parameters()}) > 1,
            "nested": lambda m: any(isinstance(c, nn.Sequential) for c in m),
            "frozen": lambda m: len({p.requires_grad for p in m.parameters()}) == 2,
            "gradients": lambda m: any(p.grad is not None for p in m.parameters()),
            "hooks": lambda m: any(p._backward_hooks for p in m.parameters()),
            "post-hooks": lambda m: any(
                c._load_state_dict_post_hooks for c in m.modules()
            ),
            "attributes": lambda m: any(hasattr(p, "mark") for p in m.parameters()),
        }.items(),
        name_fn=lambda item: item[0].replace(" ", "_").replace("-", "_"),
    )
    def test_draws(self, what):
        find(
            recipes(),
            lambda recipe: what[1](recipe.build().module),
            settings=SEARCH,
            random=random.Random(0),
        )


class TestStateDicts(TestCase):
    @parametrize("how", sorted(EDITS))
    def test_each_edit(self, how):
        edit = torch_ext.testing.Edit(how, "0.weight", "1.weight")
        recipe = Recipe(("norm", "norm"))
        plain, edited = (
            StateDictRecipe(recipe, 1, edits).build() for edits in ((), (edit,))
        )
        again = StateDictRecipe(recipe, 1, (edit,)).build()
        self.assertEqual(list(edited), list(again))
        shown = [
            [
                (key[1], str(v))
                for key, v in observe_state_dict(s).items()
                if key[1] != "object"
            ]
            for s in (plain, edited, again)
        ]
        memory = [
            [v.data_ptr() for v in s.values() if isinstance(v, torch.Tensor)]
            for s in (edited,)
        ]
        changes_memory_only = {"same", "alias", "foreign", "shared", "flat"}
        self.assertEqual(shown[1], shown[2])
        if how in changes_memory_only:
            self.assertEqual(len(memory[0]), len(plain))
        else:
            self.assertNotEqual(shown[0], shown[1])

    @given(st.data(), recipes(devices=["cpu"], kinds=PLAIN))
    @QUICK
    def test_harmless_ones_are_accepted(self, data, recipe):
        values = data.draw(state_dict_recipes(recipe, edits=HARMLESS))
        recipe.build().module.load_state_dict(values.build())

    @parametrize("how", sorted(HARMFUL))
    def test_harmful_ones_are_refused(self, how):
        edit = torch_ext.testing.Edit(how, "0.weight", "0.weight")
        state_dict = StateDictRecipe(LINEAR, 1, (edit,)).build()
        with self.assertRaises((RuntimeError, AttributeError)):
            LINEAR.build().module.load_state_dict(state_dict)


def change_in(name):
    """Ways to change a module that has to be seen."""

    def set_grad(m):
        m[0].weight.grad = torch.ones_like(m[0].weight)

    def untie(m):
        m[1].weight = nn.Parameter(m[0].bias.detach().clone())

    def other_object(m):
        m[0].bias = nn.Parameter(m[0].bias.detach().clone())

    return {
        "value": lambda m: m[0].weight.data.view(-1)[:1].add_(1),
        "sign of zero": lambda m: m[1].running_mean.zero_().neg_(),
        "dtype": lambda m: m[1].double(),
        "requires_grad": lambda m: m[0].weight.requires_grad_(False),
        "gradient": set_grad,
        "attribute": lambda m: setattr(m[0].weight, "mark", 1),
        "hook": lambda m: m[0].weight.register_hook(lambda g: g),
        "strides": lambda m: setattr(
            m[0].weight, "data", m[0].weight.data.t().contiguous().t()
        ),
        "object": other_object,
        "memory": untie,
        "training": lambda m: m[1].eval(),
        "persistence": lambda m: m[1]._non_persistent_buffers_set.add("running_var"),
        "child": lambda m: m.append(nn.Identity()),
        "order": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    }[name]


class TestObserve(TestCase):
    RECIPE = Recipe(("linear", "norm"), ties=(Tie("part", "0.bias", "1.weight"),))

    @parametrize(
        "name",
        [
            "value", "sign of zero", "dtype", "requires_grad", "gradient", "attribute",
            "hook", "strides", "object", "memory", "training", "persistence", "child", "order",
        ],
        name_fn=lambda name: name.replace(" ", "_"),
    )  # fmt: skip
    def test_sees(self, name):
        subject, other = self.RECIPE.build(), self.RECIPE.build()
        if name == "sign of zero":
            other.module[1].running_mean.zero_()
        change_in(name)(subject.module)
        self.assertNotEqual(differences(observe(other), observe(subject)), [])

    def test_sees_what_an_optimizer_is_for(self):
        subject, other = LINEAR.build(), LINEAR.build()
        self.assertEqual(differences(observe(other), observe(subject)), [])
        subject.optimizer.state.clear()
        lines = differences(observe(other), observe(subject))
        self.assertEqual(
            [line.split(":")[0] for line in lines], ["as a whole, optimizer"]
        )

    def test_does_not_see_addresses(self):
        subject = LINEAR.build()
        before = observe(subject)
        weight = subject.module[0].weight
        weight.data = weight.data.clone()
        self.assertEqual(differences(before, observe(subject)), [])


def wrong_load(name):
    """Ways to load that the law must refuse, each for one reason."""

    def assign(module, state_dict, strict):
        return module.load_state_dict(dict(state_dict), strict, assign=True)

    def half_done(module, state_dict, strict):
        return module.load_state_dict(state_dict, strict)

    def untied(module, state_dict, strict):
        result = module.load_state_dict(state_dict, strict)
        for p in module.parameters():
            p.data = p.data.clone()
        return result

    def no_version(module, state_dict, strict):
        result = module.load_state_dict(state_dict, strict)
        for p in module.parameters():
            p.grad = None
        return result

    def marks(module, state_dict, strict):
        state_dict._metadata[""]["mark"] = 1
        return module.load_state_dict(state_dict, strict)

    def takes_all(module, state_dict, strict):
        result = module.load_state_dict(state_dict, strict)
        for name, tensor in named_tensors(module):
            if name in state_dict and tensor.shape == state_dict[name].shape:
                tensor.data = state_dict[name].to(tensor.dtype).contiguous()
        return result

    return {
        "assign": assign,
        "half done": half_done,
        "untied": untied,
        "drops gradients": no_version,
        "marks metadata": marks,
        "takes all": takes_all,
    }[name]


class Broken(ModuleMachine):
    """Claims to reuse and does not, or not rightly."""

    ways = ("copy", "reuse")
    how = ""

    def load(self, module, state_dict, way):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*to a meta parameter.*")
            super().load(module, state_dict, "copy")
        if way == "copy":
            return
        for name, tensor in named_tensors(module):
            if name not in state_dict or tensor.is_meta:
                continue
            if self.how == "takes all":
                tensor.data = state_dict[name].to(tensor.dtype)
            elif self.how == "replaces":
                owner = module.get_submodule(name.rpartition(".")[0])
                own = name.rpartition(".")[2]
                if own in owner._parameters:
                    trains = tensor.requires_grad
                    setattr(owner, own, nn.Parameter(tensor.detach(), trains))


class TestWrongLoads(TestCase):
    @parametrize(
        "name",
        ["assign", "half done", "untied", "drops gradients", "marks metadata", "takes all"],
        name_fn=lambda name: name.replace(" ", "_"),
    )  # fmt: skip
    def test_are_refused_by_the_law(self, name):
        load = wrong_load(name)

        @given(st.data(), recipes(devices=["cpu"], kinds=PLAIN))
        @SEARCH
        def law(data, recipe):
            values = data.draw(state_dict_recipes(recipe))
            assert_loads_as_copy(load, recipe, values)

        with self.assertRaises(AssertionError):
            law()

    @parametrize(
        "how",
        ["copies", "takes all", "replaces"],
        name_fn=lambda h: h.replace(" ", "_"),
    )
    def test_are_refused_by_the_machine(self, how):
        machine = type(how, (Broken,), {"how": how})
        with self.assertRaises(AssertionError):
            run_state_machine_as_test(machine, settings=SEARCH)


class TestMachine(TestCase):
    def test_holds_for_stock_torch(self):
        run_state_machine_as_test(ModuleMachine, settings=QUICK)

    def test_model_knows_ties(self):
        ties = (
            Tie("part", "0.bias", "1.weight"),
            Tie("same", "2.weight", "1.weight"),
        )
        module = Recipe(("linear", "norm", "norm"), ties=ties).build().module
        model = model_of(module)
        bias, weight, other = (
            model.cells[model.names[n]] for n in ("0.bias", "1.weight", "2.weight")
        )
        self.assertIs(weight, other)
        self.assertIs(bias.memory, weight.memory)
        self.assertEqual(bias.read(), weight.read()[1:])


instantiate_parametrized_tests(TestExamples)
instantiate_parametrized_tests(TestRecipes)
instantiate_parametrized_tests(TestStateDicts)
instantiate_parametrized_tests(TestObserve)
instantiate_parametrized_tests(TestWrongLoads)


if __name__ == "__main__":
    run_tests()
