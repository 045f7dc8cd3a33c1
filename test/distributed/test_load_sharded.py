# Owner(s): ["oncall: distributed"]
"""``load_state_dict(reuse_tensors=True)`` of modules of DTensors from full tensors."""

import torch
import torch.distributed as dist
from load_sharded_case import full_of, full_state, local_of, Model, ShardedTestCase, WAYS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    distribute_tensor,
    DTensor,
    Replicate,
    Shard,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


def sharded(mesh, device="cpu", **kwargs):
    with torch.device(device):
        model = Model(**kwargs)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@instantiate_parametrized_tests
class TestLoadFSDP2(ShardedTestCase):
    @parametrize("how", WAYS)
    @parametrize("device", ["cpu", "meta"])
    def test_equals_the_full_state(self, device, how):
        mesh = init_device_mesh("cpu", (4,))
        expected = full_state()
        self.save(expected)
        model = sharded(mesh, device)
        params = dict(model.named_parameters())
        locals = {k: local_of(p) for k, p in params.items()}
        pointers = {k: t.data_ptr() for k, t in locals.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = model.load_state_dict(self.load(how), reuse_tensors=True)
        self.assertEqual(str(result), "<All keys matched successfully>")
        self.assertEqual(full_of(model.state_dict()), dict(expected))
        for key, param in model.named_parameters():
            self.assertIs(param, params[key])
            self.assertEqual(param.device.type, "cpu")
            if device == "cpu":
                self.assertEqual(local_of(param).data_ptr(), pointers[key])
        model(torch.tensor([0, 3, 4])).sum().backward()
        optimizer.step()
        self.assertNotEqual(full_of(model.state_dict())["embed.weight"], expected["embed.weight"])

if __name__ == "__main__":
    run_tests()
