"""Imports, read from the source: who may know whom, and what may not stand in `wdmoe/` at all.

One test is one rule. It lists everything that breaks the rule, so that one run shows all there is to mend.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.source_tree import Import, Sources, cycles, reached

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
LAYERS = {
    "errors": 0,
    "units": 0,
    "arrays": 1,
    "config": 1,
    "layer_call": 1,
    "receipt": 1,
    "records": 1,
    "results": 1,
    "tasks": 1,
    "heap": 1,
    "former_paths": 1,
    "solver": 2,
    "transport": 2,
    "wireless": 2,
    "backbone": 3,
    "broadcast": 3,
    "moe": 3,
    "nodes": 4,
    "serving": 4,
    "simulation": 4,
    "cli": 5,
    "__main__": 6,
}
# Inside a package each part knows only what stands left of the "<" before it. "*" is every file beside the folders.
INNER_ORDER = {
    "solver": "* < layer, placement, reference",
    "transport": "codec, refusals, descriptors < security, channel, routing, membership < zmq, memory, exchange",
    "backbone": "format, text < checkpoint, cached_folder, text_windows, perplexity < families < meta_model, split"
    " < distil < evaluation < export, runtime < graphs < default < record_trace",
    "broadcast": "codec, datasets < quality < baselines, training < study",
    "nodes": "authentication, addresses, join_token_file, local, memory, outbox < sessions, device"
    " < base_station, broadcast_station, demo < supervised",
    "simulation": "* < reports",
}
FACES = {"wdmoe.solver"}  # hand public names on to programs outside
ROOT_INIT = {"from wdmoe.former_paths import keep_former_paths", "keep_former_paths()"}  # no more is done on import
ORACLES = "wdmoe.solver.reference"  # tests compare with them
# How one expert is computed is a chain of its own: the runner opens models through providers. So is verification, of
# which the spine knows the inspector only.
SPINE = ("wdmoe.moe.layer", "wdmoe.moe.asking", "wdmoe.moe.observed")
VERIFICATION = "wdmoe.moe.verification."
WITHIN_MOE = {("expert", "providers"), ("providers", "expert")}
LIGHT = ("wdmoe.moe.expert.", "wdmoe.nodes.device.", "wdmoe.transport.")  # run on boards without torch
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}
# A base station with graphs, and what makes the default model's bundle.
STATION = (
    "wdmoe.backbone.default.bundle.",
    "wdmoe.backbone.default.write.",
    "wdmoe.backbone.graphs.",
    "wdmoe.nodes.base_station.",
    "wdmoe.nodes.supervised.",
    "wdmoe.serving.",
)
EXTRA_EXPORT = {"torch", "transformers", "accelerate"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
# joblib moves its work between processes of one owner as pickles; nothing of a peer gets there.
OURS_TO_PICKLE = ("wdmoe.simulation.study", "joblib")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
MOST_FILES = 18  # in one folder

Rule = Callable[[Sources], Iterator[str]]


def without_digit(sources: Sources) -> Iterator[str]:
    """Every package has its digit, and every digit its package."""
    yield from sorted({_part(name) for name in sources.paths if name != "wdmoe"} ^ LAYERS.keys())


def upwards(sources: Sources) -> Iterator[str]:
    """Imports go to a smaller digit or stay inside their package."""
    for each in _inner_imports(sources):
        own, other = _part(each.by), _part(each.module)
        # The few modules beside the packages are one package: the root's own.
        same = own == other or (LAYERS[own] == LAYERS[other] <= 1)
        if not same and LAYERS[other] >= LAYERS[own]:
            yield str(each)


def against_the_inner_order(sources: Sources) -> Iterator[str]:
    """Inside a package imports go to the left, and every part of it has its place in the order."""
    for package, order in INNER_ORDER.items():
        places = {part.strip(): place for place, parts in enumerate(order.split("<")) for part in parts.split(",")}
        inside = [name for name in sources.paths if name.startswith(f"wdmoe.{package}.")]
        parts = {_place_name(sources, name, places) for name in inside}
        yield from (f"wdmoe/{package}: {part} has no place in the order" for part in sorted(parts - places.keys()))
        yield from (f"wdmoe/{package}: {part} is gone" for part in sorted(places.keys() - parts))
        for each in (each for name in inside for each in sources.inside(name) if _part(each.module) == package):
            own, other = (_place_name(sources, name, places) for name in (each.by, each.module))
            if own != other and places.get(own, 0) <= places.get(other, 0):
                yield str(each)


def between_steps_of_moe(sources: Sources) -> Iterator[str]:
    """Inside `moe/` only the spine imports its siblings: a layer, how it asks, and what was observed."""
    for each in _inner_imports(sources):
        if _part(each.by) == _part(each.module) == "moe" and each.by not in SPINE:
            pair = (each.by.rpartition(".")[2], each.module.rpartition(".")[2])
            together = all(name.startswith(VERIFICATION) for name in (each.by, each.module))
            if pair not in WITHIN_MOE and not together:
                yield str(each)


def work_in_an_init(sources: Sources) -> Iterator[str]:
    """An `__init__.py` is empty, or, in a face, hands names on and does nothing else."""
    for name, path in sources.paths.items():
        if path.name == "__init__.py":
            for node in sources.trees[name].body:
                may = _hands_on(node) if name in FACES else name == "wdmoe" and ast.unparse(node) in ROOT_INIT
                if not may:
                    yield f"{name}:{node.lineno} {ast.unparse(node)}"


def through_a_face(sources: Sources) -> Iterator[str]:
    """Nothing inside imports through a face: it names the module that the name lives in."""
    yield from (str(each) for each in _inner_imports(sources) if each.module in FACES)


def production_with_oracles(sources: Sources) -> Iterator[str]:
    """What the tests compare with is no part of the product."""
    for each in _inner_imports(sources):
        if f"{each.module}.".startswith(f"{ORACLES}.") and not each.by.startswith(ORACLES):
            yield str(each)


def foreign_bytes_and_asserts(sources: Sources) -> Iterator[str]:
    """Nothing runs foreign bytes, imports by a relative path, asserts, or catches everything."""
    for name, tree in sources.trees.items():
        for each in sources.imports(name):
            top = each.name.split(".")[0]
            if not top or (top in FORBIDDEN_MODULES and (name, top) != OURS_TO_PICKLE):
                yield str(each)
        for node in ast.walk(tree):
            if what := _forbidden(node):
                yield f"{name}:{node.lineno} {what}"  # type: ignore[attr-defined]


def heavy_on_a_board(sources: Sources) -> Iterator[str]:
    """What a device imports needs no torch."""
    for name in sources.paths:
        if f"{name}.".startswith(LIGHT):
            for package, statement in reached(sources, name, HEAVY.__contains__).items():
                yield f"{name} loads {package}: {statement}"


def torch_at_a_station(sources: Sources) -> Iterator[str]:
    """What a base station with graphs imports needs no torch."""
    for name in sources.paths:
        if f"{name}.".startswith(STATION):
            for package, statement in reached(sources, name, EXTRA_EXPORT.__contains__).items():
                yield f"{name} loads {package}: {statement}"


def import_cycles(sources: Sources) -> Iterator[str]:
    """No two files need each other to be imported."""
    graph = {name: {i.module for i in sources.inside(name) if i.at_import} - {name} for name in sources.paths}
    yield from (" <-> ".join(group) for group in cycles(graph))


def crowded_folders(sources: Sources) -> Iterator[str]:
    """A folder's files can be seen at a glance."""
    folders = {path.parent for path in sources.paths.values()}
    for folder in sorted(folders):
        if (files := len(list(folder.glob("*.py")))) > MOST_FILES:
            yield f"{folder.relative_to(sources.root)} holds {files} files"


