"""metrics.jsonl after a resume."""

import json
from pathlib import Path

from metrics import cut_rows


def test_a_resume_cuts_the_file_at_its_step(tmp_path: Path) -> None:
    """Rows after the checkpoint go, and a line that a kill has torn; the rest stays as it is."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 0.1}, {"step": 2}, {"step": 2, "eval/loss": 0.3}, {"step": 3}]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines) + '{"step": 4, "tr')
    cut_rows(path, 2)
    assert path.read_text() == "".join(lines[:3])
    cut_rows(path, 0)
    assert path.read_text() == ""
