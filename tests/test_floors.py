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
WORDS = {
    "config",
    "errors",
    "expected_tensors",
    "fp8_policy",
    "journal_ops",
    "json_keys",
    "log",
    "manifest",
    "messages",
    "metrics",
    "plan",
    "quant_format",
    "ring_config",
    "rollout",
    "rope_config",
    "settings",
    "trajectory",
}
BOOKS = {
    "capsule",
    "admission",
    "decoding",
    "backend",
    "block_pool",
    "budgets",
    "collector",
    "detokenizer",
    "flipping",
    "holdings",
    "hub",
    "kv_cache",
    "growth",
    "intake",
    "journal",
    "journal_budgets",
    "journal_draft",
    "journal_files",
    "journal_memory",
    "journal_merge",
    "journal_rows",
    "journal_thread",
    "keeping",
    "manager",
    "metering",
    "named_sql",
    "native",
    "planner",
    "prefix_watch",
    "random_tokenizer",
    "readers",
    "recovery",
    "replay",
    "reporting",
    "request_keys",
    "restart",
    "roster",
    "scheduler",
    "swap",
    "tokenizer",
    "transfer",
    "versions",
}
# a core's loop runs over a FakeRunner too: it reaches the machine only inside `build`
LOOP = {"core", "determinism", "reference", "verify"}
WORD_LIBRARIES = {"msgspec"}
FORBIDDEN_IN_BOOKS = {"torch", "numpy", "triton", "safetensors"}


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).glob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> list[tuple[int, str]]:
    """(level, dotted name) of every import; `from . import x` counts as (1, x)."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                found.append((node.level, node.module))
            else:
                found += [(node.level, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_folders_below_it(folder):
    wrong = []
    for path in modules(folder):
        for level, name in imports(path):
            head = name.split(".")[0]
            # in everstep/ the folders are one dot away, elsewhere two
            is_ours = level == (1 if folder == "everstep" else 2) and head in FOLDERS
            if is_ours and head not in BELOW[folder]:
                wrong.append(f"{path.name} imports {name}")
            if level == 0 and head in FOLDERS and path.name != "__main__.py":
                wrong.append(f"{path.name} imports {name} absolutely")
    assert not wrong


def test_words_import_only_the_standard_library_and_msgspec():
    wrong = []
    for path in modules("engine"):
        if path.stem not in WORDS:
            continue
        for level, name in imports(path):
            head = name.split(".")[0]
            if level == 0 and head not in sys.stdlib_module_names | WORD_LIBRARIES:
                wrong.append(f"{path.name} imports {name}")
            if level and head not in WORDS:
                wrong.append(f"{path.name} imports {name}, which is no word")
    assert not wrong


def test_books_never_import_the_machine():
    machine = {p.stem for p in modules("engine")} - WORDS - BOOKS - LOOP - {"__init__"}
    wrong = []
    for path in modules("engine"):
        if path.stem in BOOKS | LOOP:
            for level, name in imports(path, top_level_only=True):
                head = name.split(".")[0]
                if (
                    level == 0
                    and head in FORBIDDEN_IN_BOOKS
                    and path.stem not in {"reference", "verify"}
                ):
                    wrong.append(f"{path.name} imports {name}")
                if (level == 1 and head in machine) or (level == 2 and head == "kernels"):
                    wrong.append(f"{path.name} imports the machine: {name}")
    assert not wrong


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
        "import sys; import everstep.server.app, everstep.server.openai, everstep.engine.native, "
        "everstep.engine.manager, everstep.engine.scheduler; print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_a_run_of_c3po_imports_no_torch():
    code = (
        "import sys; import everstep.rollout_run, everstep.rollout_embedded, everstep.http_engine; "
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
