"""Trims what benchmarks wrote to `results/` to the numbers that the documentation shows.

    python tests/benchmarks/publish.py [FILE.json ...]

writes ``docs/_data/benchmarks/NAME.json`` for every file, by default for all in ``results/``. The
name of a file begins with that of the benchmark that wrote it: ``torch_products_h100.json`` is a
run of ``torch_products.py``. Losses and missed targets are kept as they are.

A published file has ``machine``, ``versions``, ``settings`` and ``notes`` as measured, ``unit``,
``targets``, and in ``table`` one row for each thing measured: ``what``, ``ours`` and ``rivals``
(name to number, smaller is better) and ``ratio``, the best rival over the best of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE.parents[1] / "docs" / "_data" / "benchmarks"
OURS = "specdens"

Result = dict[str, Any]
Measured = Iterable[tuple[str, str, float]]  # what, contender, number


def rounded(value: Any) -> Any:
    """Round all numbers to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(measured: Measured, ours: Iterable[str] = (OURS,)) -> list[Result]:
    """Gather the numbers of each thing into one row; `ours` names the contenders of specdens."""
    rows: dict[str, Result] = {}
    for what, contender, number in measured:
        row = rows.setdefault(what, {"what": what, "ours": {}, "rivals": {}, "ratio": None})
        row["ours" if contender.startswith(tuple(ours)) else "rivals"][contender] = number
    for row in rows.values():
        if row["ours"] and row["rivals"]:
            row["ratio"] = min(row["rivals"].values()) / min(row["ours"].values())
    return list(rows.values())


def torch_hessian(result: Result) -> Result:
    rows = result["results"]
    each = ((r["layout"], r["contender"], 1e3 * r["seconds_per_product"]) for r in rows)
    return {"unit": "ms per product, all told", "table": table(each)}


def torch_products(result: Result) -> Result:
    done = [row for row in result["results"] if not row["failure"]]
    each = (
        (f"{r['problem']}, {r['kind']}", r["contender"], 1e3 * r["seconds_per_product"])
        for r in done
    )
    failures = [
        f"{row['contender']} on {row['problem']}, {row['kind']}: {row['failure']}"
        for row in result["results"]
        if row["failure"]
    ]
    notes = [*result["notes"], *failures]
    return {"unit": "ms per product", "table": table(each), "notes": notes}


def profile_products(result: Result) -> Result:
    def each() -> Measured:
        for what, row in rows:
            yield what, row["contender"], row["gradients"]
            yield f"{what}, its arithmetic", row["contender"], row["operations"]

    rows = [
        (f"{r['problem']}, {row['kind']}", row) for r in result["results"] for row in r["products"]
    ]
    shares = ", ".join(
        f"{what} {row['arithmetic_seconds'] / row['profiled_seconds']:.0%}"
        for what, row in rows
        if row["contender"] == OURS
    )
    notes = [*result["notes"], f"Arithmetic takes this share of the time of specdens: {shares}."]
    return {"unit": "gradients", "table": table(each()), "notes": notes}


def jax_products(result: Result) -> Result:
    each = ((r["what"], r["contender"], 1e3 * r["seconds"]) for r in result["results"])
    return {"unit": "ms per product", "table": table(each)}


def sparse(result: Result) -> Result:
    def each() -> Measured:
        for duel in result["duels"]:
            how = "with" if duel["reorthogonalize"] else "without"
            what = f"n = {duel['n']}, {how} reorthogonalization"
            for name, row in duel["rows"].items():  # float32 is not compared with a double
                suffix = ", float32" if "float32" in name else ""
                yield what + suffix, name.partition(",")[0], median(row["seconds"])

    return {"unit": "seconds per log-determinant", "table": table(each())}


def eigenpairs(result: Result) -> Result:
    def each() -> Measured:
        for r in result["results"]:
            blocks = f", blocks of {r['block_size']}" if r["block_size"] else ""
            what = f"{r['case']} {r['which']} tol {r['tol']:.0e}{blocks}"
            lost = f" (SciPy missed {r['scipy_missed']} eigenvalues)" if r["scipy_missed"] else ""
            yield what + lost, OURS, r["products"]
            yield what + lost, "SciPy", r["scipy_products"]

    return {"unit": "products", "table": table(each())}


def accuracy(result: Result) -> Result:
    ours = ("slq", "kpm", "density")
    each = [
        (f"{row['spectrum']}, {row['budget']} products", contender, 1e4 * mean)
        for row in result["results"]
        for contender, mean in row["means"].items()
        if contender not in ("slq.plain", "kpm undamped")  # rules without what specdens adds
    ]
    targets = [
        {
            "what": f"{t['spectrum']}, {t['budget']} products: distance of {t['who']} ({t['ours']})"
            f" over that of {t['rival']}",
            "value": t["ratio"],
            "noise": t["noise"],
            "wanted": t["wanted"],
            "met": t["met"],
        }
        for t in result["targets"]
    ]
    return {
        "unit": "1e-4 of the range, Wasserstein-1",
        "table": table(each, ours),
        "targets": targets,
    }


def gpu_spectra(result: Result) -> Result:
    def each() -> Measured:
        for r in result["results"]:
            how = "basis kept" if r["reorthogonalize"] else "no basis"
            yield f"{r['problem']}, {how}", r["vectors"], r["median"]

    return {"unit": "seconds per measure", "table": table(each(), ("cupy", "torch"))}


TRIMMERS: dict[str, Callable[[Result], Result]] = {
    trim.__name__: trim
    for trim in (
        torch_hessian,
        torch_products,
        profile_products,
        jax_products,
        sparse,
        eigenpairs,
        accuracy,
        gpu_spectra,
    )
}


def trimmed(name: str, result: Result) -> Result:
    """Return what is published of a result, `name` being that of its file."""
    script = next((script for script in TRIMMERS if name.startswith(script)), None)
    if script is None:
        message = f"{name}.json: no benchmark is called so; expected one of {', '.join(TRIMMERS)}"
        raise ValueError(message)
    kept = {key: result.get(key, []) for key in ("benchmark", "machine", "versions", "settings")}
    kept |= {"notes": result.get("notes", []), "targets": result.get("targets", [])}
    return rounded({"script": f"{script}.py"} | kept | TRIMMERS[script](result))


def main(files: list[str]) -> None:
    """Publish the given files, or all results."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    for path in [Path(file) for file in files] or sorted((HERE / "results").glob("*.json")):
        published = trimmed(path.stem, json.loads(path.read_text()))
        target = PUBLISHED / path.name
        target.write_text(json.dumps(published, indent=1, ensure_ascii=False) + "\n")
        print(f"{path.name}: {len(published['table'])} rows, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
