# Owner(s): ["module: serialization"]
"""Deferred tensors in modules, graphs, modes, threads and processes."""

import gc
import os
import pickle
import tempfile
import threading
import unittest
from multiprocessing.reduction import ForkingPickler

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset


class Counting:
    """A file of the bytes of ``tensor`` that counts what is read."""

    name = "weights.bin"

    def __init__(self, tensor):
        self.data = bytes(tensor.untyped_storage().tolist())
        self.size = len(self.data)
        self.nbytes = 0
        self.wait = None

    def read_into(self, start, out):
        if self.wait is not None:
            self.wait()
        self.nbytes += len(out)
        out[:] = self.data[start : start + len(out)]


def deferred(tensor, requires_grad=False):
    """A deferred tensor like ``tensor``, and the file that it reads."""
    from torch._load_lazy._deferred import DeferredStorage

    source = Counting(tensor)
    storage = DeferredStorage(source, (0, source.size), device=torch.device("cpu"))
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return storage.tensor(tensor.dtype, *place, requires_grad), source


def is_deferred(tensor):
    from torch._load_lazy._deferred import DeferredTensor

    return type(tensor) is DeferredTensor


def deferred_state_dict(module):
    pairs = {key: deferred(t.detach()) for key, t in module.state_dict().items()}
    return {key: tensor for key, (tensor, _) in pairs.items()}


def table(rows=8, columns=6):
    return torch.arange(rows * columns).float().view(rows, columns)


def add_one(x: torch.Tensor):
    return x + 1


class Rows(Dataset):
    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, i):
        return self.tensor[i] + 1


class TestModules(TestCase):
    def check_plain(self, module, expected):
        tensors = dict(module.state_dict(keep_vars=True))
        for key, value in expected.state_dict(keep_vars=True).items():
            self.assertIs(type(tensors[key]), type(value))
            self.assertEqual(tensors[key], value)
            self.assertEqual(tensors[key].requires_grad, value.requires_grad)

    @parametrize("swap", [False, True])
    @parametrize("how", ["copy", "assign", "reuse_tensors"])
    def test_load_state_dict_ends_with_plain_tensors(self, how, swap):
        expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        expected(torch.randn(5, 3))
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        x = torch.randn(5, 3)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        self.addCleanup(torch.__future__.set_swap_module_params_on_conversion, False)
        state_dict = deferred_state_dict(expected)
        module.load_state_dict(state_dict, **({how: True} if how != "copy" else {}))
        self.check_plain(module, expected)
        self.assertEqual(module(x), expected(x))

    def test_a_copying_load_keeps_no_second_copy(self):
        expected, module = nn.Linear(3, 4), nn.Linear(3, 4)
        state_dict = deferred_state_dict(expected)
        module.load_state_dict(state_dict)
        self.check_plain(module, expected)
        self.assertTrue(all(map(is_deferred, state_dict.values())))

    def test_assign_to_meta(self):
        expected, module = nn.BatchNorm1d(4), nn.BatchNorm1d(4, device="meta")
        state_dict = deferred_state_dict(expected)
        module.load_state_dict(state_dict, assign=True)
        self.check_plain(module, expected)
        self.assertIs(module.running_mean, state_dict["running_mean"])

    def test_a_parameter_is_deferred_until_it_is_registered(self):
        t, file = deferred(table())
        parameter = nn.Parameter(t)
        self.assertIsInstance(parameter, nn.Parameter)
        self.assertNotIsInstance(t, nn.Parameter)
        self.assertTrue(parameter.requires_grad and not t.requires_grad)
        self.assertEqual(file.nbytes, 0)
        module = nn.Module()
        module.weight = parameter
        self.assertIs(type(parameter), nn.Parameter)
        self.assertIs(module.weight, parameter)
        self.assertEqual(parameter.data_ptr(), t.data_ptr())
        module.register_buffer("buffer", deferred(table())[0][2])
        self.assertIs(type(module.buffer), torch.Tensor)
        module.other = nn.Buffer(deferred(table())[0])
        self.assertIsInstance(module.other, nn.Buffer)
        self.assertEqual(module.other, table())
        self.assertEqual(set(dict(module.named_buffers())), {"buffer", "other"})

    def test_ties_are_kept(self):
        t, _ = deferred(table())
        module = nn.Module()
        module.one = module.other = nn.Parameter(t)
        self.assertIs(module.one, module.other)
        self.assertEqual(len(list(module.parameters())), 1)

    def test_module_to_and_functional_call(self):
        module, x = nn.Linear(3, 4), torch.randn(2, 3)
        out = torch.func.functional_call(module, deferred_state_dict(module), (x,))
        self.assertEqual(out, module(x))
        other = nn.Linear(3, 4, device="meta")
        other.load_state_dict(deferred_state_dict(module), assign=True)
        self.assertEqual(other.double().state_dict(), module.double().state_dict())

    def test_compile(self):
        expected = nn.BatchNorm1d(6).eval()
        module = nn.BatchNorm1d(6, device="meta").eval()
        module.load_state_dict(deferred_state_dict(expected), assign=True)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        self.assertEqual(compiled(table()), expected(table()))
        compiled = torch.compile(add_one, backend="eager")
        self.assertEqual(compiled(deferred(table())[0]), table() + 1)
        self.assertEqual(compiled(deferred(table())[0][1:3]), table()[1:3] + 1)


