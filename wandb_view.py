"""A wandb dashboard of metrics.jsonl, which can neither hold up nor end a run."""

import logging
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from configs import LoggingConfig

logger = logging.getLogger("microtron")

_TIMEOUT_S = 20
Mode = Literal["online", "offline"]


class WandbView:
    """A wandb run, or nothing once wandb has failed or is disabled."""

    def __init__(
        self, config: LoggingConfig, directory: Path, wandb_id: str, values: Mapping[str, Any]
    ) -> None:
        self._run: Any = None
        if config.wandb == "disabled":
            return
        mode: Mode = "offline" if config.wandb == "offline" else "online"
        if mode == "online" and not _has_key():
            mode = "offline"  # logging in would ask, and nobody may be there to answer
            if config.wandb == "online":
                logger.warning("wandb: no API key; logging offline, `wandb sync` sends it later")
        self._attempt(lambda: self._open(config, directory, wandb_id, values, mode))
        if self._run is None and mode == "online":
            logger.warning("wandb: going on offline; `wandb sync` sends it later")
            self._attempt(lambda: self._open(config, directory, wandb_id, values, "offline"))

    def _open(
        self,
        config: LoggingConfig,
        directory: Path,
        wandb_id: str,
        values: Mapping[str, Any],
        mode: Mode,
    ) -> None:
        import wandb  # noqa: PLC0415 - half a second that `wandb=disabled` need not pay

        settings = wandb.Settings(
            init_timeout=_TIMEOUT_S,
            login_timeout=_TIMEOUT_S,
            finish_timeout=_TIMEOUT_S,
            # Nothing of the machine or the command line leaves it: arguments may hold secrets.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
        )
        self._run = wandb.init(
            project=config.wandb_project,
            dir=str(directory),
            id=wandb_id,
            name=directory.name,
            resume="allow",
            mode=mode,
            config=dict(values),
            settings=settings,
        )
        # wandb's own step only grows, so a resume behind the last logged step would lose its rows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, float | int]) -> None:
        """One row of metrics.jsonl."""
        if self._run is not None:
            self._attempt(lambda: self._run.log(dict(row)))

    def finish(self, *, failed: bool) -> None:
        """Close the run."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=int(failed)))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a dashboard raises, training goes on
            logger.warning(
                "wandb: %s: %s; metrics.jsonl has everything", type(error).__name__, error
            )
            self._run = None


def _has_key() -> bool:
    """Whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
