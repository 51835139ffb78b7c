"""What `docs/security.md` promises, each promise shown by what Python's audit hooks see."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass

import hostile
import hostile_artifacts
import pytest
from artifacts import stored
from places import SUPPORT

import qrecipe
from qrecipe.artifact.container import read_header
from qrecipe.errors.findings import QRecipeError, RecipeReferenceError
from qrecipe.recipe import extends as composition
from qrecipe.recipe import references

HEAD = "format = 1\nbackend = 'x86'\n[rules]\nglobal = 'float'\n"


def in_process(code, folder, *arguments):
    """The JSON that a program prints as its last line."""
    start = f"import sys; sys.path[:0] = [{str(SUPPORT)!r}, {str(folder)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + code, str(folder), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- no code, no import, no file outside of the tree

EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Net: pass\n"
NAMING_CODE = (
    "[tensor.a]\nobserver = 'evil.Net'\ndtype = 'int8'\n",
    "[tensor.a]\nobserver = './evil.py:Net'\ndtype = 'int8'\n",
    "[tensor.a]\nobserver = { name = 'minmax', cls = 'evil.Net', x = '__import__(\"evil\")' }\n",
    "[tensor.a]\nobserver = 'minmax'\nfake_quant = 'evil:Net'\ndtype = 'int8'\n",
    "[rules.module_type]\n'evil.Net' = 'float'\n",
    "[rules.function]\n'evil.run' = 'float'\n",
    "[rules.module_name]\n'__import__(\"evil\")' = { qconfig = 'float', optional = true }\n",
    "[fx]\nnon_traceable_module_class = ['evil.Net']\n",
    "[fx]\nroots = ['evil']\n",
    "[lint]\nignore = ['evil']\n",
)
READ_RECIPES = """
import json, torch
from pathlib import Path
from random import Random
import hostile, qrecipe
from nets import NETS
from watched import forbidden, watched

folder, tree = Path(sys.argv[1]), Path(sys.argv[1]) / "tree"
def read(path):
    try:
        recipe = qrecipe.load_recipe(path)
    except qrecipe.QRecipeError as error:
        str(error)
    else:
        recipe.to_toml()

