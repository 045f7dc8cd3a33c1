"""Build a zoo of models in every way there is, and print as a Markdown table how many of each library come out right.

    python -m torch_ext run -- python test/zoo/zoo.py [transformers timm torchvision diffusers]

For each model that eager construction builds: ``meta_init`` leaves nothing off meta; ``deferred_init`` and
materializing, in order and shuffled, is eager construction bit for bit, with the state of the generators. Beside it,
what ``torch.device("meta")``, ``accelerate.init_empty_weights`` and ``FakeTensorMode`` make of it, in a torch as it is.

Models are built in fresh processes, some tens in each; what a process dies of is the result of what it was at.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import architectures
import law
import torch
from architectures import Build, LIBRARIES
from torch import nn


# Of a torch as it is, and of a patched one.
STOCK = [
    'torch.device("meta")',
    "init_empty_weights()",
    "init_empty_weights(include_buffers=True)",
    "FakeTensorMode()",
]
META = ['torch.device("meta"), patched', "meta_init()"]
DEFERRED = ["deferred_init, in order", "deferred_init, shuffled"]
CHOICE = "eager"
MEMORY = 16 << 30  # bytes of address space of a worker

Task = tuple[str, int, str]  # the model, which of its builds, the way
Results = dict[str, dict[str, str]]  # by model, by way


def generators() -> tuple[Any, ...]:
    states: tuple[Any, ...] = (torch.get_rng_state().tolist(), random.getstate())
    with contextlib.suppress(ImportError):
        import numpy

        states += (str(numpy.random.get_state()),)
    return states


def seeded(build: Build) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(0)
    return build()


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def on_meta(tensor: torch.Tensor) -> bool:
    return tensor.is_meta


def in_context(
    context: Any, build: Build, right: Callable[[torch.Tensor], bool] = on_meta
) -> str:
    """How construction in a context goes that is to leave no real tensor."""
    try:
        with context:
            module = build()
    except Exception as e:
        return told(e)
    named = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in named if not right(tensor)]
    return f"left: {len(left)}, {left[0]}" if left else "ok"


def empty_weights(build: Build, **options: bool) -> str:
    from accelerate import init_empty_weights

    return in_context(init_empty_weights(**options), build)


def fake(build: Build) -> str:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    return in_context(FakeTensorMode(), build, lambda t: isinstance(t, FakeTensor))


@functools.lru_cache(1)
def expected(build: Build) -> tuple[nn.Module, tuple[Any, ...]]:
    """Eager construction, and the generators after it."""
    return seeded(build), generators()


def deferred(build: Build, shuffled: bool) -> str:
    """Whether deferred construction is eager construction."""
    module, states = expected(build)
    try:
        actual = seeded(lambda: nn.utils.deferred_init(build))
        parts = list(actual.modules()) if shuffled else [actual]
        random.Random(1).shuffle(parts)
        for part in parts:
            nn.utils.materialize_module(part)
    except Exception as e:
        return told(e)
    after = generators()
    found = law.differences(module, actual)
    if found and all(d.endswith("values") for d in found):
        # What two eager constructions do not agree on is not initialized, or not determined by the seeds.
        loose = law.differences(module, seeded(build))
        found = [d for d in found if d not in loose]
        if not found:
            return f"ok but for {len(loose)} that eager construction leaves open"
    if found:
        return f"{len(found)} differ: {found[0][:200]}"
    return "ok" if after == states else "generator state"


WAYS: dict[str, Callable[[Build], str]] = {
    STOCK[0]: lambda build: in_context(torch.device("meta"), build),
    STOCK[1]: empty_weights,
    STOCK[2]: functools.partial(empty_weights, include_buffers=True),
    STOCK[3]: fake,
    META[0]: lambda build: in_context(torch.device("meta"), build),
    META[1]: lambda build: in_context(nn.utils.meta_init(), build),
    DEFERRED[0]: functools.partial(deferred, shuffled=False),
    DEFERRED[1]: functools.partial(deferred, shuffled=True),
}


def parameters(build: Build) -> int:
    """How many parameters a model has, without memory for them; 0 if no context can tell."""
    for context in (nn.utils.meta_init(), torch.device("meta")):
        with contextlib.suppress(Exception), context:
            return sum(p.numel() for p in build().parameters())
    return 0


def choose(builds: list[Build], limit: int) -> tuple[int, str]:
    """Which of ``builds`` is the first that eager construction builds and that is small; or -1, and why none is."""
    why = ""
    for i, build in enumerate(builds):
        count = parameters(build)
        if count > limit:
            why = f"too large: {count / 1e6:.0f} M parameters"
            continue
        try:
            expected(build)
        except Exception as e:
            why = told(e)
            continue
        return i, ""
    return -1, why


def limit_memory() -> None:
    """Let a model that is too large fail by itself, instead of all processes of the machine."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def work(library: str, tasks: list[Task]) -> None:
    """Do tasks in this process, a line of JSON for each; a choice that fails skips what follows for its model."""
    limit_memory()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if tasks[0][2] in STOCK and hasattr(nn.utils, "meta_init"):
        sys.exit("Expected a torch as it is. Is this a tree? Run grafted instead.")
    builds = dict(architectures.models(library))
    chosen = {name: which for name, which, _ in tasks}
    for name, _, way in tasks:
        if way == CHOICE:
            chosen[name], result = choose(
                builds[name], architectures.limit(library, name)
            )
            result = result or f"ok {chosen[name]}"
        elif chosen[name] < 0:
            continue
        else:
            result = WAYS[way](builds[name][chosen[name]])
        print(json.dumps([name, way, result]), flush=True)
        gc.collect()


