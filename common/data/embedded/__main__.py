"""`make data`: pack every split that is not there yet. `--revision 1`: those in which colours tell names."""

import argparse
import sys

from common.data.embedded.splits import SPLITS, pack


def main() -> int:
    """Run the command line; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m common.data.embedded", description=__doc__)
    parser.add_argument("--revision", type=int, default=2, choices=SPLITS, help="of the scenes (default %(default)s)")
    revision = parser.parse_args().revision
    for split in SPLITS[revision]:
        print(pack(split, revision=revision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
