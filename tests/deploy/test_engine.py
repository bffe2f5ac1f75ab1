"""The engine's thread: who joins, waits, leaves and is told."""

import gc
import os
import threading
import time
from random import Random

import pytest
import torch
from tiny import tiny_config

from litgpt.deploy.engine import Engine, EngineFailed, EngineStopping, QueueFull, Ticket
from litgpt.errors import UserError
from litgpt.generate.batch import Answer
from litgpt.generate.decode import complete
from litgpt.generate.sampling import RowState
from litgpt.model import GPT


def tiny_model(model_type="llama", **changes):
    model = GPT(tiny_config(model_type, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Listener:
    """Collects what an engine tells."""

    def __init__(self):
        self.tokens, self.logprobs, self.finish, self.done = [], [], None, threading.Event()

    def __call__(self, update):
        assert self.finish is None, "nothing comes behind the end"
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        if update.finish is not None:
            self.finish = update.finish
            self.done.set()

    def wait(self):
        assert self.done.wait(30)
        return self.finish


@pytest.fixture
def make_engine():
    engines = []

    def make(model=None, **settings):
        engine = Engine(model or tiny_model(), **settings)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()
        assert not engine._thread.is_alive()


def ask(engine, prompt, n=5, timeout=None, **settings):
    listener = Listener()
    return listener, engine.submit(Answer(prompt, RowState(**dict(temperature=0.0) | settings), n), listener, timeout=timeout)


def endless(engine, prompt=(1, 2)):
    return ask(engine, list(prompt), n=100)


def slow(model, seconds=0.02):
    """Let every call of a model take a while."""
    return model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def test_many_threads_get_the_tokens_that_each_request_gives_alone(make_engine):
    model, random = tiny_model("gemma3_text"), Random(0)
    cases = [([random.randrange(96) for _ in range(random.randrange(1, 40))], random.randrange(1, 20), i) for i in range(60)]
    expected = [[t for new in complete(model, prompt, RowState(0.8, seed=seed), n) for t in new] for prompt, n, seed in cases]
    engine, found = make_engine(model, max_rows=4, max_queue=60, chunk=16), {}

    def client(first):
        for i in range(first, len(cases), 6):
            prompt, n, seed = cases[i]
            listener, _ = ask(engine, prompt, n, temperature=0.8, seed=seed)
            assert listener.wait() == "length"
            found[i] = listener.tokens

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(cases))] == expected
    assert engine.counters["finished_length"] == 60
    assert engine.counters["generated_tokens"] == sum(map(len, expected))
    assert (engine.n_running, engine.n_waiting) == (0, 0)


def test_the_queue_is_bounded_and_says_when_to_come_again(make_engine):
    model = tiny_model()
    waiting = slow(model)
    engine = make_engine(model, max_rows=1, max_queue=2)
    first, _ = endless(engine)
    while not engine.n_running:
        time.sleep(0.001)
    others = [endless(engine)[0] for _ in range(2)]
    with pytest.raises(QueueFull) as raised:
        endless(engine)
    assert raised.value.retry_after >= 1
    waiting.remove()
    assert {listener.wait() for listener in (first, *others)} == {"length"}


def test_without_a_queue_a_free_row_is_still_used(make_engine):
    engine = make_engine(max_rows=1, max_queue=0)
    assert ask(engine, [1])[0].wait() == "length"


def test_cancelled_requests_leave_before_the_next_step(make_engine):
    model = tiny_model()
    slow(model)
    engine = make_engine(model, max_rows=1)
    running, ticket = endless(engine)
    waiting, waiting_ticket = endless(engine)
    engine.cancel(waiting_ticket)
    assert waiting.wait() == "cancelled" and not waiting.tokens
    engine.cancel(ticket)
    assert running.wait() == "cancelled" and len(running.tokens) < 100
    engine.cancel(ticket)
    assert ask(engine, [1])[0].wait() == "length"


