# Owner(s): ["oncall: distributed checkpointing"]
"""``TorchSaveReader`` among gloo processes: values, bytes, optimizers, errors."""

import importlib.util
import os
import random
import tempfile
import unittest
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
    StateDictOptions,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    distribute_tensor,
    DTensor,
    empty,
    Replicate,
    Shard,
)
from torch.testing._internal.common_distributed import MultiProcContinuousTest
from torch.testing._internal.common_utils import run_tests


# torch 2.11 does not tell why a file cannot be read.
TELLS = torch.__version__ >= "2.12"
HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


class TorchSaveReaderTests:
    """What holds with any number of processes."""

    @classmethod
    def backend_str(cls):
        return "gloo"

    def shared(self, name):
        """A path that all ranks have in common, and that goes with the test."""
        folder = [tempfile.mkdtemp()] if self.rank == 0 else [None]
        dist.broadcast_object_list(folder)
        return os.path.join(folder[0], name)

    def saved(self, state_dict, name="file.pt"):
        path = self.shared(name)
        if self.rank == 0:
            torch.save(state_dict, path)
        dist.barrier()
        return path

    def meshes(self):
        size = self.world_size
        yield init_device_mesh("cpu", (size,))
        if size == 4:
            yield init_device_mesh("cpu", (2, 2))

    def test_each_rank_gets_its_part_of_what_torch_load_brings(self):
        draw = random.Random(0)
        for mesh in self.meshes():
            for _ in range(4):
                state_dict = {str(i): a_tensor(draw) for i in range(8)}
                state_dict["tied"] = state_dict["0"]
                path = self.saved(state_dict)
                targets, expected = {}, {}
                for key, full in torch.load(path).items():
                    placements = a_placement(draw, mesh, full.dim())
                    dtype = draw.choice([full.dtype, torch.float64])
                    full = full.to(dtype)
                    expected[key] = distribute_tensor(full, mesh, placements)
                    targets[key] = empty(
                        full.size(),
                        dtype=dtype,
                        device_mesh=mesh,
                        placements=placements,
                    )
                before = {key: t.to_local().data_ptr() for key, t in targets.items()}
                dcp.load(targets, storage_reader=dcp.TorchSaveReader(path))
                for key, target in targets.items():
                    self.assertEqual(
                        target.to_local(), expected[key].to_local(), rtol=0, atol=0
                    )
                    self.assertEqual(target.to_local().data_ptr(), before[key])

    def test_ranks_read_the_file_once_among_them(self):
        rows, mesh = 1 << 12, init_device_mesh("cpu", (self.world_size,))
        full = {str(i): torch.randn(rows + i, 64) for i in range(8)}
        full["tied"] = full["0"]
        path = self.saved(full)
        targets = {
            key: empty(t.size(), device_mesh=mesh, placements=[Shard(0)])
            for key, t in full.items()
        }
        targets["tied"] = targets["0"]
        reads = []
        with counted(reads):
            dcp.load(targets, storage_reader=dcp.TorchSaveReader(path))
        for key, target in targets.items():
            self.assertEqual(target.full_tensor(), full[key], rtol=0, atol=0)
        share = os.path.getsize(path) / self.world_size
        count = sum(size for _, size in reads)
        self.assertLessEqual(count, 1.1 * share)
        counts = [None] * self.world_size
        dist.all_gather_object(counts, count)
        self.assertLessEqual(sum(counts), 1.05 * os.path.getsize(path))
        # Of each tensor at once, in the order of the file, the tied ones as one:
        pieces = {target.to_local().nbytes for target in targets.values()}
        starts = [start for start, size in reads if size in pieces]
        self.assertEqual(starts, sorted(starts))
        self.assertEqual(len(starts), 8)

    def test_fsdp_model_and_optimizer(self):
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = trained(sharded=False)
        saved_model, saved_optim = get_state_dict(model, optimizer, options=full)
        path = self.saved(
            {"model": saved_model, "optim": saved_optim, "epoch": 7, "lr": [0.1]}
        )
        other, other_optimizer = trained(sharded=True, seed=1)
        model_state, optim_state = get_state_dict(other, other_optimizer)
        state_dict = {"model": model_state, "optim": optim_state, "epoch": 0, "lr": []}
        dcp.load(state_dict, storage_reader=dcp.TorchSaveReader(path))
        self.assertEqual((state_dict["epoch"], state_dict["lr"]), (7, [0.1]))
        set_state_dict(
            other,
            other_optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
        )
        got = get_state_dict(other, other_optimizer, options=full)
        if self.rank == 0:
            self.assertEqual(got, (saved_model, saved_optim), rtol=0, atol=0)
        self.assertIsInstance(next(other.parameters()), DTensor)
        for m, o in ((model, optimizer), (other, other_optimizer)):
            train(m, o, steps=2)
        for (name, a), b in zip(
            model.named_parameters(), other.parameters(), strict=True
        ):
            self.assertEqual(b.full_tensor(), a, msg=name)

    @unittest.skipUnless(HAS_SAFETENSORS, "needs safetensors")
    def test_sharded_safetensors_folder(self):
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        full = {"a": torch.randn(9, 5), "b": torch.randn(7)}
        folder = os.path.dirname(self.shared("x"))
        if self.rank == 0:
            writer = HuggingFaceStorageWriter(
                folder, fqn_to_index_mapping={"a": 1, "b": 2}
            )
            dcp.save(full, storage_writer=writer, no_dist=True)
        dist.barrier()
        mesh = init_device_mesh("cpu", (self.world_size,))
        targets = {
            key: empty(t.size(), device_mesh=mesh, placements=[Shard(0)])
            for key, t in full.items()
        }
        dcp.load(targets, storage_reader=dcp.TorchSaveReader(folder))
        for key, target in targets.items():
            self.assertEqual(target.full_tensor(), full[key], rtol=0, atol=0)

    # Errors

    def assertFailsEverywhere(self, reader, state_dict, *texts):
        try:
            dcp.load(state_dict, storage_reader=reader)
        except dcp.CheckpointException as error:
            message = str(error)
        else:
            self.fail("nothing was raised")
        for text in texts:
            self.assertIn(text, message)

    def targets(self):
        mesh = init_device_mesh("cpu", (self.world_size,))
        return {"weight": empty(64, 32, device_mesh=mesh, placements=[Shard(0)])}

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_file_cut_off_on_one_rank(self):
        path = self.saved({"weight": torch.randn(64, 32)})
        if self.rank == 1:
            path += ".copy"
            with open(path[:-5], "rb") as whole, open(path, "wb") as cut:
                cut.write(whole.read()[:5000])
        self.assertFailsEverywhere(
            dcp.TorchSaveReader(path), self.targets(), "(RANK 1)", ".copy"
        )

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_file_missing_on_one_rank(self):
        path = self.saved({"weight": torch.randn(64, 32)})
        path += ".missing" * (self.rank == 1)
        self.assertFailsEverywhere(
            dcp.TorchSaveReader(path), self.targets(), "(RANK 1)", ".missing"
        )

    def test_file_that_changes_on_one_rank_once_it_is_open(self):
        path = self.saved({"weight": torch.randn(64, 32)})
        reader = dcp.TorchSaveReader(path)
        if self.rank == 1:
            path += ".copy"
            with open(path[:-5], "rb") as whole, open(path, "wb") as copy:
                copy.write(whole.read())

            class Cut(dcp.TorchSaveReader):
                def prepare_local_plan(self, plan):
                    os.truncate(self.path, 5000)
                    return plan

            reader = Cut(path)
        self.assertFailsEverywhere(
            reader, self.targets(), "(RANK 1)", ".copy", "'weight'", "at offset"
        )

    def test_missing_key(self):
        path = self.saved({"other": torch.randn(64, 32)})
        self.assertFailsEverywhere(
            dcp.TorchSaveReader(path),
            self.targets(),
            "(RANK 0)",
            "(RANK 1)",
            "Missing key in checkpoint state_dict: weight.",
        )

    def test_other_size(self):
        path = self.saved({"weight": torch.randn(64, 33)})
        self.assertFailsEverywhere(
            dcp.TorchSaveReader(path), self.targets(), "Size mismatch", "for weight"
        )


