"""Checkpoints are exact on any layout and atomic, and all damage is detected."""

import errno
import json
import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn
from torch.distributed.fsdp import fully_shard

import checkpoints.load as load_module
import checkpoints.manifest as manifest_module
import checkpoints.save as save_module
from checkpoints import (
    CheckpointError,
    begin_save,
    commit_save,
    find_checkpoint,
    held_checkpoint,
    load_tensors,
    prune_checkpoints,
    sweep_leftovers,
)
from checkpoints.full_tensors import read_full_tensor
from configs import UserError
from configs.weights import WeightSpec
from parallel import (
    LocalShard,
    Mesh,
    any_rank,
    declare_parameter,
    initialise_parameters,
    local_shards,
)
from tests.distributed import EVERY_LAYOUT, ONE_RANK, Layout, distributed, run_on
from tests.weights import full_tensors

SHAPES = {"rows": ((13, 6), 0), "columns": ((5, 11), 1), "norm": ((7,), None), "bias": ((9,), 0)}
# Weights of one parameter: FSDP2 gives some ranks no row of the second.
MERGED = {
    "q": WeightSpec((12, 6), 0, init_std=1.0),
    "kv": WeightSpec((2, 6), 0, init_std=1.0, num_row_groups=1),
}
STATE = {"progress": {"step": 1}, "exact": 0.1}


def make_tensors(mesh: Mesh, seed: int) -> dict[str, LocalShard]:
    """Sharded tensors of uneven shapes, with values that depend on the seed."""
    module = nn.Module()
    for name, (shape, tp_dim) in SHAPES.items():
        declare_parameter(module, name, WeightSpec(shape, tp_dim, init_std=1.0), mesh)
    declare_parameter(module, "qkv", MERGED, mesh)
    fully_shard(module, mesh=mesh.device_mesh["dp"])
    module.to_empty(device=mesh.device)
    initialise_parameters(module, seed, mesh)
    return local_shards(module)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, LocalShard],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    keep: int,
) -> Path:
    """Save in the foreground, then prune."""
    pending = begin_save(folder, step, tensors, state, mesh, background=False)
    directory = commit_save(pending, mesh)
    if mesh.world.rank == 0:
        prune_checkpoints(folder, keep=keep, up_to=step)
    barrier(mesh)
    return directory


def save(mesh: Mesh, folder: Path, step: int, keep: int = 0) -> Path:
    return save_checkpoint(folder, step, make_tensors(mesh, step), STATE, mesh, keep=keep)


def assert_loads(mesh: Mesh, folder: Path, step: int) -> None:
    """The newest intact checkpoint is that of `step`, and has its exact values."""
    checkpoint = find_checkpoint(folder, mesh)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (step, STATE)
    tensors, expected = make_tensors(mesh, 999), make_tensors(mesh, step)
    load_tensors(checkpoint, tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.tensor, expected[name].tensor), name