def test_a_deadline_ends_what_has_not_begun_and_nothing_else(make_engine):
    model = tiny_model()
    slow(model)
    engine = make_engine(model, max_rows=1, chunk=2)
    running, _ = ask(engine, [1, 2], n=50, timeout=0.3)
    waiting, _ = ask(engine, [1, 2], n=50, timeout=0.1)
    assert waiting.wait() == "timeout" and not waiting.tokens
    assert running.wait() == "length" and len(running.tokens) == 50
    reading, _ = ask(engine, [3] * 100, n=5, timeout=0.3)
    assert reading.wait() == "timeout" and not reading.tokens


def test_a_broken_model_ends_every_request_and_refuses_new_ones(make_engine):
    model = tiny_model()
    slow(model)
    engine = make_engine(model, max_rows=1)
    running, waiting = endless(engine)[0], endless(engine)[0]
    while not running.tokens:
        time.sleep(0.001)
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    assert (running.wait(), waiting.wait()) == ("error", "error")
    assert isinstance(engine.failure, ZeroDivisionError) and not engine.is_alive
    with pytest.raises(EngineFailed):
        endless(engine)
    with pytest.raises(EngineFailed):
        engine.call(int)


def test_a_request_whose_numbers_break_does_not_hurt_another(make_engine):
    model = tiny_model(tie_embeddings=False)
    with torch.no_grad():
        model.transformer.wte.weight[5] = float("nan")
    engine = make_engine(model, max_rows=2)
    broken, whole = ask(engine, [5, 1])[0], ask(engine, [4, 1])[0]
    assert (broken.wait(), whole.wait()) == ("error", "length")
    assert whole.tokens == [t for new in complete(model, [4, 1], RowState(0.0), 5) for t in new]
    assert engine.failure is None


def test_a_listener_that_raises_hurts_nobody(make_engine):
    engine = make_engine(max_rows=2)
    engine.submit(Answer([1], RowState(), 50), lambda update: 1 / 0)
    assert ask(engine, [1], 50)[0].wait() == "length"
    assert engine.failure is None


def test_functions_run_in_the_engines_thread_and_their_errors_are_their_callers(make_engine):
    engine = make_engine()
    assert engine.call(lambda: threading.current_thread().name).result(10) == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(10)
    assert ask(engine, [1])[0].wait() == "length"


def test_stopping_ends_what_runs(make_engine):
    model = tiny_model()
    slow(model)
    engine = make_engine(model, max_rows=1)
    listeners = [endless(engine)[0] for _ in range(2)]
    engine.stop()
    assert [listener.finish for listener in listeners] == ["cancelled", "cancelled"]
    with pytest.raises(EngineStopping):
        engine.call(int)


def test_a_call_that_nobody_waits_for_any_more_does_not_keep_others_from_hearing_of_the_end(make_engine):
    engine, begun, gate = make_engine(), threading.Event(), threading.Event()
    held = engine.call(lambda: begun.set() or gate.wait())
    assert begun.wait(10)
    given_up, waiting = engine.call(int), engine.call(int)
    assert given_up.cancel()
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine._state != "stopped":
        time.sleep(0.001)
    gate.set()
    assert held.result(10) and isinstance(waiting.exception(10), EngineStopping)
    stopping.join()


@pytest.mark.parametrize("part", ["join", "leave"])
def test_a_request_that_breaks_the_engine_as_it_joins_or_leaves_hears_of_it(make_engine, monkeypatch, part):
    model = tiny_model()
    slow(model)
    engine = make_engine(model, max_rows=2)
    first, ticket = endless(engine)
    while not first.tokens:
        time.sleep(0.001)
    monkeypatch.setattr(engine.batch, part, lambda answer: 1 / 0)
    listener = first if part == "leave" else endless(engine)[0]
    engine.cancel(ticket)
    assert listener.wait() == "error" and isinstance(engine.failure, ZeroDivisionError)


