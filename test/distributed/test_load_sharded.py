# Owner(s): ["oncall: distributed"]
"""``load_state_dict(reuse_tensors=True)`` of modules of DTensors from full tensors."""

import copy

import torch
from load_sharded_case import (
    counted_reads,
    full_of,
    full_state,
    local_of,
    Model,
    ShardedTestCase,
    WAYS,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    set_model_state_dict,
    StateDictOptions,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    distribute_tensor,
    DTensor,
    Partial,
    Replicate,
    Shard,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    parallelize_module,
    RowwiseParallel,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


def model_on(device, mesh, tp=None, **kwargs):
    """A model under fully_shard, on top of tensor parallelism if there is a mesh for it."""
    with torch.device(device):
        model = Model(**kwargs)
    if tp is not None:
        plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
        parallelize_module(model, tp, plan)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@instantiate_parametrized_tests
class TestLoadFSDP2(ShardedTestCase):
    @parametrize("how", WAYS)
    @parametrize("device", ["cpu", "meta"])
    def test_each_parameter_stays_and_gets_its_part(self, device, how):
        expected = full_state()
        self.save(expected)
        model = model_on(device, init_device_mesh("cpu", (4,)))
        params = dict(model.named_parameters())
        locals = {key: local_of(param) for key, param in params.items()}
        before = {key: local.data_ptr() for key, local in locals.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with CommDebugMode() as sent:
            result = model.load_state_dict(self.load(how), reuse_tensors=True)
        self.assertEqual(sent.get_total_counts(), 0)
        self.assertEqual(str(result), "<All keys matched successfully>")
        self.assertEqual(result.still_meta, ())
        self.assertEqual(full_of(model.state_dict()), dict(expected))
        for key, param in model.named_parameters():
            self.assertIs(param, params[key])
            self.assertEqual((param.device.type, param.is_meta), ("cpu", False))
            if device == "cpu":
                self.assertEqual(local_of(param).data_ptr(), before[key])
        self.assertIs(model.head.weight, model.embed.weight)
        model(torch.tensor([0, 3, 4])).sum().backward()
        optimizer.step()
        updated = full_of(model.state_dict())["embed.weight"]
        self.assertNotEqual(updated, expected["embed.weight"])

    @parametrize("device", ["cpu", "meta"])
    @parametrize("kind", ["fsdp", "hsdp", "fsdp_tp"])
    def test_equals_set_model_state_dict(self, kind, device):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        args = {
            "fsdp": (init_device_mesh("cpu", (4,)),),
            "hsdp": (mesh,),
            "fsdp_tp": (mesh["dp"], mesh["tp"]),
        }[kind]
        # NB: what upstream cannot distribute unevenly has to be even here.
        expected = full_state(width=8)
        self.save(expected)
        theirs, ours = (model_on(device, *args, width=8) for _ in range(2))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(theirs, copy.deepcopy(expected), options=options)
        ours.load_state_dict(self.load("mapped"), reuse_tensors=True)
        self.assertEqual(full_of(ours.state_dict()), dict(expected))
        pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
        for (key, value), (their_key, their_value) in pairs:
            self.assertEqual(key, their_key)
            self.assertEqual(type(value), type(their_value))
            if isinstance(value, DTensor):
                self.assertEqual(value._spec, their_value._spec)
            self.assertEqual(local_of(value), local_of(their_value))

    @parametrize("width", [5, 7, 9])
    def test_uneven_tensor_parallel(self, width):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        expected = full_state(width=width)
        model = model_on("meta", mesh["dp"], mesh["tp"], width=width)
        model.load_state_dict(expected, reuse_tensors=True)
        weight = expected["layers.0.weight"]
        for rank in reversed(mesh.get_coordinate()):  # tensor parallel comes first
            parts = torch.chunk(weight, 2)
            weight = parts[rank] if rank < len(parts) else weight[:0]
        self.assertEqual(local_of(model.layers[0].weight), weight)

    def test_reads_its_part_only(self):
        expected = {"weight": torch.randn(64, 2048), "bias": torch.randn(64)}
        self.save(expected)
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = fully_shard(
                    nn.Linear(2048, 64), mesh=init_device_mesh("cpu", (4,))
                )
            with counted_reads() as counts:
                model.load_state_dict(self.load("deferred"), reuse_tensors=True)
            self.assertEqual(sum(counts), (64 * 2048 + 64) // 4 * 4)
            self.assertEqual(full_of(model.state_dict()), expected)

    def test_adopts_mapped_memory_once(self):
        mesh = init_device_mesh("cpu", (4,))
        self.save({"weight": torch.ones(8, 3), "bias": torch.ones(8)})
        state_dict = self.load("mapped")
        with torch.device("meta"):
            first, second = (fully_shard(nn.Linear(3, 8), mesh=mesh) for _ in range(2))
        results = [
            model.load_state_dict(state_dict, reuse_tensors=True)
            for model in (first, second)
        ]
        both = ("weight", "bias")
        self.assertEqual([r.reused for r in results], [both, ()])
        self.assertEqual([r.converted for r in results], [(), both])
        part = state_dict["weight"][2 * self.rank :]
        self.assertEqual(local_of(first.weight).data_ptr(), part.data_ptr())
        with torch.no_grad():
            first.weight.fill_(2)
        self.assertEqual(local_of(second.weight), torch.ones(2, 3))
        self.assertEqual(torch.load(self.path)["weight"], torch.ones(8, 3))

    @parametrize("how", WAYS)
    def test_converts(self, how):
        expected = full_state()
        for key, value in expected.items():
            if value.is_floating_point():
                expected[key] = value.bfloat16()
        self.save(expected)
        for device in ("cpu", "meta"):
            model = model_on(device, init_device_mesh("cpu", (4,)))
            model.load_state_dict(self.load(how), reuse_tensors=True)
            for key, value in full_of(model.state_dict()).items():
                self.assertIn(value.dtype, (torch.float32, torch.int64))
                self.assertEqual(value, expected[key].to(value.dtype))

    def test_after_a_forward_that_left_the_parameters_full(self):
        model = model_on("cpu", init_device_mesh("cpu", (4,)))
        tokens = torch.tensor([0, 3, 4])
        model.eval()
        model(tokens)
        self.assertNotIsInstance(model.norm.weight, DTensor)
        expected = full_state(seed=1)
        model.load_state_dict(expected, reuse_tensors=True)
        alone = Model().eval()
        alone.load_state_dict(expected)
        self.assertEqual(model(tokens), alone(tokens))

    def test_of_hooks_and_of_dtensors(self):
        mesh = init_device_mesh("cpu", (4,))
        expected = full_state()
        source = model_on("cpu", mesh)
        source.load_state_dict(expected, reuse_tensors=True)
        model = model_on("meta", mesh)
        seen = []

        def rename(module, state_dict, prefix, *args):
            for key in ("weight", "bias"):
                state_dict[prefix + key] = state_dict.pop(f"{prefix}old_{key}")

        def look(module, keys):
            seen.append(local_of(module.weight).clone())

        model.layers[0].register_load_state_dict_pre_hook(rename)
        model.layers[0].register_load_state_dict_post_hook(look)
        state_dict = source.state_dict()
        for key in ("weight", "bias"):
            state_dict[f"layers.0.old_{key}"] = state_dict.pop(f"layers.0.{key}")
        state_dict["norm.weight"] = expected["norm.weight"]
        hooks = [list(m._load_state_dict_post_hooks) for m in model.modules()]
        model.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(full_of(model.state_dict()), dict(expected))
        self.assertEqual(seen, [local_of(source.layers[0].weight)])
        after = [list(m._load_state_dict_post_hooks) for m in model.modules()]
        self.assertEqual(after, hooks)

    @parametrize("device", ["cpu", "meta"])
    def test_errors_name_the_key_and_change_nothing(self, device):
        model = model_on(device, init_device_mesh("cpu", (4,)))
        before = {k: local_of(v).clone() for k, v in model.state_dict().items()}
        objects = [local_of(p) for p in model.parameters()]
        state_dict = full_state(seed=2)
        state_dict["layers.1.weight"] = torch.ones(7, 6)
        state_dict["more"] = torch.ones(1)
        del state_dict["head.weight"]
        texts = self.outcomes(model.load_state_dict, state_dict, reuse_tensors=True)
        self.assertEqual(len(set(texts)), 1)
        self.assertExpectedInline(
            texts[0].replace(". \n", ".\n"),
            """\
RuntimeError: Error(s) in loading state_dict for FSDPModel:
	Missing key(s) in state_dict: "head.weight".
	Unexpected key(s) in state_dict: "more".
	size mismatch for layers.1.weight: copying a param with shape torch.Size([7, 6]) from checkpoint, \
the shape in current model is torch.Size([7, 7]).""",
        )
        self.assertEqual(
            [id(local_of(p)) for p in model.parameters()], list(map(id, objects))
        )
        for key, value in model.state_dict().items():
            self.assertEqual(local_of(value).is_meta, before[key].is_meta)
            if device == "cpu":
                self.assertEqual(local_of(value), before[key])


class TestLoadDTensor(ShardedTestCase):
    def test_buffers_replicates_and_modules_that_hold_none(self):
        mesh = init_device_mesh("cpu", (4,))
        module = nn.Module()
        full = {"a": torch.randn(6, 5), "b": torch.randn(3), "c": torch.randn(())}
        empty = {key: torch.zeros_like(value) for key, value in full.items()}
        module.register_buffer("a", distribute_tensor(empty["a"], mesh, [Shard(1)]))
        module.b = nn.Parameter(distribute_tensor(empty["b"], mesh, [Replicate()]))
        module.c = nn.Parameter(distribute_tensor(empty["c"], mesh, [Replicate()]))
        objects = list(module.state_dict(keep_vars=True).values())
        versions = [tensor._version for tensor in objects]
        source = {key: value.double() for key, value in full.items()}
        module.load_state_dict(source, reuse_tensors=True)
        self.assertEqual(full_of(module.state_dict()), full)
        now = list(module.state_dict(keep_vars=True).values())
        self.assertEqual(list(map(id, now)), list(map(id, objects)))
        for tensor, version in zip(objects, versions, strict=True):
            self.assertGreater(tensor._version, version)

    def test_backward_through_old_values_raises(self):
        mesh = init_device_mesh("cpu", (4,))
        module = nn.Module()
        module.a = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        loss = (module.a * module.a).sum()
        module.load_state_dict({"a": torch.zeros(8)}, reuse_tensors=True)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            loss.backward()

    def test_other_placements(self):
        mesh = init_device_mesh("cpu", (4,))
        full = torch.randn(8, 4)
        module = nn.Module()
        module.a = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
        module.load_state_dict(
            {"a": distribute_tensor(full, mesh, [Shard(1)])}, reuse_tensors=True
        )
        self.assertEqual(module.a.full_tensor(), full)
        module.a = nn.Parameter(DTensor.from_local(torch.ones(8, 4), mesh, [Partial()]))
        texts = self.outcomes(module.load_state_dict, {"a": full}, reuse_tensors=True)
        self.assertIn('While copying the parameter named "a"', texts[0])
        self.assertIn(
            "Expected a DTensor whose placements are Shard or Replicate, got Partial",
            texts[0],
        )
        self.assertEqual(len(set(texts)), 1)


if __name__ == "__main__":
    run_tests()
