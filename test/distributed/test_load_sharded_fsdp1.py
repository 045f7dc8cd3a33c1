# Owner(s): ["oncall: distributed"]
"""``load_state_dict(reuse_tensors=True)`` of ``FullyShardedDataParallel``, against the load that unshards."""

import torch
import torch.distributed as dist
from load_sharded_case import counted_reads, full_state, Model, ShardedTestCase, WAYS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel as FSDP,
)
from torch.distributed.fsdp import (
    ShardingStrategy,
    StateDictType,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
)


FULL, GRAD_OP, NO, HYBRID = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)
CPU = torch.device("cpu")


def model_of(use_orig_params, strategy=FULL, checkpointed=False):
    """A nested model, three wrappers deep."""
    torch.manual_seed(0)
    kwargs = {
        "use_orig_params": use_orig_params,
        "sharding_strategy": strategy,
        "device_id": CPU,
    }
    if strategy is HYBRID:
        kwargs["device_mesh"] = init_device_mesh("cpu", (2, 2))
    model = Model()
    for i, layer in enumerate(model.layers):
        model.layers[i] = FSDP(
            checkpoint_wrapper(layer) if checkpointed else layer, **kwargs
        )
    model.layers = FSDP(model.layers, **kwargs)
    return FSDP(model, **kwargs)


def shards_of(model):
    return [
        (
            wrapper._handle.flat_param._local_shard.clone(),
            wrapper._handle.flat_param.data_ptr(),
        )
        for wrapper in FSDP.fsdp_modules(model)
        if wrapper._handle is not None
    ]


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(torch.tensor([0, 3, 4])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


KINDS = [
    subtest((True, FULL, False), name="orig_full"),
    subtest((False, FULL, False), name="flat_full"),
    subtest((True, GRAD_OP, False), name="orig_grad_op"),
    subtest((False, NO, False), name="flat_no"),
    subtest((True, NO, False), name="orig_no"),
    subtest((False, HYBRID, False), name="flat_hybrid"),
    subtest((True, FULL, True), name="orig_checkpointed"),
]


@instantiate_parametrized_tests
class TestLoadFSDP1(ShardedTestCase):
    @parametrize("kind", KINDS)
    def test_equals_the_load_that_unshards(self, kind):
        theirs, ours = model_of(*kind), model_of(*kind)
        train(theirs), train(ours)
        expected = full_state(seed=1)
        for value in expected.values():
            if value.is_floating_point():
                value.div_(1e4)
        self.save(expected)
        theirs.load_state_dict(self.load("plain"))
        before = (
            [p.data_ptr() for p in ours.parameters()],
            dict(ours.named_parameters()),
        )
        for how in WAYS:
            ours.load_state_dict(full_state(), reuse_tensors=True)
            result = ours.load_state_dict(self.load(how), reuse_tensors=True)
            self.assertEqual(str(result), "<All keys matched successfully>")
            for mine, other in zip(shards_of(ours), shards_of(theirs), strict=True):
                self.assertEqual(mine[0], other[0])
        self.assertEqual(list(dict(ours.named_parameters())), list(before[1]))
        for key, param in ours.named_parameters():
            self.assertIs(param, before[1][key])
        self.assertEqual(ours.state_dict(), theirs.state_dict())
        self.assertEqual(ours.state_dict(), dict(expected))
        self.assertEqual(train(ours), train(theirs))
        self.assertEqual(ours.state_dict(), theirs.state_dict())

    @parametrize("use_orig_params", [True, False])
    def test_reads_its_part_only(self, use_orig_params):
        expected = {"0.weight": torch.randn(63, 2048), "0.bias": torch.randn(63)}
        self.save(expected)
        model = FSDP(
            nn.Sequential(nn.Linear(2048, 63)),
            use_orig_params=use_orig_params,
            device_id=CPU,
        )
        with counted_reads() as counts:
            model.load_state_dict(self.load("deferred"), reuse_tensors=True)
        # Rounded up to alike parts, with padding between the parameters.
        self.assertLessEqual(sum(counts), (63 * 2048 + 63) + 64)
        total = torch.tensor(sum(counts))
        dist.all_reduce(total)
        self.assertEqual(total.item(), (63 * 2048 + 63) * 4)
        self.assertEqual(model.state_dict(), expected)

    @parametrize("use_orig_params", [True, False])
    def test_errors_are_those_of_the_load_that_unshards(self, use_orig_params):
        model = model_of(use_orig_params)
        train(model)
        before = shards_of(model)
        state_dict = full_state(seed=1)
        state_dict["more"] = torch.ones(1)
        del state_dict["layers.1.weight"]
        errors = [
            self.outcomes(model.load_state_dict, state_dict, **kwargs)
            for kwargs in ({}, {"reuse_tensors": True})
        ]
        self.assertEqual(*errors)
        self.assertIn('Missing key(s) in state_dict: "layers.1.weight".', errors[0][0])
        # The other one has loaded what it could by then.
        model.load_state_dict(full_state(seed=2), reuse_tensors=True)
        before = shards_of(model)
        state_dict = full_state(seed=3)
        state_dict["layers.0.bias"] = torch.ones(4)
        state_dict["norm.weight"] = torch.ones(8)
        texts = self.outcomes(model.load_state_dict, state_dict, reuse_tensors=True)
        self.assertEqual(shards_of(model), before)
        self.assertIn(
            "layers._fsdp_wrapped_module.0._fsdp_wrapped_module.bias: copying a param with shape torch.Size([4])",
            texts[0],
        )
        self.assertIn(
            "norm.weight: copying a param with shape torch.Size([8])", texts[0]
        )
        self.assertEqual(model.state_dict(), dict(full_state(seed=2)))

    def test_other_kinds_of_state_dict_are_left_to_fsdp(self):
        model = model_of(False)
        train(model)
        with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            state_dict = model.state_dict()
            before = [shard for shard, _ in shards_of(model)]
            train(model)
            model.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual([shard for shard, _ in shards_of(model)], before)
        with FSDP.summon_full_params(model):
            model.load_state_dict(full_state(), reuse_tensors=True)
        self.assertEqual(model.state_dict(), dict(full_state()))


if __name__ == "__main__":
    run_tests()
