"""What faults do to a run, its files, the readers and the app: a table for docs/reliability.md.

python benchmarks/faults.py                     # everything: ten minutes on two cores
python benchmarks/faults.py inputs --quick      # a part of it, in little
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def inputs(args: argparse.Namespace) -> Iterator[str]:
    """Mutated inputs, for each reader."""
    import fuzz

    yield from fuzz.run(20 if args.quick else 300, args.seed, args.only, args.keep)


def kills(args: argparse.Namespace) -> Iterator[str]:
    """Killed trainings."""
    import crashes

    yield from crashes.kills(2 if args.quick else 25, args.seed)


def flips(args: argparse.Namespace) -> Iterator[str]:
    """Flipped bits."""
    import crashes

    yield from crashes.flips(20 if args.quick else 100, args.seed)


def cuts(args: argparse.Namespace) -> Iterator[str]:
    """Power cuts, replayed from the recorded fsync and rename calls."""
    import crashes

    yield from crashes.power_cuts(2 if args.quick else 8, args.seed)


def weights(args: argparse.Namespace) -> Iterator[str]:
    """Hostile weight files."""
    import hostile

    yield from hostile.run(6 if args.quick else 50, args.seed)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "kills": kills,
    "flips": flips,
    "cuts": cuts,
    "weights": weights,
    "inputs": inputs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few of each, to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="inputs: readers whose name has this")
    parser.add_argument(
        "--keep", type=Path, help="inputs: folder for the first input of each fault"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    for part in args.parts or PARTS:
        print(f"\n### {PARTS[part].__doc__}\n")
        for line in PARTS[part](args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
