"""The wheel: what is in it, and what it can do in a folder that knows nothing of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import yolo
from yolo.files import bundled, find

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    pytest.importorskip("hatchling", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("hatch_requirements_txt", reason="pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def python(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, where `yolo` can only come from the wheel."""
    env = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True
    )


def test_the_wheel_holds_the_package_the_scripts_and_what_they_open(site: Path):
    inside = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "yolo").rglob("*.py")}
    beside = [ROOT / f"{name}.py" for name in ("train", "evaluate", "gradcam", "app")]
    beside += [
        path for name in ("configs", "weights", "samples") for path in (ROOT / name).rglob("*.*")
    ]
    assert inside >= modules | {f"yolo/bundled/{path.relative_to(ROOT)}" for path in beside}


def test_the_wheel_asks_for_what_the_requirements_name(site: Path):
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split("#")[0].strip().replace("_", "-") for line in lines} - {""}
    asked = {
        line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")
    }
    assert set(map(Requirement, asked)) == set(map(Requirement, wanted))


def test_a_script_finds_the_configurations_of_the_wheel(site: Path, tmp_path: Path):
    shown = python(site, tmp_path, "-m", "yolo", "train", "--config", "configs/voc.yaml", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "data/VOCdevkit" in shown.stdout  # the default of that file


def test_the_detector_of_the_wheel_sees_a_cat(site: Path, tmp_path: Path):
    code = (
        "import sys; import yolo; assert 'torch' not in sys.modules\n"
        "from yolo import Detector\n"
        f"print(Detector.load().detect({str(ROOT / 'samples/detection/cat.jpg')!r}))"
    )
    answer = python(site, tmp_path, "-c", code)
    assert answer.returncode == 0, answer.stderr
    assert "cat" in answer.stdout


def test_without_a_command_the_usage_names_them_all(tmp_path: Path):
    shown = python(ROOT, tmp_path, "-m", "yolo")
    assert shown.returncode == 0
    assert all(f"\n  {name}" in shown.stdout for name in ("train", "evaluate", "gradcam", "app"))


def test_a_misspelt_command_is_named_with_the_nearest(tmp_path: Path):
    shown = python(ROOT, tmp_path, "-m", "yolo", "trian")
    assert shown.returncode == 2
    assert "error: trian is no command; did you mean train?" in shown.stderr


def test_a_file_of_the_current_folder_comes_before_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path("configs/voc.yaml")
    assert find(config) == bundled("configs/voc.yaml")
    config.parent.mkdir()
    config.write_text("epochs: 1")
    assert find(config) == config


@pytest.mark.parametrize(
    "name", ["configs/none.yaml", "../yolo/train.py", "train.py", "/configs/voc.yaml"]
)
def test_no_other_path_is_looked_for_in_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(Path(name)) == Path(name)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        yolo.Detektor  # noqa: B018
