"""What all benchmarks report alike: the machine, the versions, and targets as met or missed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

OURS = "specdens"


def machine() -> dict[str, Any]:
    """Return when and on what a benchmark ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the installed versions."""
    found = {}
    for name in (OURS, *distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source checkout" if name == OURS else "not installed"
    return found


def target(what: str, value: float, wanted: str, *, met: bool) -> dict[str, Any]:
    """Return one line of the targets."""
    return {"what": what, "value": value, "wanted": wanted, "met": met}


def print_targets(targets: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Print which targets were met, and what was done to keep the comparison fair."""
    print("\ntargets")
    for line in targets:
        verdict = "met" if line["met"] else "MISSED"
        value = f"{line['value']:.2f} (wanted {line['wanted']})"
        print(f"  {verdict:<8}{value:<22}{line['what']}")
    print("\n" + "\n".join(f"- {note}" for note in notes))


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
