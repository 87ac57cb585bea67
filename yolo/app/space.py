"""The folder that becomes a Hugging Face Space, and its upload.

Front matter of a Space: https://huggingface.co/docs/hub/spaces-config-reference
"""

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from yolo.app.about import TASKS, literal, model_card, model_name, results_markdown
from yolo.app.models import HUB_PAGE, Model, first_line
from yolo.app.samples import SampleSet, rank_samples, read_samples, write_samples
from yolo.errors import UserError
from yolo.runs.checkpoint import load_weights, publish_weights
from yolo.runs.trust import check_data_named

# What app.py imports; gradio comes with the Space, in the version that its front matter names.
PACKAGES = (
    "torch", "torchvision", "gradio", "grad-cam", "av", "opencv-python", "albumentations", "numpy",
    "pillow", "safetensors", "scikit-learn", "matplotlib", "defusedxml", "tyro", "pyyaml", "tqdm",
    "huggingface-hub",
)  # fmt: skip
CPU_WHEELS = "--extra-index-url https://download.pytorch.org/whl/cpu"
SYSTEM_PACKAGES = ("libgl1", "libglib2.0-0")  # of OpenCV


def find_samples(
    made: Path, model: Model, count: int, data: Mapping[str, Any], brought: Path | None
) -> SampleSet | None:
    """Return the samples of a model as `_make_samples` does; None where there are none."""
    try:
        return _make_samples(made, model, count, data, brought)
    except UserError as error:
        print(f"no samples: {error}", flush=True)
        return None


