"""`sparsemtl prune`: prune a finished run's model, with or without training it on."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl import config as configs
from sparsemtl.cli.display import live_display
from sparsemtl.cli.grid import parse_method
from sparsemtl.cli.run_folder import RunFolder, load_model, load_model_config
from sparsemtl.cli.runner import Interrupted, execute, new_run, prune_only
from sparsemtl.cli.tables import print_summary
from sparsemtl.cli.train import Text, Whole, Words, parse_set
from sparsemtl.config import RunConfig
from sparsemtl.errors import unknown_choice
from sparsemtl.models.component import find_components
from sparsemtl.sparsity.stats import sparsity_report

# Methods that decide at once, and what makes them decide now, on the weights as they are.
AT_ONCE: dict[str, dict[str, Any]] = {
    "magnitude": {"prune_at": 0.0},
    "disparse-pt": {"prune_at": 0.0},
    "snip": {"init": "own"},
    "grasp": {"init": "own"},
    "disparse-static": {"init": "own"},
}


@dataclass
class Prune:
    """Prune a finished run's model at once; then save it, or train it on with its mask fixed."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder that `sparsemtl train` left."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New run folder for the pruned model."""
    method: str = "magnitude"
    """magnitude, disparse-pt, snip, grasp or disparse-static, with options if any, for example
    magnitude+allocation=erk or disparse-pt+scores=taylor."""
    sparsity: float = 0.9
    """Fraction of zeros over all components; met exactly."""
    structure: Text = None
    """What lives or dies together: element, vector(V), block(BO,BI), channel or N:M."""
    finetune: int = 0
    """Steps to train on with the mask fixed."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")] = None
    """Learning rate of these steps; the run's own if not given."""
    seed: Whole = None
    set: Words = ()
    """Any other field of config.json, as in `sparsemtl train`."""
    quiet: bool = False

    def run(self) -> int:
        if self.finetune < 0:
            raise ValueError(f"Expected --finetune >= 0, got {self.finetune}")
        config, folder = self.config(), RunFolder(self.out)
        try:
            if self.finetune == 0:
                summary = prune_only(config, folder)
            else:
                summary = execute(new_run(config, folder), live_display(self.quiet))
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            return 130
        print_summary(summary, folder)
        return 0

    def config(self) -> RunConfig:
        """The run that starts from the finished model."""
        name = self.method.partition("+")[0]
        if name not in AT_ONCE:
            raise ValueError(unknown_choice("--method", name, AT_ONCE))
        source = RunFolder(self.run_folder)
        config = source.load_config()
        check_not_sparser(source, self.sparsity)
        model, saved = load_model_config(source)
        if saved.get("per_task"):
            raise ValueError(
                f"Expected the run of one network for all tasks, got {source.root}, which has a "
                "network for each task (single-task)"
            )
        train = dataclasses.replace(config.train, steps=max(1, self.finetune), weighting=None)
        if self.seed is not None:
            train = dataclasses.replace(train, seed=self.seed)
        if self.lr is not None:
            train = dataclasses.replace(train, optim=dataclasses.replace(train.optim, lr=self.lr))
        config = dataclasses.replace(
            config,
            model=model,
            train=train,
            baseline=str(source.root.resolve()),
            start_from=str(source.root.resolve()),
        )
        config = configs.with_method(config, name)
        changes = {f"method.{k}": v for k, v in AT_ONCE[name].items()}
        if self.structure is not None:
            changes["method.structure"] = self.structure
        config = configs.with_changes(config, changes)
        config = parse_method(self.method, config, self.sparsity)
        return configs.with_changes(config, dict(parse_set(text) for text in self.set))


def check_not_sparser(source: RunFolder, sparsity: float) -> None:
    """raises ValueError if the model has more zeros than asked for: pruning adds, never removes."""
    model = load_model(source)
    found = sparsity_report(model, find_components(model))
    if found.overall > sparsity + 1e-3:
        raise ValueError(
            f"Expected --sparsity of at least what {source.root} has, got {sparsity}: its weights "
            f"are {100 * found.overall:.2f} % zero already, so the nearest is {found.overall:.4f}"
        )
