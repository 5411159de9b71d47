"""`timm-rdp launch`: ResidualDroppath for somebody's own, unmodified training script."""

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from timm_rdp.args import add_rdp_args
from timm_rdp.errors import UsageError, nearest
from timm_rdp.launch.hooks import hooked
from timm_rdp.launch.takeover import Takeover

_SAME_BATCH = (
    "--rdp-batch same cannot be launched: giving a batch both iterations of a cycle means going "
    "through the script's loop body twice, which only the script can do; leave it out (next: "
    "batches alternate), or add the lines of docs/your_own_script.md to the script"
)


def main(argv: list[str] | None = None) -> int:
    """Run the script that the command line names, and return its exit status.

    Args:
        argv: the command line without the program, None for that of this process.

    Returns:
        0, or 2 where the script cannot be trained with ResidualDroppath. What the script raises,
        SystemExit included, goes through.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            _parser().print_help()
            return 0
        options, script, script_args = _parse(argv)
        if not (options.rdp or options.skip_dropped):
            _run(script, script_args)
            return 0
        _launch(options, script, script_args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _launch(options: argparse.Namespace, script: str, script_args: list[str]) -> None:
    """Run the script with the hooks in place, and see to it that they did something."""
    takeover = Takeover(options)
    finished = None
    with _logging_to_stderr(), hooked(takeover):
        try:
            _run(script, script_args)
        except SystemExit as exit_:
            if exit_.code not in (None, 0) or "--help" in script_args:
                raise
            finished = exit_
        takeover.check_at_the_end()
    if finished is not None:
        raise finished


def _run(script: str, script_args: list[str]) -> None:
    """Run a script as `python SCRIPT ARGS...` does."""
    argv, path = sys.argv, sys.path
    sys.argv = [script, *script_args]
    sys.path = [os.path.dirname(os.path.realpath(script)), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


def _parse(argv: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """The launcher's options, the script, and the script's own arguments in their order."""
    end = argv.index("--") if "--" in argv else len(argv)
    options, rest = _parser().parse_known_args(argv[:end])
    rest += argv[end:]
    if not rest or rest[0].startswith("-"):
        given = f", not {rest[0]}" if rest else ""
        raise UsageError(f"timm-rdp launch takes the path of a script first{given}")
    script, script_args = rest[0], rest[1:]
    if not os.path.isfile(script):
        raise UsageError(f"SCRIPT {script}: there is no such file; check the path")
    known = [f"--{name.replace('_', '-')}" for name in vars(options)]
    for text in rest[1 : len(rest) - (len(argv) - end)]:
        name = text.partition("=")[0]
        if name.startswith("--rdp"):
            raise UsageError(f"{name} is no option of timm-rdp launch{nearest(name, known)}")
    if "--help" in script_args:
        _parser().print_help()
        print(f"\n{script} --help:\n", flush=True)
    _check(options)
    return options, script, script_args


def _check(options: argparse.Namespace) -> None:
    if not options.rdp:
        for name, value in vars(options).items():
            if name.startswith("rdp_") and value is not None and not options.skip_dropped:
                raise UsageError(f"--{name.replace('_', '-')} {value} needs --rdp; add it")
    if options.rdp_batch == "same":
        raise UsageError(_SAME_BATCH)
    if options.rdp_every is not None and options.rdp_every < 1:
        raise UsageError(f"--rdp-every {options.rdp_every} must be 1 or more")
    if options.rdp_start_epoch is not None and options.rdp_start_epoch < 0:
        raise UsageError(f"--rdp-start-epoch {options.rdp_start_epoch} must be 0 or more")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="timm-rdp launch",
        usage="timm-rdp launch SCRIPT ARGS... --rdp [--rdp-every N] [--rdp-seed N] ...",
        description="Run a timm-style training script as it is, with ResidualDroppath added to it. "
        "The options below are taken out of ARGS; the others are the script's. Without --rdp the "
        "script runs as it would without the launcher.",
        epilog="The script's own loop performs the iterations, so --rdp-batch is always next here. "
        "The model has to be made by timm.create_model with a drop_path_rate above 0: timm's own "
        "train.py takes it as --drop-path. The state of the cycles rides in the optimizer's state, "
        "so a script that saves and loads that resumes where it stood.",
        add_help=False,
        allow_abbrev=False,
    )
    group = add_rdp_args(parser)
    group.add_argument(
        "--rdp-model",
        metavar="INDEX|NAME",
        help="which model to train with ResidualDroppath where the script trains several: its name "
        "in timm, or its index in the order of creation, from 0",
    )
    # None: not given. What that means is settled where the option is used.
    parser.set_defaults(**{a.dest: None for a in group._group_actions if a.dest != "rdp"})
    return parser


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show this package's messages whatever the script does with its own logging."""
    logger = logging.getLogger("timm_rdp")
    if int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("timm-rdp: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = level, propagate


if __name__ == "__main__":
    sys.exit(main())
