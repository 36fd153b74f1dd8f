"""TensorBoard event files of a run, in `tensorboard/` of its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# For the Custom Scalars tab; the other tabs sort metrics by name.
_LAYOUT = {
    "main": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "bits per byte": ["Multiline", ["eval/bits_per_byte"]],
    }
}


class TensorBoardWriter:
    """Writes rows through the background thread of torch's SummaryWriter.

    TensorBoard hides earlier launches' events from `first_step` on, so a resumed run is one curve.
    A kill loses at most the last second.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only rank 0 needs it

        self.writer: Any = SummaryWriter(
            str(directory), purge_step=first_step, max_queue=1000, flush_secs=1
        )
        self.writer.add_custom_scalars(_LAYOUT)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the metrics and the sample of a row."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 - as above

        # One event per row takes a fifth of the CPU time of an `add_scalar` per metric.
        values = [Summary.Value(tag=key, simple_value=row[key]) for key in row if "/" in key]
        self.writer.file_writer.add_summary(Summary(value=values), row["step"], row["time_s"])
        if "sample" in row:  # indented lines are a code block in Markdown
            text = "".join(f"    {line}\n" for line in row["sample"].splitlines())
            self.writer.add_text("sample", text, row["step"], row["time_s"])

    def finish(self, *, failed: bool) -> None:
        """Flush and close the event file, whether the run has `failed` or not."""
        self.writer.close()
