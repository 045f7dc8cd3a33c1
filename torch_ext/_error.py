"""The one error of the patch machinery."""


class PatchError(RuntimeError):
    """A patch cannot be applied: unknown, stale against the installed torch, or its place was taken by other code."""