seen, files = [], sorted(tree.glob("named*.toml"))
read(files[0])
read("builtin:x86-static")
read("pip:none")
random, modules = Random(5), set(sys.modules)
for number in range(80):
    if number < len(files):
        top = files[number]
    else:
        for name in hostile.FILES:
            text = hostile.extending(random)
            (tree / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        top = tree / random.choice(hostile.FILES)
    with watched() as events:
        read(top)
    seen += forbidden(events, tree)
reading = [seen, sorted(set(sys.modules) - modules)]
"""
PLAN = """
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
planning = []
for text in json.loads(sys.argv[2]):
    try:
        qrecipe.plan(model, qrecipe.parse_recipe(text), torch.randn(1, 2))
        planning.append("planned")
    except qrecipe.QRecipeError as error:
        planning.append(error.findings[0].code)
"""
LOAD_ARTIFACTS = """
import os
model = NETS["mlp"].model()
good, *files = sorted(folder.glob("*.safetensors"))
qrecipe.load_quantized(good, model)
class Other(type(model)):
    def forward(self, x):
        return super().forward(x * 2)
try:  # torch imports the rest of itself when a model first runs without values
    qrecipe.load_quantized(good, Other().eval())
except qrecipe.QRecipeError:
    pass
modules, found, refused = set(sys.modules), [], 0
for path in files:
    with watched() as events:
        try:
            qrecipe.load_quantized(path, model)
        except qrecipe.QRecipeError as error:
            refused += 1

    for name, given in events:
        own = name in ("exec", "compile", "import", "os.listdir") or "r" in str(given[1])
        if name == "open" and given[1] is None:  # by its flags
            own = given[2] & os.O_ACCMODE == os.O_RDONLY
        if not own or "evil" in repr(given):
            found.append(f"{path.name} {name} {given!r:.200}")
loading = [refused, found, sorted(set(sys.modules) - modules)]
is_imported = "evil" in sys.modules
print(json.dumps([reading, planning, loading, is_imported]))
"""
MARKER = "__import__('evil')"


@dataclass(frozen=True)
class Watched:
    """What one process did while it read, planned and loaded; ``forged`` counts the files."""

    reading: list
    planning: list
    loading: list
    ran_evil: bool
    forged: int


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched").resolve()
    tree = hostile.plant(folder)
    for place in (folder, tree):
        (place / "evil.py").write_text(EVIL)
    for number, text in enumerate(NAMING_CODE):
        (tree / f"named{number}.toml").write_text(HEAD + text)
    path = stored(folder, "mlp")
    forged = list(hostile_artifacts.with_text_everywhere(path.read_bytes(), MARKER))
    path.rename(folder / "0.safetensors")
    for number, content in enumerate(forged):
        (folder / f"forged{number}.safetensors").write_bytes(content)
    texts = json.dumps([HEAD + text for text in NAMING_CODE])
    *done, is_imported = in_process(READ_RECIPES + PLAN + LOAD_ARTIFACTS, folder, texts)
    return Watched(*done, is_imported or bool(list(folder.rglob("ran"))), len(forged))


def test_a_recipe_runs_nothing_imports_nothing_and_opens_nothing_outside_its_tree(process):
    seen, imported = process.reading
    assert seen == []
    assert imported == []
    assert not process.ran_evil


def test_planning_imports_no_class_that_a_recipe_names(process):
    assert "planned" in process.planning
    assert not process.ran_evil


def test_no_text_of_an_artifact_is_run_imported_or_opened(process):
    """Rebuilding runs what FX generates from the caller's model, and none of the file's texts."""
    refused, found, imported = process.loading
    assert process.forged > 60
    assert refused > process.forged * 0.5  # some texts, as the reasons of rules, may be anything
    assert found == []
    assert imported == []
    assert not process.ran_evil


# --- the tree


def test_a_link_that_leaves_the_tree_is_refused_as_a_base(tmp_path):
    tree = hostile.plant(tmp_path)
    for reference in ("./out.toml", "./up/secret.toml", "./outside/secret.toml", "./passwd"):
        (tree / "a.toml").write_text(f"extends = '{reference}'\n{HEAD}")
        with pytest.raises(RecipeReferenceError, match="QR122") as caught:
            qrecipe.load_recipe(tree / "a.toml")
        assert hostile.SECRET not in str(caught.value)


def test_the_outermost_recipe_may_be_a_link_and_its_tree_is_that_of_the_file(tmp_path):
    tree = hostile.plant(tmp_path)
    (tmp_path / "outside" / "real.toml").write_text(f"extends = './base.toml'\n{HEAD}")
    (tmp_path / "outside" / "base.toml").write_text("name = 'beside the file'\n")
    (tree / "base.toml").write_text("name = 'beside the link'\n")
    (tree / "named.toml").symlink_to(tmp_path / "outside" / "real.toml")
    assert qrecipe.load_recipe(tree / "named.toml").name == "beside the file"


# --- bombs


@pytest.fixture
def read(monkeypatch):
    """The names of the recipes that are read."""
    names = []

    def read_text(tree, path, file):
        names.append(file)
        return original(tree, path, file)

    original = references.read_text
    monkeypatch.setattr(references, "read_text", read_text)
    return names


def test_a_diamond_of_diamonds_reads_each_file_once(tmp_path, read):
    for level in range(15):
        below = f"extends = ['./a{level + 1}.toml', './b{level + 1}.toml']\n" if level < 14 else ""
        for side in "ab":
            (tmp_path / f"{side}{level}.toml").write_text(below + HEAD)
    qrecipe.load_recipe(tmp_path / "a0.toml")
    assert len(read) == 29


@pytest.mark.parametrize("shape", ["wide", "chain"])
def test_a_thousand_bases_are_not_all_read(tmp_path, read, shape):
    names = [f"./{number}.toml" for number in range(1_000)]
    for number in range(1_000):
        base = f"extends = '{names[number + 1]}'\n" if shape == "chain" and number < 999 else ""
        (tmp_path / names[number]).write_text(base + HEAD)
    top = names if shape == "wide" else names[:1]
    (tmp_path / "top.toml").write_text(f"extends = {json.dumps(top)}\n{HEAD}")
    with pytest.raises(QRecipeError, match="QR005"):
        qrecipe.load_recipe(tmp_path / "top.toml")
    assert len(read) == composition.MAX_LAYERS


# --- memory

LIMITED = """
import json, resource
from pathlib import Path
from giants import GIANTS
from nets import NETS
import hostile_artifacts, qrecipe
model, folder = NETS["mlp"].model(), Path(sys.argv[1])
good = (folder / "mlp.safetensors").read_bytes()
qrecipe.load_quantized(folder / "mlp.safetensors", model)
bombs = []
for number, bomb in enumerate(hostile_artifacts.artifact_bombs(good)):
    bombs.append(folder / f"bomb{number}.safetensors")
    bombs[-1].write_bytes(bomb)
texts = {name: text() for name, text in GIANTS.items()}
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 256 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ends = {}
def run(name, read):
    try:
        read()
        ends[name] = "accepted"
    except qrecipe.QRecipeError as error:
        is_short = len(error.findings) <= 150 and len(str(error)) < 150_000
        ends[name] = error.findings[0].code if is_short else "leaked no end of findings"
    except BaseException as error:
        ends[name] = f"leaked {error!r:.100}"
for name, text in texts.items():
    run(name, lambda: qrecipe.parse_recipe(text, "giant.toml"))
for path in bombs:
    run(path.name, lambda: qrecipe.load_quantized(path, model))
print(json.dumps(ends))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
@pytest.mark.slow
def test_giants_and_bombs_are_read_within_256_mebibytes(tmp_path):
    stored(tmp_path, "mlp")
    ends = in_process(LIMITED, tmp_path)
    assert not {name: end for name, end in ends.items() if end.startswith("leaked")}
    bombs = [end for name, end in ends.items() if name.startswith("bomb")]
    assert len(bombs) >= 8
    assert set(bombs) <= {"QR503", "QR505"}


def test_the_bombs_are_larger_than_what_they_may_unpack_to(tmp_path):
    good = stored(tmp_path, "mlp").read_bytes()
    bombs = list(hostile_artifacts.artifact_bombs(good))
    headers = [read_header(io.BytesIO(bomb), len(bomb), "bomb") for bomb in bombs]
    assert max(len("".join(hostile_artifacts.every_text(header))) for header in headers) > 2**24
