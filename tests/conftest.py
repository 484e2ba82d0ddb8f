"""Fixtures and hooks for the whole suite."""

from tests import distributed


def pytest_sessionfinish(session, exitstatus):
    distributed.close()
