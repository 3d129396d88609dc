"""`sparsemtl train`: data × model × method → a run folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl import config as configs
from sparsemtl.cli.display import live_display
from sparsemtl.cli.run_folder import RunFolder, read_json
from sparsemtl.cli.runner import Interrupted, execute, new_run, resume_run
from sparsemtl.cli.tables import print_summary
from sparsemtl.config import RunConfig
from sparsemtl.data import DATASETS, dataset_config
from sparsemtl.errors import unknown_choice
from sparsemtl.methods import METHODS, method_name
from sparsemtl.models.config import MODELS
from sparsemtl.training import distributed
from sparsemtl.training.balance import AGGREGATORS, BalanceConfig
from sparsemtl.training.weighting import SCALARIZERS, WEIGHTINGS, WeightingConfig

Text = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
Words = Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")]


def choice(names: Iterable[str], more: str = "") -> Any:
    """How help shows an option that takes one of `names`; `more` ends the sentence."""
    text = f"{', '.join(names)}{' ' * bool(more)}{more}"
    return tyro.conf.arg(metavar="NAME", help_behavior_hint="", help=text)


@dataclass
class Train:
    """Train a multitask network, dense or sparse, and leave a run folder.

    Start from a preset and change what you name; whatever you leave out is the preset's.
    Ctrl-C saves; `--resume DIR` goes on exactly where the run was.
    """

    out: Folder = None
    """New folder for the run."""
    resume: Folder = None
    """Continue this run; every other choice is the run's own."""
    preset: Annotated[str, choice(configs.PRESETS, "or a run's config.json")] = "demo"
    method: Annotated[str | None, choice(METHODS)] = None
    sparsity: Number = None
    """Fraction of zeros over all components, in [0, 1); met exactly."""
    structure: Text = None
    """What lives or dies together: element, vector(V), block(BO,BI), channel or N:M."""
    steps: Whole = None
    """Optimizer steps."""
    seed: Whole = None
    data: Annotated[str | None, choice(DATASETS)] = None
    data_root: Folder = None
    """Folder of a data set on disk; means --data nyuv2 unless said otherwise."""
    data_option: Words = ()
    """More data options, name=value, for example normals=encoded crop=224."""
    on_error: Text = None
    """What a damaged file does: raise or skip."""
    tasks: Words = ()
    """For example segmentation normals depth."""
    model: Annotated[str | None, choice(MODELS)] = None
    width: Number = None
    """Multiplies every channel count."""
    dropout: Number = None
    batch_size: Whole = None
    lr: Number = None
    weight_decay: Number = None
    clip_norm: Number = None
    """Clip the global gradient norm."""
    weighting: Annotated[str | None, choice((*WEIGHTINGS, *SCALARIZERS), "(adaptive: Eq. 6)")] = (
        None
    )
    balance: Annotated[
        str | None, choice(AGGREGATORS, "to combine the tasks' gradients (torchjd)")
    ] = None
    mining: Number = None
    """Learn from this share of each batch, its hardest samples by summed loss (paper: 0.7)."""
    grouping: Text = None
    """Who shares a threshold: component, one, two or layer (STR)."""
    control: Text = None
    """exact, or free: the paper's own dynamics."""
    split: Text = None
    """How thresholds learn their differences: joint or adam."""
    theta_init: Number = None
    """Threshold parameter before training."""
    baseline: Text = None
    """Reference for the deltas: dense (train a dense twin too), a run folder, or none."""
    delta_form: Text = None
    """mean (Eq. 7) or sum (as the published tables)."""
    set: Words = ()
    """Any other field of config.json, for example train.weighting.window=100
    method.controller.floor=0 task_options.segmentation.miou_convention=released."""
    precision: Text = None
    """fp32 or bf16 (autocast)."""
    device: Text = None
    """auto, cpu, cuda, cuda:1."""
    threads: Whole = None
    """CPU threads; a run repeats bit for bit at the same number."""
    workers: Whole = None
    """Loader processes."""
    checkpoint_every: Whole = None
    """Steps between checkpoints."""
    evaluate_every: Whole = None
    """Steps between evaluations on the validation split."""
    quiet: bool = False
    """No progress display."""
    plots: bool = True
    """Draw curves, allocation and predictions at the end."""

    def run(self) -> int:
        if (self.out is None) == (self.resume is None):
            raise ValueError(
                "Expected either --out DIR (a new run) or --resume DIR, got "
                + ("neither" if self.out is None else "both")
            )
        if self.resume is not None:
            self._check_only_resume()
            run = resume_run(RunFolder(self.resume))
        else:
            assert self.out is not None
            run = new_run(self.config(), RunFolder(self.out))
        main = distributed.is_main()
        try:
            display = live_display(self.quiet or not main)
            summary = execute(run, display, pictures=self.plots and main)
        except Interrupted as stopped:
            if main:
                print(stopped, file=sys.stderr)
            distributed.leave()
            return 130
        if main:
            print_summary(summary, run.folder)
        distributed.leave()
        return 0

    def _check_only_resume(self) -> None:
        allowed = ("resume", "quiet", "plots")
        changed = [
            f.name
            for f in dataclasses.fields(self)
            if f.name not in allowed and getattr(self, f.name) != f.default
        ]
        if changed:
            raise ValueError(
                "Expected --resume alone (a resumed run keeps its configuration), got also "
                + ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            )

    def config(self) -> RunConfig:
        """The preset with every named choice changed."""
        if self.preset.endswith(".json"):
            config = configs.from_json(read_json(Path(self.preset), "a run folder"))
        else:
            config = configs.preset(self.preset)
        if self.method is not None:
            config = configs.with_method(config, self.method)
        config = dataclasses.replace(
            config,
            data=self._data(config),
            model=_changed(config.model, name=self.model, width=self.width, dropout=self.dropout),
            method=self._method(config),
            train=self._train(config),
            **_given(
                tasks=self.tasks or None, baseline=self._baseline(), delta_form=self.delta_form
            ),
        )
        return configs.with_changes(config, dict(parse_set(text) for text in self.set))

    def _baseline(self) -> str | None:
        if self.baseline is None or self.baseline in configs.BASELINES:
            return self.baseline
        return str(Path(self.baseline).resolve())  # resuming may start from elsewhere

    def _data(self, config: RunConfig) -> Any:
        name = self.data
        if name is None and self.data_root is not None and not hasattr(config.data, "root"):
            name = "nyuv2"
        data: Any = config.data
        if name is not None and type(data) is not dataset_config(name):
            data = dataset_config(name)()
        options = dict(_parse_option(o) for o in self.data_option)
        if self.data_root is not None:
            options["root"] = str(self.data_root.resolve())
        if self.on_error is not None:
            options["on_error"] = self.on_error
        known = {f.name: f for f in dataclasses.fields(data)}
        for option in options:
            if option not in known:
                raise ValueError(
                    unknown_choice(f"an option of {name or 'the data'}", option, known)
                )
        values = {k: _like(getattr(data, k), v, k) for k, v in options.items()}
        return dataclasses.replace(data, **values)

    def _method(self, config: RunConfig) -> Any:
        method = config.method
        asked = _given(
            sparsity=self.sparsity,
            structure=self.structure,
            grouping=self.grouping,
            split=self.split,
            theta_init=self.theta_init,
            control=self.control,
        )
        has = {f.name for f in dataclasses.fields(method)}
        has |= {"control"} if "controller" in has else set()
        if lacking := [name for name in asked if name not in has]:
            flags = ", ".join("--" + name.replace("_", "-") for name in lacking)
            raise ValueError(f"Expected a method that has {flags}, got {method_name(method)}")
        control = asked.pop("control", None)
        if control is not None:
            asked["controller"] = dataclasses.replace(method.controller, control=control)  # type: ignore[union-attr]  # it has one
        return dataclasses.replace(method, **asked)

    def _train(self, config: RunConfig) -> Any:
        train = config.train
        weights = {t: w for t, w in train.loss_weights.items() if t in (self.tasks or config.tasks)}
        optim = _changed(
            train.optim, lr=self.lr, weight_decay=self.weight_decay, clip_norm=self.clip_norm
        )
        weighting = train.weighting
        if self.weighting is not None:
            weighting = WeightingConfig(self.weighting)
        return dataclasses.replace(
            _changed(
                train,
                steps=self.steps,
                seed=self.seed,
                batch_size=self.batch_size,
                mining=self.mining,
                checkpoint_every=self.checkpoint_every,
                evaluate_every=self.evaluate_every,
            ),
            loss_weights=weights,
            balance=train.balance if self.balance is None else BalanceConfig(self.balance),
            optim=optim,
            weighting=weighting,
            runtime=_changed(
                train.runtime,
                precision=self.precision,
                device=self.device,
                threads=self.threads,
                workers=self.workers,
            ),
        )


def _given(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _changed(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **_given(**values))


def _parse_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"Expected --data-option NAME=VALUE, got {text!r}")
    return name.replace("-", "_"), value


def parse_set(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"Expected --set FIELD=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a word


def _like(old: Any, text: str, name: str) -> Any:
    """`text` as the kind of value that `old` is."""
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind is tuple or old is None:  # sizes: H,W, or one number for both
            parts = text.split(",")
            element = type(old[0]) if old else int
            return tuple(element(part) for part in (parts if len(parts) > 1 else parts * 2))
    except (ValueError, KeyError) as error:
        raise ValueError(f"Expected --data-option {name} like {old!r}, got {text!r}") from error
    return text
