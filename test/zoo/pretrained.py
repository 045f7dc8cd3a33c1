"""``save_pretrained``, then ``from_pretrained``, of each tiny transformers model: patched as in a torch as it is.

    python test/zoo/pretrained.py [NAMES] [--folder FOLDER]

transformers opens ``torch.device("meta")`` for each ``from_pretrained``, and has the factories of torch replaced by
name meanwhile. So one process loads model after model, as a server would, and a first load that spoils the later ones
is found. Stock's process builds and saves the models and tells what it loads; the patched one loads the same folders.

What is compared: each tensor that the model holds (non-persistent buffers and plain attributes, too): its bits, dtype,
shape, device and class, and what is tied; or the type of the error. What two loads of stock do not agree on is left
out.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import law
import torch
import zoo
from torch import nn


LIMIT = 20_000_000  # parameters: what is no smaller is left out

Told = dict[str, Any]  # what is known of a loaded model: see `facts`


def facts(module: nn.Module) -> Told:
    """What a loaded model is, as JSON can have it."""
    found: Told = {}
    for name, tensor in law.tensors(module):
        kind = type(tensor).__name__, str(tensor.dtype), list(tensor.shape)
        found[name] = [*kind, str(tensor.device), tensor.requires_grad, digest(tensor)]
    found["ties"] = sorted(group for group in law.groups(module)[0] if len(group) > 1)
    found["class"] = f"{type(module).__name__}, training={module.training}"
    return found


def digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "on meta"
    return hashlib.sha1(law.bits(tensor).numpy().tobytes()).hexdigest()


def load(folder: Path) -> Told:
    library = importlib.import_module("transformers")
    try:
        return facts(zoo.seeded(lambda: library.AutoModel.from_pretrained(folder)))
    except Exception as e:
        return {"raised": type(e).__name__, "text": zoo.told(e)}


def save(name: str, folder: Path) -> str:
    """Build the smallest model of that name and save it; returns why not, or nothing."""
    why = ""
    for build in dict(architectures.models("transformers"))[name]:
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in build().parameters())
        except Exception:
            count = 0  # a constructor that cannot be built on meta
        if count > LIMIT:
            why = f"too large: {count / 1e6:.0f} M parameters"
            break  # the other sizes are larger
        try:
            zoo.seeded(build).save_pretrained(folder)
            return ""
        except Exception as e:
            why = zoo.told(e)
    return why


def stock(name: str, folder: Path) -> Told:
    """Save a model; what stock loads of it, and what is not determined by the seeds."""
    why = save(name, folder)
    if why:
        return {"not saved": why}
    found, again = load(folder), load(folder)
    loose = [key for key in found if found[key] != again.get(key) and key != "text"]
    return found | {"loose": loose}


def differences(expected: Told, actual: Told) -> list[str]:
    """Where a patched load is not stock's."""
    skip = {"loose", "text", *expected["loose"]}
    if "raised" in actual and "raised" not in expected:
        return [actual["text"]]
    return [
        f"{key}: {expected.get(key)} != {actual.get(key)}"
        for key in {**expected, **actual}
        if key not in skip and expected.get(key) != actual.get(key)
    ]


def work(patched: bool, root: Path, results: Path, names: list[str]) -> None:
    """Load model after model in this process; a line of JSON for each."""
    if patched != hasattr(nn.utils, "meta_init"):
        sys.exit("Expected a torch as it is for stock, and patches for the other one.")
    # NB: before transformers, which imports torchvision where it is installed.
    architectures.name_torchvision_operators()
    importlib.import_module("transformers").logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tell: Callable[[str, Path], Told] = (lambda _, f: load(f)) if patched else stock
    for name in names:
        found = tell(name, root / name)
        with results.open("a") as file:
            print(json.dumps([name, found]), file=file)
        gc.collect()


def process(patched: bool, root: Path, names: list[str]) -> dict[str, Told]:
    """What a process tells of ``names``; what it dies of is the result of what it was at, and another does the rest."""
    results = root / f"{'patched' if patched else 'stock'}.jsonl"
    environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--work", str(results)]
    if patched:
        command[1:1] = ["-m", "torch_ext", "run", "--", sys.executable]
    else:
        environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    found: dict[str, Told] = {}
    while left := [name for name in names if name not in found]:
        run = subprocess.run(
            [*command, "--folder", str(root), *left],
            env=os.environ | environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = results.read_text().splitlines() if results.exists() else []
        found |= dict(map(json.loads, lines))
        missing = [name for name in left if name not in found]
        if missing:
            died = f"died: {run.returncode}, {run.stderr.strip()[-300:]}"
            found[missing[0]] = {"raised": "died", "text": died, "loose": []}
    return found


def compare(
    names: list[str], root: Path
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Where patched loads are not stock's, by model; and which models are not compared, and why."""
    root.mkdir(parents=True, exist_ok=True)
    expected = process(False, root, names)
    out = {n: f["not saved"] for n, f in expected.items() if "not saved" in f}
    actual = process(True, root, [n for n in names if n not in out])
    return {n: differences(expected[n], told) for n, told in actual.items()}, out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--folder", help="where models and results are kept")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        patched = Path(options.work).name == "patched.jsonl"
        work(patched, Path(options.folder), Path(options.work), options.names)
        return
    names = options.names or [name for name, _ in architectures.models("transformers")]
    with tempfile.TemporaryDirectory() as scratch:
        found, out = compare(names, Path(options.folder or scratch))
    for name, why in out.items():
        print(f"{name} is not compared: {why}")
    for name, wrong in found.items():
        if wrong:
            print(f"{name}: {len(wrong)} differ: {wrong[0][:250]}")
    right = sum(not wrong for wrong in found.values())
    print(f"{right} of {len(found)} equal stock's, {len(out)} not compared")


if __name__ == "__main__":
    main()
