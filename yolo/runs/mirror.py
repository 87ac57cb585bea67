"""A copy of a run on a mounted drive or object storage (any fsspec path), made beside training.

Borrowed machines disappear together with their disks. A mirror holds a run in `URL/<run name>/`;
`fetch_run` brings it back onto a fresh machine. Nothing here may hold up or stop a training run.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import fsspec
from filelock import FileLock
from fsspec.callbacks import Callback
from fsspec.spec import AbstractFileSystem

from yolo.errors import UsageError, UserError
from yolo.files import replacing
from yolo.runs.checkpoint import BEST_FILE, load_resumable
from yolo.runs.folder import (
    CHECKPOINT,
    RUNS,
    RunFolder,
    list_checkpoints,
    newest_unfinished,
    step_of,
)

LONGEST_WAIT = 60.0  # seconds between two attempts to reach a mirror that does not answer
STALLED = 60.0  # seconds without a byte, after which a file is given up

T = TypeVar("T")


def patiently(work: Callable[[Callback], T]) -> T:
    """Return what `work` returns, in a thread of its own, as long as it makes progress.

    Args:
        work: gets a callback of fsspec, which counts the bytes that have gone.

    Raises:
        TimeoutError: after `STALLED` seconds without a byte. The thread is left alone: no storage
            library can be interrupted.
        Exception: what `work` raises.
    """
    progress = Callback()
    done: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((True, work(progress)))
        except Exception as error:
            done.put((False, error))

    threading.Thread(target=run, name="mirror's file", daemon=True).start()
    before = -1
    while before != progress.value:
        before = progress.value
        with suppress(Empty):
            went_well, result = done.get(timeout=STALLED)
            if went_well:
                return result
            raise result
    raise TimeoutError(f"no answer for {STALLED:g} s")


def warn_on_stderr(line: str) -> None:
    """Print a line where errors go."""
    print(line, file=sys.stderr, flush=True)


class Mirror:
    """Copies finished files to `url/run_name/` in a background thread, trying until it works."""

    def __init__(
        self,
        url: str,
        run_name: str,
        warn: Callable[[str], None] = warn_on_stderr,
        first_wait: float = 1.0,
    ) -> None:
        """Start the thread; nothing is sent yet: an unreachable mirror shows at the first file.

        Raises:
            UsageError: if no installed file system knows the URL's scheme.
        """
        self.url, self._run_name = url, run_name
        _check_scheme(url)  # no more: a mirror that does not answer must not hold the start
        self._warn = warn
        self._first_wait = first_wait
        self._pending: dict[str, Path | None] = {}  # name there -> file to copy, None to delete
        self._busy: str | None = None
        self._closing = False
        self._failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def copy(self, file: Path, name: str) -> None:
        """Ask for a copy of `file` as `name`, as in `checkpoints/x.ckpt`; returns at once."""
        self._request(name, file)

    def remove(self, name: str) -> None:
        """Ask for `name` to be deleted at the mirror; returns at once."""
        self._request(name, None)

    def close(self, timeout: float) -> None:
        """Send what waits, for at most `timeout` seconds and without more retries.

        What did not go is named.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left = [name for name in (self._busy, *self._pending) if name]
        if left:
            self._warn(
                f"warning: not copied to {self.url}: {', '.join(left)}; the local files are "
                "complete"
            )

    def _request(self, name: str, file: Path | None) -> None:
        with self._changed:
            self._pending[name] = file
            self._changed.notify_all()

    def _work(self) -> None:
        wait = self._first_wait
        while (request := self._next()) is not None:
            name, file = request
            try:
                patiently(partial(self._send, name, file))
            except Exception as error:  # whatever a storage library raises, training goes on
                self._report(error)
                with self._changed:
                    self._pending.setdefault(
                        name, file
                    )  # to the end, unless a newer request has come
                    self._busy = None
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, timeout=wait)
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                self._recovered()
                wait = self._first_wait

    def _next(self) -> tuple[str, Path | None] | None:
        with self._changed:
            self._busy = None
            self._changed.wait_for(lambda: self._pending or self._closing)
            if not self._pending:
                return None
            self._busy = next(iter(self._pending))
            return self._busy, self._pending.pop(self._busy)

    def _send(self, name: str, file: Path | None, progress: Callback) -> None:
        fs, root = _open(self.url)
        target = f"{root}/{self._run_name}/{name}"
        if file is None:
            if fs.exists(target):
                fs.rm(target)
        elif file.exists():  # pruning may have been faster
            _put(fs, file, target, progress)

    def _report(self, error: Exception) -> None:
        if not self._failed:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(
                f"warning: the mirror {self.url} does not take files ({reason}); training goes on, "
                "will retry"
            )
        self._failed = True

    def _recovered(self) -> None:
        if self._failed:
            self._warn(f"the mirror {self.url} takes files again")
        self._failed = False