@pytest.mark.parametrize(
    "prompt, n, match",
    [([], 5, "no tokens"), ([1] * 128, 5, "context is 128 tokens"), ([96], 5, "knows 96"), ([-1], 5, "knows 96"), ([1], -1, "at least 1")],
)
def test_what_cannot_be_answered_is_refused_when_it_is_asked(make_engine, prompt, n, match):
    engine = make_engine()
    with pytest.raises(UserError, match=match):
        ask(engine, prompt, n)
    assert ask(engine, [1])[0].wait() == "length"


def test_an_answer_ends_where_a_row_is_full(make_engine):
    engine = make_engine(max_length=20)
    listener, _ = ask(engine, [1] * 15, 100)
    assert (listener.wait(), len(listener.tokens)) == ("length", 5)


def test_log_probabilities_come_with_their_tokens(make_engine):
    engine, listener = make_engine(), Listener()
    engine.submit(Answer([1, 2], RowState(0.0), 6, stop=[[95, 94]], n_logprobs=2), listener)
    listener.wait()
    assert [logprob.token for logprob in listener.logprobs] == listener.tokens


@pytest.mark.parametrize("settings", [dict(max_rows=0), dict(max_queue=-1), dict(max_length=1), dict(max_length=129)])
def test_wrong_sizes_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Engine(tiny_model(), **settings)


def alive(*kinds):
    gc.collect()
    return sum(isinstance(found, kinds) for found in gc.get_objects())


def churn(engine, n, random):
    """Submit so many requests, let some of them be cancelled at any moment or run out of time, and return how each ended."""
    listeners = []
    while len(listeners) < n:
        prompt = [random.randrange(8) for _ in range(random.randrange(1, 60))]
        timeout = random.choice([None, None, None, 0.0, 0.005, 0.05])
        try:
            listener, ticket = ask(engine, prompt, random.randrange(1, 40), timeout=timeout, temperature=random.choice([0.0, 1.0]))
        except QueueFull:
            time.sleep(0.002)
            continue
        listeners.append(listener)
        if random.random() < 0.5:
            threading.Timer(random.choice([0, 0.001, 0.02]), engine.cancel, [ticket]).start()
        if random.random() < 0.05:
            time.sleep(0.02)
    return [listener.wait() for listener in listeners]


def check_nothing_is_left(make_engine, n):
    model, random = tiny_model("gemma3_text"), Random(0)
    engine = make_engine(model, max_rows=4, max_queue=20, chunk=16, max_length=100)
    before = ask(engine, [5, 6, 7], 20)[0]
    before.wait()
    churn(engine, 30, random)
    wait_for_timers()
    n_tensors = alive(torch.Tensor)
    ends = churn(engine, n, random)
    assert {"length", "cancelled", "timeout"} <= set(ends) <= {"length", "stop", "cancelled", "timeout"}
    engine.call(int).result(10)  # behind the step that told of the last one
    assert (engine.n_running, engine.n_waiting, engine.batch.running, engine.batch.n_free) == (0, 0, [], 4)
    assert engine.failure is None and engine.is_alive
    for end in ("length", "cancelled", "timeout"):
        assert engine.counters[f"finished_{end}"] >= ends.count(end)
    assert sum(engine.counters[f"finished_{end}"] for end in ("stop", "length", "cancelled", "timeout", "error")) == n + 31
    assert engine.counters["requests"] == n + 31
    assert all(engine.batch.cache.lengths[place] == len(tokens) for place, (_, tokens) in engine.batch.kept.items())
    wait_for_timers()
    assert alive(Answer, Ticket) <= 4 and alive(torch.Tensor) <= n_tensors + 4
    again = ask(engine, [5, 6, 7], 20)[0]
    assert again.wait() == "length" and again.tokens == before.tokens


def wait_for_timers():
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_300_requests_many_of_them_cancelled_or_late_leave_nothing_behind(make_engine):
    check_nothing_is_left(make_engine, 300)


@pytest.mark.stress
def test_many_requests_many_of_them_cancelled_or_late_leave_nothing_behind(make_engine):
    check_nothing_is_left(make_engine, int(os.environ.get("LITGPT_CANCELS", "2000")))
