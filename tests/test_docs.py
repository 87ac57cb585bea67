"""The README and docs/: links lead somewhere, and commands name files and flags that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str]]:
    """Every `python train.py ...` of the pages: script and flags."""
    pattern = re.compile(
        r"(?:python|torchrun[^\n`]*?) (train|evaluate|gradcam|app)\.py\b([^`\n#]*)"
    )
    texts = (page.read_text().replace("\\\n", " ") for page in PAGES)
    return [match for text in texts for match in pattern.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("script", ["train", "evaluate", "gradcam", "app"])
def test_commands_use_flags_and_configurations_that_exist(script: str):
    help_command = [sys.executable, f"{script}.py", "--help"]
    shown = subprocess.run(help_command, cwd=ROOT, capture_output=True, text=True).stdout
    known = set(re.findall(r"--[a-z][a-z0-9-]*", shown))
    lines = [line for name, line in commands() if name == script]
    assert lines
    for line in lines:
        unknown = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line)) - known
        assert not unknown, f"{script}.py{line}: {unknown}"
        missing = [
            name for name in re.findall(r"configs/\w+\.yaml", line) if not (ROOT / name).exists()
        ]
        assert not missing, f"{script}.py{line}: {missing}"


def test_the_readme_fits_three_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) < 170
