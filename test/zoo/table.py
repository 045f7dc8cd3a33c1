"""What the zoo found, as Markdown: a table of counts, and by name what is not as it should be."""

import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version

import zoo


Found = dict[str, zoo.Results]  # by library


def markdown(found: Found) -> str:
    return "\n".join([*_head(), "", *_counts(found), "", *_exceptions(found)])


def _head() -> Iterator[str]:
    python, machine = platform.python_version(), platform.machine()
    yield f"torch {version('torch')}, Python {python}, {machine}. Each cell: right / raised / something left real,"
    yield "or not equal to eager construction."


def kind(result: str) -> str:
    """What a result counts as: ``right``, ``left`` or ``raised``."""
    if result.startswith("ok"):
        return "right"
    left = result.startswith(("left: ", "generator state")) or " differ: " in result
    return "left" if left else "raised"


def _counts(found: Found) -> Iterator[str]:
    names = [f"{name} {version(name)}" for name in found]
    yield " | ".join(["| ", *names, ""]).rstrip()
    yield "|---" * (1 + len(found)) + "|"
    built = {name: _built(results) for name, results in found.items()}
    cells = [f"{len(built[name])} of {len(found[name])}" for name in found]
    yield " | ".join(["| built by eager construction", *cells, ""]).rstrip()
    for way in zoo.STOCK + zoo.META + zoo.DEFERRED:
        cells = []
        for results in built.values():
            kinds = Counter(kind(r[way]) for r in results.values() if way in r)
            cells.append(" / ".join(str(kinds[k]) for k in ("right", "raised", "left")))
        yield " | ".join([f"| `{way}`", *cells, ""]).rstrip()


def _built(results: zoo.Results) -> zoo.Results:
    return {n: r for n, r in results.items() if r[zoo.CHOICE].startswith("ok")}


def _exceptions(found: Found) -> Iterator[str]:
    for library, results in found.items():
        built = _built(results)
        why = {n: r[zoo.CHOICE] for n, r in results.items() if n not in built}
        large = [n for n, reason in why.items() if reason.startswith("too large")]
        if large:
            yield f"- {library}: {len(large)} left out, too large"
        for name, reason in why.items():
            if name not in large:
                yield f"- {library} `{name}` is not built: {reason}"
        for name, result in built.items():
            yield from (f"- {library} {line}" for line in _wrong(name, result))


def _wrong(name: str, result: dict[str, str]) -> Iterator[str]:
    for way in zoo.META[1:] + zoo.DEFERRED:
        if kind(result[way]) != "right":
            yield f"`{name}`, {way}: {result[way]}"
    ways = zoo.STOCK[0], zoo.META[0]
    stock, patched = (kind(result[w]) if w in result else "unknown" for w in ways)
    if (stock, patched) in [("right", "left"), ("right", "raised"), ("left", "raised")]:
        yield f"`{name}`, {stock} in stock's context and {patched} in the patched one: {result[ways[1]]}"
    for way, what in result.items():
        if what.startswith("died"):
            yield f"`{name}`, {way}: {what}"
