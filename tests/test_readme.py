"""Every example in the README and the data sets' pages runs, and prints what is shown (numbers and places apart)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.demo import make_photos

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "infra" / "datasets").glob("*.md"))
BIN = Path(sys.executable).parent


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def shape(line: str) -> str:
    """The line without what differs from run to run."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d.,]*", "#", line)).strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is after `make demo`, before its restoration."""
    folder = tmp_path_factory.mktemp("readme")
    make_photos(folder / "demo-output")
    return folder


@pytest.fixture
def environment(command_environment: dict[str, str]) -> dict[str, str]:
    return {**command_environment, "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_examples_run_and_commands_print_what_is_shown(place: Path, page: Path, environment: dict[str, str]) -> None:
    commands = 0
    for block in blocks(page, "console"):
        for command, shown in re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:[^$].*\n|\n)*)", block, re.MULTILINE):
            if command.startswith(("make ", "pip ")):
                continue  # what a person does once; the Makefile itself is what runs this test
            commands += 1
            done = subprocess.run(
                command, shell=True, cwd=place, env=environment, capture_output=True, text=True, check=False
            )
            printed = {shape(line.replace(str(place), "~")) for line in (done.stdout + done.stderr).splitlines()}
            missing = [
                line for line in shown.splitlines() if line.strip() != "..." and shape(line) not in printed | {""}
            ]
            assert not missing, f"$ {command}\nmissing: {missing}\nprinted:\n{done.stdout}{done.stderr}"
    assert commands >= (5 if page == README else 2)
    examples = blocks(page, "python")  # of what the commands have made
    assert bool(examples) == (page == README)
    for code in examples:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
