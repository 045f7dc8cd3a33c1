"""Law 2: with the new arguments absent, patched functions do as stock does, errors, warnings and modes included."""

import json
from pathlib import Path

import pytest
from processes import python
from stock_parity_cases import CASES


ROOT = Path(__file__).parents[2]  # with torch_ext, and no torch
SCRIPT = str(Path(__file__).parent / "stock_parity_cases.py")

# More than stock can, or another text, and why.
DIFFERS = {
    "to_empty, the first one, functions": "Parameter.__new__ imports its new file under the mode",
    "load_state_dict, deepest": "the patched walk has no recursion",
    "FSDP, no reset_parameters": "the patched error names all modules that lack it",
}


@pytest.fixture(scope="module")
def outcomes():
    return [
        json.loads(python(SCRIPT, how, root=ROOT, check=True).stdout.splitlines()[-1])
        for how in ("stock", "patched")
    ]


@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERS])
def test_is_as_stock(outcomes, name):
    stock, patched = (outcome[name] for outcome in outcomes)
    assert patched == stock


def test_modules_may_be_nested_at_least_as_deeply(outcomes):
    stock, patched = (o["load_state_dict, deepest"][0][1] for o in outcomes)
    assert patched >= stock > 900


def test_fsdp_names_what_has_no_reset_parameters(outcomes):
    for outcome in outcomes:
        (kind, *_), told = outcome["FSDP, no reset_parameters"]
        assert kind in ("error", "result")
        for category, text, _ in told:
            if "reset_parameters" in text:
                assert category == "UserWarning"
                assert text.startswith("Unable to call `reset_parameters()` for module")
