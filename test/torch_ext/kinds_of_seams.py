"""Patches to test the machinery with: one of each kind of seam, on functions of torch that the series leaves alone."""

from pathlib import Path

from torch_ext import Patch


SEAMS = {
    "torch/nn/modules/module.py": '''
from torch_ext.seams import seam

class Module:
    @seam("method", base=("BASE",))
    def zero_grad(self, set_to_none=True, *, only: str = "all"):
        """Args:
            only (str): which gradients are cleared. Default: ``"all"``
        """
        # the prologue's comments are kept
        if only == "none":
            return "kept"
        ...
''',
    "torch/nn/utils/convert_parameters.py": '''
from torch.nn.utils import _convert
from torch_ext.seams import seam

@seam("function", base=("BASE",))
def parameters_to_vector(parameters, *, order: list[int] | None = None):
    """Example::

        >>> parameters_to_vector(model.parameters(), order=[1, 0])
    """
    if order is not None:
        parameters = _convert.reorder(parameters, order)
    ...

@seam("replaced", base=("BASE",))
def _check_param_device(param, old_param_device):
    return "replaced"
''',
    "torch/distributions/distribution.py": """
from torch_ext.seams import seam

class Distribution:
    @staticmethod
    @seam("static", base=("BASE",))
    def set_default_validate_args(value, *, dry_run: bool = False):
        if dry_run:
            return value
        ...
""",
    "torch/nn/modules/sparse.py": """
from torch_ext.seams import seam

class Embedding:
    @classmethod
    @seam("classmethod", base=("BASE",))
    def from_pretrained(cls, embeddings, *, describe: bool = False):
        if describe:
            return cls.__name__
        ...
""",
    "torch/nn/utils/clip_grad.py": """
from torch_ext.seams import seam

@seam("wrapped", base=("BASE",))
def clip_grad_norm_(parameters, *, measure_only: bool = False):
    if measure_only:
        return "measured"
    ...
""",
    "torch/utils/serialization/config.py": """
from torch_ext.seams import seam

@seam("option", base=("BASE",))
class save:
    # how to compress
    level: int = 3
    names: list[str] = []
""",
    "torch/nn/modules/linear.py": """
from torch_ext.seams import seam

class Identity:
    @seam("closure", base=("BASE",))
    def forward(self, input):
        super().extra_repr()
        ...
""",
}
OVERLAY = {
    "torch/nn/utils/_convert.py": '''"""A new file."""


def reorder(parameters, order):
    parameters = list(parameters)
    return [parameters[i] for i in order]
''',
}
NAMES = (
    "method",
    "function",
    "replaced",
    "static",
    "classmethod",
    "wrapped",
    "option",
    "closure",
)
GRAFTED = NAMES[:-1]  # what "closure" asks for needs a tree
FUNCTIONS = GRAFTED[:-1]  # those that change a function


def make_series(root: Path, base: dict[str, str]) -> tuple[Patch, ...]:
    """Write the patches below ``root``; ``base`` gives the fingerprint for each patch."""
    for file, text in SEAMS.items():
        path = root / "package/seams" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            text = text.replace(
                f'"{name}", base=("BASE",)', f'"{name}", base=("{base[name]}",)'
            )
        path.write_text(text)
    for file, text in OVERLAY.items():
        path = root / "package/overlay" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "test").mkdir()
    (root / "test/test_it.py").write_text("# a test\n")
    (root / "rfc.md").write_text("# Why\n\nBecause.\n")
    return tuple(
        Patch(
            name=name,
            subject=f"[test] A seam of the kind {name}",
            summary="",
            rationale="For the tests.",
            files=("torch/nn/utils/_convert.py",) if name == "function" else (),
            tests=("test/test_it.py",) if name == "method" else (),
            requires=("method",) if name == "static" else (),
            rfc="rfc.md" if name == "method" else "",
            root=root / "package",
        )
        for name in NAMES
    )
