# Owner(s): ["module: serialization"]
"""Deferred tensors: what they read, and that nothing about them surprises.

That programs compute with them what they compute with plain tensors is tested in
test_load_lazy_deferred_law.py.
"""

import copy
import gc
import io
import itertools
import pickle
import weakref

import torch
from torch import nn
from torch.testing._internal.common_utils import run_tests, TestCase


CPU = torch.device("cpu")
START = 24  # where the bytes lie in the file


class Counting:
    """A file of the bytes of ``tensor``, or of as many zeros, that counts what is read."""

    name = "weights.bin"

    def __init__(self, tensor=None, size=0):
        self.data = None if tensor is None else bytes(tensor.untyped_storage().tolist())
        self.size = START + (size if tensor is None else len(self.data))
        self.reads = []
        self.fails = False

    def read_into(self, start, out):
        if self.fails:
            raise RuntimeError("the file is gone")
        self.reads.append((start - START, len(out)))
        assert START <= start <= start + len(out) <= self.size
        if self.data is not None:
            out[:] = self.data[start - START : start - START + len(out)]

    @property
    def nbytes(self):
        return sum(size for _, size in self.reads)


def storage_of(source, device=CPU, swap=1):
    from torch._load_lazy._deferred import DeferredStorage

    extent = START, source.size - START
    return DeferredStorage(source, extent, device=device, swap=swap)


def deferred(tensor, requires_grad=False):
    """A deferred tensor like ``tensor``, and the file that it reads."""
    source = Counting(tensor)
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return storage_of(source).tensor(tensor.dtype, *place, requires_grad), source


def is_deferred(tensor):
    from torch._load_lazy._deferred import DeferredTensor

    return type(tensor) is DeferredTensor


def table(rows=64, columns=32, dtype=torch.float32):
    return torch.arange(rows * columns).to(dtype).view(rows, columns)