def python_in_native_code(sources: Sources) -> Iterator[str]:
    """The C++ knows no Python."""
    for path in sorted((sources.root / "native").rglob("*.[hc]pp")):
        if "Python.h" in path.read_text(encoding="utf-8"):
            yield str(path.relative_to(sources.root))


def missing_in_the_drawings(sources: Sources) -> Iterator[str]:
    """The tree in the documents names every package and every file beside the packages, and nothing that is gone."""
    folders = {name for name, path in sources.paths.items() if path.name == "__init__.py"}
    real = {name.removeprefix("wdmoe.") for name in sources.paths if name in folders or name.count(".") == 1}
    real -= {"wdmoe", "__main__"}
    for document in ("docs/design.md", "CONTRIBUTING.md"):
        drawn = _drawn((sources.root / document).read_text(encoding="utf-8"))
        yield from (f"{document}: {name} is missing" for name in sorted(real - drawn))
        yield from (f"{document}: {name} is not there" for name in sorted(drawn - real))


RULES: list[Rule] = [
    without_digit,
    upwards,
    against_the_inner_order,
    between_steps_of_moe,
    work_in_an_init,
    through_a_face,
    production_with_oracles,
    foreign_bytes_and_asserts,
    heavy_on_a_board,
    torch_at_a_station,
    import_cycles,
    crowded_folders,
    python_in_native_code,
    missing_in_the_drawings,
]


def _inner_imports(sources: Sources) -> Iterator[Import]:
    return (each for name in sources.paths if name != "wdmoe" for each in sources.inside(name))


def _part(module: str) -> str:
    """The part of the tree that has a digit."""
    return module.split(".")[1]


def _place_name(sources: Sources, module: str, places: dict[str, int]) -> str:
    """The part of a package that a module belongs to, as the inner order calls it."""
    part = module.split(".")[2] if module.count(".") > 1 else "*"
    is_file = sources.paths.get(".".join(module.split(".")[:3]), Path()).name != "__init__.py"
    return "*" if is_file and part not in places and "*" in places else part


