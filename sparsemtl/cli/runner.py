"""Carries a RunConfig from data to summary: build, train, finalise, measure, compare."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsemtl import config as configs
from sparsemtl.cli.pictures import draw
from sparsemtl.cli.run_folder import (
    RunFolder,
    build_split,
    build_tasks,
    load_model,
    read_json,
    save_model,
)
from sparsemtl.config import RunConfig
from sparsemtl.errors import CheckpointError
from sparsemtl.measure.environment import environment
from sparsemtl.measure.flops import count_flops
from sparsemtl.measure.memory import peak_rss_bytes
from sparsemtl.methods import build_method, method_name
from sparsemtl.models.component import find_components
from sparsemtl.models.config import build_model
from sparsemtl.sparsity.stats import sparsity_report
from sparsemtl.tasks.delta import delta
from sparsemtl.training import distributed, runtime
from sparsemtl.training.callbacks import Checkpointer, Evaluator, MetricsLog, StopOnSignal, every
from sparsemtl.training.checkpoint import check_same_model, checkpoints, load_checkpoint, write_json
from sparsemtl.training.evaluate import Metrics, evaluate, evaluate_constant
from sparsemtl.training.loop import Callback, train
from sparsemtl.training.state import REQUIRED, TrainState
from sparsemtl.training.step_times import StepTimes

log = logging.getLogger(__name__)

DisplayFactory = Callable[[str, TrainState], "Display"]


class Display:
    """Shows a run's progress; this one shows nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, state: TrainState) -> None:
        pass

    def say(self, text: str) -> None:
        """One line for the user."""


@dataclass
class Run:
    """A run's parts, built from its configuration."""

    config: RunConfig
    folder: RunFolder
    train_set: Any
    tasks: dict[str, Any]
    state: TrainState


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved; the message says how to go on.

    what: where it stopped   run: the one to resume, which for a dense twin is the run it belongs to
    """

    def __init__(self, what: str, run: Run) -> None:
        self.what = what
        super().__init__(
            f"{what}; everything up to there is saved. "
            f"Go on with: sparsemtl train --resume {run.folder.root}"
        )


def new_run(config: RunConfig, folder: RunFolder) -> Run:
    """Check the configuration against its data, then start the folder; nothing before that."""
    threads = config.train.runtime.threads or torch.get_num_threads()
    resolved = dataclasses.replace(config.train.runtime, threads=threads)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, runtime=resolved))
    run = _build(config, folder)
    folder.check_free()
    _probe(run)
    distributed.barrier()  # all have looked before the first one writes
    if distributed.is_main():
        folder.create(config)
    distributed.barrier()
    return run


def _probe(run: Run) -> None:
    """Meet before the first step what would otherwise be met after the last one.

    The splits that will be measured must exist, and one forward pass must work: data, backend and
    model outputs. In eval mode, which draws no random numbers and moves no batch statistics.
    """
    build_split(run.config, "test")
    if run.config.train.evaluate_every is not None:
        build_split(run.config, "val")
    if run.config.baseline not in configs.BASELINES:
        baseline_summary(run.config.baseline)
    state = run.state
    state.model.eval()
    with torch.no_grad():
        state.forward(next(state.batches(workers=0)))
    state.model.train()


def resume_run(folder: RunFolder) -> Run:
    """Rebuild a run as it was at its newest good checkpoint, or at its start if there is none."""
    run = _build(folder.load_config(), folder)
    found = checkpoints(folder.checkpoints)
    for path in reversed(found):
        try:
            saved = load_checkpoint(path, REQUIRED)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
            continue
        run.state.load_resume_state(saved, path)
        break
    else:
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {folder.root} is readable"
            )
    return run


def execute(run: Run, show: DisplayFactory, *, pictures: bool = True) -> dict[str, Any]:
    """Train what is left, write the model and the summary; returns the summary.

    pictures: draw them too, where matplotlib is installed

    raises: Interrupted after Ctrl-C or SIGTERM, with everything saved.
    """
    try:
        _train(run, show)
        summary = _finish(run)
        summary = _compare(run, summary, show)
        if pictures:
            draw(run.folder, run.config, summary)
    except KeyboardInterrupt as stopped:
        what = stopped.what if isinstance(stopped, Interrupted) else "stopped after training"
        raise Interrupted(what, run) from None
    return summary


def _build(config: RunConfig, folder: RunFolder) -> Run:
    train_set = build_split(config, "train", augmented=True)
    tasks = build_tasks(config, train_set)
    device = runtime.start(config.train.runtime, config.train.seed)
    model = build_model(config.model, {name: task.channels for name, task in tasks.items()})
    if config.start_from:
        start = RunFolder(Path(config.start_from))
        weights = load_model(start).state_dict()
        check_same_model(start.weights, model.state_dict(), weights)
        model.load_state_dict(weights)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState.create(model, tasks, train_set, build_method(config.method), config.train)
    return Run(config, folder, train_set, tasks, state)


def prune_only(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Let a method that decides at once prune the run's start, untrained; returns the summary."""
    run = _build(config, folder)
    folder.check_free()
    run.state.method.on_start(run.state)
    folder.create(config)
    return _compare(run, _finish(run), lambda _name, _state: Display())