class TestUnread(TestCase):
    def test_tells_all_but_data(self):
        x = table()[3:, 2:]
        t, file = deferred(x)
        self.assertIsInstance(t, torch.Tensor)
        for ask in (
            lambda t: (t.shape, t.size(1), len(t), t.numel(), t.dim(), t.ndim),
            lambda t: (t.stride(), t.storage_offset(), t.is_contiguous(), t.nbytes),
            lambda t: (t.dtype, t.layout, t.element_size(), t.is_floating_point()),
            lambda t: (t.device, t.is_cpu, t.is_meta, t.is_cuda, t.get_device()),
            lambda t: (t.type(), t.is_shared(), t.is_pinned(), t.is_sparse),
            lambda t: (t.requires_grad, t.is_leaf, t.grad, t.grad_fn),
            lambda t: (torch.is_tensor(t), torch.is_complex(t), torch.numel(t)),
        ):
            self.assertEqual(ask(t), ask(x))
        self.assertIn(t, {t})
        self.assertTrue(is_deferred(t))
        self.assertEqual(file.reads, [])

    def test_views_and_conversions_stay_deferred(self):
        x = table()
        t, file = deferred(x)
        for make in (
            lambda t: t[2:5, None, ..., 3],
            lambda t: t.narrow(0, 1, 4).select(1, 2),
            lambda t: t.view(32, 64).T.t().transpose(0, 1).permute(1, 0),
            lambda t: t.reshape(-1).flatten().unsqueeze(0).squeeze(),
            lambda t: t.unbind(1)[3],
            lambda t: t.split([10, 54])[1].chunk(3)[2],
            lambda t: list(t)[5],
            lambda t: t[0].expand(7, -1).detach().data,
            lambda t: t.as_strided((3, 3), (3, 1), 9).contiguous(),
            lambda t: t.view(torch.int32).to(torch.int64),
            lambda t: t.half().double().bfloat16().type(torch.float32),
            lambda t: t.to("cpu", torch.float64).T[3].to(dtype=torch.float16),
            lambda t: t[:, :4].float().to(torch.bfloat16)[1:3],
        ):
            view, expected = make(t), make(x)
            self.assertTrue(is_deferred(view) or view is t)
            self.assertEqual(
                (view.shape, view.stride()), (expected.shape, expected.stride())
            )
            file.reads.clear()
            file.fails = True
            with self.assertRaisesRegex(RuntimeError, "the file is gone"):
                view.sum()
            file.fails = False
            self.assertEqual(deferred_like(make, x), expected)
        self.assertIs(t.to(torch.float32), t)
        for same in (t.to("cpu"), t.float(), t.contiguous()):
            self.assertIs(same, t)

    def test_nothing_that_is_listed_reads(self):
        from torch._load_lazy import _deferred_ops as ops

        x = table(4, 4, torch.complex64)
        tries = [(), (None,), (0,), (2,), (0, 1), (0, 1, 2), (x,), ((4, 4),), ([1, 3],)]
        tries += [(0, (2, 2)), ((2,), (1,)), ((1, 0),)]
        cubes = torch.view_as_real(x).view(2, 4, 4), torch.view_as_real(x), x
        groups = ops.VIEWS | ops.MAYBE_VIEWS | ops.METADATA | ops.SHARED | ops.OF_DEVICE
        for function in groups:
            done = 0
            for like, args in itertools.product(cubes, tries):
                try:
                    expected = function(like.detach(), *args)
                except (AttributeError, IndexError, RuntimeError, TypeError):
                    continue
                t, file = deferred(like)
                out = function(t, *args)
                self.assertEqual(file.reads, [], msg=str((function, args)))
                self.assertIs(type(out) is tuple, type(expected) is tuple)
                done += 1
            self.assertGreater(done, 0, msg=str(function))

    def test_is_printed_without_data_when_large(self):
        t, file = deferred(table())
        self.assertExpectedInline(
            str(t), """tensor(..., size=(64, 32), dtype=torch.float32, deferred)"""
        )
        self.assertExpectedInline(
            f"{nn.Parameter(t)}",
            """\
Parameter containing:
tensor(..., size=(64, 32), dtype=torch.float32, requires_grad=True, deferred)""",
        )
        self.assertEqual(file.reads, [])
        self.assertExpectedInline(str(t[1, :3]), """tensor([32., 33., 34.])""")
        self.assertExpectedInline(f"{t[1, 2]:.1f}", """34.0""")
        self.assertEqual(file.nbytes, 12)
        t, _ = deferred(table(2, 2))
        self.assertExpectedInline(
            repr(nn.Parameter(t)),
            """\
Parameter containing:
tensor([[0., 1.],
        [2., 3.]], requires_grad=True)""",
        )


def deferred_like(make, x):
    return make(deferred(x)[0]).clone()


