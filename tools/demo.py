#!/usr/bin/env python3
"""``the-mask segment`` from a source tree."""

import sys
from pathlib import Path

# Run from a source tree without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from the_mask.cli import door

main = door("segment", as_tool=True)

if __name__ == "__main__":
    raise SystemExit(main())
