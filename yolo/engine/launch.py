"""What torchrun says about a start, read before torch is imported."""

import os

from yolo.runs.folder import Launch


def torchrun_launch() -> Launch | None:
    """Return the launch by torchrun that this process belongs to, None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return Launch(
        run_id=os.environ["TORCHELASTIC_RUN_ID"],
        agent=os.getppid(),
        first_node=os.environ.get("GROUP_RANK", "0") == "0",
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
