"""The plug-in as vLLM meets it: registration, its arguments, what is refused late."""

import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from mtp_vllm import Refused, arguments
from mtp_vllm.__main__ import serve_command
from mtp_vllm.folder import ARCHITECTURE, PROPOSER
from mtp_vllm.plugin import register
from test_vllm_arguments import CONFIG, folder_of

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOURCE = pathlib.Path(__file__).parent.parent / "src"
LLAMA = CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture
def registry(monkeypatch):
    """Names of models that were registered, in a registry that begins empty."""
    import vllm

    names = []
    fake = SimpleNamespace(
        get_supported_archs=lambda: set(names),
        register_model=lambda name, where: names.append(name),
    )
    monkeypatch.setattr(vllm, "ModelRegistry", fake)
    return names


def test_registering_twice_registers_once(registry, caplog):
    register()
    register()

    assert registry == [ARCHITECTURE]
    assert not caplog.records


def test_another_version_is_told_of_and_nothing_is_registered(
    registry, caplog, monkeypatch
):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")

    register()

    assert registry == []
    [record] = caplog.records
    assert "needs vLLM >=0.32,<0.33, and this is 0.33.0" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_command_line_is_understood_as_the_arguments_are(tmp_path):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    folder = folder_of(tmp_path, LLAMA)
    words = shlex.split(serve_command(str(folder), 2))[3:]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    parsed = EngineArgs.from_cli_args(parser.parse_args(words))

    given = EngineArgs(**arguments(folder, 2))
    for name in arguments(folder, 2):
        assert getattr(parsed, name) == getattr(given, name), name


def config_of(
    method="custom_class", proposer=PROPOSER, processes=1, quant=None, full=0
):
    """An engine's config, of what the model asks it for."""
    spec = SimpleNamespace(method=method, model=proposer, num_speculative_tokens=2)
    mode = SimpleNamespace(has_full_cudagraphs=lambda: bool(full))
    return SimpleNamespace(
        speculative_config=spec if method else None,
        parallel_config=SimpleNamespace(world_size=processes),
        quant_config=quant,
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
    )


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"method": None}, "needs the speculative_config"),
        ({"method": "ngram", "proposer": "ngram"}, "needs the speculative_config"),
        ({"proposer": "other.Proposer"}, "needs the speculative_config"),
        ({"processes": 2}, "tensor_parallel_size"),
        ({"quant": "fp8"}, "without quantization"),
        ({"full": 1}, "PIECEWISE"),
    ],
)
def test_engines_that_cannot_draft_are_refused_in_one_line(settings, says):
    from mtp_vllm.model import drafts_of

    assert drafts_of(config_of()) == 2
    with pytest.raises(Refused) as refusal:
        drafts_of(config_of(**settings))

    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_proposer_needs_a_model_with_heads():
    import torch
    from mtp_vllm.proposer import HeadsProposer

    model_config = SimpleNamespace(max_model_len=64)
    proposer = HeadsProposer(SimpleNamespace(model_config=model_config))

    with pytest.raises(Refused, match="Linear keeps no states of heads"):
        proposer.load_model(torch.nn.Linear(1, 1))


def test_an_engine_says_why_it_does_not_start(tmp_path):
    folder = folder_of(tmp_path, LLAMA)
    overrides = arguments(folder)["hf_overrides"]
    program = (
        "from vllm import LLM\n"
        f"LLM({str(folder)!r}, hf_overrides={overrides!r}, skip_tokenizer_init=True)"
    )
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SOURCE),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }

    ended = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True
    )

    assert ended.returncode != 0
    assert "Refused: a Llama with heads needs the speculative_config" in ended.stderr
