"""Freed memory stays with programs of ours, and with nobody else's."""

import os
import platform
import subprocess
import sys

import pytest

_REPEATED = """
import resource, sys
import torch
from tuner.allocator import keep_freed_memory
if sys.argv[1] == "keeps":
    assert keep_freed_memory()
def passes(count):
    for _ in range(count):
        blocks = [torch.ones(1 << 21) for _ in range(8)]  # of 8 MiB
        del blocks
passes(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(choice: str) -> int:
    command = [sys.executable, "-c", _REPEATED, choice]
    # where its heap happens to grow, glibc keeps some blocks by itself: not with a fixed threshold
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=fixed)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_blocks_that_are_freed_come_back_without_a_page_fault() -> None:
    assert faults("keeps") < 100
    assert faults("returns") > 1000
