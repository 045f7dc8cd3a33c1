"""Every architecture that the libraries know, in one run that can be interrupted; prints a table and all names.

    python -m torch_ext run -- python test/zoo/sweep.py --out zoo.jsonl [transformers timm torchvision diffusers]

Of each model: ``torch.device("meta")``, patched, leaves nothing real; a model built so is usable after
``load_state_dict(reuse_tensors=True)`` and ``materialize_module``, bit for bit the eager one; ``deferred_init`` is
eager construction, in order and shuffled. Of timm, values are compared for the smallest model of each family, and all
others are only built on meta. So are models that are too large. Each result is a line of JSON in ``--out`` at once: the
same command goes on where it was interrupted.
"""

import argparse
import copy
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import architectures
import law
import table
import torch
import zoo
from architectures import Build, LIBRARIES
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm


USABLE = "usable after loading"
META = zoo.META[0]
VALUES = [USABLE, *zoo.DEFERRED]
SECONDS = 240  # what takes longer counts as raised
BATCH = 30  # models a process

Line = tuple[str, str, str, float]  # name, way, result, seconds


def usable(build: Build) -> str:
    """Whether a model that is built on meta and loaded is the eager one."""
    module, _ = zoo.expected(build)
    state_dict = copy.deepcopy(module.state_dict())  # it may share its memory
    try:
        with torch.device("meta"):
            actual = zoo.seeded(build)
        actual.load_state_dict(state_dict, reuse_tensors=True)  # type: ignore[call-arg]
        nn.utils.materialize_module(actual)
        compute_weights(module)
        compute_weights(actual)
    except Exception as e:
        return zoo.told(e)
    found = law.differences(module, actual)
    if found and all(d.endswith("values") for d in found):
        loose = law.differences(module, zoo.seeded(build))
        found = [d for d in found if d not in loose]
    return f"{len(found)} differ: {found[0][:200]}" if found else "ok"


def compute_weights(module: nn.Module) -> None:
    """Compute what ``weight_norm`` computes before each call, and leaves on meta until then."""
    for m in module.modules():
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(m, hook.name, hook.compute_weight(m))


def judged(name: str, build: Build, way: str) -> str:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return usable(build) if way == USABLE else zoo.WAYS[way](build)
    except Exception as e:
        return zoo.told(e)
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def ways(
    library: str, name: str, builds: list[Build], values: bool
) -> Iterator[tuple[str, str]]:
    """``(way, result)`` of one model."""
    limit = architectures.limit(library, name) if library != "timm" else 10**9
    which, why = zoo.choose(builds, limit) if values else (0, "")
    if values:
        yield zoo.CHOICE, why or f"ok {which}"
    if which < 0 and not why.startswith("too large"):
        return
    build = builds[max(which, 0)]
    result = judged(name, build, META)
    yield META, f"ok {zoo.parameters(build)}" if result == "ok" else result
    for way in VALUES if values and which >= 0 else ():
        yield way, judged(name, build, way)
    zoo.expected.cache_clear()


def work(library: str, values: bool, out: Path, names: list[str]) -> None:
    zoo.limit_memory()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    builds = dict(architectures.models(library))
    for name in names:
        start = time.process_time()
        for way, result in ways(library, name, builds[name], values):
            write(out, library, (name, way, result, time.process_time() - start))
            start = time.process_time()
        write(out, library, (name, f"done, values={values}", "", 0.0))
        gc.collect()


def write(out: Path, library: str, line: Line) -> None:
    text = json.dumps([library, *line]) + "\n"
    with out.open("ab", buffering=0) as file:
        file.write(text.encode())  # in one call, so that processes do not mix lines


def read(out: Path, library: str) -> dict[str, dict[str, str]]:
    """The results so far, by model and way."""
    found: dict[str, dict[str, str]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        of, name, way, result, _ = json.loads(line)
        if of == library:
            found.setdefault(name, {})[way] = result
    return found


def batch(library: str, values: bool, out: Path, names: list[str]) -> None:
    """Do models in a fresh process; if it dies, the rest in another."""
    done = f"done, values={values}"
    while names := [n for n in names if done not in read(out, library).get(n, {})]:
        arguments = ["--work", library, "--out", str(out), *["--values"] * values]
        run = subprocess.run(
            ["nice", sys.executable, "-W", "ignore", __file__, *arguments, *names],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        left = [n for n in names if done not in read(out, library).get(n, {})]
        if run.returncode == 0 or not left:
            return
        error = run.stderr.strip().splitlines()[-1:]
        write(out, library, (left[0], META, f"died: {run.returncode} {error}", 0.0))
        write(out, library, (left[0], done, "", 0.0))


def do(library: str, values: bool, out: Path, names: list[str], jobs: int) -> None:
    done = f"done, values={values}"
    found = read(out, library)
    names = [n for n in names if done not in found.get(n, {})]
    parts = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda part: batch(library, values, out, part), parts))


def families(out: Path) -> list[str]:
    """The smallest model of each family of timm, by what the meta block counted."""
    modules = importlib.import_module("timm.models._registry")._model_to_module
    smallest: dict[Any, tuple[int, str]] = {}
    for name, result in read(out, "timm").items():
        told = result.get(META, "").split()
        if told[:1] != ["ok"] or not int(told[1]):
            continue
        family = modules[name], re.match("[a-z]+", name)
        key = family[0], family[1] and family[1].group()
        smallest[key] = min(smallest.get(key, (10**9, "")), (int(told[1]), name))
    return [name for count, name in smallest.values() if count < 100_000_000]


def report(out: Path, libraries: list[str]) -> int:
    """Print the table; returns how many results of the patches are not right."""
    wrong = 0
    seconds: Counter[str] = Counter()
    for line in out.read_text().splitlines():
        of, _, way, _, s = json.loads(line)
        seconds[f"{of}, {way}"] += s
    for library in libraries:
        found = read(out, library)
        for way in [zoo.CHOICE, META, *VALUES]:
            told = {n: r[way] for n, r in found.items() if way in r}
            kinds = Counter(table.kind(t) for t in told.values())
            cells = " / ".join(str(kinds[k]) for k in ("right", "raised", "left"))
            print(
                f"| {library} | {way} | {cells} | {seconds[f'{library}, {way}']:.0f} s |"
            )
            for name, result in told.items():
                if not result.startswith("ok"):
                    wrong += way != zoo.CHOICE
                    print(f"  - `{name}`: {result}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="libraries")
    parser.add_argument("--out", type=Path, required=True, help="file of results")
    parser.add_argument("--every", type=int, default=1, help="only each n-th model")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--strict", action="store_true", help="fail if any is wrong")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--values", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.values, options.out, options.names)
        return
    libraries = options.names or list(LIBRARIES)
    for library in libraries if not options.report else ():
        names = [name for name, _ in architectures.models(library)][:: options.every]
        values = library != "timm"
        do(library, values, options.out, names, options.jobs)
        if not values:
            do(library, True, options.out, families(options.out), options.jobs)
    wrong = report(options.out, libraries)
    if options.strict and wrong:
        sys.exit(f"Expected all results to be right, got {wrong} that are not.")


if __name__ == "__main__":
    main()