class TestReads(TestCase):
    def test_a_block_of_rows_is_one_range(self):
        t, file = deferred(table())
        self.assertEqual((t[10:20] + 0).sum(), table()[10:20].sum())
        self.assertEqual(file.reads, [(10 * 128, 10 * 128)])

    def test_reads_what_is_missing(self):
        t, file = deferred(table())
        t[10:20] + 0
        t[30:40] + 0
        self.assertEqual(t[5:35] + 0, table()[5:35])
        self.assertEqual(file.reads[2:], [(5 * 128, 5 * 128), (20 * 128, 10 * 128)])
        self.assertEqual(t + 0, table())
        self.assertEqual(file.nbytes, table().nbytes)

    def test_a_column_is_read_with_bounded_gaps(self):
        rows, columns = 40, 10_000
        source = Counting(size=rows * columns * 4)
        t = storage_of(source).tensor(torch.float32, 0, (rows, columns), (columns, 1))
        t[:, 7] + 0
        self.assertEqual(source.reads, [(28 + i * 40_000, 4) for i in range(rows)])
        source.reads.clear()
        t[:, 2000:4000:3].sum()
        self.assertEqual([size for _, size in source.reads], [7996] * rows)
        rows, columns = 40, 1_000  # nearer than one more request is worth
        source = Counting(size=rows * columns * 4)
        t = storage_of(source).tensor(torch.float32, 0, (rows, columns), (columns, 1))
        t[:, 7] + 0
        self.assertEqual(source.reads, [(28, 39 * 4_000 + 4)])

    def test_a_conversion_reads_what_its_view_needs(self):
        x = table(dtype=torch.bfloat16)
        t, file = deferred(x)
        wide = t.float()
        self.assertEqual(wide[3:5] * 2, x[3:5].float() * 2)
        self.assertEqual(file.reads, [(3 * 64, 2 * 64)])
        self.assertTrue(is_deferred(t) and is_deferred(wide))
        self.assertEqual(wide + 0, x.float())

    def test_a_copy_is_read_to_its_place(self):
        x = table()
        t, file = deferred(x)
        self.assertEqual(t[4:8].clone(), x[4:8])
        target = torch.zeros(8, 32, dtype=torch.float64)
        version = target._version
        target[2:].copy_(t[10:16])
        self.assertEqual(target, torch.cat([torch.zeros(2, 32), x[10:16]]).double())
        self.assertEqual(target._version, version + 1)
        self.assertEqual(file.reads, [(512, 512), (1280, 768)])
        self.assertTrue(is_deferred(t))
        self.assertEqual(torch.ones(32, 64).copy_(t.t()), x.t())
        self.assertEqual(torch.ones(64, 32).t().copy_(t.t()), x.t())

    def test_of_a_storage_larger_than_memory(self):
        rows, columns = 1 << 26, 1 << 14  # 4 TiB
        source = Counting(size=rows * columns * 4)
        t = storage_of(source).tensor(torch.float32, 0, (rows, columns), (columns, 1))
        t[rows - 3 :].add_(1)
        self.assertEqual(t[rows - 2 :, :5].tolist(), [[1.0] * 5] * 2)
        self.assertEqual(source.nbytes, 3 * columns * 4)

    def test_other_byte_order(self):
        x = table()
        swapped = x.view(torch.uint8).view(-1, 4).flip(1).reshape(-1)
        source = Counting(swapped)
        t = storage_of(source, swap=4).tensor(torch.float32, 0, (64, 32), (32, 1))
        self.assertEqual(t[3] + 0, x[3])
        part, expected = (like.view(torch.uint8)[5, 3:9] for like in (t, x))
        self.assertEqual(part.tolist(), expected.tolist())
        self.assertEqual(t[1:3].half() + 0, x[1:3].half())
        self.assertEqual(t + 0, x)

    def test_a_failed_read_can_be_repeated(self):
        t, file = deferred(table())
        rows = t[2:4]
        file.fails = True
        for use in (lambda: rows + 1, lambda: t.numpy(), lambda: t.half().sum()):
            with self.assertRaisesRegex(RuntimeError, "the file is gone"):
                use()
        self.assertTrue(is_deferred(rows) and is_deferred(t))
        file.fails = False
        self.assertEqual(rows + 0, table()[2:4])