def bring_back(
    url: str, config_name: str, out_dir: str | None, warn: Callable[[str], None] = warn_on_stderr
) -> None:
    """Fetch what the mirror has newer of `out_dir`, or of the newest unfinished run.

    It comes before `--resume auto`. Several processes of a machine may call it together: the first
    one fetches.

    Raises:
        UserError: if the mirror cannot be read and there is no local run to go on with.
    """
    local = RunFolder(Path(out_dir)) if out_dir else newest_unfinished(config_name)
    try:
        if out_dir:
            run_dir = Path(out_dir)
        else:
            names = [local.path.name if local else None, find_run(url, config_name)]
            newest = max(filter(None, names), default=None)
            if newest is None:
                return
            run_dir = RUNS / newest
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(run_dir.with_name(f".{run_dir.name}.lock")):
            path = fetch_run(url, run_dir.name, run_dir, warn)
    except UserError as error:
        if local is None or not local.holds_a_run:
            raise
        warn(f"warning: {error}; going on from {local.path}")
    else:
        if path:
            warn(f"fetched {path.name} from {url}")


def find_run(url: str, config_name: str) -> str | None:
    """Return the name of a mirror's newest unfinished run `<config_name>-<time>`, or None.

    Raises:
        UserError: if the mirror cannot be read.
    """
    fs, root = _open(url)
    runs = [run for run in _names(fs, root, url) if fnmatch(run, f"{config_name}-[0-9]*")]
    for run in reversed(runs):
        is_finished = "results.json" in _names(fs, f"{root}/{run}", url)
        if not is_finished and _checkpoint_names(fs, f"{root}/{run}", url):
            return run
    return None


def fetch_run(
    url: str, run_name: str, run_dir: Path, warn: Callable[[str], None] = warn_on_stderr
) -> Path | None:
    """Bring a run back from a mirror if its newest intact checkpoint is newer than the local ones.

    Returns:
        The local path of the fetched checkpoint, None if there was nothing newer. A damaged copy is
        reported and the one before it is taken.

    Raises:
        UserError: if the mirror cannot be read.
    """
    fs, root = _open(url)
    remote, folder = f"{root}/{run_name}", run_dir / "checkpoints"
    local_step = max((step_of(path) for path in list_checkpoints(folder)), default=-1)
    paths = map(folder.joinpath, _checkpoint_names(fs, remote, url))
    newer = [path for path in paths if step_of(path) > local_step]
    for name in (
        _names(fs, remote, url) if newer else ()
    ):  # first: what comes after a broken fetch needs them
        if patiently(lambda _, path=f"{remote}/{name}": fs.isfile(path)):  # type: ignore[misc]
            _get(fs, f"{remote}/{name}", run_dir / name, url)
    for path in sorted(newer, key=step_of, reverse=True):
        _get(fs, f"{remote}/checkpoints/{path.name}", path, url)
        try:
            content = load_resumable(path)
        except UserError as error:
            warn(f"warning: {error} (fetched from {url})")
            path.unlink()
            continue
        _fetch_best(fs, f"{remote}/checkpoints", folder, content.get("best"), url, warn)
        return path
    return None


def _fetch_best(
    fs: AbstractFileSystem,
    remote: str,
    folder: Path,
    best: str | None,
    url: str,
    warn: Callable[[str], None],
) -> None:
    """Bring back `best.txt` and the best checkpoint, too; a run goes on without them as well."""
    marked = folder / BEST_FILE
    try:
        names = _names(fs, remote, url)
        if BEST_FILE in names:
            _get(fs, f"{remote}/{BEST_FILE}", marked, url)
            best = best or marked.read_text(errors="replace").strip()
        if best in names and CHECKPOINT.fullmatch(best) and not (folder / best).exists():
            _get(fs, f"{remote}/{best}", folder / best, url)
    except UserError as error:
        warn(f"warning: the best checkpoint was not fetched: {error}")


def _check_scheme(url: str) -> None:
    try:
        fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
    except (ImportError, ValueError) as error:
        raise UsageError(f"--mirror {url}: {' '.join(str(error).split())}") from None


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--mirror {url}: {' '.join(str(error).split())}") from None
    return fs, root.rstrip("/")


def _put(fs: AbstractFileSystem, file: Path, target: str, progress: Callback) -> None:
    """Copy so that nobody sees half a `target`: by renaming, or object storage's whole uploads."""
    size = file.stat().st_size
    can_rename = type(fs).mv is not AbstractFileSystem.mv
    landing = f"{target}.part" if can_rename else target
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(file), landing, callback=progress)
    if fs.size(landing) < size:  # a log may have grown meanwhile
        raise OSError(f"only {fs.size(landing)} of {size} bytes of {file.name} arrived")
    if can_rename:
        fs.mv(landing, target)


def _get(fs: AbstractFileSystem, source: str, file: Path, url: str) -> None:
    try:
        with replacing(file) as temporary:
            patiently(lambda progress: fs.get_file(source, str(temporary), callback=progress))
    except Exception as error:
        raise _unreadable(url, error) from None


def _names(fs: AbstractFileSystem, folder: str, url: str) -> list[str]:
    """Return the sorted names in a folder; none if it does not exist."""
    try:
        fs.invalidate_cache()
        paths = patiently(lambda _: fs.ls(folder, detail=False))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
    except FileNotFoundError:
        return []
    except Exception as error:
        raise _unreadable(url, error) from None


def _checkpoint_names(fs: AbstractFileSystem, run: str, url: str) -> list[str]:
    return [name for name in _names(fs, f"{run}/checkpoints", url) if CHECKPOINT.fullmatch(name)]


def _unreadable(url: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"the mirror {url} cannot be read ({reason}); check it, or leave out --mirror to go on "
        "without"
    )
