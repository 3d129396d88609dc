"""Train sparse multitask networks and make them really faster.

`import sparsemtl` needs torch and numpy only; everything optional fails at its first use,
with the line that installs it.
"""

__version__ = "0.1.0"
