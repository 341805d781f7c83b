"""Shared fixtures and the guards that hold for every test."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
# the root at the front of sys.path would hide other packages behind our folders (`kernels`, say)
if ROOT in sys.path:
    sys.path.remove(ROOT)
    sys.path.append(ROOT)

# no test may reach for a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test may write into the user's own."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["XDG_STATE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 checkpoint of a few hundred kB, with tokenizer and template."""
    from everstep.engine.checkpoint.make_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", shape="tiny", seed=1)
