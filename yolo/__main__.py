"""`python -m yolo train --epochs 3`: the scripts, from any folder and from an installed wheel."""

import difflib
import runpy
import sys

from yolo.files import bundled

COMMANDS = {
    "train": "train a detector or a classifier",
    "evaluate": "measure a model, or let it answer about pictures",
    "gradcam": "show why a box was predicted",
    "app": "open a model in the browser, or build a Hugging Face Space",
}
USAGE = "\n".join(
    [
        "usage: python -m yolo COMMAND [flags]     (python -m yolo COMMAND --help lists its flags)",
        *(f"  {name:10}{what}" for name, what in COMMANDS.items()),
    ]
)


def main() -> int:
    """Run the script that the first word names; return 2 where there is none of that name."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {name} is no command{hint}\n{USAGE}", file=sys.stderr)
        return 2
    del sys.argv[1]
    runpy.run_path(str(bundled(f"{name}.py")), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
