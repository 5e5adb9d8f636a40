"""Environments: from ids, factories and suites, one at a time or as a vector."""

from worldloom.envs.environment import Environment
from worldloom.envs.make import make_env, make_environment
from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.envs.vector import EnvironmentFailed, Step, VectorEnv

__all__ = [
    "AtariConfig",
    "DMCConfig",
    "Environment",
    "EnvironmentFailed",
    "Step",
    "VectorEnv",
    "make_env",
    "make_environment",
]
