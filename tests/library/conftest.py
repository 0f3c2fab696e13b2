"""Fails a run of Transformers' own tests that differs from `exceptions.py` in what fails or is skipped."""

import re
from pathlib import Path

import pytest

from . import exceptions

# Marks of the library's tests.
MARKS = (
    "accelerate_tests",
    "flash_attn_2_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_fsdp_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)
skipped: dict[str, set[str]] = {}  # reason: tests, "Class::test"


def pytest_configure(config):
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: of Transformers' tests")


def model_test(nodeid: str) -> str | None:
    """Return "Class::test", None for a test of another file."""
    path, _, name = nodeid.partition("::")
    return name if path.endswith("library/model_tests.py") else None


def is_whole(config) -> bool:
    """True if all tests of the file run, and no others."""
    one_file = [Path(arg).name for arg in config.args] == ["model_tests.py"]
    return one_file and not (config.option.keyword or config.option.markexpr)


def pytest_collection_modifyitems(config, items):
    """Expect the listed failures. A test that passes all the same then fails (strict)."""
    names = {model_test(item.nodeid): item for item in items}
    for name, (error, why) in exceptions.FAILS.items():
        if name in names:
            names[name].add_marker(pytest.mark.xfail(reason=why, raises=error, strict=True))
        elif is_whole(config):
            raise pytest.UsageError(f"exceptions.py lists {name}, which is not among the tests")


def pytest_runtest_logreport(report):
    name = model_test(report.nodeid)
    if name and report.skipped and not hasattr(report, "wasxfail"):
        skipped.setdefault(report.longrepr[2].removeprefix("Skipped: "), set()).add(name)


def departures(config) -> list[str]:
    """Return what the run skipped and the list does not, and the reverse."""
    found, used, patterns = [], set(), exceptions.SKIPS | exceptions.MACHINE
    for reason, tests in sorted(skipped.items()):
        listed = {pattern for pattern in patterns if re.fullmatch(pattern, reason)}
        used |= listed
        if not listed:
            found.append(f"skipped for a reason that exceptions.py does not list: {reason!r}, {sorted(tests)}")
    if is_whole(config):
        unused = sorted(exceptions.SKIPS.keys() - used)
        found += [f"exceptions.py lists {pattern!r}, but nothing was skipped for it" for pattern in unused]
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and session.exitstatus == 0 and departures(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for line in departures(config):
        terminalreporter.write_line(f"FAILED {line}", red=True)
