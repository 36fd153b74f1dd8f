"""Multiple choice: every item has the scores that lm-evaluation-harness gives the export."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import Config
from data.tasks import METRICS
from export import Settings, export
from parallel import Mesh
from tests.data_corpora import write_task
from tests.distributed import ONE_RANK, Layout, run_on
from tests.lines import ROOT
from tests.random_runs import GPT2, write_run
from tests.trained_runs import start_program


def export_on(mesh: Mesh, settings: Settings, config: Config) -> None:
    export(settings, config, mesh)


def harness(model: Path, task: Path) -> dict[str, Any]:
    """The result of docs/lm_eval_choices.yaml, with another file."""
    from lm_eval import simple_evaluate  # noqa: PLC0415  takes seconds
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    spec = yaml.safe_load((ROOT / "docs/lm_eval_choices.yaml").read_text())
    spec["dataset_kwargs"]["data_files"]["test"] = str(task)
    (task.parent / "task.yaml").write_text(yaml.safe_dump(spec))
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[spec["task"]],
        task_manager=manager,
        batch_size=16,
        device="cpu",
        log_samples=True,
    )
    return {"samples": found["samples"][spec["task"]], **found["results"][spec["task"]]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_item_equals_lm_evaluation_harness(tmp_path: Path) -> None:
    """Two hundred items: log-likelihoods within 1e-5, each accuracy, and their standard errors."""
    run, model, output = tmp_path / "run", tmp_path / "model", tmp_path / "result.json"
    config = write_run(run, GPT2, Layout(tp=2))
    settings = Settings(run=str(run), output=str(model), check=False)
    run_on(ONE_RANK, export_on, settings=settings, config=config)
    task, items = write_task(tmp_path / "choices.jsonl", 200), tmp_path / "items.jsonl"
    arguments = [f"run={run}", f"task={task}", f"output={output}", f"items={items}"]
    code, printed = start_program(2, "evaluate.py", *arguments, "micro_batch_size=16")
    assert code == 0
    ours = [json.loads(line) for line in items.read_text().splitlines()]
    theirs = harness(model, task)
    samples = sorted(theirs["samples"], key=lambda sample: sample["doc_id"])
    assert len(ours) == len(samples) == 200
    for mine, sample in zip(ours, samples, strict=True):
        scores = [pair[0] for pair in sample["filtered_resps"]]
        assert mine["log_likelihoods"] + mine["unconditional"] == pytest.approx(scores, rel=1e-5)
        assert [mine[name] for name in METRICS] == [sample[name] for name in METRICS], mine["line"]
    result = json.loads(output.read_text())
    for name in METRICS:
        assert result[f"choices/{name}"] == pytest.approx(theirs[f"{name},none"])
        assert result[f"choices/{name}_stderr"] == pytest.approx(theirs[f"{name}_stderr,none"])
    assert f"choices: acc {result['choices/acc']:.4f} +- " in printed.decode()
    assert 0.2 < result["choices/acc"] < 0.8
