"""Answers of many prompts at a time: with every family, whatever the batch, each is what transformers says."""

import random

import pytest
import torch
from oracle import pair
from speaking import make_tokenizer
from tiny import EVERY_FAMILY, tiny_config

from litgpt.generate.answers import Options, new_reply, write
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

N_NEW = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(folder)


def prompts():
    draw = random.Random(1)
    shared = [draw.randrange(3, 90) for _ in range(40)]  # long enough to be copied from row to row
    return [*([draw.randrange(3, 90) for _ in range(n)] for n in (1, 17, 60)), [*shared, 5, 6], [*shared, 7], shared[:35]]


def answers(model, tokenizer, asked, rows, seeds=range(9), **options):
    replies = [new_reply(model, tokenizer, ids, Options(N_NEW, seed=seed, **options)) for seed, ids in zip(seeds, asked, strict=False)]
    for _ in write(model, replies, rows, max(reply.length for reply in replies)):
        pass
    return [reply.answer.made for reply in replies]


@EVERY_FAMILY
def test_greedy_answers_of_a_batch_are_those_of_transformers_one_by_one(family, tokenizer):
    ours, theirs = pair(tiny_config(family))
    expected = []
    for ids in prompts():
        for _ in range(N_NEW):
            with torch.no_grad():
                ids = [*ids, theirs(torch.tensor([ids])).logits[0, -1].argmax().item()]
        expected.append(ids[-N_NEW:])
    for rows in (2, 6):
        assert answers(ours.eval(), tokenizer, prompts(), rows, temperature=0.0) == expected


@EVERY_FAMILY
def test_drawn_answers_do_not_depend_on_order_and_batch(family, tokenizer):
    torch.manual_seed(0)
    model = GPT(tiny_config(family)).eval()
    options = dict(temperature=1.5, top_p=0.95, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.1)
    alone = [answers(model, tokenizer, [ids], 1, [seed], **options)[0] for seed, ids in enumerate(prompts())]
    for rows in (2, 3, 8):
        order = random.Random(rows).sample(range(len(alone)), len(alone))
        found = answers(model, tokenizer, [prompts()[i] for i in order], rows, order, **options)
        assert found == [alone[i] for i in order]


def test_replies_are_begun_only_when_a_row_is_free(tokenizer):
    model, begun = GPT(tiny_config("llama")).eval(), []

    def replies():
        for seed, ids in enumerate(prompts()):
            begun.append(seed)
            yield new_reply(model, tokenizer, ids, Options(N_NEW, seed=seed))

    n_done = 0
    for step in write(model, replies(), 2, 80):
        assert len(begun) - n_done <= 2
        n_done += step.reply.answer.finish is not None
    assert begun == list(range(len(prompts()))) and n_done == len(begun)