def batch(library: str, tasks: list[Task], stock: bool) -> list[tuple[str, str, str]]:
    """Do tasks in a fresh process; if it dies, the rest in another."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if stock:
        env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    command = ["nice", sys.executable, "-W", "ignore", __file__, "--work", library]
    results: list[tuple[str, str, str]] = []
    while tasks:
        run = subprocess.run(
            command, input=json.dumps(tasks), env=env, text=True, capture_output=True
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith('["')]
        results += [tuple(json.loads(line)) for line in lines]
        if run.returncode == 0:
            break
        tasks = rest(tasks, results)
        code, error = run.returncode, run.stderr.strip().splitlines()[-1:]
        died = f"died: {signal.Signals(-code).name if code < 0 else error}"
        results.append((tasks[0][0], tasks[0][2], died))
        tasks = rest(tasks, results)
    return results


def rest(tasks: list[Task], results: list[tuple[str, str, str]]) -> list[Task]:
    """What of ``tasks`` is left to do after ``results``."""
    done = {(name, way) for name, way, _ in results}
    choices = {name: result for name, way, result in results if way == CHOICE}
    left = []
    for name, which, way in tasks:
        choice = choices.get(name, f"ok {which}")
        if (name, way) not in done and choice.startswith("ok"):
            left.append((name, int(choice.split()[1]), way))
    return left


def survey(
    library: str,
    names: list[str],
    ways: list[str],
    chosen: dict[str, int] | None = None,
    size: int = 20,
    jobs: int = 2,
) -> Results:
    """What each way makes of each model; without ``chosen``, the first of the ways is the choice of what to build."""
    stock = chosen is not None
    ways = ways if stock else [CHOICE, *ways]
    tasks = [(n, chosen[n] if chosen else -1, way) for n in names for way in ways]
    step = size * len(ways)
    batches = [tasks[i : i + step] for i in range(0, len(tasks), step)]
    results: Results = {name: {} for name in names}
    with ThreadPoolExecutor(jobs) as pool:
        for some in pool.map(lambda b: batch(library, b, stock), batches):
            for name, way, result in some:
                results[name][way] = result
                print(f"{library} {name}, {way}: {result}", file=sys.stderr, flush=True)
    return results


def everything(library: str, every: int, jobs: int) -> Results:
    """All ways, of each model of a library that eager construction builds."""
    names = [name for name, _ in architectures.models(library)][::every]
    results = survey(library, names, META + DEFERRED, jobs=jobs)
    chosen = {
        name: int(found[CHOICE].split()[1])
        for name, found in results.items()
        if found[CHOICE].startswith("ok")
    }
    stock = survey(library, list(chosen), STOCK, chosen, jobs=jobs)
    return {name: found | stock.get(name, {}) for name, found in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES))
    parser.add_argument("--every", type=int, default=1, help="only each n-th model")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--save", help="file for all results, as JSON")
    parser.add_argument("--load", nargs="+", help="print what was saved")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, [tuple(task) for task in json.load(sys.stdin)])
        return
    import table

    found: dict[str, Results] = {}
    for file in options.load or ():
        with open(file) as f:
            found |= json.load(f)
    for library in options.libraries if not options.load else ():
        try:
            found[library] = everything(library, options.every, options.jobs)
        except ImportError as e:
            print(f"{library}: {e}", file=sys.stderr)
    if options.save:
        with open(options.save, "w") as f:
            json.dump(found, f, indent=1)
    print(table.markdown(found))


if __name__ == "__main__":
    main()
