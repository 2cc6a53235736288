"""All benchmarks of `docs/performance.md`, one after another: `make bench`, about fifty minutes."""

import argparse
import sys
import traceback
from types import ModuleType

from benchmarks import bulk, feed, memory, neighbours, posts, replicas, scaling, streams, threads
from benchmarks.report import finish, models_of, parser, publish
from benchmarks.served import say

MODULES: tuple[ModuleType, ...] = (streams, posts, bulk, feed, neighbours, threads, replicas, memory, scaling)


def chosen_of(module: ModuleType, told: argparse.Namespace) -> argparse.Namespace:
    """A benchmark's own defaults, with what was told to all of them."""
    chosen: argparse.Namespace = module.options().parse_args([])
    shared = {name: value for name, value in vars(told).items() if value is not None}
    return argparse.Namespace(**{**vars(chosen), **shared})


def main() -> None:
    """Measure, print tables and one JSON line; what fails does not keep the others from being measured."""
    told, reports, failed = parser(None, None).parse_args(), [], False
    with models_of(told) as told.models:
        for module in MODULES:
            say(f"--- {module.__name__}")
            try:
                reports.append(module.run(chosen_of(module, told)))
                publish(reports[-1], told.markdown)
            except RuntimeError:
                failed = True
                traceback.print_exc()
    finish(reports)
    sys.exit(failed)


if __name__ == "__main__":
    main()
