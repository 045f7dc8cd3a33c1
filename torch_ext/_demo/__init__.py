"""``python -m torch_ext demo``: real models through all patches, against stock PyTorch.

Every variant runs in fresh processes, with the checkpoint in the page cache, the variants taking turns. What they
compute must agree bit for bit, or the exit status is 1. The result is a table for each model and a picture of the
memory over time. Linux only: memory is read from ``/proc``.
"""

import argparse
import os
import sys
from pathlib import Path


MODELS = {"real": "real_model", "llama": "llama"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`run` is told on the command line."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="DIR",
        help="folder for the picture (default: ./demo_out)",
    )
    parser.add_argument("--only", choices=MODELS, help="one model instead of both")
    parser.add_argument(
        "--quick", action="store_true", help="one round instead of three"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoint files in DIR"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    if not sys.platform.startswith("linux"):
        print(
            f"Expected Linux, whose /proc tells memory, got {sys.platform}.",
            file=sys.stderr,
        )
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is needed comes with packages
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from torch_ext._demo.tour import tour
    except ModuleNotFoundError as e:
        print(
            f"Expected the packages of the demo, got no {e.name}. "
            "(Did you mean to install them? pip install 'torch_ext[demo]')",
            file=sys.stderr,
        )
        return 2
    names = [MODELS[args.only]] if args.only else list(MODELS.values())
    return tour(names, args.out, rounds=1 if args.quick else 3, keep=args.keep)
