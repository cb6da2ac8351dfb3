"""The documentation's own checks that need no build: coverage, links, figures, toctrees, syntax."""

import ast
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PACKAGES = ("specdens", "specdens_torch", "specdens_jax")
ADAPTERS = PACKAGES[1:]

_FENCE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S
)


def name_of(page):
    return page.relative_to(DOCS).with_suffix("").as_posix()


@pytest.fixture(params=PAGES, ids=name_of)
def page(request):
    """A page of the documentation."""
    return request.param


def blocks(text):
    """Return (info, body) of every fenced block."""
    return [(match["info"].strip(), match["body"]) for match in _FENCE.finditer(text)]


def prose(text):
    """Return a page without its blocks and code."""
    return re.sub(r"(`+).+?\1", "", _FENCE.sub("", text), flags=re.S)


def anchors(text):
    """Return the anchors that headings and labels of a page have, as GitHub makes them."""
    heads = re.findall(r"^#+\s+(.+?)\s*$", _FENCE.sub("", text), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {head.replace(" ", "-") for head in plain} | set(re.findall(r"^\((\S+)\)=", text, re.M))


@pytest.fixture
def extension(monkeypatch):
    """Import an extension of the build, or a benchmark's script, by its name."""
    monkeypatch.syspath_prepend(str(DOCS / "_extensions"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return importlib.import_module


def names_of(module):
    """Return the names a module lists, or else the functions and classes that it defines."""
    defined = (
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )
    return list(getattr(module, "__all__", defined))


def public_names(package):
    """Give all public names of a package and its public modules in full."""
    module = importlib.import_module(package)
    for name in names_of(module):
        yield f"{package}.{name}"
        if isinstance(getattr(module, name), ModuleType):
            yield from public_names(f"{package}.{name}")


def documented(text):
    """Return what the directives of a reference page document, in full."""
    module, found = "", set()
    for directive, name in re.findall(
        r"^\.\. (currentmodule|module|automodule|auto\w+|data):: ([\w.]+)", text, re.M
    ):
        if directive.endswith("module"):
            module = name if directive != "automodule" else module
            found.add(name)
        else:
            found.add(name if name.startswith("specdens") else f"{module}.{name}")
    return found


@pytest.fixture(scope="module")
def reference():
    """All names that the reference documents."""
    return set().union(*(documented(path.read_text()) for path in DOCS.glob("reference/*.md")))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package, reference):
    names = set(public_names(package))
    assert len(names) > 20
    assert names - reference == set()


def test_nothing_is_documented_that_is_not_there(reference):
    for full in reference:
        parts = full.split(".")
        for split in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:split]))
            except ImportError:
                continue
            break
        for part in parts[split:]:
            value = getattr(value, part)


def test_contract_page_names_what_both_adapters_have():
    text = (DOCS / "reference" / "adapter_contract.md").read_text()
    every = set().union(*(importlib.import_module(package).__all__ for package in ADAPTERS))
    assert {name for name in every if not re.search(rf"\b{name}\b", text)} == set()


def test_internal_links_lead_somewhere(page, reference):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        place, _, anchor = target.partition("#")
        if not place and anchor in reference:  # a name, which the build links to its entry
            continue
        other = (page.parent / place).resolve() if place else page
        assert other.is_file(), f"{target} is no file"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), (
                f"{target} has no such heading"
            )


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_pages_are_in_a_toctree():
    listed = {"index"}
    for path in PAGES:
        for info, body in blocks(path.read_text(encoding="utf-8")):
            if info.startswith("{toctree}"):
                entries = (line.strip() for line in body.splitlines())
                folder = path.parent.relative_to(DOCS)
                listed |= {
                    (folder / entry).as_posix()
                    for entry in entries
                    if entry and not entry.startswith(":")
                }
    assert {name_of(path) for path in PAGES} == listed


@pytest.mark.parametrize("tutorial", sorted(DOCS.glob("tutorials/*.md")), ids=name_of)
def test_tutorials_draw(tutorial):
    cells = [
        body
        for info, body in blocks(tutorial.read_text(encoding="utf-8"))
        if info.startswith("{code-cell}")
    ]
    drawing = re.compile(r"\.plot\(|plt\.subplots|plot_\w+\(")
    assert any(drawing.search(cell) for cell in cells)


