"""Graft and the queue: patches go on in place, under every name a function has, and come off without a trace."""

import dataclasses
import inspect
import pydoc
import sys
import threading
import traceback
from unittest import mock

import kinds_of_seams as kinds
import pytest
import torch
from kinds_of_seams import GRAFTED
from torch.distributions import Distribution
from torch.nn.utils import (
    clip_grad_norm_,
    parameters_to_vector,
)  # aliases taken before any patch
from torch.testing._internal.common_utils import run_tests, TestCase
from torch.utils.serialization import config as serialization_config

import torch_ext
from torch_ext import _drift, _graft, _queue, PatchError


FUNCTIONS = {
    "method": torch.nn.Module.zero_grad,
    "function": parameters_to_vector,
    "replaced": torch.nn.utils.convert_parameters._check_param_device,
    "static": Distribution.set_default_validate_args,
    "classmethod": torch.nn.Embedding.from_pretrained.__func__,
    "wrapped": clip_grad_norm_.__wrapped__,
}


def snapshot():
    return {
        name: (
            f.__code__,
            f.__defaults__,
            f.__kwdefaults__,
            f.__doc__,
            dict(f.__annotations__),
        )
        for name, f in FUNCTIONS.items()
    }


def is_same(before, after):
    return all(
        x is y or (type(x) is dict and x == y)
        for n in before
        for x, y in zip(before[n], after[n], strict=True)
    )


