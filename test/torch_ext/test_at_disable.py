"""What the new files of a patch have running ends when the patch is switched off."""

import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest

import torch
from torch.testing._internal.common_utils import run_tests, TestCase
from torch.utils.serialization import config

import torch_ext


# What patches could leave behind in a process. New names are left out: what is imported stays imported.
WHOLE_PROCESS = """
import copyreg, gc, io, os, signal, sys, tempfile, threading, types, warnings
from multiprocessing.reduction import ForkingPickler

import torch
import torch._dynamo  # replaces functions of torch, such as torch.manual_seed, when it is imported
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.multiprocessing, torch.utils.serialization
from torch import nn

import torch_ext


def parts(function):
    return function, function.__code__, function.__defaults__, dict(function.__kwdefaults__ or {})


def namespace(space):
    found = {}
    for name, value in list(vars(space).items()):
        if type(value) in (staticmethod, classmethod):
            value = value.__func__
        # NB: not isinstance, which asks lazy objects such as CUDA's plan cache.
        if type(value) is types.FunctionType:
            found[name] = parts(value)
        elif type(value) in (type, types.BuiltinFunctionType, property):
            found[name] = value
    return found


def functions(modules):
    spaces = {}
    for module in modules:
        spaces[module.__name__] = namespace(module)
        for value in list(vars(module).values()):
            if issubclass(type(value), type) and value.__module__ == module.__name__:
                spaces[f"{module.__name__}.{value.__qualname__}"] = namespace(value)
    return spaces


def hooks():
    return {n: dict(v) for n, v in vars(nn.modules.module).items() if n.startswith("_global_") and isinstance(v, dict)}


def snapshot(modules):
    return {
        "functions": functions(modules),
        "hooks": hooks(),
        "torch function modes": torch.overrides._get_current_function_mode_stack(),
        "generator": (torch.default_generator, torch.get_rng_state().tolist()),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "threads": {t.name for t in threading.enumerate()},
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "copyreg": dict(copyreg.dispatch_table),
        "import": (list(sys.meta_path), list(sys.path_hooks)),
        "gc": list(gc.callbacks),
        "warnings": list(warnings.filters),
        "standard library": functions([threading, warnings, io, os, copyreg, sys.modules["multiprocessing.reduction"]]),
        "default device": torch.get_default_device(),
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        t = threading.Thread(target=lambda: nn.Linear(2, 2))
        t.start()
        t.join()


class Raises(Module):
    def __init__(self):
        super().__init__()
        raise KeyError("in the constructor")


def use(folder):
    path = os.path.join(folder, "m.pt")
    torch.save(Module().state_dict(), path)
    for how in ({"mmap": True}, {"mmap": False}):
        loaded = torch.load(path, lazy=True, **how)
        with torch.device("meta"):
            module = Module()
        module.load_state_dict(loaded, reuse_tensors=True)
        nn.utils.materialize_module(module)
    for make in (nn.utils.deferred_init, lambda f: nn.utils.meta_init()(f)()):
        make(Module)
        try:
            make(Raises)
        except KeyError:
            pass
        else:
            raise AssertionError("expected KeyError")
    nn.utils.materialize_module(nn.utils.deferred_init(Module))
    torch.save(module.state_dict(), path)


with tempfile.TemporaryDirectory() as folder:
    state = torch.get_rng_state()
    Module(), torch.save(torch.ones(2), os.path.join(folder, "warm"))
    torch.set_rng_state(state)
    modules = [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] == "torch" and type(m) is types.ModuleType]
    before = snapshot(modules)
    torch_ext.enable()
    assert snapshot(modules)["functions"] != before["functions"], "expected the patches to be seen"
    use(folder)
    gc.collect()
    torch_ext.disable()
    torch.set_rng_state(state)
    after = snapshot(modules)
for key in ("functions", "standard library"):
    for space, names in after[key].items():
        after[key][space] = {name: value for name, value in names.items() if name in before[key][space]}
for key, value in before.items():
    if after[key] != value:
        print(key, "differs")
        if isinstance(value, dict):
            for name in {*value, *after[key]}:
                old, new = value.get(name), after[key].get(name)
                if old != new:
                    print("   ", name, ":", str(old)[:300], "->", str(new)[:300])
        else:
            print("   ", value, "->", after[key])
"""


def is_watched():
    return any("leases" in thread.name for thread in threading.enumerate())


class TestAtDisable(TestCase):
    @unittest.skipIf(sys.platform != "linux", "leases are Linux's")
    @unittest.skipIf("TORCH_EXT_TREE" in os.environ, "a tree's patches stay on")
    def test_leases(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "m.pt")
            torch.save({"x": torch.ones(3)}, path)
            with torch_ext.enable("load_lazy"):
                config.load.lazy_leases = 8
                loaded = torch.load(path, lazy=True)
                self.assertTrue(is_watched())
            end = time.monotonic() + 20
            while is_watched() and time.monotonic() < end:
                time.sleep(0.01)
            self.assertFalse(is_watched())
            self.assertEqual(loaded, {"x": torch.ones(3)})

    @unittest.skipIf("TORCH_EXT_TREE" in os.environ, "a tree's patches stay on")
    @unittest.skipIf(sys.platform != "linux", "reads /proc")
    def test_the_whole_process_is_as_before(self):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WHOLE_PROCESS)],
            capture_output=True,
            text=True,
        )
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)


if __name__ == "__main__":
    run_tests()
