"""Options of decoders on the command line."""

import dataclasses
from typing import ClassVar

import pytest

from mtp_jax.cli import generate
from mtp_jax.cli.decoder_args import decoder_of
from mtp_jax.config import ModelConfig
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.fitting import fitting, options_of
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Odd:
    """A decoder of many options, for the command line alone."""

    lossy: ClassVar[bool] = False
    file: str
    width: int = 3
    share: float | None = None
    sizes: tuple[int, ...] = (1, 2)
    sure: bool = dataclasses.field(default=False, metadata={"help": "quite sure"})

    def __post_init__(self):
        if self.width < 1:
            raise UserError(f"width is {self.width}; it must be at least 1.")


def test_the_fields_of_a_decoder_are_options(monkeypatch, capsys):
    monkeypatch.setitem(DECODERS, "odd", Odd)
    options = ["--file=f", "--width=5", "--share=0.5", "--sizes=3,4,5", "--sure=True"]
    assert decoder_of("odd", options) == Odd("f", 5, 0.5, (3, 4, 5), True)
    assert decoder_of("odd:file=f,width=2") == Odd("f", 2)
    with pytest.raises(SystemExit):
        generate.main(["--decoders"])
    out = capsys.readouterr().out
    assert "--sure  quite sure (false)" in out and "speculative: " in out
    assert "required" in fitting(ModelConfig())["odd"]
    for option, message in [
        ("--width=0", "width is 0"),
        ("--width=x", "width"),
        ("--sure=perhaps", "neither true nor false; see mtp-jax generate --decoders"),
        ("--deep=3", r"unknown option --deep.*--file, --width"),
    ]:
        with pytest.raises(UserError, match=message):
            decoder_of("odd", ["--file=f", option])


def test_no_option_of_a_decoder_is_one_of_the_verb():
    own = {field.name for kind in DECODERS.values() for field in options_of(kind)}
    args, _ = generate._parse(["--workdir=run", "--prompt=a"])
    assert own and not own & set(vars(args))
