#!/usr/bin/env python3
"""Train any timm model, with --rdp by ResidualDroppath; the same as `timm-rdp train`."""

import sys

from timm_rdp.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
