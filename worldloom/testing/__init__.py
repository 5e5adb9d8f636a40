"""Hold a family of models to everything that the library asks of one: `check_family("my_package.my_family:tiny")`."""

from worldloom.testing.checks import Check, check_family

__all__ = ["Check", "check_family"]
