"""Who may import whom: an import only goes down (docs/explain/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "engine", "trainer_bridge", "server", "clients", "everstep")

# folder → folders of ours that it may import
BELOW = {
    "kernels": set(),
    "engine": {"kernels"},
    "trainer_bridge": {"engine", "kernels"},
    "server": {"engine", "trainer_bridge"},
    "clients": {"engine", "server"},
    "everstep": {"kernels", "engine", "trainer_bridge", "server", "clients"},
}
# of engine/: modules, or folders with all that is in them
WORDS = {
    "checkpoint.expected_tensors",
    "checkpoint.fp8_policy",
    "checkpoint.json_keys",
    "checkpoint.manifest",
    "checkpoint.quant_format",
    "checkpoint.ring_config",
    "checkpoint.rope_config",
    "config",
    "container",
    "core.plan",
    "errors",
    "journal.ops",
    "log",
    "messages",
    "metrics",
    "rollout",
    "settings",
    "trajectory",
}
BOOKS = {
    "backend",
    "checkpoint.hub",
    "checkpoint.random_tokenizer",
    "core",
    "detokenizer",
    "journal",
    "manager",
    "native",
    "preload",
    "proofs.capsule",
    "proofs.replay",
    "tokenizer",
}
# a core's loop runs over a FakeRunner too: it reaches the machine only inside `build`
LOOP = {"core.core", "proofs.determinism", "proofs.reference", "proofs.verify"}
WORD_LIBRARIES = {"msgspec"}
FORBIDDEN_IN_BOOKS = {"torch", "numpy", "triton", "safetensors"}


def modules(folder: str) -> list[Path]:
    # the links in everstep/ are not followed; a recipe is what a user writes
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "recipes" not in p.parts)


def name_of(path: Path) -> str:
    """`core.plan` for engine/core/plan.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:]).removesuffix(".__init__")


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    """Dotted names of every import, our own from the root on: `engine.errors`, and both `engine`
    and `engine.log` for `from .. import log`."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parent.parts
    if package[0] == "everstep":
        package = package[1:]
    found = []
    for node in tree.body if top_level_only else list(ast.walk(tree)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = node.level - 1
            base = [*package[: len(package) - above]] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [".".join([*base, alias.name]) for alias in node.names]
    return found


def is_in(name: str, names: set[str]) -> bool:
    """The module, or a folder that it is in, or what an import takes from it."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_folders_below_it(folder):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imports(path)
        if (head := name.split(".")[0]) in FOLDERS and head not in BELOW[folder] | {folder}
    ]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_imports_are_relative(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(folder)
        if path.name != "__main__.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").split(".")[0] in {*FOLDERS, "everstep"}
    ]
    assert not wrong


def test_words_import_only_the_standard_library_and_msgspec():
    wrong = []
    for path in modules("engine"):
        if name_of(path) not in WORDS:
            continue
        for name in imports(path):
            head, _, rest = name.partition(".")
            if head == "engine":
                if not is_in(rest, WORDS):
                    wrong.append(f"{name_of(path)} imports {name}, which is no word")
            elif head not in sys.stdlib_module_names | WORD_LIBRARIES:
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong


def test_books_never_import_the_machine():
    light = WORDS | BOOKS | LOOP
    wrong = []
    for path in modules("engine"):
        if not is_in(name_of(path), BOOKS | LOOP):
            continue
        for name in imports(path, top_level_only=True):
            head, _, rest = name.partition(".")
            is_free = name_of(path) in {"proofs.reference", "proofs.verify"}
            if head in FORBIDDEN_IN_BOOKS and not is_free:
                wrong.append(f"{name_of(path)} imports {name}")
            if head == "kernels" or (head == "engine" and not is_in(rest, light)):
                wrong.append(f"{name_of(path)} imports the machine: {name}")
    assert not wrong


def test_the_tables_name_what_there_is():
    there = {name_of(path) for path in modules("engine")}
    assert there >= WORDS | BOOKS | LOOP


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_everstep_pulls_in_no_third_party_module():
    code = (
        "import sys; before = set(sys.modules); import everstep; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(m for m in new if m not in sys.stdlib_module_names and m != 'everstep'))"
    )
    assert run(code) == "[]"


def test_the_front_imports_no_torch():
    code = (
        "import sys; import everstep.server.app, everstep.server.openai.openai, everstep.engine.native, "
        "everstep.engine.manager.manager, everstep.engine.core.scheduler; print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_a_run_of_c3po_imports_no_torch():
    code = (
        "import sys; import everstep.rollout.run, everstep.rollout.embedded, everstep.rollout.http_engine; "
        "print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_the_clients_of_a_server_need_only_httpx_and_msgspec():
    code = (
        "import sys; from everstep import AsyncClient, Client; "
        "print([m for m in ('torch', 'numpy', 'starlette', 'uvicorn', 'apsw', 'zmq', 'tokenizers') "
        "if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_the_kernels_import_alone():
    code = (
        "import sys; import everstep.kernels; "
        "print(sorted(m for m in sys.modules if m.startswith('everstep.') "
        "and not m.startswith('everstep.kernels')))"
    )
    assert run(code) == "[]"
