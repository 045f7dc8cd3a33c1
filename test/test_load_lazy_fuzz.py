# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) on files damaged at random.

Good files of each format are flipped, cut, spliced and overwritten with numbers that
programs stumble over; ``load_lazy_judge`` holds the outcome to the law. The same PROPERTY_TEST_SEED
makes the same files: that and a failure's name are enough to find it again.
"""

import io
import os
import random
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from load_lazy_corpus import files, legacy, safetensors
from load_lazy_corpus.case import Case, either, saved, state
from load_lazy_judge import judge
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    parametrize,
    run_tests,
    TestCase,
)


COUNT = int(os.environ.get("PROPERTY_TEST_EXAMPLES", "2500"))  # of each good file
SEED = os.environ.get("PROPERTY_TEST_SEED", "")
ANY = either(".*")
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62)


class Seed:
    """A good file to be damaged."""

    def __init__(
        self, data: bytes, suffix: str = ".pt", weights_only: bool = True
    ) -> None:
        self.data, self.suffix, self.weights_only = data, suffix, weights_only


def model() -> dict[str, object]:
    layers = {f"layers.{i}.weight": torch.arange(float(i % 7)) for i in range(90)}
    return {"model": layers, "tied": layers["layers.5.weight"], "epoch": 3}


def other_kinds() -> dict[str, object]:
    quantized = torch.quantize_per_tensor(torch.arange(8.0), 0.5, 3, torch.qint8)
    return {
        "sparse": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        "quantized": quantized,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "new": torch.ones(3, dtype=torch.uint16),
        "meta": torch.ones(2, device="meta"),
        "set": {1, 2},
    }


def rezipped(data: bytes) -> bytes:
    with files.zipfile.ZipFile(io.BytesIO(data)) as source:
        return files.zip_of({name: source.read(name) for name in source.namelist()})


def seeds() -> dict[str, Seed]:
    tar = legacy.tar_of(legacy.tar_storages(), legacy.tar_tensors(), legacy.TENSOR)
    old = {"_use_new_zipfile_serialization": False}
    pair = {"a": safetensors.info(), "b": safetensors.info(64, 128)}
    others = other_kinds()
    del others["new"]  # which torch.save writes, and torch.load refuses, in that format
    tensors = safetensors.file_of(pair, bytes(range(128)))
    return {
        "zip": Seed(saved(state())),
        "zip_of_many": Seed(saved(model())),
        "zip_of_other_kinds": Seed(saved(other_kinds())),
        "zip_of_zipfile": Seed(rezipped(saved(state()))),
        "legacy": Seed(saved(state(), **old)),
        "legacy_of_many": Seed(saved(model(), **old)),
        "legacy_of_other_kinds": Seed(saved(others, **old)),
        "safetensors": Seed(tensors, ".safetensors"),
        "tar": Seed(tar, weights_only=False),
    }


SEEDS = seeds()


def damage(data: bytes, rng: random.Random) -> bytes:
    """Returns ``data`` after one to three random changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if changed:
            rng.choice(CHANGES)(changed, rng)
    return bytes(changed)


def flip_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x2E, 0x7F, 0x80, 0xFF))


def set_number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((2, 4, 8))
    number = rng.choice(NUMBERS) + rng.choice((-1, 0, 1))
    at = rng.randrange(len(data))
    room = data[at : at + size]
    order = rng.choice(("little", "little", "big"))
    data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)[: len(room)]


def add_to_number(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at] = (data[at] + rng.choice((-2, -1, 1, 2, 16))) % 256


def cut_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def cut_start(data: bytearray, rng: random.Random) -> None:
    del data[: rng.randrange(1, 200)]


def cut_out(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 8, 64, rng.randrange(1, 500)))]


def blank_out(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice((4, 16, 64, 4096))
    room = len(data[at : at + size])
    data[at : at + room] = bytes([rng.choice((0, 0xFF))]) * room


def repeat(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 64, 300))
    data[at:at] = data[at : at + size] * rng.choice((1, 1, 2, 50))


def move(data: bytearray, rng: random.Random) -> None:
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    part = data[start : start + rng.choice((1, 4, 8, 46, 64, 300))]
    data[at : at + len(part)] = part


def splice(data: bytearray, rng: random.Random) -> None:
    other = SEEDS[rng.choice(sorted(SEEDS))].data
    start, at = rng.randrange(len(other)), rng.randrange(len(data))
    data[at : at + rng.randrange(300)] = other[start : start + rng.randrange(300)]


def insert_noise(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 30, 1000)))


CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip_bit, flip_bit, flip_bit, set_byte, set_byte, set_number, set_number),
    *(add_to_number, add_to_number, cut_end, cut_start, cut_out, blank_out, repeat),
    *(move, splice, insert_noise),
)


def damaged(title: str, count: int, as_object: bool) -> Iterator[Case]:
    """Yields ``count`` damaged files of a seed."""
    seed = SEEDS[title]
    for i in range(count):
        case = f"{title}-{i}"

        def write(path: Path, case: str = case) -> object:
            data = damage(seed.data, random.Random(SEED + case))
            if as_object:
                return io.BytesIO(data)
            path = path.with_suffix(seed.suffix)
            path.write_bytes(data)
            return str(path)

        # NB: torch.load takes safetensors files by their names alone.
        original = None if seed.suffix == ".safetensors" else seed.data
        yield Case(case, write, ANY, True, seed.weights_only, original)


@pytest.mark.slow
@unittest.skipIf(not IS_LINUX, "forks, and limits memory")
class TestLoadLazyFuzz(TestCase):
    def check(self, cases):
        wrong, count = [], 0
        for case, verdict in judge(cases):
            count += 1
            if verdict.fault:
                wrong.append(
                    f"{case.name}: {verdict.fault}\n    lazy: {verdict.lazy[:200]}\n"
                    f"    torch.load: {verdict.stock[:200]}"
                )
        self.assertEqual(len(wrong), 0, "\n".join(wrong[:20]))
        self.assertEqual(count, len(cases))

    @parametrize("seed", sorted(SEEDS))
    def test_damaged_files(self, seed):
        self.check(list(damaged(seed, COUNT, as_object=False)))

    @parametrize("seed", ["zip", "zip_of_other_kinds", "legacy"])
    def test_damaged_file_objects(self, seed):
        self.check(list(damaged(seed, COUNT // 2, as_object=True)))

    @parametrize("seed", sorted(SEEDS))
    def test_undamaged(self, seed):
        """The seeds themselves load: the fuzzer starts from something."""
        path = lambda path: path.with_suffix(SEEDS[seed].suffix)
        write = lambda p: path(p).write_bytes(SEEDS[seed].data) and str(path(p))
        case = Case(seed, write, "", True, SEEDS[seed].weights_only)
        ((_, verdict),) = judge([case])
        self.assertEqual(verdict, ("loaded", "loaded", ""))


instantiate_parametrized_tests(TestLoadLazyFuzz)

if __name__ == "__main__":
    run_tests()