class TestAutograd(TestCase):
    def test_a_leaf(self):
        t, _ = deferred(table(), requires_grad=True)
        (t * 2).sum().backward()
        self.assertEqual(t.grad, torch.full((8, 6), 2.0))
        parameter = nn.Parameter(deferred(table())[0])
        torch.optim.SGD([parameter], lr=1.0)
        (parameter * 2).sum().backward()
        self.assertEqual(parameter.grad, torch.full((8, 6), 2.0))
        self.assertIs(type(parameter), nn.Parameter)

    def test_of_a_view(self):
        t, _ = deferred(table(), requires_grad=True)
        row, other = t[2], t.T[1]
        self.assertTrue(row.requires_grad and not row.is_leaf)
        (row * 3).sum().backward()
        expected = torch.zeros(8, 6)
        expected[2] = 3
        self.assertEqual(t.grad, expected)  # and t has not been read
        (other * t.double()[:, 0]).sum().backward()
        expected[:, 1] += table()[:, 0]
        expected[:, 0] += table()[:, 1]
        self.assertEqual(t.grad, expected)
        self.assertIs(type(t), torch.Tensor)

    def test_a_write_that_is_recorded(self):
        scale = torch.tensor(2.0, requires_grad=True)
        t, _ = deferred(table())
        before = t[1]
        t[:2].mul_(scale)
        self.assertFalse(t.is_leaf)
        before.sum().backward()
        self.assertEqual(scale.grad, table()[1].sum())

    def test_a_write_to_what_is_saved_is_noticed(self):
        t, _ = deferred(table())
        row, same = t[1], t[1]
        out = torch.ones(6, requires_grad=True) * row
        same.add_(1)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            out.sum().backward()

    def test_hooks(self):
        t, _ = deferred(table(), requires_grad=True)
        seen = []
        t.register_hook(seen.append)
        t.register_post_accumulate_grad_hook(seen.append)
        t.sum().backward()
        self.assertEqual(seen[0], torch.ones(8, 6))
        self.assertIs(seen[1], t)


class TestModes(TestCase):
    def test_modes_see_plain_tensors(self):
        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                log.append((str(func), types))
                return func(*args, **kwargs or {})

        log, (t, file) = [], deferred(table())
        with Log():
            self.assertEqual((t[1:3] + 1).tolist(), (table()[1:3] + 1).tolist())
        self.assertEqual(log[0], ("aten.slice.Tensor", ()))
        self.assertIs(type(t), torch.Tensor)
        t, file = deferred(table())
        with torch.device("meta"):
            self.assertEqual(t.device.type, "cpu")
            row, wide, own = t[1], t[2].double(), t[3].clone()
            self.assertEqual({x.device.type for x in (row, wide, own)}, {"cpu"})
        self.assertEqual(file.nbytes, 24)
        self.assertEqual(row + wide + own, table()[1:4].sum(0).double())

    def test_fake_tensors(self):
        t, _ = deferred(table())
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.assertIsInstance(t + 1, FakeTensor)
        self.assertEqual(t, table())
        fake = FakeTensorMode().from_tensor(deferred(table())[0])
        self.assertEqual((fake.shape, fake.device.type), ((8, 6), "cpu"))
        t, _ = deferred(table())
        self.assertEqual(torch.empty_like(t, device="meta").shape, (8, 6))
        self.assertEqual(t.to("meta").device.type, "meta")

    def test_inference_mode(self):
        t, _ = deferred(table())
        with torch.inference_mode():
            row, wide, own = t[1], t.double(), t[3].clone()
            self.assertEqual(row + wide[1] + own, table()[[1, 1, 3]].sum(0).double())
            inside, _ = deferred(table())
        self.assertEqual(row + 1, table()[1] + 1)
        self.assertEqual(inside[1] + 1, table()[1] + 1)
        self.assertFalse(t.is_inference())
        t.requires_grad_().sum().backward()
        self.assertEqual(t.grad, torch.ones(8, 6))

    def test_function_transforms(self):
        t, _ = deferred(table())
        x = table()
        self.assertEqual(torch.func.vmap(lambda row: row * t[1])(x), x * x[1])
        t, _ = deferred(x)
        self.assertEqual(torch.func.grad(lambda y: (y * t).sum())(x), x)

    def test_what_gets_past_is_refused_or_has_no_data(self):
        parameter = nn.Parameter(table())
        for use, text in (
            (lambda t: setattr(parameter, "data", t), "incompatible tensor type"),
            (lambda t: torch.utils.dlpack.to_dlpack(t), "meta"),
            (lambda t: torch.jit.script(add_one)(t), "has not been read"),
            (lambda t: torch.func.vmap(torch.sin)(t), "has not been read"),
            (lambda t: (parameter * 1).backward(t), "got meta"),
            (lambda t: torch.Tensor.new_tensor(parameter, t).tolist(), "no data"),
            (lambda t: without_functions(lambda: table().copy_(t)), "no data"),
            (lambda t: without_functions(t.numpy), "meta"),
        ):
            t, file = deferred(table())
            with self.assertRaisesRegex(Exception, text):
                use(t)
            self.assertEqual(file.nbytes, 0)
            self.assertEqual(t + 1, table() + 1)

    def test_another_subclass(self):
        class Other(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs or {})

        t, _ = deferred(table())
        other = torch.ones(8, 6).as_subclass(Other)
        self.assertEqual(t + other, table() + 1)
        t, _ = deferred(table())
        t[2] + 1
        self.assertEqual(torch.add(t[2:4], other[:2]), table()[2:4] + 1)
        self.assertIs(type(t[1] + 0), torch.Tensor)


