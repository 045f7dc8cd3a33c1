"""Build a zoo of models in every way there is, and tell how many of each library come out right.

    python -m torch_ext run -- python test/zoo/zoo.py transformers timm torchvision diffusers

For each model that eager construction builds: ``meta_init`` leaves nothing off meta; ``deferred_init`` and
materializing, in order and shuffled, is eager construction bit for bit, with the state of the generator. Beside it,
what ``torch.device("meta")``, ``accelerate.init_empty_weights`` and ``FakeTensorMode`` make of it.
"""

import argparse
import contextlib
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import architectures
import law
import torch
from torch import nn


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(0)
    return build()


def off_meta(module: nn.Module) -> list[str]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, t in named if t.device.type != "meta"]


def in_context(context: Any, build: Callable[[], nn.Module]) -> str:
    """How construction in a context goes that is to leave all on meta."""
    try:
        with context:
            module = build()
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    left = off_meta(module)
    return f"off meta: {len(left)}, {left[0]}" if left else "ok"


def in_meta_init(build: Callable[[], nn.Module]) -> str:
    return in_context(nn.utils.meta_init(), build)


def fake(build: Callable[[], nn.Module]) -> str:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            build()
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    return "ok"


def deferred(build: Callable[[], nn.Module], shuffled: bool) -> str:
    """Whether deferred construction is eager construction."""
    expected = seeded(build)
    state = torch.get_rng_state()
    # What two eager constructions do not agree on is not initialized, or not determined by the seeds.
    loose = {
        d for d in law.differences(expected, seeded(build)) if d.endswith("values")
    }
    try:
        module = seeded(lambda: nn.utils.deferred_init(build))
        parts = list(module.modules()) if shuffled else [module]
        random.Random(1).shuffle(parts)
        for part in parts:
            nn.utils.materialize_module(part)
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    found = [d for d in law.differences(expected, module) if d not in loose]
    if found:
        return f"{len(found)} differ: {found[0][:200]}"
    if not torch.equal(torch.get_rng_state(), state):
        return "generator state"
    return "ok" if not loose else "ok but for what eager construction leaves open"


def ways(build: Callable[[], nn.Module], with_fake: bool) -> Iterator[tuple[str, str]]:
    yield "torch.device", in_context(torch.device("meta"), build)
    with contextlib.suppress(ImportError):
        from accelerate import init_empty_weights

        yield "accelerate", in_context(init_empty_weights(), build)
    if with_fake:
        yield "FakeTensorMode", fake(build)
    yield "meta_init", in_meta_init(build)
    yield "deferred_init", deferred(build, shuffled=False)
    yield "shuffled", deferred(build, shuffled=True)


def buildable(
    sized: Callable[[int], Callable[[], nn.Module]],
) -> Callable[[], nn.Module] | None:
    """The smallest size that eager construction builds, if it is small."""
    for size in range(4):
        try:
            with nn.utils.meta_init():
                module = sized(size)()
            if sum(p.numel() for p in module.parameters()) > 60_000_000:
                continue
            build = sized(size)
            build()
        except Exception:
            continue
        return build
    return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("libraries", nargs="+")
    # NB: of torch 2.13, this ends the process after some hundreds of models (SIGSEGV in malloc).
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    for library in options.libraries:
        counts: Counter[str] = Counter()
        end = time.monotonic() + options.seconds
        every = list(getattr(architectures, library)())
        for name, sized in every[options.start :: options.every]:
            if time.monotonic() > end:
                print(f"stopped before {name}")
                break
            build = buildable(sized)
            if build is None:
                print(f"{library} {name}: not built", flush=True)
                continue
            counts["eager"] += 1
            for way, result in ways(build, options.fake):
                counts[way] += result.startswith("ok")
                if result != "ok" and way not in (
                    "torch.device",
                    "accelerate",
                    "FakeTensorMode",
                ):
                    print(f"{library} {name}, {way}: {result}", flush=True)
            gc.collect()
        print(library, dict(counts))


if __name__ == "__main__":
    main()
