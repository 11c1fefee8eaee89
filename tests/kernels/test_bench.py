"""`diffpost bench`: the model's arithmetic, that kernels and references agree, and what it says without a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from diffpost.cli import app
from diffpost.jobs import bench
from diffpost.kernels._model import H100, Cost, Device
from diffpost.kernels._workloads import workloads

ON_GPU = torch.cuda.is_available()


def test_the_model_is_bytes_operations_and_launches():
    device = Device("test", bandwidth=1e9, rate=1e10, overhead=1e-3)
    moved = Cost(bytes=2_000_000, flops=1000, launches=3)
    assert moved.limit(device) == pytest.approx(2e-3)
    assert moved.time(device) == pytest.approx(5e-3)
    assert moved.share(device) == pytest.approx(0.4)
    computed = Cost(bytes=1000, flops=50_000_000)
    assert computed.time(device) == pytest.approx(6e-3)
    assert H100.bandwidth == 3.35e12 and H100.overhead == 4e-6


@pytest.fixture(scope="module")
def rows():
    return workloads("cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("place", range(7 if not ON_GPU else 9))
def test_what_is_timed_is_the_same_thing(rows, place):
    """Without a GPU those of the lens' gradients are left to the checks: their references take seconds."""
    row = rows[place]
    assert row.cost.bytes > 0 and row.cost.flops > 0
    assert bench.difference(row.kernel(), row.reference()) < 1e-4


def test_the_difference_is_seen():
    a = (torch.tensor([1.0, 2.0]), torch.tensor([4.0]))
    b = (torch.tensor([1.0, 2.0]), torch.tensor([5.0]))
    assert bench.difference(a, a) == 0.0
    assert bench.difference(a, b) == pytest.approx(0.2)


def test_without_a_gpu_the_model_alone_is_printed(rows):
    result = CliRunner().invoke(app, ["bench", "--device", "cpu"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for row in rows:
        assert bench.model_cells(row)[0] in result.output
    assert "It was not measured." in result.output and "Nothing was measured" in result.output
    assert "eager" not in result.output


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
@pytest.mark.parametrize(("device", "match"), [("cuda", "no GPU"), ("tpu", "cpu")])
def test_a_device_that_is_not_there_is_an_error(device, match):
    result = CliRunner().invoke(app, ["bench", "--device", device])
    assert result.exit_code == 2
    assert match in result.output


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_on_a_gpu_times_are_measured_beside_the_model():
    pytest.importorskip("triton")
    result = CliRunner().invoke(app, ["bench", "--device", "cuda"], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    assert "Measured on" in result.output and "graph µs" in result.output
