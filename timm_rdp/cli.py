"""The command `timm-rdp`: one subcommand per tool, each imported only when it runs."""

import importlib
import os
import select
import sys
from contextlib import suppress
from io import UnsupportedOperation

from timm_rdp import __version__
from timm_rdp.errors import UsageError, nearest, report

COMMANDS = {
    "train": ("timm_rdp.training.train", "train a model, with or without ResidualDroppath"),
    "launch": ("timm_rdp.launch.main", "run your own training script with ResidualDroppath"),
    "paths": ("timm_rdp.study.paths", "list a model's residual paths"),
    "spiral": ("timm_rdp.study.spiral.main", "the paper's toy study"),
    "features": ("timm_rdp.study.features.main", "feature similarity of models and checkpoints"),
    "compare": ("timm_rdp.study.compare.main", "compare variants over seeds"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp SUBCOMMAND ARGS...` and return its exit status."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return report(error)
    except BrokenPipeError:
        if _is_unread():
            return 0
        raise  # a pipe of its own
    finally:
        _is_unread()


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: timm-rdp SUBCOMMAND ... (timm-rdp SUBCOMMAND --help says more)")
        print("       timm-rdp --version\n")
        for name, (_, help_text) in COMMANDS.items():
            print(f"  {name:<10} {help_text}")
        return 0
    if argv[0] == "--version":
        print(f"timm-rdp {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown subcommand {argv[0]!r}{hint}")
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


def _is_unread() -> bool:
    """Whether nobody reads the output any more (`| head`); what is left of it is thrown away."""
    unread = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError, UnsupportedOperation):
            stream.flush()
        with suppress(UnsupportedOperation):  # a stream without a file
            (pipe := select.poll()).register(stream, 0)
            if pipe.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                unread = True
    return unread


if __name__ == "__main__":
    sys.exit(main())