@distributed(*EVERY_LAYOUT)
def test_save_then_load(mesh: Mesh, tmp_path: Path) -> None:
    """Every shard is restored, replicas are stored once, and no temporary directory remains."""
    directory = save(mesh, tmp_path, 3)
    assert_loads(mesh, tmp_path, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "_CHUNK_BYTES", 50)  # one or two rows
        assert_loads(mesh, tmp_path, 3)
    manifest = json.loads((directory / "manifest.json").read_text())
    shapes = {name: shard.global_shape for name, shard in make_tensors(mesh, 3).items()}
    assert shapes.keys() == SHAPES.keys() | MERGED.keys()
    for name, shape in shapes.items():
        shards = manifest["tensors"][name]["shards"]
        stored = sum(math.prod(shard["shape"]) for shard in shards)
        assert stored == math.prod(shape), name
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests of this module."""
    return tmp_path_factory.mktemp("reshard")


@pytest.mark.parametrize("reader", EVERY_LAYOUT, ids=str)
def test_any_layout_reads_any_other(reader: Layout, shared: Path) -> None:
    """Exactly, for every pair of layouts, with uneven shards."""
    for writer in EVERY_LAYOUT:
        folder = shared / str(writer)
        if not folder.exists():
            run_on(writer, save, folder=folder, step=5)
        run_on(reader, assert_loads, folder=folder, step=5)


@distributed(ONE_RANK, Layout(tp=2))
def test_the_newest_checkpoints_are_kept(mesh: Mesh, tmp_path: Path) -> None:
    """keep=2 leaves the two newest."""
    for step in (1, 2, 10):
        save(mesh, tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000010"]
    assert_loads(mesh, tmp_path, 10)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_damaged_newer_checkpoint_does_not_count(mesh: Mesh, tmp_path: Path) -> None:
    """After a resume from before it, keep=1 keeps the new save; other folders are left alone."""
    for step in (1, 2):
        save(mesh, tmp_path, step)
    if mesh.world.rank == 0:
        flip(tmp_path / "step_00000002" / "rank_00000.safetensors")
        shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001_best")
    barrier(mesh)
    save(mesh, tmp_path, 1, keep=1)  # the steps after 1 are run again
    assert_loads(mesh, tmp_path, 1)
    assert (tmp_path / "step_00000001_best").is_dir()


class Killed(BaseException):
    """Stands in for kill -9: the code under test cannot catch it."""


@distributed(ONE_RANK)
@pytest.mark.parametrize(
    ("moment", "survivor"),
    [("save_file", 1), ("write_manifest", 1), ("fsync_manifest", 1), ("rename", 1), ("rmtree", 2)],
)
def test_killed_at_any_moment_of_a_commit(
    mesh: Mesh, tmp_path: Path, moment: str, survivor: int
) -> None:
    """The rename decides which checkpoint survives; the next start removes the leftovers."""
    save(mesh, tmp_path, 1)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if moment == "fsync_manifest":
            patch.setattr(manifest_module, "fsync", kill)
        elif moment == "rename":
            patch.setattr(Path, "rename", kill)
        elif moment == "rmtree":
            patch.setattr(save_module.shutil, "rmtree", kill)
        else:
            patch.setattr(save_module, moment, kill)
        with pytest.raises(Killed):
            save(mesh, tmp_path, 2, keep=1)
    sweep_leftovers(tmp_path)
    assert_loads(mesh, tmp_path, survivor)
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{survivor:08d}"]


def barrier(mesh: Mesh) -> None:
    """Wait for all ranks."""
    any_rank(mesh, False)


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Drop the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    """Replace it with the file of another step: right size and format, wrong content."""
    shutil.copy(path.parent.parent / "step_00000001" / path.name, path)


def link(path: Path) -> None:
    """Move it and leave a symbolic link: right content, but not a real file."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = {"flip": flip, "truncate": truncate, "remove": Path.unlink, "swap": swap, "link": link}


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_and_skipped(mesh: Mesh, tmp_path: Path, damage: str) -> None:
    """The damaged file is named and the previous checkpoint is used."""
    save(mesh, tmp_path, 1)
    newest = save(mesh, tmp_path, 2)
    names = sorted(path.name for path in newest.iterdir())
    warnings: list[tuple[Any, ...]] = []
    assert len(names) == mesh.world.size + 1
    barrier(mesh)
    for name in names:
        if name == "manifest.json" and damage == "link":
            continue  # the checksum identifies a manifest, so it may be a link
        if mesh.world.rank == 0:
            shutil.rmtree(newest)
        barrier(mesh)
        save(mesh, tmp_path, 2)
        if mesh.world.rank == 0:
            DAMAGES[damage](newest / name)
        barrier(mesh)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load_module.logger, "warning", lambda *record: warnings.append(record))
            assert_loads(mesh, tmp_path, 1)
        if mesh.world.rank == 0:
            text, *values = warnings.pop()
            assert f"checkpoint {newest} is damaged, skipped: {name} " in text % tuple(values)
        barrier(mesh)
    # The damaged step can be saved again; the damaged directory is renamed.
    save(mesh, tmp_path, 2)
    assert_loads(mesh, tmp_path, 2)
    assert (tmp_path / "damaged_step_00000002_1").is_dir()


@distributed(ONE_RANK, Layout(tp=2))
def test_too_few_open_files_are_no_damage(mesh: Mesh, tmp_path: Path) -> None:
    """All ranks end and say what to raise; otherwise an older checkpoint would be used."""
    for step in (1, 2):
        save(mesh, tmp_path, step)
    original = os.open

    def limited(path: Any, *arguments: Any) -> int:
        if mesh.world.rank == mesh.world.size - 1 and str(path).endswith(".safetensors"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return original(path, *arguments)

    enough = resource.getrlimit(resource.RLIMIT_NOFILE)[0] + mesh.world.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module.os, "open", limited)
        with pytest.raises(UserError) as caught, held_checkpoint(tmp_path, mesh):
            pass
    assert not isinstance(caught.value, CheckpointError)
    assert str(caught.value) == (
        f"{tmp_path}/step_00000002: rank_00000.safetensors cannot be opened: Too many open files; "
        f"raise the limit of open files (ulimit -n) above {enough}"
    )
    barrier(mesh)


