"""Memory and logits of the step where heads are taught more than hard targets."""

import dataclasses

import pytest
from test_step_program import CHUNK, ROWS, D, T, V, config, program, temporaries

from mtp_jax.config import LossConfig

ACTIVATION = ROWS * T * D * 4  # bytes of [B, T, D]
LOGITS = CHUNK * V * 4  # of a chunk
SLACK = 1.02  # figures of tokens, and of the program itself


def taught(**fields):
    return dataclasses.replace(config(), loss=LossConfig(**fields))


@pytest.mark.parametrize("kind", ["kl", "tv", "lk", "e2e"])
def test_soft_losses_take_an_activation_and_a_chunk_more(kind):
    hard, soft = temporaries(config()), temporaries(taught(kind=kind))

    assert soft <= SLACK * (hard + ACTIVATION + LOGITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_meter": True},
        {"balance": "encodec"},
        {"balance": "pcgrad"},
    ],
    ids=str,
)
def test_meter_and_balance_take_an_activation_more(fields):
    hard, measured = temporaries(config()), temporaries(taught(**fields))

    assert measured <= SLACK * (hard + ACTIVATION)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_logits_of_soft_losses_are_of_one_chunk_at_a_time(shape):
    _, fsdp, tensor = shape
    tokens, vocab = ROWS // fsdp * T, V // tensor
    cfg = dataclasses.replace(
        config(chunk_tokens=24), loss=LossConfig(kind="lk", mask="entropy")
    )

    largest = max(
        buffer.elements
        for buffer in program(cfg, shape).buffers
        if vocab in buffer.shape and D not in buffer.shape
    )

    assert largest == -(-tokens // -(-tokens // 24)) * vocab
