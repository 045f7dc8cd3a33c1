# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) is torch.load(f)."""

import contextlib
import gc
import os
import pickle
import threading
import warnings
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from load_lazy_case import (
    Commands,
    described,
    DTYPES,
    LazyTestCase,
    state_dicts,
    Subclass,
    tensors_in,
    Unlisted,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


class TestLoadLazy(LazyTestCase):
    # The law

    @settings(max_examples=100, deadline=None)
    @given(state_dicts(), st.booleans())
    def test_equals_load(self, state, weights_only):
        self.save(state)
        # Several tensors over one empty record are left to torch's own unpickler.
        has_empty = not all(tensor.numel() for tensor in tensors_in(state))
        with contextlib.nullcontext() if has_empty else self.by_itself():
            self.assertLoadsAlike(self.path, weights_only=weights_only)

    def test_empty_tensors(self):
        state = {str(i): torch.empty(0, i) for i in range(80)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
        self.assertLoadsAlike(self.save([state["1"], state["1"].t()]))

    @parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        state = {str(i): torch.ones(2, 3).to(dtype) for i in range(80)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))

    @parametrize("ndim", range(6))
    def test_rows(self, ndim):
        size = (2, 3, 1, 2, 2)[:ndim]
        state = {str(i): torch.full(size, i) for i in range(600)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
            self.assertLoadsAlike(self.save([{"x": t} for t in state.values()]))
            self.assertLoadsAlike(self.save(list(state.values())))

    def test_ties_and_views(self):
        base = torch.arange(64.0).view(8, 8)
        more = {f"more.{i}": torch.full((i % 5,), i) for i in range(100)}
        state = {"a": base, **more, "same": base, "t": base.t(), "row": base[2:3, 1:]}
        self.save(state)
        with self.by_itself():
            lazy = torch.load(self.path, lazy=True)
            self.assertLoadsAlike(self.path)
        self.assertIs(lazy["a"], lazy["same"])
        self.assertEqual(lazy["t"].data_ptr(), lazy["a"].data_ptr())
        lazy["row"].zero_()
        self.assertEqual(lazy["a"][2, 1:], torch.zeros(7))
        self.assertEqual(lazy["a"]._version, 1)

    def test_model_and_optimizer(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
            lazy = torch.load(self.path, lazy=True)
        model.load_state_dict(lazy["model"], assign=True)
        optimizer.load_state_dict(lazy["optimizer"])

    def test_cycles_and_depth(self):
        nested = shared = [torch.ones(2)]
        for _ in range(5000):
            nested = [nested]
        shared.append(shared)
        # torch.save itself recurses, so that depth is written by hand.
        data = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
        with self.by_itself():
            lazy = torch.load(self.save({"x": shared, "y": shared}), lazy=True)
            self.assertIs(lazy["x"], lazy["y"])
            self.assertIs(lazy["x"][1], lazy["x"])
            deep = torch.load(self.rewrite({"data.pkl": data}), lazy=True)
        for _ in range(4999):
            (deep,) = deep
        self.assertEqual(deep, [])

    # What torch's own unpickler does

    @parametrize("weights_only", [True, False])
    def test_other_tensors(self, weights_only):
        state = {
            "sparse": torch.eye(3).to_sparse(),
            "conj": torch.ones(2, dtype=torch.complex64).conj(),
            "named": torch.ones(2),
            "plain": torch.ones(2),
            "meta": torch.ones(2, device="meta"),
        }
        state["named"].note = "hello"
        path = self.save(state)
        eager = torch.load(path, weights_only=weights_only)
        lazy = torch.load(path, lazy=True, weights_only=weights_only)
        for name in ("sparse", "conj"):
            self.assertEqual(eager.pop(name), lazy.pop(name))
        self.assertEqual(lazy["named"].note, "hello")
        self.assertFalse(lazy["plain"].untyped_storage().resizable())
        self.assertEqual(lazy.pop("meta").device.type, "meta")
        eager.pop("meta")
        self.assertEqual(described(eager), described(lazy))

    def test_storage_in_the_result(self):
        path = self.save({"s": torch.arange(3.0).untyped_storage()})
        with warnings.catch_warnings(record=True):
            lazy = torch.load(path, lazy=True)["s"].tolist()
            self.assertEqual(lazy, torch.load(path)["s"].tolist())

    def test_classes(self):
        path = self.save(
            {"x": Unlisted(torch.ones(2)), "y": torch.ones(2).as_subclass(Subclass)}
        )
        lazy = torch.load(path, lazy=True, weights_only=False)
        self.assertEqual(lazy["x"].value, torch.ones(2))
        self.assertIs(type(lazy["y"]), Subclass)
        with torch.serialization.safe_globals([Unlisted, Subclass]):
            lazy = torch.load(path, lazy=True)
        self.assertIs(type(lazy["y"]), Subclass)

    def test_refusals_are_torchs(self):
        for value in (
            Unlisted(1),
            Commands(),
            {"x": [Commands()]},
            torch.ones(1).as_subclass(Subclass),
        ):
            path = self.save(value)
            with self.assertRaises(pickle.UnpicklingError) as stock:
                torch.load(path)
            with self.assertRaises(pickle.UnpicklingError) as lazy:
                torch.load(path, lazy=True)
            self.assertEqual(str(lazy.exception), str(stock.exception))
        self.assertFalse(os.path.exists("was_here"))

    @parametrize("protocol", [2, 3, 4, 5])
    def test_protocols(self, protocol):
        path = self.save({"x": [torch.ones(3)], "y": "z"}, pickle_protocol=protocol)
        self.assertLoadsAlike(path, weights_only=False)

    # Arguments and surroundings

    @parametrize("kind", [str, Path, os.fsencode])
    def test_paths(self, kind):
        self.save({"x": torch.ones(2)})
        self.assertEqual(torch.load(kind(self.path), lazy=True)["x"], torch.ones(2))

    def test_arguments(self):
        path = self.save({"x": torch.ones(2)})
        for kwargs in (
            {"mmap": True},
            {"map_location": "cpu"},
            {"map_location": torch.device("cpu")},
        ):
            with self.by_itself():
                self.assertLoadsAlike(path, **kwargs)
        with self.assertRaisesRegex(RuntimeError, "explicit pickle_module"):
            torch.load(path, pickle_module=pickle, weights_only=True, lazy=True)

    def test_environment(self):
        path = self.save(Unlisted(3))
        environment = mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
        with (
            environment,
            self.assertWarnsRegex(UserWarning, "forcing weights_only=False"),
        ):
            self.assertEqual(torch.load(path, lazy=True).value, 3)
        environment = mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
        with environment, self.assertRaises(pickle.UnpicklingError):
            torch.load(path, lazy=True, weights_only=False)

    def test_contexts(self):
        path = self.save({"x": torch.ones(2)})
        with torch.device("meta"):
            self.assertEqual(torch.load(path, lazy=True)["x"].device.type, "cpu")
        with torch.inference_mode():
            self.assertTrue(torch.load(path, lazy=True)["x"].is_inference())
        with FakeTensorMode():
            self.assertIsInstance(torch.load(path, lazy=True)["x"], FakeTensor)

    def test_global_state(self):
        good, bad = self.save({"x": torch.eye(2).to_sparse()}), self.path + "bad"
        torch.save([torch.eye(2).to_sparse(), Unlisted(1)], bad)

        def state():
            local = torch.serialization._serialization_tls
            return (
                gc.isenabled(),
                local.map_location,
                torch.get_default_device(),
                torch.is_grad_enabled(),
            )

        before = state()
        for path in (good, bad):
            with contextlib.suppress(pickle.UnpicklingError):
                torch.load(path, lazy=True, map_location="cpu")
            self.assertEqual(state(), before)

    def test_threads(self):
        path = self.save({str(i): torch.full((9,), i) for i in range(300)})
        results = []

        def load():
            for _ in range(20):
                lazy = torch.load(path, lazy=True)
                results.append(all(t[3] == int(k) for k, t in lazy.items()))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [True] * 80)
        self.assertTrue(gc.isenabled())


instantiate_parametrized_tests(TestLoadLazy)

if __name__ == "__main__":
    run_tests()