def _train(run: Run, show: DisplayFactory) -> None:
    state, folder, train_config = run.state, run.folder, run.config.train
    steps = train_config.steps
    count_every = train_config.log_every or max(1, steps // 200)
    metrics, times = MetricsLog(folder.log, count_every), MetricsLog(folder.times, count_every)
    for file in (metrics, times):
        file.cut_after(state.step)
    save = Checkpointer(folder.checkpoints)
    with StopOnSignal() as stop, show(method_name(run.config.method), state) as display:
        callbacks: list[Callback] = [metrics, StepTimes(times, count_every)]
        if train_config.evaluate_every is not None:
            validation = build_split(run.config, "val")
            callbacks.append(
                every(train_config.evaluate_every, Evaluator(validation, metrics, batch_size=1))
            )
        interval = train_config.checkpoint_every or max(1, min(1000, steps // 10))
        callbacks += [every(interval, save), display, stop]
        try:
            if not state.finished:
                train(state, callbacks)
        finally:
            metrics.close()
            times.close()
        if stop.received is not None:
            save(state)
            raise Interrupted(f"{stop.received}: stopped after step {state.step} of {steps}", run)


def _finish(run: Run) -> dict[str, Any]:
    """Finalise, save, measure. Everything in the summary but Δ."""
    state, config = run.state, run.config
    model = state.method.finalize(state.model).eval()
    heads = {name: task.channels for name, task in run.tasks.items()}
    save_model(run.folder, model, config, heads)
    test_set = build_split(config, "test")
    metrics = evaluate(model, run.tasks, test_set)
    height, width = run.train_set.spec.image_size
    components = find_components(model)
    report = sparsity_report(model, components)
    summary = {
        "preset": config.preset,
        "method": method_name(config.method),
        "model": config.model.name,
        "seed": config.train.seed,
        "steps": state.step,
        "seconds": round(state.seconds, 3),
        "metrics": metrics,
        "metrics_split": "test",
        "constant_metrics": evaluate_constant(run.tasks, build_split(config, "train"), test_set),
        "delta": no_delta(config.delta_form, _no_delta_yet(config)),
        "sparsity": {"requested": state.method.sparsity_target, **report.to_json()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": count_flops(model, (height, width)).to_json(),
        "skipped_files": {
            "train": [list(s) for s in getattr(run.train_set, "skipped", ())],
            "test": [list(s) for s in getattr(test_set, "skipped", ())],
        },
        "peak_memory_bytes": peak_rss_bytes(),
        "environment": environment(),
    }
    write_json(run.folder.summary, summary)
    return summary


def _no_delta_yet(config: RunConfig) -> str:
    if config.baseline == "none" or method_name(config.method) == "dense":
        return "no reference run was named; see --baseline"
    return "the reference is not trained yet; --resume this run"


def _compare(run: Run, summary: dict[str, Any], show: DisplayFactory) -> dict[str, Any]:
    """Add Δ against the run's reference, training the dense twin first where asked to."""
    config = run.config
    if config.baseline == "none":
        return summary
    if config.baseline == "dense":
        if method_name(config.method) == "dense":
            return summary
        twin = run.folder.baseline
        reference = read_json(twin.summary, "a run") if twin.summary.exists() else None
        if reference is None:
            twin_run = (
                resume_run(twin)
                if twin.config.exists()
                else new_run(configs.dense_twin(config), twin)
            )
            reference = execute(twin_run, show, pictures=distributed.is_main())
        name = "baseline (dense twin)"
    else:
        name = config.baseline
        reference = baseline_summary(config.baseline)
    summary["delta"] = compute_delta(run.tasks, summary, reference, name, config.delta_form)
    summary["baseline_metrics"] = reference["metrics"]
    write_json(run.folder.summary, summary)
    return summary


def baseline_summary(name: str) -> dict[str, Any]:
    """The summary of the run that a --baseline names: a run folder or its summary.json."""
    path = Path(name)
    path = path if path.suffix == ".json" else RunFolder(path).summary
    summary = read_json(path, "a finished run")
    if not isinstance(summary.get("metrics"), dict):
        raise ValueError(f"Expected --baseline to name a run's summary with metrics, got {path}")
    return summary


def compute_delta(
    tasks: Mapping[str, Any],
    summary: Mapping[str, Any],
    reference: Mapping[str, Any],
    name: str,
    form: str,
) -> dict[str, Any]:
    """Δ against a reference run; one that cannot be divided by gives a reason, no number."""
    directions = {task: t.higher_is_better for task, t in tasks.items()}
    base: Metrics = {
        task: {k: float("nan") if v is None else v for k, v in values.items()}
        for task, values in reference["metrics"].items()
    }
    try:
        return {"reference": name, **delta(summary["metrics"], base, directions, form)}
    except ValueError as error:
        return no_delta(form, str(error), name)


def no_delta(form: str, reason: str, reference: str | None = None) -> dict[str, Any]:
    """A Δ that is not known, and why."""
    return {
        "overall": None,
        "tasks": {},
        "form": form,
        "reference": reference,
        "reason": reason,
    }
