"""What torch.testing._internal ships to test torch with, run with the patches and without: the outcomes are the same.

Law 2 of the project: without a new argument, the patched torch behaves as stock does. Each group of cases
(``upstream_<group>.py``) runs in two fresh processes, one with all patches and one with the installed torch alone, and
the outcomes are compared case by case. What is meant to differ stands in ``HARDENED``, with the reason, and has to.

``with torch.device("meta"):`` is compared on meta inputs: shape inference, counting and tracing. What it does to
real tensors is the matter of ``test/utils`` and ``test/nn``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch.testing._internal.common_utils import run_tests, TestCase
from upstream_subclasses import SEAMS, WITHOUT_TENSORS

import torch_ext
from torch_ext._autoload import VARIABLE
from torch_ext._drift import seams_of


SCRIPT = Path(__file__).with_name("upstream_case.py")

# Cases that may differ, and do: group → pattern of the case's name → why.
HARDENED = {
    "subclasses": {
        "materialized by FSDP of .*": "what has its values already keeps them",
        r"(sharded by FSDP|initialized by FSDP|distribute_tensor) of \w+ of meta under \w+ mode": "a tensor on meta "
        "is asked whether it is there",
    },
    "ops": {
        r"equal \d": "the message names the line and the remedy, and no missing kernel",
        r"to \d+": 'the sample names device="cpu": data of a meta tensor cannot be copied out in stock; in the patched '
        "block the device is overridden",
    },
    "modules": {
        r"nn\.BatchNorm(1d train 2|[23]d train 1)": "without momentum, num_batches_tracked is read, which is known",
        r"nn\.TransformerEncoder \w+ \d+": "the sample has a real tensor beside meta ones, which raises in stock",
        r"nn\.LinearCrossEntropyLoss \w+ \d+": 'the sample names device="cpu": stock builds a real '
        "weight, and its backward with meta inputs fails; in the patched block the weight is on meta",
    },
    "modes": {
        r"\w+ (under compile in a block|in a block under compile)": "the block has a dispatch mode, "
        "under which torch.compile runs eagerly",
        r"\w+ (in a block under jit\.trace|under jit\.trace in a block)": "the trace has other ops for constants",
        r"\w+ under cpu block in a block": "real tensors of an inner block meet those on meta, which raises in stock",
        r"initialization (in a block under|under) \w* ?functions( in a block)?": "random initialization is one call",
    },
}
# Operators whose sample names a device: stock makes a real tensor, the patched block one on meta, else equal.
NAMES_A_DEVICE = " names a device"


class TestUpstreamDatabases(TestCase):
    def test_subclasses(self):
        stock = self._compare("subclasses", at_least=1600)
        for seam, action in SEAMS.items():
            self.assertEqual(stock[f"{action} calls {seam}"], "True")

    def test_each_seam_is_among_the_cases(self):
        seams = {
            str(seam)
            for patch in torch_ext.series
            for seam in seams_of(patch)
            if seam.is_function
        }
        self.assertEqual({*SEAMS, *WITHOUT_TENSORS}, seams)

    def test_overrides(self):
        self._compare("overrides", at_least=3000)

    def test_operators(self):
        self._compare("ops", at_least=600)

    @pytest.mark.slow
    def test_operators_with_all_inputs(self):
        self._compare("ops", at_least=6000, limit=0)

    def test_modules(self):
        self._compare("modules", at_least=200)

    @pytest.mark.slow
    def test_modules_with_all_inputs(self):
        self._compare("modules", at_least=800, limit=0)

    def test_modes(self):
        self._compare("modes", at_least=400)

    def _compare(self, group, at_least, limit=1):
        stock, patched = outcomes(group, limit)
        self.assertEqual(list(patched), list(stock))
        # Cases that raise in stock say little.
        returned = sum("raises" not in str(one)[:20] for one in stock.values())
        self.assertGreaterEqual(returned, at_least)
        hardened = HARDENED.get(group, {})
        differing, found = [], set()
        for case, was in stock.items():
            # NB: a meta block names the line and the remedy; UnknownValue is a RuntimeError.
            now = without_messages(patched[case])
            now = json.loads(json.dumps(now).replace("UnknownValue", "RuntimeError"))
            to_compare = on_meta if case.endswith(NAMES_A_DEVICE) else without_messages
            same = to_compare(was) == now
            reasons = [name for name in hardened if re.fullmatch(name, case)]
            if not same and not reasons:
                differing.append(
                    f"{case}\n  stock    {was}\n  patched  {patched[case]}"
                )
            if not same:
                found.update(reasons)
        expected = {
            name for name in hardened if any(re.fullmatch(name, case) for case in stock)
        }
        self.assertEqual(found, expected, "differs no more")
        if differing:
            self.fail(report(differing, len(stock)))
        return stock


def report(differing, cases):
    shown = "\n".join(line[:1000] for line in differing[:40])
    return f"{len(differing)} of {cases} cases differ\n{shown}"


def outcomes(group, limit):
    """The outcomes of ``group`` in stock and patched, by case. Both processes run at once."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stock", "patched")]
        command = [sys.executable, str(SCRIPT), group]
        started = [
            subprocess.Popen(
                [*command, str(file), str(limit)],
                env=environment(file.name == "patched"),
                stderr=subprocess.PIPE,
                text=True,
            )
            for file in files
        ]
        for process, file in zip(started, files, strict=True):
            _, errors = process.communicate()
            last = file.read_text().splitlines()[-1:] if file.exists() else []
            if process.returncode:
                raise AssertionError(f"{file.name} died after {last}: {errors[-3000:]}")
        return [read(file) for file in files]


def environment(patched):
    if patched and "TORCH_EXT_TREE" in os.environ:
        return {**os.environ, "PYTHONHASHSEED": "0"}
    ours = ("PYTHONPATH", "TORCH_EXT_TREE", VARIABLE)
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    environ["PYTHONHASHSEED"] = "0"  # some samples are made of sets
    # NB: also for stock, so that both have the same path; nothing imports it there.
    environ["PYTHONPATH"] = str(Path(torch_ext.__file__).parents[1])
    if patched:
        environ[VARIABLE] = ",".join(patch.name for patch in torch_ext.series)
        environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    return environ


def read(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def without_messages(outcome):
    if isinstance(outcome, list):
        return [without_messages(one) for one in outcome]
    if isinstance(outcome, dict):
        return {k: without_messages(v) for k, v in outcome.items() if k != "message"}
    return outcome


def on_meta(outcome):
    """The outcome with each real tensor replaced by one on meta, which has no data."""
    outcome = without_messages(outcome)
    if isinstance(outcome, list):
        return [on_meta(one) for one in outcome]
    if isinstance(outcome, dict) and outcome.get("device") == "cpu":
        outcome = {**outcome, "device": "meta"}
        outcome.pop("data", None)
    return outcome


if __name__ == "__main__":
    run_tests()
