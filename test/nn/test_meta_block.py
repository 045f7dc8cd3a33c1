# Owner(s): ["module: nn"]
"""The laws of a meta block hold for ``meta_init``."""

from meta_block_case import MetaBlockLaws
from torch import nn
from torch.testing._internal.common_utils import run_tests, TestCase


class TestMetaInit(MetaBlockLaws, TestCase):
    def block(self):
        return nn.utils.meta_init()


if __name__ == "__main__":
    run_tests()
