"""Run the contract tests with several versions of the libraries that models and attributions come from.

Every combination gets a fresh virtual environment; the results are written as a table after each of them.

    python tests/run_versions.py [--quick] [--only TEXT] [--output docs/versions.md]
"""

from __future__ import annotations

import argparse
import configparser
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/contracts", "tests/attr"]
# What depends on the libraries most: each model's own score and default method, Captum's interface, the parity.
QUICK = [
    "tests/contracts/test_captum_interface.py",
    "tests/contracts/test_models.py",
    "tests/attr/test_multi_modal_info_bottleneck.py",
    "-k",
    "(not test_models or score_is_the_models or recommended_method)"
    " and not (every_layer or tensor_in_tensor or without_gradients or attribution_has)",
]
SHOWN = ["python", "torch", "numpy", "transformers", "captum", "open_clip_torch"]


@dataclass(frozen=True)
class Environment:
    """Requirements of one combination, as pip reads them."""

    transformers: str
    captum: str
    open_clip: str = "==3.*"

    def requirements(self) -> list[str]:
        return [f"transformers{self.transformers}", f"captum{self.captum}", f"open_clip_torch{self.open_clip}"]

    def __str__(self) -> str:
        return " ".join(self.requirements())


# What libraries of other ages say of their own code: FLAVA of transformers 4.57, open_clip 2.24 with a new timm.
WARNINGS = [
    "ignore:The `device` argument is deprecated:FutureWarning",
    "ignore:Importing from timm.models.layers is deprecated:FutureWarning",
]

NEWEST = ">=5,<6"
ENVIRONMENTS = [
    *(
        Environment(library, f"=={captum}")
        for library in ("==4.57.*", NEWEST)
        for captum in ("0.7.0", "0.8.0", "0.9.0")
    ),
    # Its blocks are sequence-first.
    Environment(NEWEST, "==0.9.0", "==2.24.0"),
]


@dataclass(frozen=True)
class Result:
    """The versions that pip chose, how many tests ended how, the names of those that failed, and the seconds taken."""

    versions: dict[str, str]
    counts: Counter[str]
    failed: list[str]
    seconds: float


def package_requirements() -> list[str]:
    """What the package and these tests need, as setup.cfg says; of the tests' extra only what no other extra holds."""
    configuration = configparser.ConfigParser(interpolation=None)
    configuration.read(ROOT / "setup.cfg")
    lists = configuration["options"]["install_requires"], configuration["options.extras_require"]["test"]
    lines = [line.strip() for text in lists for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("%(")]


def adapted_constraints() -> list[str]:
    """The repository's constraints without what depends on the versions under test."""
    # transformers 4 needs an older hub client and tokenizers, captum 0.8 an older numpy.
    free = ("transformers", "captum", "open_clip_torch", "huggingface_hub", "tokenizers", "numpy")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.split("=")[0].strip() not in free]


def create(folder: Path, environment: Environment) -> Path:
    """A virtual environment with everything but the package itself, which is imported from the checkout."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(adapted_constraints()) + "\n")
    # torch is chosen first, so that nothing else brings a build of it for another device.
    for wanted in (["torch"], [*package_requirements(), *environment.requirements()]):
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, *wanted], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions of what the table shows."""
    program = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({n: platform.python_version() if n == 'python' else version(n) for n in sys.argv[1:]}))"
    )
    output = subprocess.run([python, "-c", program, *SHOWN], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def run(python: Path, report: Path, quick: bool) -> tuple[Counter[str], list[str]]:
    """How many tests ended how, and the names of those that failed."""
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *(f"-W{warning}" for warning in WARNINGS)]
    command = [str(python), "-m", "pytest", *options, *(QUICK if quick else TESTS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}: the tests could not be run; its output is above.")
    return read_report(report)


def read_report(report: Path) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed


_FULLY = " and ".join(f"`{path}`" for path in TESTS)
_QUICKLY = "each model's own score and default method, Captum's interface and the parity with the published loop"


def table(results: Sequence[Result], quick: bool, today: datetime.date) -> str:
    r"""The results as a page of Markdown.

    Args:

        results (sequence of Result): One per environment.
        quick (bool): Whether a part of the tests was run.
        today (datetime.date): When.

    Returns:
        str: the page.
    """
    columns = [*SHOWN, "passed", "failed", "skipped", "minutes"]
    lines = [
        "# Versions",
        "",
        f"Written by `python tests/run_versions.py{' --quick' if quick else ''}` on {today.isoformat()}. Each row is a "
        f"fresh virtual environment on the CPU, in which {_QUICKLY if quick else _FULLY} ran.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for result in results:
        counts = [str(result.counts[name]) for name in ("passed", "failed", "skipped")]
        cells = [*(result.versions[name] for name in SHOWN), *counts, f"{result.seconds / 60:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for result in results:
        if result.failed:
            lines += ["", f"Failed with {', '.join(f'{name} {result.versions[name]}' for name in SHOWN[3:])}:", ""]
            lines += [f"- `{name}`" for name in result.failed]
    return "\n".join(lines) + "\n"


def kept(page: Path) -> str:
    """What stands on a page below the table, under headings: it was written by hand."""
    _, heading, rest = page.read_text(encoding="utf-8").partition("\n## ") if page.exists() else ("", "", "")
    return heading + rest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run the tests that depend on the libraries most")
    parser.add_argument("--only", default="", metavar="TEXT", help="run environments whose requirements contain this")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "versions.md", help="the page to write")
    options = parser.parse_args(arguments)
    chosen = [environment for environment in ENVIRONMENTS if options.only in str(environment)]
    if not chosen:
        parser.error(
            f"--only: no environment contains {options.only!r}; there are {'; '.join(map(str, ENVIRONMENTS))}."
        )
    results: list[Result] = []
    below = kept(options.output)
    for number, environment in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {environment}: installing", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            python = create(Path(folder) / "environment", environment)
            versions = installed(python)
            print(f"[{number}/{len(chosen)}] {environment}: testing", flush=True)
            start = time.monotonic()
            counts, failed = run(python, Path(folder) / "report.xml", options.quick)
        results.append(Result(versions, counts, failed, time.monotonic() - start))
        page = table(results, options.quick, datetime.date.today())
        options.output.write_text(page + below, encoding="utf-8")
        print(f"[{number}/{len(chosen)}] {environment}: {dict(counts)}", flush=True)
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
