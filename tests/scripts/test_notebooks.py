"""The notebooks, run from an empty folder on tiny sets: slow, in CI's second step."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from yolo.data.digits import write_digits

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("own_data", "voc_training", "cifar10_training")
SMALL = "--width 0.0625 --img-sizes 64,96 --test-size 96 --batch-size 4 --epochs 1 --max-steps 3"


def setup_cell(name: str) -> str:
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_all_notebooks_find_code_and_storage_in_the_same_way() -> None:
    cells = {setup_cell(name) for name in NOTEBOOKS}
    assert len(cells) == 1
    [cell] = cells
    for place in ("google.colab", "/kaggle/working", "/storage", "YOLO_SOURCE", "requirements.txt"):
        assert place in cell


def test_committed_outputs_hold_no_error_and_no_folder_of_this_machine() -> None:
    for name in NOTEBOOKS:
        notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert not [output for output in outputs if output.output_type == "error"]
        texts = json.dumps([output for output in outputs if output.output_type == "stream"])
        assert "/home/" not in texts and "/root/" not in texts and "Traceback" not in texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing but a copy of the project, as `git clone` would leave it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        target = tmp_path / "trainer" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return tmp_path


def run(folder: Path, name: str, **settings: str) -> str:
    """Run a notebook; return all that its cells printed."""
    notebook = nbformat.read(folder / f"trainer/notebooks/{name}.ipynb", 4)
    environment = {**os.environ, "NOTEBOOK_TEST": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
    places = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, startup_timeout=300, resources=places)
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "error:" not in printed, printed
    return printed


@pytest.mark.slow
def test_own_data_goes_from_pictures_to_a_space(folder: Path) -> None:
    write_digits(folder / "pictures", num_scenes={"train": 12, "test": 4})
    printed = run(
        folder,
        "own_data",
        DATA_ROOT=str(folder / "pictures"),
        TRAIN_TIME="30s",
        EXTRA="--img-sizes 96 --test-size 96 --train-steps 3 --batch-size 4",
    )
    assert "mAP" in printed and "half precision" in printed
    assert (folder / "trainer/runs/own-space/app.py").exists()
    assert len(list((folder / "trainer/runs/own-maps").glob("*.png"))) == 3


@pytest.mark.slow
def test_voc_training_runs_on_a_small_devkit(folder: Path) -> None:
    write_digits(folder / "pictures", num_scenes={"train": 12, "test": 4})
    flags = f"--classes auto --train-split train --split test {SMALL}"
    settings = {"VOC_ROOT": str(folder / "pictures"), "CONFIG": "configs/voc_small.yaml"}
    printed = run(folder, "voc_training", EXTRA=flags, **settings)
    assert "class accuracy" in printed


@pytest.mark.slow
def test_cifar10_training_runs_on_class_folders(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / "pictures" / split / label).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / split / label / f"{k}.png")
    flags = "--width 0.125 --batch-size 8 --max-steps 3"
    root = str(folder / "pictures")
    printed = run(folder, "cifar10_training", CIFAR10_ROOT=root, EXTRA=flags, EPOCHS="2")
    assert "accuracy" in printed