def build(
    folder: Path,
    source: Path,
    models: Mapping[str, Model],
    count: int,
    data: Mapping[str, Any],
    brought: Path | None = None,
) -> Path:
    """Write a complete Space, whole or not at all.

    Args:
        folder: to be made; must not exist, or be empty.
        source: where `app.py` and `LICENSE` are.
        models: by task.
        count: samples per model.
        data: `data_root` and `split` of the samples, where they differ from the training run.
        brought: folder of samples by task that lie beside bundled weights, to be taken where `data`
            names no test data of a model.

    Raises:
        UserError: if the folder is in use or the test data cannot be opened.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--build-space {folder}: is not empty; name another folder, or delete it first"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        space = Path(scratch) / "space"
        _copy_code(source, space)
        samples = {
            task: _make_samples(space / "samples" / task, model, count, data, brought)
            for task, model in models.items()
        }
        _write_texts(
            space, {task: _write_weights(space, model) for task, model in models.items()}, samples
        )
        if folder.exists():
            folder.rmdir()
        space.rename(folder)
    return folder


def with_page(models: Mapping[str, Model], name: str) -> dict[str, Model]:
    """Return the models, those without a page of their own with the one that `push` makes."""
    return {
        task: Model(model.loaded, model.url or f"{HUB_PAGE}/{name}")
        for task, model in models.items()
    }


def push(folder: Path, name: str, models: Mapping[str, Model]) -> str:
    """Upload a Space folder to `owner/name`, made if it does not exist; return its address.

    The weights of models whose page is `owner/name` too become a model repository of that name.

    Raises:
        UserError: if the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    own = [task for task, model in models.items() if model.url == f"{HUB_PAGE}/{name}"]
    try:
        if own:
            with TemporaryDirectory() as scratch:
                _write_model_repository(Path(scratch), folder, own)
                api.create_repo(name, repo_type="model", exist_ok=True)
                api.upload_folder(repo_id=name, repo_type="model", folder_path=scratch)
        api.create_repo(name, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(
            repo_id=name, repo_type="space", folder_path=str(folder), delete_patterns="*"
        )
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through
        raise UserError(
            f"--push {name}: {first_line(error)}; `hf auth login` signs you in"
        ) from None
    return f"{HUB_PAGE}/spaces/{name}"


def _write_model_repository(target: Path, space: Path, tasks: Sequence[str]) -> None:
    """Write weights and card of a Space's models as a model repository of the Hub."""
    for task in tasks:
        name = f"{task}.safetensors"
        shutil.copyfile(space / "weights" / name, target / name)
    front = {
        "license": "mit",
        "pipeline_tag": TASKS[tasks[0]].replace(" ", "-"),
        "tags": ["yolov3", "grad-cam"],
    }
    card = (space / "MODEL_CARD.md").read_text()
    (target / "README.md").write_text(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{card}")


def requirements() -> str:
    """Return what a Space has to install, pinned to the versions at work here."""
    pins = [f"{package}=={version(package).split('+')[0]}" for package in PACKAGES]
    return "\n".join([CPU_WHEELS, *pins]) + "\n"


def _copy_code(source: Path, space: Path) -> None:
    space.mkdir()
    shutil.copyfile(source / "app.py", space / "app.py")
    shutil.copyfile(source / "LICENSE", space / "LICENSE")
    package = Path(__file__).parents[1]
    shutil.copytree(
        package, space / "yolo", ignore=shutil.ignore_patterns("__pycache__", "bundled")
    )


def _make_samples(
    made: Path, model: Model, count: int, data: Mapping[str, Any], brought: Path | None
) -> SampleSet | None:
    """Fill the new folder `made` with test data, or with the samples that are brought along."""
    if count <= 0:
        return None
    loaded = model.loaded
    folder = brought / loaded.task if brought else None
    samples = read_samples(folder) if folder else None
    fits = samples is not None and samples.class_names == loaded.class_names
    if data or not (fits and samples and samples.ranked):  # a Space brings its own
        try:
            config = dataclasses.replace(loaded.config, **data)
            check_data_named(loaded, config)
            return write_samples(made, loaded, config, count)
        except UserError as error:
            if not fits:
                raise
            if data:
                print(f"{TASKS[loaded.task]}: {error}; the bundled samples are shown", flush=True)
            shutil.rmtree(made, ignore_errors=True)
    assert folder is not None and samples is not None
    shutil.copytree(folder, made)
    copied = dataclasses.replace(samples, folder=made)
    return copied if samples.ranked else rank_samples(copied, loaded)


def _write_weights(space: Path, model: Model) -> Model:
    """Write the weights; return them as written."""
    path = space / "weights" / f"{model.loaded.task}.safetensors"
    path.parent.mkdir(exist_ok=True)
    publish_weights(path, model.loaded)
    return Model(load_weights(path), model.url)


def _write_texts(
    space: Path, models: Mapping[str, Model], samples: Mapping[str, SampleSet | None]
) -> None:
    cards = "\n\n".join(_card(model, samples.get(task)) for task, model in models.items())
    front = yaml.safe_dump(_front_matter(models), sort_keys=False, allow_unicode=True)
    (space / "README.md").write_text(f"---\n{front}---\n\n{cards}\n")
    (space / "MODEL_CARD.md").write_text(f"{cards}\n")
    (space / "requirements.txt").write_text(requirements())
    (space / "packages.txt").write_text("\n".join(SYSTEM_PACKAGES) + "\n")
    urls = {model.url for model in models.values() if model.url}
    settings = {"public": True, **({"model_url": urls.pop()} if len(urls) == 1 else {})}
    (space / "app.yaml").write_text(yaml.safe_dump(settings))


def _front_matter(models: Mapping[str, Model]) -> dict[str, Any]:
    pages = [model.url.removeprefix(f"{HUB_PAGE}/") for model in models.values() if model.url]
    linked = [page for page in dict.fromkeys(pages) if page.count("/") == 1]
    return {
        "title": model_name(*(model.loaded for model in models.values())),
        "emoji": "🔎",
        "colorFrom": "indigo",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": "mit",
        "short_description": "Predictions, each with its Grad-CAM heat map",
        "tags": ["yolov3", "grad-cam", *(TASKS[task].replace(" ", "-") for task in models)],
        **({"models": linked} if linked else {}),
    }


def _card(model: Model, samples: SampleSet | None) -> str:
    loaded = model.loaded
    classes = literal(", ".join(loaded.class_names))
    return (
        f"# {model_name(loaded)}\n\n{model_card(loaded, samples, model.url)}\n"
        f"- **Classes:** {classes}\n\n## Results\n\n{results_markdown(loaded)}"
    )
