"""Fixtures and hooks for the whole suite."""

import os

# Read when torch is imported. One thread a process: `make test` runs two of them, and each may start ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before anything imports one; worker processes inherit it.
    os.environ["TRITON_INTERPRET"] = "1"

from tests import distributed, interpreter, properties

if "TRITON_INTERPRET" in os.environ:
    interpreter.make_quick()

# Before the test modules are imported: their decorators read the profile.
properties.load_profile()


# Files with few tests that take long: begun last, one of two processes would be left with them alone.
_LONG = (
    "test_compile.py",
    "test_example.py",
    "test_engines.py",
    "test_faults.py",
    "test_launch.py",
    "test_transformers.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_sessionfinish(session, exitstatus):
    distributed.close()
