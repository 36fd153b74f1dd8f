"""Raw results of a run, pooled over its rounds."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.timing import LARGEST_SHARE
from bench.workload import Workload

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Speed:
    """All timed steps of one side on one workload."""

    step_s: tuple[float, ...]  # the undisturbed ones, or all if there are none
    num_steps: int  # timed, disturbed ones too
    is_disturbed: bool  # whether there was no undisturbed one
    tokens_per_step: int
    flops_per_token: int
    peak_mb: float  # of the largest rank, in any round

    @property
    def median_s(self) -> float:
        """Of a step."""
        return statistics.median(self.step_s)

    @property
    def tokens_per_second(self) -> float:
        """Of the median step."""
        return self.tokens_per_step / self.median_s


class Results:
    """What was found for each visit, over all rounds."""

    def __init__(self, records: Records) -> None:
        self._by_visit: dict[str, Records] = {}
        for record in records:
            if record["kind"] != "machine":
                key = _key(record["kind"], record["side"], record["workload"], record["overrides"])
                self._by_visit.setdefault(key, []).append(record)

    def kinds(self) -> set[str]:
        """Kinds of visits that were made, whether they succeeded or not."""
        return {records[0]["kind"] for records in self._by_visit.values()}

    def found(
        self, kind: str, side: str, shape: Workload, overrides: Iterable[str] = ()
    ) -> Records | None:
        """What the side has reported in each round, without failures; None if it was not asked."""
        records = self._by_visit.get(_key(kind, side, asdict(shape), overrides))
        if records is None:
            return None
        return [record for record in records if "error" not in record]

    def error(self, kind: str, side: str, shape: Workload, overrides: Iterable[str] = ()) -> str:
        """Why there is nothing, of a side that has reported nothing."""
        return str(self._by_visit[_key(kind, side, asdict(shape), overrides)][-1]["error"])

    def speed(
        self, kind: str, side: str, shape: Workload, overrides: Iterable[str] = ()
    ) -> Speed | None:
        """The steps of a side; None if it was not asked, or has reported nothing."""
        records = self.found(kind, side, shape, overrides)
        return pooled(records) if records else None

    def gemm_flops_per_second(self, shape: Workload) -> float | None:
        """The best rate of the workload's products that this run has seen on as many ranks.

        A side that trains in bfloat16 may multiply in float32, and should where that is faster.
        """
        layout = "tp1" if shape.num_ranks == 1 else "tp2"
        records = self.found("gemm", "gemm", Workload(layout))
        allowed = {shape.precision, "fp32"}
        return max(
            (r["flops_per_second"][name] for r in records or () for name in allowed), default=None
        )


def pooled(records: Records) -> Speed:
    """The steps of all rounds; see [Note: undisturbed steps] in timing.py."""
    steps = [
        step
        for record in records
        for step in zip(record["step_s"], record["foreign"], record["stolen"], strict=True)
    ]
    calm = [
        seconds
        for seconds, foreign, stolen in steps
        if foreign < LARGEST_SHARE and stolen < LARGEST_SHARE
    ]
    return Speed(
        step_s=tuple(calm or [seconds for seconds, _, _ in steps]),
        num_steps=len(steps),
        is_disturbed=not calm,
        tokens_per_step=records[0]["tokens_per_step"],
        flops_per_token=records[0]["flops_per_token"],
        peak_mb=max(record["peak_mb"] for record in records),
    )


def _key(kind: str, side: str, workload: dict[str, Any], overrides: Iterable[str]) -> str:
    return json.dumps([kind, side, workload, list(overrides)])