@distributed(ONE_RANK)
def test_a_file_truncated_after_its_verification_is_an_error(mesh: Mesh, tmp_path: Path) -> None:
    """The error prevents a crash, or tensors that are partly zero."""
    directory = save(mesh, tmp_path, 1)
    checkpoint = find_checkpoint(tmp_path, mesh)
    assert checkpoint is not None
    truncate(directory / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="truncated"):
        load_tensors(checkpoint, make_tensors(mesh, 1))


@distributed(ONE_RANK, Layout(tp=2))
def test_all_damaged_is_an_error(mesh: Mesh, tmp_path: Path) -> None:
    """A run never silently starts from scratch."""
    directory = save(mesh, tmp_path, 1)
    if mesh.world.rank == 0:
        flip(directory / "rank_00000.safetensors")
    barrier(mesh)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints in .* are damaged"):
        find_checkpoint(tmp_path, mesh)


@distributed(ONE_RANK, Layout(tp=2))
def test_an_empty_folder_has_no_checkpoint(mesh: Mesh, tmp_path: Path) -> None:
    """An empty or missing folder is not an error."""
    assert find_checkpoint(tmp_path, mesh) is None
    assert find_checkpoint(tmp_path / "missing", mesh) is None


@distributed(Layout(tp=2))
def test_a_rank_that_cannot_write_fails_the_save_on_all(mesh: Mesh, tmp_path: Path) -> None:
    """The error names the rank, the previous checkpoint still loads, and nothing else remains."""
    save(mesh, tmp_path, 1)
    original = save_module.save_file

    def failing(tensors: Any, path: Path) -> None:
        if mesh.world.rank == 1:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    save_module.save_file = failing
    try:
        with pytest.raises(CheckpointError, match=r"rank 1 cannot write .*No space left"):
            save(mesh, tmp_path, 2)
    finally:
        save_module.save_file = original
    barrier(mesh)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_loads(mesh, tmp_path, 1)


