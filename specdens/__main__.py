"""Command line: ``python -m specdens`` prints what is installed and tests that it works."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from specdens.selftest import Check, Found, device_name, found_backends, run_checks
from specdens.version import __version__

_PACKAGES = ("numpy", "scipy", "array-api-compat", "numba", "matplotlib")


def main() -> int:
    """Print versions, array libraries, devices and the self-test.

    Returns
    -------
    int
        0, or 1 if a check has failed.
    """
    print(f"specdens {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\n".join(f"  {name:<18}{_version(name)}" for name in _PACKAGES))
    print("\nArray libraries")
    found = found_backends()
    for library in found:
        print(_line_of(library))
    print("\nSelf-test: eigenvalues of a chain of 60 sites, against the formula")
    checks = []
    for check in run_checks(found):
        checks.append(check)
        print(_result(check), flush=True)
    failed = sum(not check.passed for check in checks)
    seconds = sum(check.seconds for check in checks)
    verdict = f"{failed} of {len(checks)} failed" if failed else f"all {len(checks)} passed"
    print(f"\n{verdict} in {seconds:.1f} s")
    return int(failed > 0)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _line_of(library: Found) -> str:
    if library.version is None:
        return f"  {library.name:<10}{library.reason}"
    devices = ", ".join(map(device_name, library.devices))
    return f"  {library.name:<10}{library.version:<14}on {devices}"


def _result(check: Check) -> str:
    word = "ok    " if check.passed else "FAILED"
    what = f"  {word}  {check.estimator:<6} {check.backend:<7} {check.dtype:<8}"
    if check.message:
        return f"{what} {check.device}: {check.message}"
    return f"{what} error {check.error:.0e}, at most {check.tolerance:.0e}  {check.device}"


if __name__ == "__main__":
    sys.exit(main())
