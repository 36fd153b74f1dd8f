"""generate.py writes the dense reference's text, from a checkpoint of any layout on any other."""

from pathlib import Path

import pytest
import torch

from configs import UserError
from configs.program_settings import run_config
from model import Sampling
from parallel import Mesh, local_shards
from parallel.transport.shared_memory import PeerLostError
from tests.data_corpora import small_tokenizer
from tests.distributed import EVERY_LAYOUT, ONE_RANK, distributed
from tests.trained_runs import FAMILIES, Dense, start_program
from training.inference import load_for_inference
from training.run_folder import exit_on_error


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_layout_loads_only_weights(mesh: Mesh, runs: dict[str, Path], family: str) -> None:
    """Each rank has its tensor-parallel shard of each weight, and no memory beyond it."""
    run = runs[family]
    trained = load_for_inference(run_config(str(run), precision="fp32"), run, mesh, step=3)
    dense = Dense(run, step=3)
    assert trained.checkpoint.step == 3
    for name, shard in local_shards(trained.model).items():
        assert torch.equal(shard.tensor, dense.weights.pop(name)[shard.slices].float()), name
    assert not dense.weights
    for parameter in trained.model.parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()


@distributed(ONE_RANK)
def test_missing_files_are_one_message(mesh: Mesh, runs: dict[str, Path], tmp_path: Path) -> None:
    """A step without a checkpoint, no checkpoint at all, no tokenizer, another tokenizer."""
    config = run_config(str(runs["gpt"]))

    def message(run: Path, step: int | None) -> str:
        with pytest.raises(UserError) as caught:
            load_for_inference(config, run, mesh, step)
        return str(caught.value)

    assert message(runs["gpt"], 5).endswith("there are checkpoints of steps 3, 6")
    (tmp_path / "checkpoints").mkdir()
    assert "has no checkpoint yet" in message(tmp_path, None)
    assert message(tmp_path, 5).endswith("there are none at all")
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to(runs["gpt"] / "checkpoints")
    assert "is a folder without tokenizer.model and tokenizer.json" in message(tmp_path, None)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().content)
    assert "the tokenizer is not the one that" in message(tmp_path, None)


def test_stdout_is_prompt_and_continuation(runs: dict[str, Path]) -> None:
    """And nothing else, to the byte, also beyond the context of 37 tokens."""
    run, prompt = runs["gpt"], "if é = 漢 "
    text = Dense(run).continuation(prompt, 40, Sampling(temperature=0.0))
    arguments = (f"run={run}", f"prompt={prompt}", "max_new_tokens=40", "temperature=0")
    assert start_program(1, "generate.py", *arguments) == (0, (prompt + text).encode())


def test_bos_is_optional(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt has one token less without bos; one longer than the context is reported."""
    run, long = runs["gpt"], "def " * 99
    tokenizer = Dense(run).tokenizer
    for prompt, bos, is_cut in (("def", True, False), ("def", False, False), (long, True, True)):
        num_tokens = len(tokenizer.encode(prompt)) + bos
        arguments = (f"run={run}", f"prompt={prompt}", f"bos={str(bos).lower()}")
        assert start_program(1, "generate.py", *arguments, "max_new_tokens=3")[0] == 0
        error = capsys.readouterr().err
        assert f"generated 3 tokens after a prompt of {num_tokens} in" in error
        assert ("the model sees only the last 37 (model.seq_length)" in error) == is_cut


def test_lines_of_stdin_are_prompts_on_two_ranks(runs: dict[str, Path]) -> None:
    """Two samples each, under a separator; the tokens are those of one rank."""
    run, prompts = runs["llama"], ["while True", "", "def é"]
    code, written = start_program(
        2,
        "generate.py",
        *(f"run={run}", "max_new_tokens=12", "num_samples=2", "temperature=0.8"),
        *("top_k=40", "top_p=0.95", "seed=3"),
        given="\n".join(prompts),
    )
    dense, sampling = Dense(run), Sampling(0.8, 40, 0.95, seed=3)
    expected = [
        f"--- sample {sample + 1} of 2 ---\n"
        f"{prompt}{dense.continuation(prompt, 12, sampling, sample)}\n"
        for prompt in prompts
        for sample in range(2)
    ]
    assert (code, written.decode()) == (0, "".join(expected))


def test_a_lost_peer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """In programs that use a model, as in training; other errors keep their traceback."""
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise PeerLostError("connection lost: rank 1 (process 7) has ended")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "[rank 0] connection lost: rank 1 (process 7) has ended\n"
    with pytest.raises(RuntimeError, match="a defect"), exit_on_error():
        raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_tokens=3", "there is no key max_tokens; did you mean max_new_tokens?"),
        ("top_p=1.5", "top_p=1.5 is out of range; it must be more than 0 and at most 1"),
        ("stop=", "stop is empty; omit it to stop at no text"),
        ("stop_id=999999", "stop_id=999999 is not in the vocabulary; choose 0 to "),
        ("run=/nowhere", "run=/nowhere is not a run: there is no /nowhere/config.yaml"),
        ("tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size=2 needs 2 ranks"),
    ],
)
def test_a_wrong_key_is_one_line(
    runs: dict[str, Path], argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, before torch is imported, and nothing on stdout."""
    assert start_program(1, "generate.py", f"run={runs['gpt']}", argument) == (2, b"")
    assert message in capsys.readouterr().err