@distributed(*EVERY_LAYOUT)
def test_a_background_save_has_the_values_from_its_start(mesh: Mesh, tmp_path: Path) -> None:
    """Later changes by training are not saved. It is not a checkpoint until it is committed."""
    tensors = make_tensors(mesh, 7)
    pending = begin_save(tmp_path, 7, tensors, STATE, mesh, background=True)
    for tensor in tensors.values():
        tensor.tensor.fill_(float("nan"))
    pending.wait()
    barrier(mesh)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-step_00000007"]
    commit_save(pending, mesh)
    assert_loads(mesh, tmp_path, 7)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_failed_commit_leaves_nothing(mesh: Mesh, tmp_path: Path) -> None:
    """If the disk is full before the manifest, the files are removed; the old checkpoint loads."""
    save(mesh, tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "manifest.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_manifest", full)
        with pytest.raises(CheckpointError, match=r"rank 0 cannot commit: .*manifest\.json"):
            save(mesh, tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_loads(mesh, tmp_path, 1)


@distributed(Layout(tp=2))
def test_any_exception_in_a_writer_is_reported(mesh: Mesh, tmp_path: Path) -> None:
    """If one rank raised, the others would wait forever."""
    original = save_module.save_file

    def failing(tensors: Any, path: Path) -> None:
        if mesh.world.rank == 1:
            raise MemoryError("no memory")
        original(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "save_file", failing)
        pending = begin_save(tmp_path, 1, make_tensors(mesh, 1), STATE, mesh, background=True)
        with pytest.raises(
            CheckpointError, match=r"rank 1 cannot write in .*: MemoryError: no memory"
        ):
            commit_save(pending, mesh)


@distributed(ONE_RANK)
def test_leftovers_are_removed(mesh: Mesh, tmp_path: Path) -> None:
    """The next start removes what killed saves and deletions left, and no checkpoint."""
    directory = save(mesh, tmp_path, 1)
    shutil.copytree(directory, tmp_path / ".tmp-step_00000002")
    shutil.copytree(directory, tmp_path / ".del-step_00000000")
    sweep_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def plant_foreign_entries(folder: Path) -> list[Path]:
    """Create entries named like checkpoints: a file, links, and a directory with user data."""
    elsewhere = folder.parent / f"{folder.name}_elsewhere"
    (elsewhere / "step_00000003").mkdir(parents=True)
    (elsewhere / "step_00000003" / "precious").write_text("")
    (folder / "step_00000001").write_text("a file")
    (folder / "step_00000002").symlink_to(elsewhere / "nothing")
    (folder / "step_00000003").symlink_to(elsewhere / "step_00000003")
    (folder / "step_00000004").mkdir()
    (folder / "step_00000004" / "notes").write_text("")
    (folder / ".del-step_00000005").write_text("a file")
    (folder / ".tmp-step_00000005").symlink_to(elsewhere)
    return [*sorted(folder.iterdir()), elsewhere / "step_00000003" / "precious"]


@distributed(ONE_RANK, Layout(tp=2))
def test_foreign_entries_are_left_alone(mesh: Mesh, tmp_path: Path) -> None:
    """Saves, pruning and sweeps neither change nor count them; a start logs a warning."""
    folder, warnings = tmp_path / "checkpoints", []
    if mesh.world.rank == 0:
        folder.mkdir()
        plant_foreign_entries(folder)
    barrier(mesh)
    planted = [*sorted(folder.iterdir()), tmp_path / "checkpoints_elsewhere/step_00000003/precious"]
    for step in (6, 7, 8):
        save(mesh, folder, step, keep=2)
    barrier(mesh)
    if mesh.world.rank == 0:
        sweep_leftovers(folder)
    barrier(mesh)
    assert all(os.path.lexists(path) for path in planted)
    kept = sorted(path for path in folder.iterdir() if path not in planted)
    assert [path.name for path in kept] == ["step_00000007", "step_00000008"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module.logger, "warning", lambda *record: warnings.append(record))
        assert_loads(mesh, folder, 8)
    if mesh.world.rank == 0:
        text = "\n".join(message % tuple(values) for message, *values in warnings)
        assert "step_00000001 is not a directory" in text
        assert "step_00000002 is not a directory" in text


@distributed(ONE_RANK, Layout(tp=2))
def test_a_step_is_saved_even_if_its_name_is_taken(mesh: Mesh, tmp_path: Path) -> None:
    """An existing link is moved aside and not followed."""
    if mesh.world.rank == 0:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "step_00000002").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "step_00000003").symlink_to(tmp_path / "nowhere")
    barrier(mesh)
    for step in (2, 3):
        save(mesh, tmp_path, step)
        assert_loads(mesh, tmp_path, step)
    barrier(mesh)
    assert (tmp_path / "damaged_step_00000002_1").readlink() == tmp_path / "elsewhere"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@distributed(ONE_RANK)
