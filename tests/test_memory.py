"""Tests of the memory that a process keeps when it frees it."""

import platform

import pytest
import torch

from worldloom.memory import VARIABLES, keep_freed_memory

MIB = 1 << 20
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries allocate in their own way")


def pages_mapped() -> int:
    import resource  # which systems without glibc may lack

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture
def plain_environment(monkeypatch):
    for name in (*VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@glibc
def test_large_arrays_are_mapped_once(plain_environment):
    assert keep_freed_memory.__wrapped__()
    torch.ones(64 * MIB, dtype=torch.uint8)
    before = pages_mapped()
    for _ in range(8):
        torch.ones(64 * MIB, dtype=torch.uint8)
    # 131,072 pages of 4 KiB where freed memory returns to the system, and some of other threads of the process.
    assert pages_mapped() - before < 16_384


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
