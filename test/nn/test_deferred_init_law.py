# Owner(s): ["module: nn"]
"""The law of deferred_init, for programs that nobody thought of: bit-equal to running them, in any order.

Hypothesis writes a constructor, as a list of steps on the tensors made so far; the reference is to run it.
"""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.common_utils import run_tests, TestCase


SIZES = [(), (0,), (1,), (5,), (16,), (40,), (3, 4), (2, 3, 5), (8, 16)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

sizes = st.sampled_from(SIZES)
dtypes = st.sampled_from(DTYPES)
which = st.integers(0, 99)
value = st.integers(-2, 3).map(float)


def pick(made, i):
    return made[i % len(made)]


def alike(made, i, t):
    """A tensor of the shape of ``t``."""
    same = [o for o in made if o.shape == t.shape]
    return same[i % len(same)]


# Each maker takes the tensors so far and returns one more.
MAKERS = {
    "empty+fill": lambda made, size, dtype, i, v: torch.empty(size, dtype=dtype).fill_(
        v
    ),
    "zeros": lambda made, size, dtype, i, v: torch.zeros(size, dtype=dtype),
    "full": lambda made, size, dtype, i, v: torch.full(size, v, dtype=dtype),
    "rand": lambda made, size, dtype, i, v: torch.rand(size, dtype=dtype),
    "randn": lambda made, size, dtype, i, v: torch.randn(size, dtype=dtype),
    "randperm": lambda made, size, dtype, i, v: torch.randperm(i).to(dtype),
    "legacy": lambda made, size, dtype, i, v: torch.Tensor(*size).fill_(v),
    "tensor": lambda made, size, dtype, i, v: torch.tensor([v, 1, i], dtype=dtype),
    "arange": lambda made, size, dtype, i, v: torch.arange(i, dtype=dtype),
    "clone": lambda made, size, dtype, i, v: pick(made, i).clone(),
    "detach": lambda made, size, dtype, i, v: pick(made, i).detach(),
    "t": lambda made, size, dtype, i, v: (
        pick(made, i).movedim(0, -1) if pick(made, i).dim() else pick(made, i).view(1)
    ),
    "part": lambda made, size, dtype, i, v: pick(made, i).flatten()[i % 3 :: 2],
    "view": lambda made, size, dtype, i, v: pick(made, i).unsqueeze(0),
    "expand": lambda made, size, dtype, i, v: pick(made, i).expand(
        2, *pick(made, i).shape
    ),
    "to": lambda made, size, dtype, i, v: pick(made, i).to(dtype),
    "cpu": lambda made, size, dtype, i, v: pick(made, i).to("cpu"),
    "mul": lambda made, size, dtype, i, v: pick(made, i) * v,
    "sum": lambda made, size, dtype, i, v: pick(made, i).double().sum(),
    "cat": lambda made, size, dtype, i, v: torch.cat(
        [pick(made, i).flatten().float(), torch.ones(2)]
    ),
    "where": lambda made, size, dtype, i, v: torch.where(
        pick(made, i) > 0, pick(made, i), v
    ),
    "nonzero": lambda made, size, dtype, i, v: torch.nonzero(pick(made, i)),
    "rand_like": lambda made, size, dtype, i, v: torch.rand_like(
        floating(pick(made, i))
    ),
    "bernoulli": lambda made, size, dtype, i, v: torch.bernoulli(
        floating(pick(made, i)).clamp(0, 1)
    ),
    "dropout": lambda made, size, dtype, i, v: torch.dropout(
        floating(pick(made, i)), 0.5, True
    ),
    "parameter": lambda made, size, dtype, i, v: (
        nn.Parameter(pick(made, i), pick(made, i).is_floating_point()).data
    ),
}


def floating(t):
    return t if t.is_floating_point() else t.float()


def writable(t):
    return t.numel() == 0 or all(
        s != 0 or n <= 1 for s, n in zip(t.stride(), t.shape, strict=True)
    )


WRITERS = {
    "normal_": lambda t, made, i, v: t.normal_(v, 2.0),
    "uniform_": lambda t, made, i, v: t.uniform_(-1, 2),
    "exponential_": lambda t, made, i, v: t.exponential_(),
    "zero_": lambda t, made, i, v: t.zero_(),
    "constant_": lambda t, made, i, v: nn.init.constant_(t, v),
    "trunc_normal_": lambda t, made, i, v: (
        nn.init.trunc_normal_(t) if t.dtype.itemsize > 2 else t.zero_()
    ),
    "add_": lambda t, made, i, v: t.add_(v),
    "mul_": lambda t, made, i, v: t.mul_(v),
    "copy_": lambda t, made, i, v: t.copy_(alike(made, i, t).clone()),
    "data": lambda t, made, i, v: t.data.sub_(v),
    "row": lambda t, made, i, v: t[i % len(t)].normal_() if t.dim() and len(t) else t,
    "setitem": lambda t, made, i, v: t.__setitem__(t > v, 7.0),
    "clamp_": lambda t, made, i, v: t.clamp_(max=v),
}


@st.composite
def programs(draw):
    steps = [
        (
            "make",
            draw(st.sampled_from(["rand", "randn", "empty+fill"])),
            draw(sizes),
            draw(dtypes),
            3,
            1.0,
        )
    ]
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(
            st.sampled_from(
                ["make", "make", "write", "write", "read", "seed", "forget"]
            )
        )
        if kind == "make":
            steps.append(
                (
                    kind,
                    draw(st.sampled_from(sorted(MAKERS))),
                    draw(sizes),
                    draw(dtypes),
                    draw(which),
                    draw(value),
                )
            )
        elif kind == "write":
            steps.append(
                (
                    kind,
                    draw(st.sampled_from(sorted(WRITERS))),
                    draw(which),
                    draw(which),
                    draw(value),
                )
            )
        else:
            steps.append((kind, draw(which)))
    return steps, draw(st.integers(0, 2**20))


def build(steps):
    module = nn.Module()
    made, read = [], []
    for kind, *step in steps:
        if kind == "make":
            name, size, dtype, i, v = step
            made.append(MAKERS[name](made, size, dtype, i, v))
        elif kind == "write":
            name, target, i, v = step
            t = pick(made, target)
            if writable(t) and t.is_floating_point():
                WRITERS[name](t, made, i, v)
        elif kind == "read":
            t = pick(made, step[0])
            read.append((t.double().sum().tolist(), t.device.type, facts(t)))
        elif kind == "seed":
            read.append(torch.initial_seed())
            torch.manual_seed(step[0])
        elif len(made) > 1:
            made.pop(step[0] % len(made))
    for i, t in enumerate(made):
        if i % 3 == 0 and t.is_floating_point():
            setattr(module, f"p{i}", nn.Parameter(t))
        elif i % 3 == 1:
            module.register_buffer(f"b{i}", t)
        else:
            setattr(module, f"a{i}", t)
    module.read = read
    return module


def facts(t):
    # NB: meta and real kernels do not agree on strides where there are no elements.
    strides = t.stride() if t.numel() else None
    return (
        type(t),
        t.dtype,
        t.device,
        t.shape,
        strides,
        t.storage_offset(),
        t.requires_grad,
    )


def bits(t):
    return (
        t.detach()
        .flatten()
        .clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
    )


def tensors(module):
    found = {}
    for kind in (module._parameters, module._buffers, module.__dict__):
        found.update({n: t for n, t in kind.items() if isinstance(t, torch.Tensor)})
    return found


class TestLaw(TestCase):
    def check(self, expected, state, module):
        one, other = tensors(expected), tensors(module)
        self.assertEqual(list(one), list(other))
        self.assertEqual(module.read, expected.read)
        for name, t in one.items():
            o = other[name]
            self.assertEqual(facts(o), facts(t))
            # Bit for bit, -0.0 and NaN as well.
            self.assertTrue(torch.equal(bits(o), bits(t)), name)
        shared = lambda ts: [
            [a.untyped_storage()._cdata == b.untyped_storage()._cdata for a in ts]
            for b in ts
        ]
        self.assertEqual(shared(list(other.values())), shared(list(one.values())))
        if state is not None:
            self.assertTrue(torch.equal(torch.get_rng_state(), state))

    @settings(max_examples=100, deadline=None)
    @given(programs(), st.randoms(use_true_random=False))
    def test_deferred_is_eager(self, program, rng: random.Random):
        steps, seed = program
        torch.manual_seed(seed)
        expected = build(steps)
        state = torch.get_rng_state()

        torch.manual_seed(seed)
        module = nn.utils.deferred_init(build, steps)
        nn.utils.materialize_module(module)
        self.check(expected, state, module)

        torch.manual_seed(seed)
        module = nn.utils.deferred_init(build, steps)
        names = list(tensors(module))
        rng.shuffle(names)
        for name in names:
            t = tensors(module)[name]
            if t.dim() and len(t) and nn.utils.is_deferred(t):
                rows = nn.utils.materialize_tensor(t, index=slice(1, None))
                self.assertTrue(
                    torch.equal(rows.double(), tensors(expected)[name][1:].double())
                    or rows.isnan().any()
                )
            nn.utils.materialize_tensor(t)
        self.check(expected, None, module)


if __name__ == "__main__":
    run_tests()
