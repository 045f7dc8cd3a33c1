# Owner(s): ["module: nn"]
"""Law: what a meta block does, does not depend on what the names in ``torch`` held when the process opened its first.

transformers, accelerate and vLLM replace factory functions by name (``setattr(torch, name, wrapper)``) while they load
a model, and open meta blocks meanwhile. A table of functions that the first block fills from these names keeps the
wrappers, and no later block knows the builtin functions again. So each case here runs in a fresh process: it wraps one
factory (or all), opens a block for the first time, unwraps, and tells what later blocks do. That has to be what they do
in a process that never wrapped anything.
"""

import functools
import json
import os
import subprocess
import sys

import torch
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


# What libraries replace, and what else makes tensors: how each is called.
FACTORIES = {
    "arange": (4,),
    "as_tensor": ([1.0, 2.0],),
    "asarray": ([1.0, 2.0],),
    "empty": (2,),
    "empty_like": (),
    "empty_strided": ((2,), (1,)),
    "eye": (2,),
    "full": ((2,), 3.0),
    "full_like": (3.0,),
    "hann_window": (4,),
    "linspace": (0, 1, 4),
    "logspace": (0, 1, 4),
    "ones": (2,),
    "ones_like": (),
    "rand": (2,),
    "rand_like": (),
    "randint": (4, (2,)),
    "randn": (2,),
    "randn_like": (),
    "randperm": (4,),
    "tensor": ([1.0, 2.0],),
    "tril_indices": (2, 2),
    "zeros": (2,),
    "zeros_like": (),
}
RANDOM = {"rand", "rand_like", "randint", "randn", "randn_like", "randperm"}
EMPTY = {"empty", "empty_like", "empty_strided"}
CONSTRUCTORS = """
import json
import torch.utils._device as device
print(json.dumps(sorted(f.__name__ for f in device._device_constructors())))
"""
BLOCKS = ["device", "meta_init", "deferred_init"]


def opened(block):
    """The context of that name."""
    if block == "device":
        return torch.device("meta")
    return getattr(torch.nn.utils, block)()


def wrapped(function):
    """As transformers wraps it: an argument is added, the name stays."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def called(name, **options):
    args = FACTORIES[name]
    if name.endswith("_like"):
        # NB: what the block is to know has to come from inside of it.
        args = (torch.ones(2, device="cpu"), *args)
    return getattr(torch, name)(*args, **options)


def told(call):
    """What a call returns or how it fails, as JSON can have it."""
    try:
        return call()
    except Exception as e:
        return f"raised {type(e).__name__}"


def answers(name):
    """What a block tells of a tensor that this factory makes: where it is, and its values."""
    found = {}
    for options in ({}, {"device": "cpu"}):
        made = told(lambda options=options: called(name, **options))
        key = f"{name}({'cpu' if options else ''})"
        if isinstance(made, str):
            found[key] = made
            continue
        found[key] = [str(made.device), str(made.dtype), type(made).__name__]
        if name not in RANDOM | EMPTY:
            found[key].append(told(made.tolist))
            found[key].append(told((made + 1).tolist))
    return found


def child(block, names):
    """Open a first block while ``names`` are wrapped; print what blocks of every kind do afterwards."""
    before = {name: getattr(torch, name) for name in names}
    for name, function in before.items():
        setattr(torch, name, wrapped(function))
    try:
        with opened(block):
            torch.nn.Linear(2, 3)
            for name in names:
                told(lambda name=name: called(name, device="cpu"))
                told(lambda name=name: called(name, device="cpu").tolist())
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
    found = {}
    for later in BLOCKS:
        with opened(later):
            found[later] = {
                k: v for name in FACTORIES for k, v in answers(name).items()
            }
    print(json.dumps(found))


@functools.cache
def in_a_fresh_process(block, names):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, block, *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXT_WRAPPED_CHILD": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


class TestWrappedFactories(TestCase):
    @parametrize("block", BLOCKS)
    def test_later_blocks_do_as_ever(self, block):
        expected = in_a_fresh_process(block, ())
        self.assertEqual(in_a_fresh_process(block, tuple(FACTORIES)), expected)

    def test_the_order_of_blocks_does_not_matter(self):
        first, *others = (in_a_fresh_process(block, ()) for block in BLOCKS)
        for other in others:
            self.assertEqual(other, first)

    def test_real_blocks_know_the_constructors_of_stock(self):
        from torch.nn.utils._deferred_init._calls import DEVICE_CONSTRUCTORS

        run = subprocess.run(
            [sys.executable, "-c", CONSTRUCTORS],
            env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        # NB: nested_tensor is written in Python, and no mode sees it.
        names = {*json.loads(run.stdout)} - {"nested_tensor"}
        self.assertEqual({f.__name__ for f in DEVICE_CONSTRUCTORS}, names)

    def test_a_real_block_does_not_fill_the_table_of_stock(self):
        # What it would put there are the wrappers, and no default device would have an effect later.
        torch.utils._device._device_constructors.cache_clear()
        with torch.device("meta"), torch.device("cpu"):
            self.assertEqual(torch.ones(2).device.type, "cpu")
        info = torch.utils._device._device_constructors.cache_info()
        self.assertEqual(info.currsize, 0)

    def test_constants_are_known(self):
        found = in_a_fresh_process("device", tuple(FACTORIES))
        for block in BLOCKS:
            # The values that a constructor is told, whatever was wrapped before.
            self.assertEqual(found[block]["linspace(cpu)"][3][-1], 1.0, block)
            self.assertEqual(
                found[block]["arange(cpu)"][3:], [[0, 1, 2, 3], [1, 2, 3, 4]]
            )
            self.assertEqual(found[block]["ones(cpu)"][3], [1.0, 1.0])


instantiate_parametrized_tests(TestWrappedFactories)


if __name__ == "__main__":
    if "TORCH_EXT_WRAPPED_CHILD" in os.environ:
        import torch_ext

        if not hasattr(torch.nn.utils, "meta_init"):
            torch_ext.enable()
        child(sys.argv[1], sys.argv[2:])
    else:
        run_tests()
