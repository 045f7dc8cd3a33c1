# Owner(s): ["oncall: distributed"]
"""An error of one rank is one of all ranks, with its cause, and no rank loads."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from load_sharded_case import full_of, ShardedTestCase
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import distribute_tensor, Shard
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


def damage(state_dict, how):
    if how == "missing key":
        del state_dict["weight"]
    elif how == "wrong shape":
        state_dict["weight"] = torch.ones(3, 3)
    elif how == "no mapping":
        return [state_dict]
    elif how == "no tensor":
        state_dict["weight"] = "weight"
    return state_dict


@instantiate_parametrized_tests
class TestFaultsOfFour(ShardedTestCase):
    # NB: what would hang ends in time to tell.
    timeout = timedelta(seconds=30)

    def module(self, kind):
        mesh = init_device_mesh("cpu", (self.world_size,))
        torch.manual_seed(0)
        if kind == "fsdp1":
            return FSDP(nn.Linear(3, 8), device_id=torch.device("cpu"))
        with torch.device("meta" if kind == "meta" else "cpu"):
            return fully_shard(nn.Linear(3, 8), mesh=mesh)

    def check(self, texts, causes, module, before):
        """The last rank has failed, and the others say so."""
        last = self.world_size - 1
        for rank, text in enumerate(texts):
            for cause in causes:
                self.assertIn(cause, text)
            self.assertEqual(f"RankError: Rank {last} " in text, rank != last, text)
        if before is not None:
            self.assertEqual(full_of(module.state_dict()), before)
        else:
            self.assertTrue(module.weight.is_meta)
        good = {"weight": torch.ones(8, 3), "bias": torch.ones(8)}
        module.load_state_dict(good, reuse_tensors=True)
        self.assertEqual(full_of(module.state_dict()), good)

    @parametrize("kind", ["cpu", "meta", "fsdp1"])
    def test_a_state_dict_that_does_not_fit_one_rank(self, kind):
        causes = {
            "missing key": ['Missing key(s) in state_dict: "weight"'],
            "wrong shape": [
                "size mismatch for",
                "weight: copying",
                "torch.Size([3, 3])",
            ],
            "no mapping": ["TypeError: Expected state_dict to be dict-like"],
            "no tensor": [
                "While copying the parameter named",
                "received <class 'str'>",
            ],
        }
        for how, texts in causes.items():
            module = self.module(kind)
            before = None if kind == "meta" else full_of(module.state_dict())
            state_dict = {"weight": torch.ones(8, 3), "bias": torch.ones(8)}
            if self.rank == self.world_size - 1:
                state_dict = damage(state_dict, how)
            self.check(
                self.outcomes(module.load_state_dict, state_dict, reuse_tensors=True),
                texts,
                module,
                before,
            )

    @parametrize("kind", ["cpu", "meta", "fsdp1"])
    def test_a_file_that_is_bad_on_one_rank(self, kind):
        from torch.distributed.errors import fail_together

        self.save({"weight": torch.ones(8, 3), "bias": torch.ones(8)})

        def load(module, path):
            with fail_together():
                state_dict = torch.load(path, lazy=True)
                module.load_state_dict(state_dict, reuse_tensors=True)

        for how in ("truncated", "gone", "garbage"):
            path = self.path
            if self.rank == self.world_size - 1:
                path = f"{self.path}.{how}"
                with open(self.path, "rb") as file:
                    content = file.read()
                content = {"truncated": content[:-100], "garbage": b"x" * 500}.get(how)
                if content is not None:
                    with open(path, "wb") as file:
                        file.write(content)
            module = self.module(kind)
            before = None if kind == "meta" else full_of(module.state_dict())

            causes = [
                f"x.pt.{how}",
                "FileNotFoundError" if how == "gone" else "RuntimeError",
            ]
            self.check(self.outcomes(load, module, path), causes, module, before)

    @parametrize("kind", ["cpu", "meta", "fsdp1"])
    def test_a_file_that_changes_while_it_is_read(self, kind):
        path = f"{self.path}.{self.rank}"
        torch.save({"weight": torch.ones(8, 3), "bias": torch.ones(8)}, path)
        state_dict = torch.load(path, lazy=True, mmap=False)
        if self.rank == self.world_size - 1:
            os.truncate(path, 400)
        module = self.module(kind)
        before = None if kind == "meta" else full_of(module.state_dict())
        texts = self.outcomes(module.load_state_dict, state_dict, reuse_tensors=True)
        self.check(texts, ["to be as it was when it was opened"], module, before)

    def test_any_error_in_the_context_and_none(self):
        from torch.distributed.errors import fail_together

        def work(failing):
            with fail_together():
                if self.rank == failing:
                    raise KeyError("some key")

        for failing in (None, 0, 1):
            texts = self.outcomes(work, failing)
            for rank, text in enumerate(texts):
                if failing is None:
                    self.assertEqual(text, "")
                elif rank == failing:
                    self.assertEqual(text, "KeyError: 'some key'")
                else:
                    expected = f"RankError: Rank {failing} failed: KeyError: 'some key'"
                    self.assertEqual(text, expected)

    def test_votes_are_those_of_a_context_whatever_is_raised_in_it(self):
        from torch.distributed.errors import fail_together, RankError

        good = {"weight": torch.ones(8, 3), "bias": torch.ones(8)}
        module, kept = self.module("cpu"), []

        def wrapped():
            with fail_together():
                try:
                    module.load_state_dict(
                        good if self.rank else {}, reuse_tensors=True
                    )
                except RankError:
                    raise
                except RuntimeError as error:
                    kept.append(error)
                    raise ValueError("wrapped") from error

        def fine():
            with fail_together():
                module.load_state_dict(good, reuse_tensors=True)

        def raised_again():
            with fail_together():
                for error in kept:
                    raise error

        for work, failing in ((wrapped, True), (fine, False), (raised_again, True)):
            for text in self.outcomes(work):
                self.assertEqual(bool(text), failing, text)
                self.assertNotIn("did not come", text)
        self.assertEqual(set(self.outcomes(fine)), {""})

    def test_several_groups_in_one_context(self):
        from torch.distributed.errors import fail_together

        whole = init_device_mesh("cpu", (self.world_size,))
        alone = [dist.new_group([rank]) for rank in range(self.world_size)]
        module = nn.Module()
        module.a = nn.Parameter(distribute_tensor(torch.zeros(8), whole))
        if self.rank == 0:  # a group that the others know nothing of
            mesh = DeviceMesh.from_group(alone[0], "cpu")
            module.b = nn.Parameter(distribute_tensor(torch.zeros(3), mesh))
        state_dict = {
            name: torch.ones_like(p.to_local()) for name, p in module.named_parameters()
        }
        state_dict["a"] = torch.ones(8)

        def load():
            with fail_together():
                module.load_state_dict(state_dict, reuse_tensors=True)

        self.assertEqual(set(self.outcomes(load)), {""})

    def test_a_rank_outside_of_the_mesh_has_no_vote(self):
        mesh = DeviceMesh("cpu", [0, 1])
        weight = distribute_tensor(torch.zeros(8), mesh, [Shard(0)])
        module = nn.Module()
        module.weight = nn.Parameter(weight)
        shape = 3 if self.rank == 1 else 8
        if self.rank == 1:
            time.sleep(0.5)  # NB: so that all others have voted
        texts = self.outcomes(
            module.load_state_dict, {"weight": torch.ones(shape)}, reuse_tensors=True
        )
        self.assertIn("size mismatch for weight", texts[1])
        self.assertIn("Rank 1 failed", texts[0])
        if self.rank == 0:
            self.assertEqual(module.weight.to_local(), torch.zeros(4))

    def test_groups_of_some_ranks(self):
        from torch.distributed.errors import fail_together

        group, _ = dist.new_subgroups(1)
        with fail_together(group):
            pass
        one = init_device_mesh("cpu", (self.world_size,), mesh_dim_names=("x",))
        sub = init_device_mesh(
            "cpu", (self.world_size // 2, 2), mesh_dim_names=("a", "b")
        )["b"]
        self.assertEqual(one.size(), self.world_size)
        module = fully_shard(nn.Linear(3, 8), mesh=sub)
        state_dict = {"weight": torch.ones(8, 3), "bias": torch.ones(8)}
        # NB: only the ranks that have the module's parts need be there.
        if self.rank < 2:
            if self.rank == 0:
                del state_dict["bias"]
            with self.assertRaisesRegex(RuntimeError, 'Missing key.*"bias"'):
                module.load_state_dict(state_dict, reuse_tensors=True)
        dist.barrier()


class TestFaultsOfTwo(TestFaultsOfFour):
    world_size = 2
    # NB: processes of its own.
    _processes_spawned = poison_pill = False


class TestRanksThatDoNotCome(ShardedTestCase):
    world_size = 2

    def test_are_named(self):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=2))
        module = fully_shard(nn.Linear(3, 8), mesh=init_device_mesh("cpu", (2,)))
        state_dict = {"weight": torch.ones(8, 3), "bias": torch.ones(8)}
        if self.rank == 0:
            with self.assertRaisesRegex(
                RuntimeError, "Rank 1 did not come within 2 s"
            ) as raised:
                module.load_state_dict(state_dict, reuse_tensors=True)
            self.assertEqual(type(raised.exception).__name__, "RankError")
            store.set("raised", "")
        else:
            store.wait(["raised"], timedelta(seconds=60))
            # Late, and not to do what the other one has given up.
            with self.assertRaisesRegex(RuntimeError, "Rank 1 did not come within 2 s"):
                module.load_state_dict(state_dict, reuse_tensors=True)
        store.set_timeout(timedelta(seconds=120))
        module.load_state_dict(state_dict, reuse_tensors=True)


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = fully_shard(torch.nn.Linear(3, 8), mesh=dist.init_device_mesh("cpu", (2,)))
state_dict = torch.load(sys.argv[3], lazy=True)
model.load_state_dict(state_dict, reuse_tensors=True)
"""


@instantiate_parametrized_tests
class TestScripts(TestCase):
    @parametrize("bad", [0, 1])
    def test_one_ends_in_torch_load(self, bad):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            path = os.path.join(folder, "x.pt")
            torch.save(nn.Linear(3, 8).state_dict(), path)
            free.bind(("localhost", 0))
            address = f"tcp://localhost:{free.getsockname()[1]}"
            free.close()
            processes = [
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        SCRIPT,
                        address,
                        str(rank),
                        path + "_bad" * (rank == bad),
                    ],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(2)
            ]
            errors = [process.communicate()[1] for process in processes]
        self.assertNotIn("RankError", errors[bad])
        self.assertIn("RankError", errors[1 - bad])
        for error in errors:
            self.assertIn("FileNotFoundError", error)
            self.assertIn("x.pt_bad", error)


if __name__ == "__main__":
    run_tests()
