"""The tree and what it is packed as agree; one module has one name."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from everstep import doctor

from .lowest import requirements

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = requirements()
EXTRAS = {extra: names for extra, names in NEEDED.items() if extra not in {"", "dev"}}
# distributions whose module has another name
MODULES = {"pyzmq": "zmq"}
# starlette's forms need it; we never name it
UNNAMED = {"python-multipart"}


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
    names = {
        ".".join(f.parts if f.parts[0] == "everstep" else ("everstep", *f.parts)) for f in real
    }
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
        "import sys; import everstep.engine.core.core, everstep.kernels, everstep.server.app; "
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


def third_party(*, top_level_only: bool) -> set[str]:
    """Modules of others that the packed folders import by an import statement."""
    found = set()
    for folder in PROJECT["tool"]["setuptools"]["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in tree.body if top_level_only else ast.walk(tree):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"everstep"}


def modules(distributions: dict[str, str]) -> set[str]:
    return {
        MODULES.get(name, name.replace("-", "_")) for name in distributions if name not in UNNAMED
    }


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    needed = modules(NEEDED[""])
    optional = set().union(*(modules(names) for names in EXTRAS.values()))
    # by importlib, in trainer_bridge/trainer/fp8_operations.py
    optional.remove("transformer_engine")
    assert third_party(top_level_only=False) == needed | optional
    assert third_party(top_level_only=True) <= needed


def test_a_package_has_one_lower_bound():
    bounds: dict[str, set[str]] = {}
    for names in NEEDED.values():
        for name, version in names.items():
            bounds.setdefault(name, set()).add(version)
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_doctor_knows_every_dependency_and_extra():
    assert list(NEEDED[""]) == doctor.PACKAGES
    assert {extra: [name] for extra, (_, name, _) in doctor.EXTRAS.items()} == {
        extra: list(names) for extra, names in EXTRAS.items()
    }
