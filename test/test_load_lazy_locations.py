# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) keeps the meaning of map_location, and of the modes around it."""

import io
import unittest

import torch
from load_lazy_case import deferred_tensor, LazyTestCase, place_of
from load_lazy_files import FORMATS, legacy, Opened, zipped
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


class TestLoadLazyLocations(LazyTestCase):
    def setUp(self):
        super().setUp()
        base = torch.arange(6.0).view(2, 3)
        self.state = {
            "x": base,
            "y": torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
            "z": torch.ones(2, dtype=torch.complex64),
            "t": base.t(),
        }

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_cpu(self, write, give):
        for map_location in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, {"x": "y"}):
            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertActsAlike(torch.load(io.BytesIO(write(self.state))), lazy)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_callable(self, write, give):
        for result in (lambda s: s, lambda s: s.clone(), lambda s: None):
            calls = []

            def map_location(storage, location, calls=calls, result=result):
                calls.append((storage.nbytes(), location))
                return result(storage)

            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertEqual(calls, [(24, "cpu"), (24, "cpu"), (16, "cpu")])
            self.assertActsAlike(torch.load(io.BytesIO(write(self.state))), lazy)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    def test_errors_of_callables(self, give):
        def map_location(storage, location):
            raise error

        for state in (self.state, {"s": torch.eye(2).to_sparse()}):
            for error in (ValueError("mine"), TypeError(3), RuntimeError(), KeyError()):
                f = give(Opened(self.folder), zipped(state))
                with self.assertRaises(type(error)) as caught:
                    torch.load(f, lazy=True, map_location=map_location)
                self.assertIs(caught.exception, error)

    def test_callable_is_called_once(self):
        state = {"x": torch.ones(2), "y": torch.ones(3), "s": torch.eye(2).to_sparse()}
        path = Opened(self.folder).path_(zipped(state))
        calls = []
        stock = []
        torch.load(path, lazy=True, map_location=lambda s, _: calls.append(s.nbytes()))
        torch.load(path, map_location=lambda s, _: stock.append(s.nbytes()))
        self.assertEqual(calls, stock)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_meta(self, write, give):
        for map_location in ("meta", torch.device("meta"), {"cpu": "meta"}):
            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertIs(type(lazy["y"]), torch.nn.Parameter)
            for name, tensor in self.state.items():
                self.assertEqual(lazy[name].device.type, "meta")
                meta = tensor.detach().to("meta")
                self.assertEqual(place_of(lazy[name].detach()), place_of(meta))
            shared = lazy["x"].untyped_storage()._cdata
            self.assertEqual(lazy["t"].untyped_storage()._cdata, shared)

    def test_meta_has_offsets(self):
        path = Opened(self.folder).path_(zipped(self.state))
        offsets = lambda state: [
            t.untyped_storage()._checkpoint_offset for t in state.values()
        ]
        lazy = torch.load(path, lazy=True, map_location="meta")
        self.assertEqual(offsets(lazy), offsets(torch.load(path, map_location="meta")))

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    @parametrize("map_location", ["cuda:77", "nowhere", b"cpu", {"cpu": "cuda:77"}])
    def test_no_such_device(self, write, give, map_location):
        errors = []
        for lazy in ({}, {"lazy": True}):
            f = give(Opened(self.folder), write(self.state))
            with self.assertRaises(Exception) as caught:
                torch.load(f, map_location=map_location, **lazy)
            errors.append((type(caught.exception), str(caught.exception)))
        self.assertEqual(*errors)

    @unittest.skipIf(not torch.cuda.is_available(), "needs CUDA")
    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_cuda(self, write, give):
        data = write(self.state)
        for map_location in ("cuda", torch.device("cuda", 0), {"cpu": "cuda:0"}):
            f = give(Opened(self.folder), data)
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertIs(type(lazy["x"]), deferred_tensor())
            eager = torch.load(io.BytesIO(data), map_location=map_location)
            for name, tensor in eager.items():
                self.assertEqual(lazy[name].device, tensor.device)
                self.assertEqual(lazy[name] + 0, tensor + 0)

    def test_own_deserializer(self):
        before = list(torch.serialization._package_registry)

        def restore():
            torch.serialization._package_registry[:] = before

        self.addCleanup(restore)
        torch.serialization.register_package(
            5,
            lambda s: None,
            lambda s, location: s.clone() if location == "x" else None,
        )
        for give in (Opened.path_, Opened.bytes_io):
            f = give(Opened(self.folder), zipped(self.state))
            lazy = torch.load(f, lazy=True, map_location="x")
            self.assertTrue(lazy["x"].untyped_storage().resizable())
            self.assertEqual(lazy["x"], self.state["x"])

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", [zipped, legacy])
    def test_surroundings(self, write, give):
        data = write(self.state)
        give_it = lambda: give(Opened(self.folder), data)
        with FakeTensorMode():
            lazy = torch.load(give_it(), lazy=True)
        self.assertIsInstance(lazy["x"], FakeTensor)
        self.assertEqual(lazy["x"].size(), (2, 3))
        with torch.serialization.skip_data():
            lazy = torch.load(give_it(), lazy=True)
        self.assertEqual(place_of(lazy["x"]), place_of(self.state["x"]))
        with torch.device("meta"):
            self.assertEqual(torch.load(give_it(), lazy=True)["x"].device.type, "cpu")
        with torch.inference_mode():
            self.assertTrue(torch.load(give_it(), lazy=True)["x"].is_inference())


instantiate_parametrized_tests(TestLoadLazyLocations)

if __name__ == "__main__":
    run_tests()
