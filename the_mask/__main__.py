"""``python -m the_mask`` is ``the-mask``."""

from the_mask.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
