"""The source text follows the rules of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_cachegen
from hf_cachegen.artifact import encoded

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_cachegen"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONVERT = PACKAGE / "models" / "convert.py"
MAX_LINES = 400

FLOORS = (
    ("errors", "_version"),
    ("config", "report", "strict_json", "new_bytes"),
    ("codec",),
    ("artifact",),
    ("stores",),
    ("models",),
    ("profiles",),
    ("streaming",),
    ("context",),
    ("generation",),
    ("prefix_cache",),
    ("cache",),
    ("cli",),
    ("encode_dataset",),
)
"""From the lowest floor up. A module imports from lower floors and from its own package, not from its own floor."""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

CONTAINER = {PACKAGE / "artifact" / f"{name}.py" for name in (
    "__init__", "checks", "entries", "header", "manifest", "pin", "reader", "writer",
)}  # fmt: skip
"""The part of artifact/ that reads untrusted bytes. It imports neither torch nor numpy, nor the codec, which does."""

ONLY_IN = {
    "transformers": {
        "models", "profiles", "streaming", "context", "cache", "generation", "prefix_cache", "cli",
    },
    "huggingface_hub": {"stores"},
    "fsspec": {"stores"},
    "cryptography": {"stores"},
    "matplotlib": {"cli"},
    "click": {"cli"},
    "accelerate": {"cli"},
    "datasets": {"cli"},
    "rich": {"cli"},
    "prometheus_client": {"streaming", "prefix_cache"},
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

PUBLIC_NAMES = {
    "CacheGenCache",
    "CacheGenConfig",
    "EncodedContext",
    "PrefixCache",
    "Profile",
    "TextAnswer",
    "__version__",
    "attach",
    "decode_kv",
    "detach",
    "encode_kv",
    "errors",
    "generate",
    "generate_text",
    "learn_profile",
}


def home(path: Path) -> str:
    """Return the name of a module in FLOORS: its package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all imported modules, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=ids)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    own = home(path)
    assert own in FLOOR_OF, f"add {own!r} to FLOORS"
    for name in imports(parse(path)):
        parts = name.split(".")
        if parts[0] != "hf_cachegen" or len(parts) == 1:
            continue
        target = home(PACKAGE / parts[1])
        assert target in FLOOR_OF, f"import {parts[1]} from the module that defines it"
        assert target == own or FLOOR_OF[target] < FLOOR_OF[own], f"{own} must be above {target}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types alone and in functions count: the structure is the same."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    reads = {
        own: {module for name in imports(parse(path)) for module in (name, name.rpartition(".")[0])} & modules.keys()
        for own, path in modules.items()
    }
    while free := [own for own, read in reads.items() if not read & set(reads)]:
        for own in free:
            del reads[own]
    assert not reads, f"a circle, or above one: {sorted(reads)}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_library_is_imported_only_in_its_packages(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(parse(path))}
    for library, homes in ONLY_IN.items():
        assert library not in found or home(path) in homes, f"{library} belongs in {sorted(homes)}"
    assert not found & FORBIDDEN_MODULES
    if path in CONTAINER:
        assert not found & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize("path", [p for p in SOURCES if home(p) == "cli"], ids=ids)
def test_the_command_line_imports_heavy_libraries_in_functions_only(path: Path) -> None:
    top = ast.Module([node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    heavy = {"torch", "transformers", "matplotlib", "numpy"}
    assert not {name.split(".")[0] for name in imports(top)} & heavy
    assert not any(name.startswith(("hf_cachegen.cache", "hf_cachegen.artifact.artifact", "hf_cachegen.generation"))
                   for name in imports(top))  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_the_package_neither_unpickles_nor_asserts(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise a typed error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            if path == CONVERT and called == "torch.load":  # caches of other programs: tensors, no code
                assert "weights_only" in {keyword.arg for keyword in node.keywords}
            elif path != CONVERT:
                assert called not in ("torch.load", "torch.save"), f"line {node.lineno}: {called} pickles"
        if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle", "trust_remote_code"):
            assert ast.unparse(node.value) == ("True" if node.arg == "weights_only" else "False")


def test_files_are_short() -> None:
    folders = [ROOT / name for name in ("hf_cachegen", "cuda_ext", "eval", "tests", "benchmarks", "examples")]
    files = [ROOT / "setup.py", *(f for folder in folders for f in folder.rglob("*"))]
    code = [f for f in files if f.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and f.is_file()]
    lengths = {ids(f): len(f.read_text(encoding="utf-8").splitlines()) for f in code}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=ids)
def test_no_test_file_imports_another(path: Path) -> None:
    found = [name for name in imports(parse(path)) if name.startswith(("tests.test_", "test_"))]
    assert not found, "move the shared code into a support module"


def test_public_names() -> None:
    assert set(hf_cachegen.__all__) == PUBLIC_NAMES
    assert len(hf_cachegen.__all__) == len(PUBLIC_NAMES)
    assert set(dir(hf_cachegen)) >= PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(hf_cachegen, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        hf_cachegen.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("statement", ["import hf_cachegen", "import hf_cachegen.cli", "import hf_cachegen.artifact"])
def test_importing_is_cheap(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub'}"
    code = f"import sys; {statement}; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_and_dependencies_agree() -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, dynamic = settings["project"], settings["tool"]["setuptools"]["dynamic"]
    assert project["dynamic"] == ["version"]
    assert dynamic["version"] == {"attr": "hf_cachegen._version.__version__"}
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == hf_cachegen.__version__
    assert f"hf_cachegen {hf_cachegen.__version__}" == encoded.WRITER
    repeated = [path for path in SOURCES if hf_cachegen.__version__ in path.read_text(encoding="utf-8")]
    assert repeated == [PACKAGE / "_version.py"], "the version is written once"
    used = {name.split(".")[0] for path in SOURCES for name in imports(parse(path))}
    declared = {requirement.split(">")[0] for requirement in project["dependencies"]}
    checkout = {"hf_cachegen"}
    optional = {"cryptography", "torchac", "accelerate", "datasets", "prometheus_client"}
    assert used - set(sys.stdlib_module_names) - checkout <= declared | optional


READY = {"errors", "config", "report", "codec", "artifact", "stores", "profiles"}
"""Packages whose objects are complete after `__init__`."""
ASSIGN_INHERITED = {"Connection", "Profile", "Response"}
"""Classes whose bases, in other files, declare the attributes that they assign."""


@pytest.mark.parametrize("path", [p for p in SOURCES if home(p) in READY], ids=ids)
def test_every_attribute_is_assigned_in_init(path: Path) -> None:
    for node in ast.walk(parse(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("setattr", "object.__setattr__"), f"line {node.lineno}: assign in __init__"
        if isinstance(node, ast.ClassDef) and node.name not in ASSIGN_INHERITED:
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            fields += [name for part in node.body if isinstance(part, ast.Assign) for name in part.targets]
            declared = {ast.unparse(name) for name in fields}
            made = [method for method in methods if method.name == "__init__"]
            late = assigned(methods) - assigned(made) - declared
            assert not late, f"{node.name} gets {sorted(late)} after it is made"


def assigned(methods: list[ast.FunctionDef]) -> set[str]:
    """Return the attributes of self that these methods assign."""
    nodes = (node for method in methods for node in ast.walk(method))
    return {
        node.attr for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }  # fmt: skip