class TorchSaveReader2Test(TorchSaveReaderTests, MultiProcContinuousTest):
    world_size = 2


class TorchSaveReader4Test(TorchSaveReaderTests, MultiProcContinuousTest):
    world_size = 4


def a_tensor(draw):
    size = [draw.choice((0, 1, 2, 3, 5, 8, 17)) for _ in range(draw.randrange(1, 4))]
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    tensor = torch.randint(-100, 100, size, generator=generator)
    tensor = tensor.to(draw.choice(DTYPES))
    if draw.random() < 0.3:
        tensor = tensor.transpose(0, -1)
    return tensor[1:] if draw.random() < 0.3 else tensor


def a_placement(draw, mesh, dims):
    return [
        Replicate() if draw.random() < 0.3 else Shard(draw.randrange(dims))
        for _ in range(mesh.ndim)
    ]


def trained(*, sharded, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(13, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5)
    )
    if sharded:
        fully_shard(model[2])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    train(model, optimizer, steps=1)
    return model, optimizer


def train(model, optimizer, *, steps):
    torch.manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 13)).square().sum().backward()
        optimizer.step()


def counted(reads):
    """Notes where and how much the readers of lazy loading read."""
    preadv = os.preadv

    def noting(fd, buffers, start):
        count = preadv(fd, buffers, start)
        reads.append((start, count))
        return count

    return mock.patch("os.preadv", noting)


if __name__ == "__main__":
    run_tests()
