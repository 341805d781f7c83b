"""Options of the simulation: how many seeds, on how many processes, or one that is shown."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--sim-seeds", type=int, help="number of histories to run (default: 500)")
    group.addoption("--sim-first", type=int, help="the first seed (default: 0)")
    group.addoption("--sim-jobs", type=int, help="processes to run them on (default: 1)")
    group.addoption("--sim-seed", type=int, help="run this history alone and print it")
