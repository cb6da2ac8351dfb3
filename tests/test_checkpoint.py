"""Interrupted runs go on to the same bits; damaged and foreign files are refused."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from specdens import (
    Checkpoint,
    FunctionOperator,
    RunState,
    VectorSpace,
    checkpoint_every,
    lanczos,
    load,
    slq,
)
from specdens.storage import write_npz
from tests.cases import CountingOperator, dense, diagonal, move, same_bits

ROOT = Path(__file__).parents[1]
OPTIONS = {"num_probes": 6, "num_steps": 8, "block_size": 2, "seed": 3}


class StopHereError(Exception):
    """Raised by a callback in mid-run."""


def interrupt(after):
    def callback(progress):
        if progress.done == after:
            raise StopHereError

    return callback


@pytest.fixture
def matrix():
    return dense(np.linspace(-1.0, 2.0, 30))


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("after", [3, 9, 13])
def test_resuming_gives_the_same_bits(matrix, tmp_path, reorthogonalize, vectors, after):
    path = tmp_path / "run.npz"
    options = OPTIONS | {"reorthogonalize": reorthogonalize}
    whole = slq(matrix, **options)
    saving = Checkpoint(path, vectors=vectors)
    with pytest.raises(StopHereError):
        slq(matrix, checkpoint=saving, callback=interrupt(after), **options)
    space = VectorSpace.like(matrix)
    counted = CountingOperator(FunctionOperator(lambda x: matrix @ x, space, blocks=True))
    reports = []
    again = slq(counted, resume=path, callback=lambda p: reports.append(p.done), **options)
    assert same_bits(whole, again)
    done = after if vectors else after // 8 * 8
    assert len(counted.shapes) == 3 * 8 - done  # nothing that was kept is computed again
    assert sorted(set(reports)) == list(range(done + 1, 25))  # and it is not forgotten


def test_a_state_in_memory_resumes_too(matrix):
    states = []
    whole = slq(matrix, callback=lambda progress: states.append(progress.state), **OPTIONS)
    assert isinstance(states[11], RunState)
    assert same_bits(whole, slq(matrix, resume=states[11], **OPTIONS))
    with pytest.raises(ValueError, match="seed=3"):
        slq(matrix, resume=states[11], **OPTIONS | {"seed": 4})


def test_settings_that_are_left_out_are_taken_from_the_file(matrix, tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(StopHereError):
        slq(matrix, num_steps=8, checkpoint=path, callback=interrupt(9))
    again = slq(matrix, num_steps=8, resume=path)
    assert same_bits(again, slq(matrix, num_steps=8, block_size=2))  # a fifth of ten probes


@pytest.mark.parametrize(
    "change", [{"num_steps": 9}, {"seed": 4}, {"block_size": 3}, {"reorthogonalize": False}]
)
def test_runs_of_other_settings_are_refused(matrix, tmp_path, change):
    path = tmp_path / "run.npz"
    slq(matrix, checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match=next(iter(change))):
        slq(matrix, resume=path, **OPTIONS | change)


def test_operators_of_another_size_are_refused(matrix, tmp_path):
    path = tmp_path / "run.npz"
    slq(matrix, checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="dimension=30"):
        slq(np.eye(12), resume=path, **OPTIONS)


def test_more_probes_extend_a_finished_run(matrix, tmp_path):
    path = tmp_path / "run.npz"
    slq(matrix, checkpoint=path, **OPTIONS)
    longer = OPTIONS | {"num_probes": 10}
    assert same_bits(slq(matrix, resume=path, **longer), slq(matrix, **longer))
    with pytest.raises(ValueError, match="num_probes=4"):
        slq(matrix, resume=path, **OPTIONS | {"num_probes": 4})


def test_a_missing_file_is_a_fresh_start_only_where_it_is_also_written(matrix, tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(FileNotFoundError):
        slq(matrix, resume=path, **OPTIONS)
    first = slq(matrix, resume=path, checkpoint=path, **OPTIONS)
    assert same_bits(first, slq(matrix, resume=path, checkpoint=path, **OPTIONS))


@pytest.mark.parametrize("keep", [0, 10, 1000, -30])
def test_a_truncated_checkpoint_says_so(matrix, tmp_path, keep):
    path = tmp_path / "run.npz"
    slq(matrix, checkpoint=path, **OPTIONS)
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match="truncated"):
        slq(matrix, resume=path, **OPTIONS)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(200)])
def test_garbage_is_refused(matrix, tmp_path, content):
    path = tmp_path / "run.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or truncated, or not a specdens checkpoint"):
        slq(matrix, resume=path, **OPTIONS)


def test_arrays_of_another_program_are_refused(matrix, tmp_path):
    path = tmp_path / "run.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(ValueError, match="not a specdens checkpoint"):
        slq(matrix, resume=path, **OPTIONS)
    np.save(tmp_path / "run.npy", np.ones(3))
    with pytest.raises(ValueError, match="not a specdens checkpoint"):
        slq(matrix, resume=tmp_path / "run.npy", **OPTIONS)


def test_pickles_are_never_read(tmp_path):
    path = tmp_path / "measure.npz"
    np.savez(path, header=np.array([{"kind": "measure"}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load(path)


def test_altered_bytes_are_noticed_or_harmless(tmp_path):
    path = tmp_path / "measure.npz"
    measure = slq(diagonal(np.linspace(0, 1, 50)), num_probes=2, num_steps=6)
    measure.save(path)
    content = path.read_bytes()
    damaged = 0
    for place in range(0, len(content), 101):
        altered = bytearray(content)
        altered[place] ^= 0xFF
        path.write_bytes(altered)
        try:
            assert same_bits(load(path), measure)  # metadata of the archive that nobody reads
        except ValueError:
            damaged += 1
    assert damaged > 20


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_an_interrupt_inside_a_product_leaves_a_valid_file(tmp_path, vectors, reorthogonalize):
    path = tmp_path / "run.npz"
    values = np.linspace(0, 1, 40)[:, None]
    calls = []

    def multiply(x):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return values * x

    operator = FunctionOperator(multiply, VectorSpace.like(values), blocks=True)
    options = OPTIONS | {"reorthogonalize": reorthogonalize}
    with pytest.raises(KeyboardInterrupt):
        slq(operator, checkpoint=Checkpoint(path, vectors=vectors), **options)
    assert same_bits(slq(operator, resume=path, **options), slq(operator, **options))


def test_runs_resume_on_every_library(library, tmp_path):
    matrix = move(dense(np.linspace(-1.0, 2.0, 30)), library)
    path = tmp_path / "run.npz"
    for reorthogonalize in (True, False):
        options = OPTIONS | {"reorthogonalize": reorthogonalize}
        with pytest.raises(StopHereError):
            slq(
                matrix,
                checkpoint=Checkpoint(path, vectors=True),
                callback=interrupt(11),
                **options,
            )
        assert same_bits(slq(matrix, resume=path, **options), slq(matrix, **options))


def test_files_of_another_kind_or_of_the_future_are_refused(matrix, tmp_path):
    path = tmp_path / "file.npz"
    slq(matrix, **OPTIONS).save(path)
    with pytest.raises(ValueError, match="holds a specdens measure, expected a checkpoint"):
        slq(matrix, resume=path, **OPTIONS)
    write_npz(path, "measure", {"format_version": 99}, {})
    with pytest.raises(ValueError, match="format 99"):
        load(path)


def test_a_run_without_vectors_is_kilobytes(tmp_path):
    path = tmp_path / "run.npz"
    slq(diagonal(np.linspace(0, 1, 50_000)), num_steps=20, num_probes=5, checkpoint=path)
    assert path.stat().st_size < 100_000


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.npz"
    write_npz(path, "measure", {"format_version": 1}, {})
    before = path.read_bytes()

    class Unwritable:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(path, "measure", {"format_version": 1}, {"x": Unwritable()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file.npz"]


def test_a_missing_folder_is_named(matrix, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        slq(matrix, checkpoint=tmp_path / "nowhere" / "run.npz", **OPTIONS)


def test_checkpoint_every_keeps_vectors_and_counts_products(matrix, tmp_path):
    assert checkpoint_every("x.npz", 5) == Checkpoint("x.npz", vectors=True, every=5)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint("x.npz", every=0)
    path = tmp_path / "run.npz"
    whole = lanczos(matrix, num_steps=12)
    with pytest.raises(StopHereError):
        lanczos(matrix, num_steps=12, checkpoint=path, callback=interrupt(7))
    assert same_bits(whole, lanczos(matrix, num_steps=12, resume=path))


@pytest.mark.parametrize("vectors", [True, False])
def test_a_killed_process_resumes_to_the_same_bits(tmp_path, vectors):
    path = tmp_path / "run.npz"
    script = textwrap.dedent(f"""
        import time
        import numpy as np
        from specdens import Checkpoint, FunctionOperator, VectorSpace, slq
        values = np.linspace(0.0, 1.0, 500)
        def multiply(x):
            time.sleep(0.02)
            return values[:, None] * x
        operator = FunctionOperator(multiply, VectorSpace.like(values), blocks=True)
        slq(operator, num_probes=4, num_steps=30, block_size=2,
            checkpoint=Checkpoint({str(path)!r}, vectors={vectors}))
    """)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not _has_a_rule(path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "the run was over before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    operator = diagonal(np.linspace(0.0, 1.0, 500))
    options = {"num_probes": 4, "num_steps": 30, "block_size": 2}
    assert same_bits(slq(operator, **options), slq(operator, resume=path, **options))


def _has_a_rule(path):
    if not path.exists():
        return False
    with np.load(path) as file:
        return any(name.startswith("rule0") for name in file.files)
