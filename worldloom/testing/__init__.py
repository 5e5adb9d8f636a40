"""Tests of a family of models against the library's contract: `check_family("my_package.my_family:tiny")`."""

from worldloom.testing.checks import Check, check_family

__all__ = ["Check", "check_family"]
