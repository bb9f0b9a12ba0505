"""How torch's blocks lie in a process that has imported a model's code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_BLOCKS = """
import prefopt.model, torch
print([torch.empty(12_345_678 + size).data_ptr() % 4096 for size in range(0, 100_000, 10_001)])
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here")
@pytest.mark.parametrize(("given", "aligned"), [(None, True), ("1", True), ("0", False)])
def test_large_blocks_are_whole_pages_unless_the_user_says_otherwise(given: str | None, aligned: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": given} if given is not None else {}
    done = subprocess.run([sys.executable, "-c", _BLOCKS], env=environment, capture_output=True, text=True, check=True)
    assert (set(eval(done.stdout)) == {0}) == aligned, done.stdout
