"""The engine's extras for speed: compiled networks, traces, batches made ahead. What it computes: test_exactness.py."""

import functools
import json

import pytest
import torch

from kd_dist import engine, inference, objectives
from kd_dist.batches import Batch
from kd_dist.checkpoint import RunFolder
from kd_dist.errors import UserError
from kd_dist.models import Cnn5
from tests.test_exactness import K, make_trainer, random_data


def trained(runtime, folder, **how):
    """Three epochs of seven steps; gives the trainer."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Cnn5(K, channels=(4, 4, 8, 8, 8))
    trainer = make_trainer(runtime, folder, model, random_data(150, 24, 32), objectives.hard(K, 0.0), 3, **how)
    trainer.run()
    return trainer


@pytest.fixture
def quick_compiler(monkeypatch):
    """Everything of torch.compile but the generated code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_a_compiled_network_learns_the_same_and_its_cost_is_told_apart(one_process, tmp_path, quick_compiler, capsys):
    plain, compiled = trained(one_process, tmp_path / "a"), trained(one_process, tmp_path / "b", compile_model=True)
    assert "compiled in" in capsys.readouterr().out
    assert compiled.settling_seconds > 0 == plain.settling_seconds
    assert compiled.parallel is not compiled.model
    mine, theirs = plain.model.state_dict(), compiled.model.state_dict()
    assert mine.keys() == theirs.keys()  # a checkpoint does not tell them apart
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_is_said_in_a_sentence(one_process, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(UserError, match="leave --compile out") as caught:
        trained(one_process, tmp_path, compile_model=True)
    assert "\n" not in str(caught.value)


def test_a_trace_of_warm_steps_is_kept(one_process, tmp_path):
    trained(one_process, tmp_path, trace=True)
    trace = json.loads(RunFolder(tmp_path).trace.read_text())  # Chrome's format, which Perfetto opens
    names = [event.get("name", "") for event in trace["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert 1 <= len(steps) <= engine.TRACED_STEPS and "ProfilerStep#0" not in steps
    assert any(name.startswith("aten::") for name in names)
    assert RunFolder(tmp_path).trace in RunFolder(tmp_path).products()


def test_a_trace_that_cannot_be_written_costs_only_the_trace(one_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine.checkpoint, "write_trace", lambda folder, export: (_ for _ in ()).throw(OSError("full")))
    assert trained(one_process, tmp_path, trace=True).step == 21
    assert "no trace was written" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_ahead_keeps_its_order_and_its_errors(threads):
    assert list(inference.ahead(lambda item: item * 2, range(10), threads)) == list(range(0, 20, 2))
    with pytest.raises(ZeroDivisionError):
        list(inference.ahead(lambda item: 1 // item, [1, 2, 0, 3], threads))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_for_the_device(tmp_path):  # pragma: no cover
    """torch raises wherever the host would wait, in copies and .item() alike."""
    from kd_dist.runtime import Runtime

    runtime = Runtime(0, 1, 0, 1, torch.device("cuda", 0), None)
    trainer = make_trainer(
        runtime, tmp_path, Cnn5(K, channels=(4, 4, 8, 8, 8)), random_data(150, 24, 32), objectives.hard(K, 0.0)
    )
    batches: list[Batch] = list(trainer._prepared(trainer.data.epoch(0, runtime)))
    trainer.train_step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