@pytest.mark.usefixtures("use_test_series")
class TestGraft(TestCase):
    def test_every_kind_of_seam(self):
        linear = torch.nn.Linear(2, 3)
        with torch_ext.enable(*GRAFTED):
            self.assertEqual(linear.zero_grad(only="none"), "kept")
            self.assertIsNone(linear.zero_grad())
            weight, bias = linear.weight.flatten(), linear.bias
            self.assertEqual(
                parameters_to_vector(linear.parameters(), order=[1, 0]),
                torch.cat([bias, weight]),
            )
            self.assertEqual(
                parameters_to_vector(linear.parameters()), torch.cat([weight, bias])
            )
            self.assertEqual(
                torch.nn.utils.convert_parameters._check_param_device(1, 2), "replaced"
            )
            self.assertEqual(Distribution.set_default_validate_args(7, dry_run=True), 7)
            self.assertEqual(
                torch.nn.Embedding.from_pretrained(None, describe=True), "Embedding"
            )
            self.assertEqual(clip_grad_norm_([], 1.0, measure_only=True), "measured")
        with self.assertRaisesRegex(TypeError, "unexpected keyword argument 'only'"):
            linear.zero_grad(only="none")

    def test_signature_help_and_source_tell_of_the_patch(self):
        with torch_ext.enable("method"):
            f = torch.nn.Module.zero_grad
            self.assertExpectedInline(
                str(inspect.signature(f)),
                """(self, set_to_none: bool = True, *, only: str = 'all') -> None""",
            )
            self.assertIn(
                'only (str): which gradients are cleared. Default: ``"all"``',
                pydoc.render_doc(f),
            )
            self.assertIn('if only == "none":', inspect.getsource(f))
        self.assertNotIn("only", pydoc.render_doc(f))
        self.assertNotIn("only", inspect.getsource(f))

    def test_traceback_shows_the_patched_lines(self):
        with torch_ext.enable("function"):
            try:
                parameters_to_vector([], order=[3])
            except IndexError:
                shown = traceback.format_exc()
        self.assertIn("    parameters = _convert.reorder(parameters, order)\n", shown)

    def test_disable_puts_back_the_originals(self):
        before = snapshot()
        handle = torch_ext.enable(*kinds.FUNCTIONS)
        self.assertFalse(
            any(
                x[0] is y[0]
                for x, y in zip(before.values(), snapshot().values(), strict=True)
            )
        )
        handle.remove()
        self.assertTrue(is_same(before, snapshot()))
        handle.remove()

    def test_undo_in_any_order(self):
        before = snapshot()
        a, b, c = (
            torch_ext.enable("method"),
            torch_ext.enable("function", "replaced"),
            torch_ext.enable("method"),
        )
        a.remove()
        self.assertEqual(torch_ext.enabled(), ("method", "function", "replaced"))
        self.assertEqual(torch.nn.Linear(1, 1).zero_grad(only="none"), "kept")
        torch_ext.disable("replaced")
        self.assertEqual(torch_ext.enabled(), ("method", "function"))
        c.remove()
        self.assertEqual(torch_ext.enabled(), ("function",))
        self.assertIs(before["replaced"][0], FUNCTIONS["replaced"].__code__)
        b.remove()
        self.assertEqual(torch_ext.enabled(), ())
        self.assertTrue(is_same(before, snapshot()))

    def test_disable_undoes_one_enable_of_each(self):
        torch_ext.enable("method")
        torch_ext.enable("method", "function")
        torch_ext.disable()
        self.assertEqual(torch_ext.enabled(), ("method",))
        torch_ext.disable()
        torch_ext.disable()
        self.assertEqual(torch_ext.enabled(), ())

    def test_requirements_come_along_and_stay_while_needed(self):
        torch_ext.enable("static")
        torch_ext.disable("method")
        self.assertEqual(torch_ext.enabled(), ("method", "static"))
        torch_ext.disable("static")
        self.assertEqual(torch_ext.enabled(), ())

    def test_unknown_name(self):
        for call in (torch_ext.enable, torch_ext.disable):
            with self.assertRaisesRegex(
                PatchError, r"got 'metod'\. \(Did you mean 'method'\?\)"
            ):
                call("function", "metod")
        self.assertEqual(torch_ext.enabled(), ())

    def test_new_closure_is_refused_and_nothing_changes(self):
        before = snapshot()
        with self.assertRaisesRegex(
            PatchError, r"Identity\.forward.*use the same closure"
        ):
            torch_ext.enable()
        self.assertEqual(torch_ext.enabled(), ())
        self.assertTrue(is_same(before, snapshot()))

    def test_replaced_function_is_refused(self):
        _graft._grafted.pop(
            (
                "torch/distributions/distribution.py",
                "Distribution.set_default_validate_args",
            ),
            None,
        )
        with (
            mock.patch.object(
                Distribution,
                "set_default_validate_args",
                staticmethod(lambda value: None),
            ),
            self.assertRaisesRegex(PatchError, "Did another library replace it"),
        ):
            torch_ext.enable("static")
        self.assertEqual(torch_ext.enabled(), ())

    def test_options_of_a_config(self):
        config = serialization_config
        stock = config.get_config_copy(), config.get_hash()
        entries = dict(config._config)
        config.save.storage_alignment = 128
        self.addCleanup(setattr, config.save, "storage_alignment", 64)
        with torch_ext.enable("option"):
            self.assertEqual((config.save.level, config.save.names), (3, []))
            self.assertIs(config.get_type("save.level"), int)
            self.assertEqual(config.save.storage_alignment, 128)
            self.assertEqual(config.get_config_copy()["save.level"], 3)
            self.assertNotEqual(config.get_hash(), stock[1])
            with config.patch("save.level", 9), torch_ext.enable("method"):
                self.assertEqual(config.save.level, 9)
            self.assertEqual(config.save.level, 3)
            config.save.names.append("changed")
        self.assertFalse(hasattr(config.save, "level"))
        self.assertEqual(config.save.storage_alignment, 128)
        config.save.storage_alignment = 64
        self.assertEqual((config.get_config_copy(), config.get_hash()), stock)
        self.assertEqual(list(config._config), list(entries))
        for name, entry in entries.items():
            self.assertIs(config._config[name], entry)
        with torch_ext.enable("option"):
            self.assertEqual(config.save.names, [])

    def test_assignments_to_another_class_are_refused(self):
        before = snapshot()
        seam = dataclasses.replace(
            *_drift.seams_of(*_queue.select("option")),
            file="torch/nn/modules/linear.py",
            qualname="Identity",
        )
        with self.assertRaisesRegex(
            PatchError, "Expected torch.nn.modules.linear to be a config module"
        ):
            _graft.graft([*_queue._seams(_queue.select("method")), seam], [])
        self.assertFalse(hasattr(torch.nn.Identity, "level"))
        self.assertTrue(is_same(before, snapshot()))

    def test_dynamo_traces_a_patched_function(self):
        with torch_ext.enable("function"):
            f = torch.compile(
                lambda p: parameters_to_vector(p) + 1, backend="eager", fullgraph=True
            )
            self.assertEqual(
                f([torch.ones(2), torch.zeros(1)]), torch.tensor([2.0, 2.0, 1.0])
            )

    def test_threads(self):
        before = snapshot()
        linear, errors = torch.nn.Linear(1, 1), []
        stop = threading.Event()

        def toggle(names):
            for _ in range(5):
                with torch_ext.enable(*names):
                    if (
                        torch.nn.Module.zero_grad.__code__ is before["method"][0]
                        and "method" in names
                    ):
                        errors.append("method is off while a handle is live")

        def call():
            try:
                while not stop.is_set():
                    linear.zero_grad()
                    parameters_to_vector([linear.weight])
            except Exception as e:
                errors.append(repr(e))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            caller = threading.Thread(target=call)
            togglers = [
                threading.Thread(target=toggle, args=(n,))
                for n in (("method",), ("function",), GRAFTED)
            ]
            for thread in [caller, *togglers]:
                thread.start()
            for thread in togglers:
                thread.join()
        finally:
            stop.set()
            caller.join()
            sys.setswitchinterval(interval)
        self.assertEqual(errors, [])
        self.assertEqual(torch_ext.enabled(), ())
        self.assertTrue(is_same(before, snapshot()))


if __name__ == "__main__":
    run_tests()
