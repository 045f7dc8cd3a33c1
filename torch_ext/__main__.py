"""The command line, ``python -m torch_ext``: status, run, export, verify, inspect, convert, demo."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_ext import _demo
from torch_ext._autoload import VARIABLE
from torch_ext._drift import check, grade, seams_of
from torch_ext._error import PatchError
from torch_ext._export import export
from torch_ext._graft import module_name
from torch_ext._queue import select
from torch_ext._series import series
from torch_ext._tree import cached_tree
from torch_ext._upstream import installed, tree_patches, Upstream


_STATUS_OF_SIGNAL = 128  # as a shell tells of a command that a signal ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        try:
            return _run_command(argv)
        finally:
            # NB: else a closed pipe is found at exit, where it cannot be caught.
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _STATUS_OF_SIGNAL + signal.SIGINT
    except BrokenPipeError:
        _drop_output()
        return _STATUS_OF_SIGNAL + signal.SIGPIPE


def _run_command(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except PatchError as e:
        print(f"torch_ext: {e}", file=sys.stderr)
        status = 1
    return status


def _drop_output() -> None:
    """Let what nobody reads any more go nowhere, so that Python does not fail to write it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch_ext", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    status = commands.add_parser(
        "status", help="how each patch fits the installed torch"
    )
    status.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="the torch in this folder, such as an unpacked wheel",
    )
    status.add_argument(
        "--markdown", action="store_true", help="print the README's table of patches"
    )
    status.set_defaults(run=_status)

    run = commands.add_parser(
        "run", help="run a command, and its children, with patches enabled"
    )
    run.add_argument(
        "--tree", action="store_true", help="with a patched copy of torch on PYTHONPATH"
    )
    run.add_argument(
        "-p",
        "--patch",
        action="append",
        default=[],
        metavar="NAME",
        help="this patch (default: all)",
    )
    run.add_argument(
        "command",
        nargs="+",
        metavar="CMD",
        help="the command and its arguments, behind --",
    )
    run.set_defaults(run=_run)

    mailbox = commands.add_parser(
        "export",
        help="write the series as a mailbox for `git am` in a pytorch checkout",
    )
    mailbox.add_argument("out", type=Path, metavar="OUT")
    mailbox.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify",
        help="check the checksum of every record in files of weights, or folders of them",
    )
    verify.add_argument("files", nargs="+", metavar="FILE")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser(
        "inspect", help="print what a file of weights holds, without reading tensors"
    )
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert",
        help="write .pt, safetensors or a DCP checkpoint from another of these, a tensor at a time",
    )
    convert.add_argument("src", metavar="SRC")
    convert.add_argument("dst", metavar="DST")
    convert.add_argument(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="trust the pickle of SRC, as torch.load(weights_only=False); that of a DCP checkpoint is always trusted",
    )
    convert.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read DST back and compare it with SRC before it takes its name (default: yes)",
    )
    convert.set_defaults(run=_convert)

    demo = commands.add_parser("demo", help="load real models, stock against torch_ext")
    _demo.add_arguments(demo)
    demo.set_defaults(run=_demo.run)
    return parser


def _status(args: argparse.Namespace) -> int:
    upstream = Upstream(args.against) if args.against else installed()
    if args.markdown:
        print(_table())
        return 0
    print(f"torch {upstream.version()}")
    stale = False
    width = max(len(patch.name) for patch in series)
    for patch in series:
        drift = grade(patch, upstream)
        is_tree = not args.against and patch.name in tree_patches()
        print(f"{patch.name:{width}}  {'tree' if is_tree else drift.grade}")
        for seam in seams_of(patch):
            found = upstream.source(seam.file).fingerprint(seam.qualname)
            print(f"    {'stale' if seam in drift.changed else '     '} {found} {seam}")
        stale |= bool(drift.changed)
    return int(stale)


def _table() -> str:
    """The series as the README shows it."""
    rows = ["| patch | what core gets | changes | new files |", "|---|---|---|---|"]
    for patch in series:
        changes = ", ".join(
            f"`{module_name(seam.file).rpartition('.')[2]}.{seam.qualname}`"
            for seam in seams_of(patch)
        )
        files = ", ".join(f"`{file}`" for file in patch.files)
        rows.append(f"| `{patch.name}` | {patch.summary} | {changes} | {files} |")
    return "\n".join(rows)


def _run(args: argparse.Namespace) -> int:
    patches = select(*args.patch)
    check(patches)
    environ = dict(os.environ)
    if args.tree:
        tree = str(cached_tree(patches, installed()))
        environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [tree, environ.get("PYTHONPATH")])
        )
        environ["TORCH_EXT_TREE"] = tree
    else:
        environ[VARIABLE] = ",".join(patch.name for patch in patches)
        environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
    try:
        os.execvpe(args.command[0], args.command, environ)
    except OSError as e:
        print(f"torch_ext: {args.command[0]}: {e.strerror}", file=sys.stderr)
        return 127


def _export(args: argparse.Namespace) -> int:
    patches = select()
    check(patches)
    export(args.out, patches, installed())
    print(f"{args.out}: {len(patches)} patches on torch {installed().version()}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from torch_ext._tools import verify

    return verify.main(args.files)


def _inspect(args: argparse.Namespace) -> int:
    from torch_ext._tools import inspect

    return inspect.main(args.file, args.json)


def _convert(args: argparse.Namespace) -> int:
    from torch_ext._tools import convert

    return convert.main(args.src, args.dst, args.weights_only, args.verify)


if __name__ == "__main__":
    sys.exit(main())
