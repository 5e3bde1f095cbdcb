"""The compiled step: its memory, its buffers, its collectives and its size.

Compiled for CPU devices, from shapes alone; nothing runs.
"""

import dataclasses
import functools

import jax
import pytest
from models import mesh_of
from usual_cases import named

from mtp_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    HeadsConfig,
    ModelConfig,
)
from mtp_jax.parallel.sharding import abstract_tree
from mtp_jax.planning.aot import abstract_batch
from mtp_jax.planning.hlo import read_hlo
from mtp_jax.training.train_step import make_gradients, make_init, make_step

ROWS, T, D, V, CHUNK = 8, 64, 64, 8192, 64
MATRICES = 7  # of a layer
MESHES = {"fsdp": (1, 8, 1), "fsdp x tensor": (1, 4, 2), "all axes": (2, 2, 2)}


def config(n=4, layers=10, vocab=V, form="fused", chunk_tokens=CHUNK):
    return Config(
        model=ModelConfig(
            vocab_size=vocab,
            d_model=D,
            num_layers=layers,
            n_future_tokens=n,
            num_query_heads=4,
            num_kv_heads=2,
            d_head=D // 4,
            d_ff=2 * D,
        ),
        data=DataConfig(seq_len=T, batch_size=ROWS),
        compute=ComputeConfig(head_loss=form, chunk_tokens=chunk_tokens),
    )


@functools.cache
def compiled(cfg, shape=(1, 1, 1), make=make_gradients):
    """The step of a config, or its gradients alone."""
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        init = jax.eval_shape(make_init(cfg), jax.random.key(0))
        state = abstract_tree(init, mesh)
        batch = abstract_batch(cfg, mesh)
        if make is make_step:
            return make(cfg).lower(state, batch).compile()
        return jax.jit(make(cfg)).lower(state.params, batch).compile()


def program(cfg, shape=(1, 1, 1)):
    return read_hlo(compiled(cfg, shape).as_text())


def temporaries(cfg, make=make_gradients):
    return compiled(cfg, make=make).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("form", ["fused", "remat"])
def test_memory_does_not_depend_on_the_number_of_heads(form):
    two, eight = (temporaries(config(n, form=form), make_step) for n in (2, 8))

    assert eight <= 1.03 * two


def test_memory_of_all_logits_at_once_does():
    two, eight = (temporaries(config(n, form="naive")) for n in (2, 8))

    assert eight > 3 * two


def test_memory_does_not_depend_on_the_vocabulary():
    """But for the unembedding's own: its copy, and the gradients of a head and of all.

    They are three arrays of [V, D], however many heads and chunks there are. What the
    function gives, the gradients of the two tables among it, is no temporary.
    """
    chunk_logits = 2**20
    # The CPU compiler of later versions makes a copy of one of them.
    arrays = 3 if jax.__version_info__ < (0, 11) else 4
    small, large = (
        temporaries(config(vocab=vocab, chunk_tokens=chunk_logits // vocab))
        - arrays * vocab * D * 4
        for vocab in (2**13, 2**17)
    )

    assert large <= 1.10 * small


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("form", ["fused", "remat", "naive"])
def test_logits_of_at_most_one_chunk_are_ever_there(form, shape):
    _, fsdp, tensor = shape
    tokens, vocab = ROWS // fsdp * T, V // tensor

    largest = max(
        buffer.elements
        for buffer in program(config(form=form, chunk_tokens=24), shape).buffers
        if vocab in buffer.shape and D not in buffer.shape
    )

    if form == "naive":
        assert largest >= 4 * tokens * vocab
    else:
        # The smallest chunks of which no fewer would do: 22 of 24, or 6 of 22.
        chunk = -(-tokens // -(-tokens // 24))
        assert largest == chunk * vocab < tokens * vocab


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("n", [1, 4])
def test_collectives_are_those_that_the_mesh_calls_for(mesh, n):
    layers, (_, fsdp, tensor) = 10, MESHES[mesh]
    found = program(config(n, layers), MESHES[mesh]).collectives

    # Weights are gathered for the forward and for the backward pass of a layer; the
    # unembedding once for all heads, and the tokens once for the embeddings.
    assert found["all-gather"].count == MATRICES * 2 * layers + 2
    # The gradients of the copies are added up once a head.
    assert found["reduce-scatter"].count == n
    copies = n * V // tensor * D * 4
    assert found["reduce-scatter"].bytes == copies * (fsdp - 1) / fsdp
    # Embeddings change their layout, and their gradients change it back.
    assert found["all-to-all"].count == 2
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 2, 2, 2)], ids=str)
def test_a_sequence_axis_adds_the_keys_and_values_of_every_layer(shape):
    n, layers, (_, fsdp, tensor, sequence) = 4, 10, shape
    found = program(config(n, layers), shape).collectives

    # Beside those of the test above: a trunk layer gathers keys and values forward and,
    # as it computes again, backward, a head less; what head 1 says, for the acceptance.
    of_time = 4 * (layers - n) + 3 * n + 1
    assert found["all-gather"].count == MATRICES * 2 * layers + 2 + of_time
    # Their gradients go back to the positions that they are of.
    assert found["reduce-scatter"].count == n + 2 * layers
    copies = n * V // tensor * D * 4
    ways = fsdp * sequence
    keys = 2 * layers * (ROWS // fsdp) * T * (2 // tensor) * (D // 4) * 4
    assert found["reduce-scatter"].bytes == (
        copies * (ways - 1) / ways + keys * (sequence - 1) / sequence
    )
    assert found["all-to-all"].count == 2
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}


