"""`sparsemtl info`: the machine, the build, and which backend each op would use and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl import ops
from sparsemtl.measure.environment import environment, machine_line
from sparsemtl.training.checkpoint import write_json


@dataclass
class Info:
    """Show the machine, the build and the backends, and why a backend is not used."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write it here too."""

    def run(self) -> int:
        env = environment()
        backends: dict[str, Any] = {name: dict(op.explain()) for name, op in ops.all_ops().items()}
        if self.json is not None:
            write_json(self.json, {"environment": env, "ops": backends})
        print(machine_line(env))
        for key, value in env.items():
            print(f"  {key:<14} {value}")
        for name, op in ops.all_ops().items():
            print(f"\n{name}")
            print("\n".join(f"  {line}" for line in str(op.explain()).splitlines()))
        return 0
