"""`python -m sparsemtl` is `sparsemtl`."""

import sys

from sparsemtl.cli import main

sys.exit(main())
