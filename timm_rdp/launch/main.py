"""`timm-rdp launch`: ResidualDroppath for somebody's own, unmodified training script."""

import argparse
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from timm_rdp.args import Parser, add_rdp_args
from timm_rdp.errors import UsageError, nearest, report
from timm_rdp.launch.hooks import hooked
from timm_rdp.launch.launched_run import LaunchedRun


def main(argv: list[str] | None = None) -> int:
    """Run the script that the command line names, and return the exit status.

    2: it cannot be trained with ResidualDroppath. What the script raises goes through.
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
        run = LaunchedRun(options)
        with _logging_to_stderr(), hooked(run):
            try:
                _run(script, script_args)
            except SystemExit as exit_:
                if exit_.code in (None, 0) and "--help" not in script_args:
                    run.check_at_the_end()
                raise
            run.check_at_the_end()
    except UsageError as error:
        return report(error)
    return 0


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
    parser = _parser()
    options, rest = parser.parse_known_args(argv[:end])
    if not rest or rest[0].startswith("-"):
        given = f", not {rest[0]}" if rest else ""
        raise UsageError(f"timm-rdp launch takes the path of a script first{given}")
    script, script_args = rest[0], rest[1:] + argv[end:]
    if not os.path.isfile(script):
        raise UsageError(f"SCRIPT {script}: there is no such file; check the path")
    known = parser._option_string_actions
    for name in (text.partition("=")[0] for text in argv[:end] if text.startswith("--rdp")):
        if name not in known:
            raise UsageError(f"{name} is no option of timm-rdp launch{nearest(name, known)}")
        if not (options.rdp or options.skip_dropped):
            raise UsageError(f"{name} needs --rdp; add it")
    # Read by from_args where there is no --rdp-seed.
    seeds = re.findall(r"^--seed[=\n](-?\d+)$", "\n".join(script_args), re.MULTILINE)
    options.seed = int(seeds[-1]) if seeds else None
    if "--help" in script_args:
        parser.print_help()
        print(f"\n{script} --help:\n", flush=True)
    return options, script, script_args


def _parser() -> Parser:
    parser = Parser(
        prog="timm-rdp launch",
        usage="timm-rdp launch SCRIPT ARGS... --rdp [--rdp-batch next] [--rdp-seed N]",
        description="Run an unmodified training script with ResidualDroppath. The options below "
        "are taken out of ARGS; the others are the script's.",
        epilog="The script makes its model by timm.create_model with a drop_path_rate above 0 "
        "(--drop-path in timm's own). The optimizer's state holds that of the cycles.",
        add_help=False,
        allow_abbrev=False,
    )
    group = add_rdp_args(parser)
    group.add_argument(
        "--rdp-model",
        metavar="INDEX|NAME",
        help="which model, where the script trains several: its name in timm, or its index in the "
        "order of creation, from 0",
    )
    parser.set_defaults(rdp_batch=None)
    parser._option_string_actions["--rdp-batch"].help = (
        "same: each batch gets a droppath and a complement iteration, where the script uses a task "
        "of timm.task (then the default) or passes step() a closure; next: batches alternate "
        "between them (else), measured to be cheaper and less accurate than plain DropPath"
    )
    return parser


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show this package's messages whatever the script does with its own logging."""
    logger = logging.getLogger("timm_rdp")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("timm-rdp: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.CRITICAL)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