def test_python_on_pages_parses(page):
    for info, body in blocks(page.read_text(encoding="utf-8")):
        if info == "python":
            ast.parse(body)
        elif info.startswith("{code-cell}"):
            lines = [line for line in body.splitlines() if not re.match(r"\s*(:\w[\w-]*:|%)", line)]
            ast.parse("\n".join(lines))


def test_gallery_shows_every_example_that_has_a_figure():
    pictures = list((DOCS / "_static" / "gallery").rglob("*.png"))
    assert len(pictures) >= 5
    assert [path for path in pictures if path.stat().st_size > 40_000] == []
    patterns = [
        line
        for info, body in blocks((DOCS / "gallery.md").read_text())
        if info == "{gallery}"
        for line in body.split()
    ]
    shown = {path for pattern in patterns for path in (ROOT / "examples").glob(pattern)}
    every = {p for p in (ROOT / "examples").rglob("*.py") if "__main__" in p.read_text()}
    assert every - shown == set()
    assert {path.stem for path in pictures} <= {path.stem for path in shown}


def test_benchmark_page_shows_all_that_is_published():
    shown = re.findall(r"^```\{benchmark\} (\w+)$", (DOCS / "benchmarks.md").read_text(), re.M)
    published = {path.stem for path in DOCS.glob("_data/benchmarks/*.json")}
    assert set(shown) == published
    for name in published:
        numbers = json.loads((DOCS / "_data" / "benchmarks" / f"{name}.json").read_text())
        assert numbers["machine"]["date"]
        assert numbers["versions"]
        for row in numbers["table"]:
            if row["rivals"]:
                ratio = min(row["rivals"].values()) / min(row["ours"].values())
                assert row["ratio"] == pytest.approx(ratio, rel=2e-3)


def test_published_numbers_keep_losses(extension):
    """Of two layouts, one lost: medians, best rival and verdict are those of the raw result."""
    rows = [
        {"layout": layout, "contender": who, "seconds_per_product": seconds}
        for layout, who, seconds in (
            ("1 x 5000", "specdens", 0.02),
            ("1 x 5000", "fast", 0.01),
            ("1 x 5000", "slow", 0.08),
            ("5 x 1000", "specdens", 0.0123456),
            ("5 x 1000", "slow", 0.06),
        )
    ]
    target = {"what": "1 x 5000: times faster", "value": 0.5, "wanted": ">= 2", "met": False}
    raw = {"benchmark": "b", "machine": {}, "versions": {}, "settings": {}}
    raw |= {"results": rows, "targets": [target]}
    published = extension("publish").trimmed("torch_hessian_other", raw)
    lost, won = published["table"]
    assert lost == {
        "what": "1 x 5000",
        "ours": {"specdens": 20.0},
        "rivals": {"fast": 10.0, "slow": 80.0},
        "ratio": 0.5,
    }
    assert won["ours"] == {"specdens": 12.35}
    assert won["ratio"] == 4.86
    assert published["targets"] == [target]
    with pytest.raises(ValueError, match=r"unknown\.json: no benchmark is called so"):
        extension("publish").trimmed("unknown", raw)


def test_tables_of_benchmarks_say_missed(extension):
    pytest.importorskip("sphinx")
    page = extension("benchmarks")
    row = {"what": "cube", "ours": {"specdens": 2.0}, "rivals": {"other": 1.0}, "ratio": 0.5}
    targets = [
        {"what": "cube: products", "value": 2.0, "wanted": "<= 1", "met": False},
        {"what": "cubes: products", "value": 1.0, "wanted": "<= 1", "met": True},
    ]
    lines = page.measurements({"unit": "products", "table": [row], "targets": targets})
    assert "| cube | 2 | 1 | 0.5 | **missed** 1 of 1 |" in lines
    assert "| cube: products | 2 | `<= 1` | **missed** |" in page.targets({"targets": targets})