def test_a_failed_cleanup_is_logged_with_its_reason(mesh: Mesh, tmp_path: Path) -> None:
    """OSErrors raised by Python have no strerror; their text is logged, not "None"."""
    save(mesh, tmp_path, 1)
    (tmp_path / ".del-step_00000000").mkdir()
    warnings: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Cannot call rmtree on a symbolic link")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module.shutil, "rmtree", fail)
        patch.setattr(save_module.logger, "warning", lambda text, *v: warnings.append(text % v))
        sweep_leftovers(tmp_path)
        save(mesh, tmp_path, 2, keep=1)
    assert len(warnings) == 2
    assert all(text.endswith(": Cannot call rmtree on a symbolic link") for text in warnings)
    assert_loads(mesh, tmp_path, 2)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_requested_step_is_never_replaced_by_another(mesh: Mesh, tmp_path: Path) -> None:
    """A damaged or missing one is an error."""
    for step in (1, 2):
        save(mesh, tmp_path, step)
    found = find_checkpoint(tmp_path, mesh, step=1)
    assert found is not None
    assert found.step == 1
    if mesh.world.rank == 0:
        (tmp_path / "step_00000001" / "rank_00000.safetensors").write_bytes(b"")
    barrier(mesh)
    with pytest.raises(CheckpointError, match=r"step_00000001 is damaged: rank_00000.* 0 bytes"):
        find_checkpoint(tmp_path, mesh, step=1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .* of steps 1, 2"):
        find_checkpoint(tmp_path, mesh, step=3)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_held_checkpoint_is_readable_after_it_is_deleted(mesh: Mesh, tmp_path: Path) -> None:
    """Every rank can read it, as shards and as full tensors."""
    save(mesh, tmp_path, 1)
    with held_checkpoint(tmp_path, mesh) as checkpoint:
        assert checkpoint is not None
        save(mesh, tmp_path, 2, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
        tensors, expected = make_tensors(mesh, 999), make_tensors(mesh, 1)
        full = full_tensors(expected, mesh)
        load_tensors(checkpoint, tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor.tensor, expected[name].tensor), name
            assert torch.equal(read_full_tensor(checkpoint, name), full[name]), name
        barrier(mesh)


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("moment", ["read_manifest", "verify_file"])
def test_a_checkpoint_that_vanishes_is_not_damaged(mesh: Mesh, tmp_path: Path, moment: str) -> None:
    """If a run saves and prunes during the search, the newest remaining checkpoint is found."""
    folder, stock = tmp_path / "checkpoints", tmp_path / "stock"
    save(mesh, folder, 1)
    for step in (2, 3, 4):
        save(mesh, stock, step)
    warnings: list[str] = []
    original = getattr(load_module, moment)

    def overtaken(directory: Any, *arguments: Any) -> Any:
        barrier(mesh)
        if mesh.world.rank == 0 and (new := sorted(stock.iterdir())):
            (old,) = folder.iterdir()
            new[0].rename(folder / new[0].name)
            shutil.rmtree(old)
        barrier(mesh)
        return original(directory, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, moment, overtaken)
        patch.setattr(load_module.logger, "warning", lambda *record: warnings.append(str(record)))
        checkpoint = find_checkpoint(folder, mesh)
    assert checkpoint is not None
    assert (checkpoint.step, warnings) == (4, [])


@distributed(ONE_RANK)
def test_a_requested_step_that_vanishes_is_an_error(mesh: Mesh, tmp_path: Path) -> None:
    """The error lists the steps that remain."""
    for step in (1, 2):
        save(mesh, tmp_path, step)

    def overtaken(directory: Path) -> None:
        shutil.rmtree(directory)
        raise CheckpointError("manifest.json is missing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "read_manifest", overtaken)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .* of steps 2"):
            find_checkpoint(tmp_path, mesh, step=1)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_checkpoint_that_one_host_never_sees_is_skipped(mesh: Mesh, tmp_path: Path) -> None:
    """The number of retries is limited."""
    for step in (1, 2):
        save(mesh, tmp_path, step)
    exists, last = Path.exists, mesh.world.size - 1

    def hidden(path: Path) -> bool:
        return exists(path) and path.name != "step_00000002"

    original = load_module.read_manifest

    def read(directory: Path) -> Any:
        if mesh.world.rank == last and directory.name == "step_00000002":
            raise CheckpointError("manifest.json is missing")
        return original(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "_RETRY_INTERVAL_S", 0.001)
        if mesh.world.rank == last:
            patch.setattr(Path, "exists", hidden)
        patch.setattr(load_module, "read_manifest", read)
        checkpoint = find_checkpoint(tmp_path, mesh)
    assert checkpoint is not None
    assert checkpoint.step == 1


@distributed(ONE_RANK, Layout(tp=2))
def test_only_the_needed_tensors_are_verified(mesh: Mesh, tmp_path: Path) -> None:
    """Damaged optimizer state fails training, not a program that reads only weights."""
    tensors = make_tensors(mesh, 1)
    weights = {f"parameters.{name}": tensor for name, tensor in tensors.items()}
    moments = {f"exp_avg.{name}": tensor for name, tensor in make_tensors(mesh, 2).items()}
    directory = save_checkpoint(tmp_path, 1, weights | moments, STATE, mesh, keep=0)
    path = directory / "rank_00000.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:header])
    positions = {
        "the header": [0, 20, header - 1],
        **{
            name: [header + entry["data_offsets"][0], header + entry["data_offsets"][1] - 1]
            for name, entry in entries.items()
            if name != "__metadata__"
        },
    }
    for part, offsets in positions.items():
        for offset in offsets:
            barrier(mesh)
            if mesh.world.rank == 0:
                damaged = bytearray(whole)
                damaged[offset] ^= 1
                path.write_bytes(damaged)
            barrier(mesh)
            with pytest.raises(CheckpointError, match="all 1 checkpoints"):
                find_checkpoint(tmp_path, mesh)
            if part.startswith("exp_avg."):
                with held_checkpoint(tmp_path, mesh, prefix="parameters.") as checkpoint:
                    assert checkpoint is not None
            else:
                with (
                    pytest.raises(CheckpointError, match=f"checksum in {part}"),
                    held_checkpoint(tmp_path, mesh, 1, prefix="parameters."),
                ):
                    pass


@distributed(ONE_RANK, Layout(tp=2))
def test_version_1_is_read(mesh: Mesh, tmp_path: Path) -> None:
    """It has one checksum per file and none per shard."""
    directory = save(mesh, tmp_path, 1)
    path = directory / "manifest.json"
    if mesh.world.rank == 0:
        content = json.loads(path.read_bytes())
        for name, file in content["files"].items():
            del file["header"]
            file["xxh3_128"] = xxhash.xxh3_128_hexdigest((directory / name).read_bytes())
        for entry in content["tensors"].values():
            for shard in entry["shards"]:
                del shard["checksum"]
        content["version"] = 1
        del content["checksum"]
        content["checksum"] = manifest_module._manifest_checksum(content)
        path.write_text(json.dumps(content))
    barrier(mesh)
    assert_loads(mesh, tmp_path, 1)
    barrier(mesh)
    if mesh.world.rank == 0:
        flip(directory / "rank_00000.safetensors")
    barrier(mesh)
    with pytest.raises(
        CheckpointError, match=r"rank_00000.safetensors does not match its checksum"
    ):
        find_checkpoint(tmp_path, mesh, step=1)


@distributed(ONE_RANK, Layout(tp=2))
def test_another_model_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    """Names and shapes must match the checkpoint's, so that no tensor keeps old values."""
    save(mesh, tmp_path, 1)
    checkpoint = find_checkpoint(tmp_path, mesh)
    assert checkpoint is not None
    tensors = make_tensors(mesh, 1)
    rows = tensors.pop("rows")
    with pytest.raises(CheckpointError, match=r"has unknown \['rows'\]"):
        load_tensors(checkpoint, tensors)
    with pytest.raises(CheckpointError, match=r"lacks \['new'\]"):
        load_tensors(checkpoint, {**tensors, "rows": rows, "new": rows})
    with pytest.raises(
        CheckpointError, match=r"rows is float32 \[13, 6\], the model has .* \[5, 11\]"
    ):
        load_tensors(checkpoint, {**tensors, "rows": tensors["columns"]})


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a manifest, and its checksum to match; None removes a key."""
    content = {**json.loads(path.read_bytes()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    del content["checksum"]
    content["checksum"] = manifest_module._manifest_checksum(content)
    path.write_text(json.dumps(content))


@distributed(ONE_RANK)
def test_another_format_is_refused_by_its_version(mesh: Mesh, tmp_path: Path) -> None:
    """A newer version may lack keys that this one needs; files it does not list are not read."""
    directory = save(mesh, tmp_path, 1)
    path = directory / "manifest.json"
    tensors = json.loads(path.read_bytes())["tensors"]
    rewrite(path, version=3, step=None, files=None)
    with pytest.raises(CheckpointError, match="has format version 3; this program reads 1 and 2"):
        manifest_module.read_manifest(directory)
    rewrite(path, version=2)
    with pytest.raises(CheckpointError, match="is not a manifest: KeyError"):
        manifest_module.read_manifest(directory)
    first = next(iter(tensors))
    tensors[first]["shards"][0]["file"] = "../other.safetensors"
    rewrite(path, step=1, files={"rank_00000.safetensors": {}}, tensors=tensors)
    with pytest.raises(CheckpointError, match="names files outside its directory"):
        manifest_module.read_manifest(directory)


@distributed(ONE_RANK, Layout(dp=2))
def test_a_save_writes_only_into_its_own_empty_directory(mesh: Mesh, tmp_path: Path) -> None:
    """Leftovers of a failed save are removed; a link is refused on all ranks, not followed."""
    leftover, elsewhere = tmp_path / ".tmp-step_00000001", tmp_path / "elsewhere"
    if mesh.world.rank == 0:
        leftover.mkdir()
        (leftover / "rank_00009.safetensors").write_bytes(b"old")
        elsewhere.mkdir()
        (tmp_path / ".tmp-step_00000002").symlink_to(elsewhere)
    barrier(mesh)
    directory = save(mesh, tmp_path, 1)
    assert not (directory / "rank_00009.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"cannot save step 2: cannot create .*step_00000002"):
        save(mesh, tmp_path, 2)
    assert list(elsewhere.iterdir()) == []