def without_functions(use):
    with torch._C.DisableTorchFunctionSubclass():
        return use()


class TestElsewhere(TestCase):
    @parametrize("seed", range(20))
    def test_first_use_in_many_threads(self, seed):
        t, _ = deferred(table())
        barrier, results = threading.Barrier(6), {}

        def work(i):
            barrier.wait()
            part = t if i % 2 else t[i : i + 2]
            results[i] = t.shape, (part + 1).tolist(), t[3:5].double().tolist()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(6):
            part = table() if i % 2 else table()[i : i + 2]
            expected = (8, 6), (part + 1).tolist(), table()[3:5].tolist()
            self.assertEqual(results[i], expected)
        self.assertIs(type(t), torch.Tensor)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_forked_while_another_thread_reads(self):
        t, file = deferred(table())
        reading, go_on = threading.Event(), threading.Event()
        file.wait = lambda: (reading.set(), go_on.wait())
        thread = threading.Thread(target=lambda: t.sum())
        thread.start()
        reading.wait()
        pid = os.fork()
        if not pid:
            file.wait = None
            os._exit(int(t.tolist() != table().tolist()))
        go_on.set()
        thread.join()
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual(t, table())

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_data_loader_workers(self):
        t, file = deferred(table())
        loader = DataLoader(
            Rows(t), batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        self.assertEqual(torch.cat(list(loader)), table() + 1)
        self.assertEqual(file.nbytes, 0)

    def test_another_process_reads_for_itself(self):
        from torch._load_lazy._deferred import DeferredStorage
        from torch._load_lazy._source import FileSource

        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(bytes(4) + Counting(table()).data)
        self.addCleanup(os.unlink, file.name)
        storage = DeferredStorage(
            FileSource(file.name), (4, 192), device=torch.device("cpu")
        )
        t = storage.tensor(torch.float32, 0, (8, 6), (6, 1))
        sent = [t, t[2], nn.Parameter(t), t.double(), Rows(t)]
        one, row, parameter, wide, rows = pickle.loads(ForkingPickler.dumps(sent))
        self.assertTrue(all(map(is_deferred, (one, row, parameter, wide, t))))
        self.assertIs(rows.tensor, one)
        self.assertIsInstance(parameter, nn.Parameter)
        self.assertEqual(wide[1] + 0, table()[1].double())
        row.zero_()
        self.assertEqual(one[1:3].tolist(), [*table()[1:2].tolist(), [0.0] * 6])
        self.assertEqual(t, table())

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_what_has_been_read_is_shared(self):
        t, _ = deferred(table())
        t[2].zero_()
        fork = torch.multiprocessing.get_context("fork")
        queue = fork.Queue()
        process = fork.Process(target=lambda: queue.get().add_(1))
        process.start()
        queue.put(t)
        process.join()
        self.assertEqual(t[1:4, 0].tolist(), [7, 1, 19])

    def test_deep_views(self):
        t, _ = deferred(table())
        view = t
        for _ in range(5000):
            view = view[:]
        self.assertEqual(view + 1, table() + 1)
        del view
        gc.collect()


instantiate_parametrized_tests(TestModules)
instantiate_parametrized_tests(TestElsewhere)


if __name__ == "__main__":
    run_tests()
