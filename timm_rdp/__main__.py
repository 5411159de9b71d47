"""`python -m timm_rdp`: the command `timm-rdp`."""

import sys

from timm_rdp.cli import main

if __name__ == "__main__":
    sys.exit(main())
