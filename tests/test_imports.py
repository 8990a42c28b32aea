"""Who may import whom: the contract stays light, and folders depend on it alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "openvino", "onnxruntime", "nncf", "onnx", "skimage", "matplotlib", "jinja2", "lmdb", "psutil")
SIBLINGS = ("rpfm_edge", "distill", "quantize", "runtimes", "benchmarks", "tests")
LIGHT = ("cv2", "numpy", "rich", "safetensors", "tomli", "typer")
OPTIONAL = {"rpfm_edge/live/rtc.py": {"aiortc", "av"}}  # it subclasses theirs, and is imported by name when asked for


@pytest.mark.parametrize(
    "module", ["rpfm_edge", "rpfm_edge.cli", "rpfm_edge.recipe.run", "rpfm_edge.report", "runtimes"]
)
def test_importing_the_contract_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


@pytest.mark.parametrize("folder", ["rpfm_edge", "distill", "quantize", "runtimes"])
def test_folders_depend_on_the_contract_alone(folder: str) -> None:
    allowed = {"rpfm_edge", folder} | ({"runtimes"} if folder == "rpfm_edge" else set())
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in imported(file) if name in SIBLINGS}
    assert {(file, name) for file, name in found if name not in allowed} == set()


def test_the_contract_needs_only_its_light_libraries() -> None:
    allowed = set(sys.stdlib_module_names) | {"rpfm_edge", "runtimes", *LIGHT}
    files = sorted((ROOT / "rpfm_edge").rglob("*.py"))
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in imported(file)}
    assert {(file, name) for file, name in found if name not in allowed | OPTIONAL.get(file, set())} == set()


def test_the_live_service_loads_no_optional_library() -> None:
    code = "import sys, rpfm_edge.live.command; print(*(name for name in ('aiortc', 'av') if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_no_file_of_the_product_knows_the_tests() -> None:
    folders = ("rpfm_edge", "distill", "quantize", "runtimes")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    everywhere = {(file.name, name) for file in files for name in imported(file, inside=True)}
    assert {(file, name) for file, name in everywhere if name in ("tests", "benchmarks", "pytest")} == set()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import a.b, c", {"a", "c"}),
        ("if x:\n    from a import b\nelse:\n    import c", {"a", "c"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", {"b"}),
        ("def f():\n    import a", set()),
        ("class C:\n    import a\n    def f(self):\n        import b", {"a"}),
    ],
)
def test_the_reader_of_imports(code: str, names: set[str], tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text(code)
    assert set(imported(file)) == names


def imported(file: Path, inside: bool = False) -> Iterator[str]:
    """Top-level names that a file imports when it is loaded; ``inside`` its functions too."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse  # for type checkers only
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