class TestRead(TestCase):
    def test_is_plain_from_then_on(self):
        x = table()
        t, _ = deferred(x)
        t.label = "weight"
        same, reference = t, weakref.ref(t)
        self.assertEqual(t + 1, x + 1)
        self.assertIs(type(t), torch.Tensor)
        self.assertIs(reference(), same)
        self.assertEqual(vars(t), {"label": "weight"})
        plain = torch.empty(0).set_(x.untyped_storage(), 0, x.size(), x.stride())
        keys = torch._C._dispatch_keys
        self.assertEqual(keys(t).raw_repr(), keys(plain).raw_repr())
        self.assertFalse(t.untyped_storage().resizable())

    def test_writes_are_seen_by_all_views(self):
        x = table()
        t, _ = deferred(x)
        early = t[4:8]
        written = t[5]
        written.zero_()
        late = t.view(-1)
        self.assertTrue(is_deferred(early) and is_deferred(late) and is_deferred(t))
        x[5] = 0
        self.assertEqual(early + 0, x[4:8])
        self.assertEqual(late + 0, x.view(-1))
        early.fill_(7)
        self.assertEqual(t[:9, 0].tolist(), [0, 32, 64, 96, 7, 7, 7, 7, 256])
        self.assertEqual(written._version, t._version)
        self.assertIs(written._base, t)
        t.sum()
        self.assertEqual(written + early[1], torch.full((32,), 14.0))
        for tensor in (t, written, early):
            self.assertIs(type(tensor), torch.Tensor)
        self.assertIs(written._base, t)

    def test_a_conversion_is_a_snapshot(self):
        x = table()
        t, _ = deferred(x)
        before = t.double()
        row = t[3]
        row.zero_()
        after = t.double()
        self.assertEqual(before + 0, x.double())
        x[3] = 0
        self.assertEqual(after + 0, x.double())
        self.assertEqual(t.clone(), x)

    def test_tensors_of_one_storage_share_it(self):
        source = Counting(table())
        storage = storage_of(source)
        one = storage.tensor(torch.float32, 0, (64, 32), (32, 1))
        other = storage.tensor(torch.uint8, 4, (12,), (1,))
        other.zero_()
        self.assertEqual(one[0, :5].tolist(), [0, 0, 0, 0, 4])
        self.assertEqual(source.reads, [(4, 12), (0, 4), (16, 4)])
        self.assertEqual(other.untyped_storage()._cdata, one.untyped_storage()._cdata)
        self.assertEqual(other.data_ptr(), one.data_ptr() + 4)

    def test_what_sees_the_storage_reads_all_of_it(self):
        x = table()
        for see in (
            lambda row: row.as_strided((2, 4), (32, 1), 8).tolist(),
            lambda row: row.untyped_storage().tolist(),
            lambda row: row._base.tolist(),
            lambda row: torch.save(row, file := io.BytesIO()) or file.getvalue(),
            lambda row: copy.deepcopy(row).untyped_storage().tolist(),
            lambda row: row.as_strided_((3,), (40,)).tolist(),
            lambda row: row.share_memory_().untyped_storage().tolist(),
        ):
            row = deferred(x)[0][3]
            row + 1
            self.assertTrue(is_deferred(row))
            self.assertEqual(see(row), see(x.clone()[3]))

    def test_answers_of_data(self):
        x = table(4, 4)
        for ask in (
            lambda t: t.numpy().tolist(),
            lambda t: t.tolist(),
            lambda t: t[1, 2].item(),
            lambda t: float(t[1, 2]),
            lambda t: bool(t[1, 2] > 3),
            lambda t: torch.equal(t, table(4, 4)),
            lambda t: table(4, 4) @ t,
            lambda t: torch.cat([t, t[1:2], table(4, 4)]),
            lambda t: t[torch.tensor([2, 0])],
            lambda t: t[t > 5],
            lambda t: 7 in t,
            lambda t: torch.from_dlpack(t) + 1,
            lambda t: nn.functional.linear(torch.ones(4), t),
            lambda t: torch.ops.aten.sum(t),
            lambda t: torch.stack(list(t)),
            lambda t: torch.utils.data.default_collate([t, t]),
        ):
            self.assertEqual(ask(deferred(x)[0]), ask(x))

    def test_copies_are_plain(self):
        x = table()
        for make in (
            copy.deepcopy,
            copy.copy,
            lambda t: pickle.loads(pickle.dumps(t)),
            lambda t: torch.load(saved(t)),
        ):
            out = make(deferred(x)[0])
            self.assertIs(type(out), torch.Tensor)
            self.assertEqual(out, x)
            out = make(nn.Parameter(deferred(x)[0]))
            self.assertIs(type(out), nn.Parameter)
            self.assertEqual(out, nn.Parameter(x))
        t, _ = deferred(x)
        loaded = torch.load(saved([t, t[3], t]))
        self.assertIs(loaded[0], loaded[2])
        self.assertEqual(loaded[1].data_ptr(), loaded[0][3].data_ptr())

    def test_views_that_are_gone_are_forgotten(self):
        x, _ = deferred(torch.arange(40.0).view(10, 4))
        views = [x[i] for i in range(10)][8:]
        self.assertEqual(len(x._deferral.views), len(views))

    def test_memory_ends_with_the_last_tensor(self):
        t, file = deferred(table())
        row = t[3]
        row + 1
        storage = weakref.ref(file)
        del t, file
        self.assertEqual(row.sum(), table()[3].sum())
        del row
        gc.collect()
        self.assertIsNone(storage())


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


if __name__ == "__main__":
    run_tests()
