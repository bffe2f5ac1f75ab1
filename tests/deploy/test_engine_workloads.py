"""Requests with and without adapters through one engine: each is what it is alone, and what the merged model says."""

import threading
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from deploy.test_adapters import KINDS as UPDATES
from deploy.test_adapters import write_peft
from generate.test_batch import check_memory
from oracle import pair
from tiny import tiny_config

from litgpt.checkpoint import load_model
from litgpt.deploy.adapters import Adapters
from litgpt.deploy.engine import Engine
from litgpt.errors import UserError
from litgpt.generate.batch import Answer
from litgpt.generate.sampling import RowState
from litgpt.model import GPT

MODELS = {  # what layers remember
    "full": ("llama", {}),
    "sliding": ("mistral", dict(sliding_window_size=7)),
    "latent": ("deepseek_v3", {}),
    "delta rule": ("qwen3_next", {}),
}
N_WORKLOADS = 10  # for each
CHOICES = [None, *UPDATES]


class Loaded(NamedTuple):
    """A model with all adapters loaded."""

    folder: Path
    adapters: Adapters
    merged: dict[str | None, GPT]  # the same by the other way


@pytest.fixture(scope="module", params=MODELS)
def loaded(request, tmp_path_factory):
    folder, (model_type, changes) = tmp_path_factory.mktemp("adapters"), MODELS[request.param]
    torch.manual_seed(0)
    model, theirs = pair(tiny_config(model_type, **changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(folder / "base")
    model.load_state_dict(load_model(folder / "base").state_dict())
    adapters = Adapters(model.eval(), folder / "base")
    merged = {None: load_model(folder / "base").eval()}
    for name, settings in UPDATES.items():
        write_peft(folder / "base", folder / name, **settings)
        adapters.load(name, folder / name)
        merged[name] = load_model(folder / "base", adapter=folder / name).eval()
    return Loaded(folder, adapters, merged)


class Request:
    """One request and what became of it."""

    def __init__(self, random, beginnings):
        self.prompt = random.choice(beginnings)[: random.randrange(1, 60)] + [random.randrange(96) for _ in range(random.randrange(4))]
        self.adapter = random.choice(CHOICES)
        self.row = dict(temperature=random.choice([0.0, 0.8]), top_k=random.choice([None, 5]), seed=random.randrange(1000))
        self.n = random.randrange(1, 14)
        self.stop = [[random.randrange(96)], [random.randrange(96), random.randrange(96)]]

    def submit(self, engine):
        self.tokens, self.finish, self.done = [], None, threading.Event()
        self.answer = Answer(self.prompt, RowState(**self.row), self.n, self.stop, n_logprobs=0)
        self.ticket = engine.submit(self.answer, self.hear, adapter=self.adapter)
        return self

    def hear(self, update):
        assert self.finish is None, "nothing comes behind the end"
        self.tokens += update.tokens
        self.finish = update.finish
        if self.finish is not None:
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self.tokens


def engine_of(loaded, **settings):
    engine = Engine(loaded.adapters.model, adapters=loaded.adapters, max_length=80, max_queue=100, **settings)
    step, batch = engine.batch.step, engine.batch

    def checked_step():
        check_memory(batch)
        for answer in batch.running:
            name = engine._running[answer].adapter
            assert answer.slot == (0 if name is None else loaded.adapters.slot(name))
        changed = step()
        check_memory(batch)
        return changed

    batch.step = checked_step
    engine.start()
    return engine


def check_idle(engine):
    """Whatever happened, all is as at the start."""
    end = time.monotonic() + 20
    while (engine.n_running or engine.n_waiting) and time.monotonic() < end:
        time.sleep(0.001)
    assert (engine.n_running, engine.n_waiting, engine.batch.running) == (0, 0, [])
    assert engine.failure is None and engine.is_alive
    assert engine.batch.n_free == engine.max_rows


@pytest.mark.parametrize("seed", range(N_WORKLOADS))
def test_requests_with_different_adapters_get_what_each_gets_alone_and_from_the_merged_model(loaded, seed):
    random = Random(seed)
    beginnings = [[random.randrange(96) for _ in range(60)] for _ in range(2)]
    requests = [Request(random, beginnings) for _ in range(9)]
    alone = engine_of(loaded, max_rows=1, chunk=80)
    expected = []
    for request in requests:
        alone.batch.forget()
        expected.append(request.submit(alone).wait())
        check_logprobs(request, loaded)
    check_idle(alone)
    alone.stop()
    together, cancelled = engine_of(loaded, max_rows=random.choice([2, 3, 6]), chunk=random.choice([3, 8, 20])), set()
    for request in requests:
        request.submit(together)
        if random.random() < 0.3:
            time.sleep(random.random() / 100)
        if random.random() < 0.1:
            together.cancel(request.ticket)
            cancelled.add(request)
    for request, tokens in zip(requests, expected, strict=True):
        found = request.wait()
        assert request.finish in ("stop", "length", "cancelled") and (request.finish != "cancelled" or request in cancelled)
        assert found == (tokens if request.finish != "cancelled" else tokens[: len(found)])
        check_logprobs(request, loaded)
    check_idle(together)
    together.stop()


@torch.no_grad()
def check_logprobs(request, loaded):
    """The tokens are as likely as the model says that has the adapter's update in its weights."""
    answer = request.answer
    if not answer.made:
        return
    logs = loaded.merged[request.adapter](torch.tensor([answer.prompt + answer.made]))[0].log_softmax(-1)
    logs = logs[len(answer.prompt) - 1 : -1].gather(1, torch.tensor(answer.made)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([found.logprob for found in answer.logprobs]), logs, rtol=0, atol=1e-3)


def test_adapters_differ_so_much_that_a_mistake_would_show(loaded):
    idx = torch.randint(96, (1, 20))
    with torch.no_grad():
        logs = [model(idx).log_softmax(-1) for model in loaded.merged.values()]
    assert all((logs[i] - logs[j]).abs().mean() > 0.02 for i in range(4) for j in range(i))


def test_an_adapter_that_requests_use_is_not_unloaded(loaded):
    engine = engine_of(loaded, max_rows=1)
    hook = loaded.adapters.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    try:
        random = Random(0)
        requests = [Request(random, [[1, 2, 3]]) for _ in range(3)]
        for request, adapter in zip(requests, ["some", "some", "all"], strict=True):
            request.adapter, request.n, request.stop = adapter, 15, []
            request.submit(engine)
        for name, n in (("some", 2), ("all", 1)):  # one runs, two wait
            with pytest.raises(UserError, match=rf"adapter '{name}' is in use \({n}\)"):
                engine.call(lambda name=name: engine.unload(name)).result(10)
        with pytest.raises(UserError, match="There is no adapter 'other'"):
            engine.call(lambda: engine.unload("other")).result(10)
        assert [len(request.wait()) for request in requests] == [15] * 3
        engine.call(lambda: engine.unload("some")).result(10)
        with pytest.raises(UserError, match="There is no adapter 'some'"):
            requests[0].submit(engine)
        pairs = loaded.adapters.read(loaded.folder / "some")
        engine.call(lambda: loaded.adapters.install("some", pairs)).result(10)
        tokens = requests[1].tokens
        assert requests[1].submit(engine).wait() == tokens
        check_idle(engine)
    finally:
        hook.remove()
        engine.stop()


def test_adapters_that_come_and_go_hurt_no_request_that_uses_another(loaded):
    engine, random = engine_of(loaded, max_rows=3, chunk=8), Random(3)
    pairs = loaded.adapters.read(loaded.folder / "others")
    beginnings = [[random.randrange(96) for _ in range(60)]]
    requests = [Request(random, beginnings) for _ in range(12)]
    expected = [request.submit(engine).wait() for request in requests]
    for request in requests:
        request.submit(engine)
    for i in range(10):
        engine.call(lambda i=i: loaded.adapters.install(f"more{i}", pairs)).result(10)
        engine.call(lambda i=i: engine.unload(f"more{i}")).result(10)
    assert [request.wait() for request in requests] == expected
    check_idle(engine)
    engine.stop()
