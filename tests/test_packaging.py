"""The tree and what it is packed as agree; one module has one name."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_an_init_is_packed():
    packed = set(PROJECT["tool"]["setuptools"]["packages"])
    environments = {path.parent.name for path in ROOT.glob("*/pyvenv.cfg")}
    outside = {"tests", "benchmarks", "build"} | environments
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.rglob("__init__.py")
        if not outside & set(path.relative_to(ROOT).parts)
    }
    real = {
        f
        for f in folders
        if not (ROOT / "everstep" / f.parts[-1]).is_symlink() or len(f.parts) == 1
    }
    names = {"everstep" if f == Path("everstep") else "everstep." + ".".join(f.parts) for f in real}
    assert names == packed


def test_the_links_point_home():
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        if package == "everstep":
            continue
        link = ROOT / "everstep" / package.removeprefix("everstep.")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_one_module_has_one_name():
    code = (
        "import sys; import everstep.engine.core, everstep.kernels, everstep.server.app; "
        "print(sorted({'engine.core', 'kernels', 'engine', 'server'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_the_version_is_one_fact():
    import everstep

    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "everstep.__version__"
    assert everstep.__version__ in (ROOT / "CHANGELOG.md").read_text()
