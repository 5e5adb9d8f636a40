"""Tests of the memory that a process keeps when it frees it."""

import platform
import subprocess
import sys

import pytest

from worldloom.memory import VARIABLES, keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries allocate in their own way")
PROGRAM = """
import resource, torch
from worldloom.memory import keep_freed_memory

def pages_mapped():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory()
for _ in range(32):  # until the heap holds pieces that fit
    torch.ones(64 << 20, dtype=torch.uint8)
before = pages_mapped()
for _ in range(8):
    torch.ones(64 << 20, dtype=torch.uint8)
print(kept, pages_mapped() - before)
"""


@pytest.fixture
def plain_environment(monkeypatch):
    for name in (*VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def pages_of_eight_arrays():
    """Return whether memory is kept, and the pages mapped for 8 arrays of 64 MiB one after the other, in a process of
    its own: in this one, what other tests left in the heap decides."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, pages = ran.stdout.split()
    return kept, int(pages)


@glibc
def test_large_arrays_are_mapped_once(plain_environment, monkeypatch):
    kept, pages = pages_of_eight_arrays()
    assert kept == "True"
    assert pages <= 16_384  # one array's
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # as users may have it: nothing is kept
    kept, pages = pages_of_eight_arrays()
    assert kept == "False"
    assert pages > 100_000


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")],
)
def test_what_the_environment_says_of_freed_memory_stands(plain_environment, monkeypatch, name, value):
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("the allocation was changed"))
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory.__wrapped__()


def test_another_c_library_is_left_alone(plain_environment, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory.__wrapped__()
