"""The models that the app shows: from files, run folders and the Hugging Face Hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolo.app.about import TASKS
from yolo.errors import UsageError, UserError
from yolo.files import bundled
from yolo.runs.checkpoint import (
    LoadedWeights,
    bundled_weights,
    load_weights,
    resolve_checkpoint,
)

HUB = "hf://"
HUB_PAGE = "https://huggingface.co"


@dataclass(frozen=True)
class Model:
    """A trained model and the page where it is published."""

    loaded: LoadedWeights
    url: str | None


def load_models(
    checkpoints: Sequence[str], model_url: str | None, *, last: bool = False
) -> dict[str, Model]:
    """Load one detector, one classifier, or both, by task; detection comes first.

    Args:
        checkpoints: files, run folders, or `hf://owner/name`; default the bundled weights.
        last: of a run folder take the newest checkpoint, not the best.
        model_url: where the models are published, if not at the page of an `hf://` name.

    Raises:
        UsageError: for two models of the same task, or if no weights are bundled.
        UserError: for a file that cannot be read or fetched.
    """
    models: dict[str, Model] = {}
    for name in checkpoints or map(str, bundled_weights().values()):
        path, url = _locate(name)
        loaded = load_weights(resolve_checkpoint(path, last=last))
        if loaded.task in models:
            other = models[loaded.task].loaded.path
            raise UsageError(
                f"--checkpoint {other} and {path} are both for {TASKS[loaded.task]}: "
                "name one of each task"
            )
        models[loaded.task] = Model(loaded, model_url or url or _page_in_space(path))
    if not models:
        raise UsageError(f"{bundled('weights')} holds no weights: name a --checkpoint")
    return {task: models[task] for task in TASKS if task in models}


def _page_in_space(path: Path) -> str | None:
    """Return where a Space shows a file that it brings along; None anywhere else."""
    space = os.environ.get("SPACE_ID")
    inside = space and path.resolve().is_relative_to(bundled("."))
    return f"{HUB_PAGE}/spaces/{space}/blob/main/{path.parent.name}/{path.name}" if inside else None


def _locate(name: str) -> tuple[Path, str | None]:
    """Return the file of a checkpoint, fetched from the Hub if need be, and its model's page."""
    if not name.startswith(HUB):
        return Path(name), None
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise UsageError(
            f"--checkpoint {name}: want {HUB}owner/name or {HUB}owner/name/file.safetensors"
        )
    repository = f"{owner}/{repository}"
    return _fetch(name, repository, file), f"{HUB_PAGE}/{repository}"


def _fetch(name: str, repository: str, file: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        if not file:
            files = [
                path
                for path in HfApi().list_repo_files(repository)
                if path.endswith(".safetensors")
            ]
            if len(files) != 1:
                found = ", ".join(files) or "none"
                raise UserError(
                    f"--checkpoint {name}: want one .safetensors file there, found {found}; name it"
                )
            file = files[0]
        return Path(hf_hub_download(repository, file))
    except UserError:
        raise
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through
        raise UserError(f"--checkpoint {name}: cannot be fetched ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """Return what an error of another library says, without what follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
