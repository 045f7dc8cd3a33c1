# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) on files that are damaged, lie, or are something else.

The files are those of ``load_lazy_corpus``; ``load_lazy_judge`` holds each of them to the
law, in a process of its own kind.
"""

import collections
import io
import os
import re
import signal
import time
import unittest

import torch
from load_lazy_corpus import cases, LAYERS, LOADS
from load_lazy_corpus.case import Case
from load_lazy_judge import judge
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    parametrize,
    run_tests,
    TestCase,
)


# Where the bytes of these files start is seen in their local headers alone, of which only a
# few are read from a file object. See Note [Where data starts].
OWN = re.compile(r"RuntimeError: Expected /")
WORDED = re.compile(
    r"RuntimeError: Expected /[\w./]+ to (be|have) .*, got .*\. \(.*[?.]\)$",
    re.DOTALL,
)

UNSEEN = re.compile("local_data_3/|central_data_3/header_one_less")


@unittest.skipIf(not IS_LINUX, "forks, and limits memory")
class TestLoadLazyBadFiles(TestCase):
    def assertJudged(self, judged):
        """Fails if the law does not hold for a case, or another error comes than expected."""
        wrong = []
        for case, verdict in judged:
            fault = verdict.fault
            if not case.accepts(verdict.lazy, loaded=verdict.lazy == "loaded"):
                fault = fault or "another outcome than expected"
            if OWN.match(verdict.lazy) and not WORDED.match(verdict.lazy):
                fault = fault or "an error without file, or remedy"
            if fault:
                wrong.append(
                    f"{case.name}: {fault}\n"
                    f"    lazy: {verdict.lazy[:300]}\n    torch.load: {verdict.stock[:300]}\n"
                    f"    expected: {case.error or 'it loads'}"
                )
        self.assertEqual(len(wrong), 0, "\n".join(wrong))

    @parametrize("layer", sorted(LAYERS))
    def test_law(self, layer):
        self.assertJudged(judge(LAYERS[layer].cases()))

    def test_file_objects(self):
        def from_bytes(case):
            return case._replace(content=lambda _: io.BytesIO(case.content))

        chosen = [
            from_bytes(case)
            for name, layer in LAYERS.items()
            for case in layer.cases()
            if name != "opcodes"  # is about what comes later
            and isinstance(case.content, bytes)
            and not UNSEEN.match(case.name)
        ]
        faults = [
            f"{case.name}: {verdict.fault}"
            for case, verdict in judge(chosen)
            if verdict.fault
        ]
        self.assertGreater(len(chosen), 300)
        self.assertEqual(faults, [])

    def test_distinct_cases(self):
        corpus = list(cases())
        self.assertEqual(len({case.name for case in corpus}), len(corpus))
        contents = {case.content for case in corpus if isinstance(case.content, bytes)}
        self.assertGreater(len(contents), 1000)
        outcomes = collections.Counter(case.error == LOADS for case in corpus)
        self.assertGreater(outcomes[False], 1000)

    def test_judge(self):
        """The judge notices what it is there to notice."""

        def hold_memory(_):
            return Greedy(bytes(100))

        # As a file named so, torch.load would take it; by its content, it does not.
        unnamed = b"\2" + bytes(7) + b"{}"
        ill = [
            Case("crash", lambda _: os.kill(os.getpid(), signal.SIGSEGV), LOADS),
            Case("hang", lambda _: time.sleep(60), LOADS),
            Case("accept", unnamed, LOADS),
            Case("memory", hold_memory, LOADS),
            Case("well", lambda path: torch.save([1], path) or str(path), LOADS),
        ]
        faults = {case.name: verdict.fault for case, verdict in judge(ill, timeout=5)}
        self.assertEqual(
            faults,
            {
                "crash": "died: code -11",
                "hang": "no end in 5 s",
                "accept": "it loads what torch.load refuses",
                "memory": "it asks for too much memory",
                "well": "",
            },
        )


class Greedy(io.BytesIO):
    """A file object of which reading takes memory."""

    def readinto(self, out):
        bytearray(1 << 30)
        return super().readinto(out)


instantiate_parametrized_tests(TestLoadLazyBadFiles)

if __name__ == "__main__":
    run_tests()
