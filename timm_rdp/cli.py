"""The command `timm-rdp`: one subcommand per tool, each imported only when it runs."""

import importlib
import sys
from difflib import get_close_matches

from timm_rdp import __version__
from timm_rdp.errors import UsageError, report

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
    argv = sys.argv[1:] if argv is None else argv
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
        close = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"timm-rdp: unknown subcommand {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[argv[0]]
    try:
        return importlib.import_module(module).main(argv[1:])
    except UsageError as error:  # raised by the import
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
