"""What is set before CUDA starts: CUDA_DEVICE_MAX_CONNECTIONS, and no attention of cuDNN."""

import os
from typing import Literal

import pytest
import torch

from parallel import init_mesh


@pytest.mark.parametrize(
    ("tp", "world_size", "overlap", "chosen", "expected"),
    [
        (2, 2, "backward", None, "1"),
        (2, 2, "backward", "8", "8"),
        (2, 2, "none", None, None),
        (1, 2, "backward", None, None),
        (2, 4, "backward", None, None),  # FSDP2 has its own streams
        (1, 1, "backward", None, None),
    ],
)
def test_a_gpu_starts_kernels_in_order_only_for_tensor_parallelism(
    monkeypatch: pytest.MonkeyPatch,
    tp: int,
    world_size: int,
    overlap: Literal["none", "backward"],
    chosen: str | None,
    expected: str | None,
) -> None:
    """The variable is set before CUDA starts, where this test stops; cuDNN is off."""

    class CudaStarts(Exception):  # noqa: N818
        pass

    def start(_: object) -> None:
        raise CudaStarts

    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(variable, chosen or "")
    if chosen is None:
        monkeypatch.delenv(variable)
    for name, value in {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # set by the user, so left unchanged
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", start)
    torch.backends.cuda.enable_cudnn_sdp(True)
    with pytest.raises(CudaStarts):
        init_mesh(tp, True, overlap)
    assert os.environ.get(variable) == expected
    assert not torch.backends.cuda.cudnn_sdp_enabled()
