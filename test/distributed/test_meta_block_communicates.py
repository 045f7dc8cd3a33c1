# Owner(s): ["oncall: distributed"]
"""Two ranks communicate inside of a meta block and of ``deferred_init``: each gets what it gets outside of them.

What is sent is made inside, on an explicit device, as stock's ``with torch.device("meta"):`` leaves it real.
"""

import shutil
import tempfile
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.common_distributed import MultiProcContinuousTest
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


BLOCKS = {
    "none": nullcontext,
    "device": lambda: torch.device("meta"),
    "meta_init": lambda: nn.utils.meta_init(),
    "deferred_init": lambda: nn.utils.deferred_init(),
}


def constant(*values):
    """A tensor that is other on each rank."""
    return torch.tensor(values, device="cpu") + 10.0 * dist.get_rank()


def empty():
    return torch.zeros(2, device="cpu")


def asynchronous():
    value = constant(1, 2)
    dist.all_reduce(value, async_op=True).wait()
    return value


def in_place(collective, **kwargs):
    value = constant(1, 2)
    collective(value, **kwargs)
    return value


def gathered():
    values = [empty(), empty()]
    dist.all_gather(values, constant(1, 2))
    return values


def gathered_on_one():
    values = [empty(), empty()] if dist.get_rank() == 0 else None
    dist.gather(constant(1, 2), values)
    return values


def gathered_in_one():
    value = torch.zeros(4, device="cpu")
    dist.all_gather_into_tensor(value, constant(1, 2))
    return value


def reduced_and_scattered():
    value = torch.zeros(1, device="cpu")
    dist.reduce_scatter_tensor(value, constant(1, 2))
    return value


def scattered():
    value = empty()
    dist.scatter(
        value, [constant(1, 2), constant(3, 4)] if dist.get_rank() == 0 else None
    )
    return value


def sent():
    value = constant(5, 6)
    if dist.get_rank() == 0:
        dist.send(value, 1)
    else:
        dist.recv(value, 0)
    return value


def with_a_constant():
    """What came from others is computed with."""
    value = in_place(dist.all_reduce)
    return value * 2 + constant(1, 1)


def objects():
    values = [None, None]
    dist.all_gather_object(values, {"rank": dist.get_rank(), "tensor": constant(1)})
    return values


def object_list():
    values = [dist.get_rank(), constant(3)]
    dist.broadcast_object_list(values, src=1)
    return values


def scattered_objects():
    values = [None]
    dist.scatter_object_list(values, ["a", {"b": 1}] if dist.get_rank() == 0 else None)
    return values


def mesh():
    made = init_device_mesh("cpu", (2,), mesh_dim_names=("x",))
    assert made.mesh.device.type == "cpu"
    return [made.mesh, made.get_coordinate(), made["x"].size(), made.get_local_rank()]


CALLS = {
    "all_reduce": lambda: in_place(dist.all_reduce),
    "all_reduce, async": asynchronous,
    "all_reduce, then computed": with_a_constant,
    "reduce": lambda: in_place(dist.reduce, dst=1),
    "broadcast": lambda: in_place(dist.broadcast, src=1),
    "all_gather": gathered,
    "gather": gathered_on_one,
    "all_gather_into_tensor": gathered_in_one,
    "reduce_scatter_tensor": reduced_and_scattered,
    "scatter": scattered,
    "send and recv": sent,
    "barrier": lambda: dist.barrier() or 1,
    "functional all_reduce": lambda: functional.all_reduce(constant(1, 2), "sum", dist.group.WORLD) + 0,
    "functional all_gather": lambda: functional.all_gather_tensor(constant(1, 2), 0, dist.group.WORLD) + 0,
    "all_gather_object": objects,
    "broadcast_object_list": object_list,
    "scatter_object_list": scattered_objects,
    "init_device_mesh": mesh,
}  # fmt: skip


def plain(value):
    """``value`` with lists for tensors: read where this is called."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@instantiate_parametrized_tests
class TestMetaBlockCommunicates(MultiProcContinuousTest):
    world_size = 2
    timeout = timedelta(seconds=30)  # of what would hang

    @classmethod
    def backend_str(cls):
        return "gloo"

    @parametrize("block", list(BLOCKS))
    def test_collectives(self, block):
        for name, call in CALLS.items():
            expected = plain(call())
            with BLOCKS[block]():
                self.assertEqual(plain(call()), expected, msg=name)
        self.assertEqual(plain(CALLS["all_reduce"]()), [12.0, 14.0])

    @parametrize("block", list(BLOCKS))
    def test_a_buffer_has_what_was_reduced(self, block):
        with BLOCKS[block]():
            module = nn.Module()
            module.register_buffer("reduced", in_place(dist.all_reduce))
            module.register_buffer("doubled", module.reduced * 2)
            self.assertEqual(module.doubled.tolist(), [24.0, 28.0])
        self.assertEqual(module.reduced.is_meta, block != "none")
        nn.utils.materialize_module(module)
        self.assertEqual(plain(list(module.buffers())), [[12, 14], [24, 28]])

    @parametrize("block", list(BLOCKS))
    def test_distributed_checkpoints(self, block):
        folders = [tempfile.mkdtemp() if self.rank == 0 else None]
        dist.broadcast_object_list(folders)
        (folder,) = folders
        saved = {"a": constant(1, 2)[:1], "b": torch.arange(3.0), "n": 7}
        with BLOCKS[block]():
            made = {
                "a": constant(1, 2)[:1],
                "b": torch.arange(3.0, device="cpu"),
                "n": 7,
            }
            dcp.save(saved, checkpoint_id=f"{folder}/outside")
            dcp.save(made, checkpoint_id=f"{folder}/inside")
            for name in ("outside", "inside"):
                loaded = {
                    "a": torch.zeros(1, device="cpu"),
                    "b": torch.zeros(3, device="cpu"),
                    "n": 0,
                }
                dcp.load(loaded, checkpoint_id=f"{folder}/{name}")
                self.assertEqual(plain(loaded["b"]), [0, 1, 2], msg=name)
                self.assertEqual(loaded["n"], 7)
        for name in ("outside", "inside"):  # read by who is outside
            loaded = {"b": torch.zeros(3), "n": 0}
            dcp.load(loaded, checkpoint_id=f"{folder}/{name}")
            self.assertEqual(plain(loaded), {"b": [0, 1, 2], "n": 7})
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run_tests()