def _hands_on(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__"
    return isinstance(node, ast.ImportFrom) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _forbidden(node: ast.AST) -> str:
    if isinstance(node, ast.Assert):
        return "asserts; raise an error of ours"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
        return f"calls {node.func.id}"
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "is a bare except"
    return ""


def _drawn(document: str) -> set[str]:
    """Dotted names in the code block that begins with the line `wdmoe/`, where what is inside is indented by 2 more."""
    block = re.search(r"^```\w*\nwdmoe/[^\n]*\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    names, above = set(), [""]
    for indent, cell in re.findall(r"^( {2}| {4}| {6})(\S+(?: \S+)*)", block.group(1) if block else "", re.MULTILINE):
        depth = len(indent) // 2
        words = [word.rstrip(",") for word in cell.split()]
        if depth == 1:
            its = [word.rstrip("/").removesuffix(".py") for word in words]
        else:
            its = [f"{above[depth - 1]}.{word.rstrip('/')}" for word in words if word.endswith("/")]
        names |= set(its)
        above[depth:] = its[:1]
    return names


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_of_what_breaks_a_rule_there_is_nothing(rule: Rule, sources: Sources) -> None:
    if offenders := list(rule(sources)):
        pytest.fail("\n".join([str(rule.__doc__), *offenders]), pytrace=False)


# For each rule a file that breaks it, in a tree that is right otherwise.
SPOILT: dict[str, tuple[str, str]] = {
    "without_digit": ("wdmoe/extra.py", ""),
    "upwards": ("wdmoe/solver/ranking.py", "def late():\n    import wdmoe.nodes.local\n"),
    "against_the_inner_order": ("wdmoe/transport/codec/wire.py", "from wdmoe.transport.zmq import sockets\n"),
    "between_steps_of_moe": ("wdmoe/moe/select.py", "from wdmoe.moe.expert import run\n"),
    "work_in_an_init": ("wdmoe/moe/__init__.py", "ready = True\n"),
    "through_a_face": ("wdmoe/nodes/local/process.py", "from wdmoe.solver import ranks\n"),
    "production_with_oracles": ("wdmoe/nodes/local/process.py", "from wdmoe.solver.reference.native import top_k\n"),
    "foreign_bytes_and_asserts": ("wdmoe/nodes/local/process.py", "def ran(text):\n    eval(text)\n"),
    "heavy_on_a_board": ("wdmoe/transport/codec/wire.py", "class Wire:\n    import torch.nn\n"),
    "torch_at_a_station": ("wdmoe/serving/app.py", "import transformers\n"),
    "import_cycles": ("wdmoe/arrays.py", "from wdmoe import records\n"),
    "crowded_folders": ("wdmoe/cli/more.py", ""),
    "python_in_native_code": ("native/wdmoe/top.hpp", "#include <Python.h>\n"),
    "missing_in_the_drawings": ("wdmoe/cli/late/__init__.py", ""),
}


@pytest.fixture
def tidy(tmp_path: Path) -> Path:
    """A made-up project that keeps every rule, if only just."""
    order = {package: re.findall(r"\w+", parts) for package, parts in INNER_ORDER.items()}
    rows = [f"  {name}" for name in LAYERS if name not in {*order, "moe", "cli", "__main__"}] + ["  moe/", "  cli/"]
    files = {f"wdmoe/{name}.py": "" for name in LAYERS if name not in {*order, "moe", "cli"}}
    files |= {"wdmoe/__init__.py": "", "wdmoe/moe/__init__.py": "", "wdmoe/cli/__init__.py": ""}
    files |= {f"wdmoe/cli/command{n}.py": "" for n in range(MOST_FILES - 1)}
    files |= {"wdmoe/records.py": "from wdmoe.arrays import Floats\n", "wdmoe/moe/expert.py": ""}
    for package, parts in order.items():
        rows += [f"  {package}/", *(f"    {part}/" for part in parts)]
        files |= {f"wdmoe/{each}/__init__.py": "" for each in (package, *(f"{package}/{part}" for part in parts))}
    files |= {"wdmoe/solver/ranking.py": "", "wdmoe/simulation/study.py": "import joblib\n"}
    drawing = "\n".join(["```", "wdmoe/", *rows, "```", ""])
    files |= {"docs/design.md": drawing, "CONTRIBUTING.md": drawing, "native/wdmoe/top.hpp": ""}
    for name, text in files.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_finds_what_breaks_it(rule: Rule, tidy: Path) -> None:
    assert not list(rule(Sources(tidy)))
    write(tidy / SPOILT[rule.__name__][0], SPOILT[rule.__name__][1])
    assert len(list(rule(Sources(tidy)))) in (1, 2)
