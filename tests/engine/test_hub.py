"""A word on the command line becomes a folder, or one line that says what is accepted."""

from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from everstep.engine.checkpoint import convert, hub
from everstep.engine.checkpoint.hub import cache_folder, default_folder, resolve, scratch_folder
from everstep.engine.errors import CheckpointError


def refusal(word):
    with pytest.raises(CheckpointError) as caught:
        resolve(str(word))
    message = str(caught.value)
    assert "\n" not in message
    return message


def fake_convert(target, on_progress):
    target.mkdir()
    (target / "config.json").write_text("{}")
    on_progress("write", 1, 1)
    return target


def test_existing_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_folder_without_a_model_is_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_file_is_refused_with_what_is_accepted(tmp_path, name):
    (tmp_path / name).write_text("")
    message = refusal(tmp_path / name)
    assert name in message
    assert "a model folder" in message


@pytest.mark.parametrize("word", ["", "nonsense", "/no/such/folder", "./org/name", "a/b/c"])
def test_anything_else_is_refused_with_what_is_accepted(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(word)
    assert '"default"' in message or "no config.json" in message


def test_unreadable_path_is_refused_in_one_line(monkeypatch):
    assert "cannot be read" in refusal("x" * 5000)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    assert "Permission denied" in refusal("/private/model")


def test_hub_id_that_is_not_cached_is_one_line_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal("everstep-tests/no-such-model")
    assert "everstep-tests/no-such-model" in message
    assert "cannot be reached" in message


def test_hub_snapshot_takes_only_the_files_of_a_model(tmp_path, monkeypatch):
    asked = {}

    def snapshot(model_id, *, allow_patterns):
        asked.update(model_id=model_id, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("inclusionAI/Ring-mini-2.0") == tmp_path
    assert asked["model_id"] == "inclusionAI/Ring-mini-2.0"
    assert "*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith(("py", "bin", "*")) for pattern in asked["patterns"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("two\nlines"),
        hub_errors.HFValidationError("x"),
    ],
)
def test_hub_faults_are_one_line(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert "inclusionAI/Ring-mini-2.0" in refusal("inclusionAI/Ring-mini-2.0")


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("EVERSTEP_CACHE")
    assert cache_folder() == Path("/two/everstep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "everstep"


def test_default_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    calls = []

    def counting(target, on_progress):
        calls.append(target)
        return fake_convert(target, on_progress)

    monkeypatch.setattr(convert, "convert_default", counting)
    folder = resolve("default")
    assert (folder / "config.json").is_file()
    assert resolve("default") == folder
    assert len(calls) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path))

    def fail(target, on_progress):
        target.mkdir()
        raise CheckpointError("no wheel")

    monkeypatch.setattr(convert, "convert_default", fail)
    assert refusal("default") == "no wheel"
    assert list(tmp_path.iterdir()) == []


def test_processes_that_race_for_the_default_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path))

    def overtaken(target, on_progress):
        # another process finishes while this one converts
        rival = tmp_path / target.name
        rival.mkdir()
        (rival / "config.json").write_text('{"rival": true}')
        return fake_convert(target, on_progress)

    monkeypatch.setattr(convert, "convert_default", overtaken)
    folder = default_folder()
    assert "rival" in (folder / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_cache_that_cannot_be_written_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "file"))
    message = refusal("default")
    assert "EVERSTEP_CACHE" in message


def test_scratch_folder_is_removed_after_an_error(tmp_path):
    def fail():
        with scratch_folder(tmp_path) as scratch:
            (scratch / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_hub_imports_neither_torch_nor_the_hub_library():
    import subprocess
    import sys

    code = f"import sys, {hub.__name__}; print('torch' in sys.modules, 'huggingface_hub' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