@pytest.mark.parametrize("mesh", MESHES)
def test_chunks_exchange_only_figures_of_tokens_over_the_vocabulary(mesh):
    n, (replica, fsdp, _) = 4, MESHES[mesh]
    tokens = ROWS // (replica * fsdp) * T
    one, four = (
        program(config(n, chunk_tokens=tokens // k), MESHES[mesh]).collectives
        for k in (1, 4)
    )

    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert one[kind] == four[kind], kind
    # Maximum, sums, and the lowest token of the maximum: three more for each chunk.
    assert four["all-reduce"].count - one["all-reduce"].count == n * 3 * 3
    assert four["all-reduce"].bytes == pytest.approx(one["all-reduce"].bytes)


def test_one_device_sends_nothing():
    assert program(config()).sent_bytes == 0


def test_the_program_grows_neither_with_depth_nor_with_heads():
    base, deep, headed = (
        program(config(n, layers)).instructions
        for n, layers in ((2, 10), (2, 40), (8, 10))
    )

    assert deep <= 1.01 * base
    assert headed <= 1.05 * base  # a shift of the targets for each head


KINDS = {
    "linear": {"kind": "linear", "markov_rank": 16},
    "residual": {"kind": "residual", "norm": "own"},
    "causal": {"kind": "causal", "layers": 2},
    "anticausal": {"kind": "anticausal"},
    "serial": {"kind": "serial"},
    "repeated": {"kind": "serial", "shared": True},
}


def with_kind(name, n, chunk_tokens=CHUNK, vocab=V):
    """A trunk of two layers, whatever the heads are."""
    cfg = config(n, vocab=vocab, chunk_tokens=chunk_tokens)
    heads = HeadsConfig(**KINDS[name])
    layers = 2 + heads.counted_layers(n)
    model = dataclasses.replace(cfg.model, num_layers=layers, heads=heads)
    return dataclasses.replace(cfg, model=model)


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_heads_of_any_kind_are_of_a_chunk(name):
    largest = max(
        buffer.elements
        for buffer in program(with_kind(name, 4, chunk_tokens=24)).buffers
        if V in buffer.shape and not {D, 16, D + 16} & set(buffer.shape)
    )

    chunk = -(-ROWS * T // -(-ROWS * T // 24))
    assert largest == chunk * V < ROWS * T * V


@pytest.mark.parametrize("name", named(KINDS, ["causal", "serial"]))
def test_memory_of_heads_of_any_kind_does_not_depend_on_their_number(name):
    """But for what a chain keeps: of each head what it reads, and a gradient."""
    two, eight = (temporaries(with_kind(name, n)) for n in (2, 8))
    of_a_head = 2 * ROWS * T * D * 4
    chained = HeadsConfig(**KINDS[name]).wiring.reads != "trunk"

    assert eight - (6 * of_a_head if chained else 0) <= 1.05 * two


@pytest.mark.parametrize("name", named(KINDS, ["linear", "anticausal", "repeated"]))
def test_memory_of_heads_of_any_kind_does_not_depend_on_the_vocabulary(name):
    """But for the tables' own, as where heads are parallel.

    Serial heads have a gradient of the embedding more. A bias is joined to the
    unembedding, which takes the joined table, and cutting its gradient in two.
    """
    chunk_logits = 2**20
    heads = HeadsConfig(**KINDS[name])
    arrays = 3 if jax.__version_info__ < (0, 11) else 4
    arrays += (heads.kind == "serial") + 2 * bool(heads.markov_rank)
    small, large = (
        temporaries(with_kind(name, 4, chunk_logits // vocab, vocab))
        - arrays * vocab * (D + heads.markov_rank) * 4
        for vocab in (2**13, 2**17)
    )

    assert large <= 1.10 * small
