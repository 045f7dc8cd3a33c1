# Owner(s): ["oncall: distributed"]
"""Law: of each full tensor each rank has the part that its placements say, whatever mesh, sizes, dtypes and file."""

import os

import hypothesis
import hypothesis.strategies as st
import torch
from load_sharded_case import ShardedTestCase
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.common_utils import run_tests


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int32]
LAYOUTS = ["plain", "transposed", "expanded", "gaps", "requires_grad"]


def chunk(items, count):
    """As torch.chunk does it, but with as many parts as asked for."""
    step = max(-(-len(items) // count), 1)
    return [items[i * step : (i + 1) * step] for i in range(count)]


def part_of(indices, placement, count, which):
    """The indices that one rank of a mesh dimension keeps of those that it has."""
    if isinstance(placement, _StridedShard):
        pieces = chunk(indices, placement.split_factor)
        return [i for piece in pieces for i in chunk(piece, count)[which]]
    return chunk(indices, count)[which]


def expected_part(full, mesh, placements):
    for dim in range(full.dim()):
        indices = list(range(full.size(dim)))
        for i, placement in enumerate(placements):
            if not isinstance(placement, Replicate) and placement.dim == dim:
                which = mesh.get_coordinate()[i]
                indices = part_of(indices, placement, mesh.size(i), which)
        full = full.index_select(dim, torch.tensor(indices, dtype=torch.long))
    return full


@st.composite
def cases(draw):
    """Sizes, how they are sharded, and of which dtype and layout module and file have the tensor."""
    size = draw(st.lists(st.integers(0, 7), max_size=3))

    def placement():
        kinds = [st.just(Replicate())]
        if size:
            dims = st.integers(0, len(size) - 1)
            kinds.append(st.builds(Shard, dims))
            kinds.append(
                st.builds(
                    lambda d, f: _StridedShard(d, split_factor=f),
                    dims,
                    st.integers(1, 3),
                )
            )
        return draw(st.one_of(kinds))

    return {
        "mesh": draw(st.sampled_from([(4,), (2, 2), (1, 4)])),
        "size": size,
        "placements": (placement(), placement()),
        "dtype": draw(st.sampled_from(DTYPES[:3])),
        "file_dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "device": draw(st.sampled_from(["cpu", "meta"])),
        "is_param": draw(st.booleans()),
    }


def laid_out(values, layout):
    if layout == "requires_grad" and values.is_floating_point():
        return values.requires_grad_()
    if not values.dim():
        return values
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values


class TestShardedLaw(ShardedTestCase):
    # NB: one seed, so that all ranks draw the same.
    @hypothesis.seed(int(os.environ.get("PROPERTY_TEST_SEED", "0")))
    @hypothesis.settings(
        max_examples=int(os.environ.get("PROPERTY_TEST_EXAMPLES", "60")),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(cases(), min_size=1, max_size=4),
        st.sampled_from([{}, {"lazy": True}, {"lazy": True, "mmap": False}]),
    )
    def check(self, drawn, kwargs):
        module, state_dict, expected = nn.Module(), {}, {}
        for i, case in enumerate(drawn):
            mesh = self.meshes[case["mesh"]]
            placements = case["placements"][: mesh.ndim]
            values = torch.arange(torch.Size(case["size"]).numel()).view(case["size"])
            full = laid_out((values + i).to(case["file_dtype"]), case["layout"])
            part = expected_part(full.detach(), mesh, placements).to(case["dtype"])
            whole = DTensor.from_local(
                torch.zeros(part.shape, dtype=case["dtype"], device=case["device"]),
                mesh,
                placements,
                run_check=False,
                shape=full.shape,
                stride=torch.empty(full.shape).stride(),
            )
            if case["is_param"]:
                module.register_parameter(f"t{i}", nn.Parameter(whole))
            else:
                module.register_buffer(f"t{i}", whole)
            state_dict[f"t{i}"], expected[f"t{i}"] = full, part
        path = f"{self.path}.{self.rank}"
        torch.save(state_dict, path)
        objects = {key: getattr(module, key) for key in expected}
        result = module.load_state_dict(torch.load(path, **kwargs), reuse_tensors=True)
        os.unlink(path)
        self.assertEqual({*result.reused, *result.converted}, set(expected))
        for key, part in expected.items():
            tensor = getattr(module, key)
            self.assertIs(tensor, objects[key])
            self.assertEqual(tensor.device.type, "cpu")
            local = tensor._local_tensor
            self.assertEqual((local.dtype, local.shape), (part.dtype, part.shape))
            self.assertTrue(torch.equal(local, part), (local, part))
            self.assertEqual(tensor.requires_grad, isinstance(tensor, nn.Parameter))

    def test_every_rank_has_its_part(self):
        shapes = [(4,), (2, 2), (1, 4)]
        self.meshes = {shape: init_device_mesh("cpu", shape) for shape in shapes}
        self.check()


if __name__ == "__main__":
    run_tests()
