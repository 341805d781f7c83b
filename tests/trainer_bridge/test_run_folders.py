"""Folders of versions: what may go at the end of a run, and what is left."""

from pathlib import Path

import pytest

from everstep import doctor
from everstep.engine.errors import ConfigError
from everstep.trainer_bridge.run import folders
from everstep.trainer_bridge.run.folders import hold, remove_versions, runs_there, sizes_of
from everstep.trainer_bridge.weights.folder import default_root


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_bytes(b"x" * 100)
        (root / name / "config.json").write_text("{}")


def test_what_an_engine_needs_stays(tmp_path: Path) -> None:
    root = tmp_path / "run"
    fill(root, "v3", "v4", ".partial-v5", ".spare-v2")
    left = {".partial-v5": 102, ".spare-v2": 102}
    assert sizes_of(root) == {"v3": 102, "v4": 102} | left
    remove_versions(root, [str(root / "v4")])
    assert sizes_of(root) == {"v4": 102}
    remove_versions(root, [])
    assert not root.exists()
    remove_versions(root, [])
    assert sizes_of(root) == {}


def test_doctor_lists_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "v3", "v4", ".spare-v2", ".partial-v5")
    monkeypatch.setattr(folders, "runs_there", lambda: [tmp_path])
    [(what, said)] = doctor._left_runs()
    assert what == "run's weights"
    assert said.startswith(f"{tmp_path}: 2 versions, 2 left over, 0.0 MB, written ")


def test_nothing_but_versions_is_taken_away(tmp_path: Path) -> None:
    root = tmp_path / "run"
    fill(root, "v3", "vault", "notes")
    remove_versions(root, [])
    assert sorted(path.name for path in root.iterdir()) == ["notes", "vault"]


def test_runs_with_versions_are_found(tmp_path: Path) -> None:
    fill(tmp_path / "everstep-b", "v1")
    fill(tmp_path / "everstep-a", ".partial-v1")
    (tmp_path / "everstep-empty").mkdir()
    fill(tmp_path / "other", "v1")
    found = runs_there(tmp_path)
    assert [path.name for path in found] == ["everstep-a", "everstep-b"]
    assert default_root("a").name == found[0].name
    assert runs_there(tmp_path / "nowhere") == []


def test_a_second_trainer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    root = tmp_path / "run"
    held = hold(root, "publish.root")
    with pytest.raises(
        ConfigError,
        match=r"run holds the versions of a trainer that runs now; .* another publish.root$",
    ):
        hold(root, "publish.root")
    held.close()
    hold(root, "publish.root").close()
    fill(root, "v1")
    remove_versions(root, [])
    assert not root.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        hold(tmp_path / "file" / "run", "publish.root")
