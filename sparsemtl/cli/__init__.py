"""The command line: `sparsemtl VERB …`, one file per verb."""

from sparsemtl.cli.main import main

__all__ = ["main"]
