"""Show what this installation runs on, and advise what to fix or speed up.

The facts are those of `python -m the_mask.env`, for bug reports. The exit code is 1 if something is broken.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    """Print facts and advice; returns the exit code."""
    from the_mask.env import environment_report, findings

    print(environment_report())
    found = findings()
    print()
    for problem in found:
        print(f"{'broken' if problem.broken else 'advice'}: {problem.text}")
    if not found:
        print("nothing to mend")
    return int(any(problem.broken for problem in found))
