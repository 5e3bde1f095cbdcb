"""Decoders, one file a strategy: they turn the heads' predictions into text.

Each is a `state.Decoder`; `DECODERS` has them by name.
"""

from mtp_jax.decode.decoders.beam import Beam
from mtp_jax.decode.decoders.blockwise import Blockwise
from mtp_jax.decode.decoders.dynamo import Dynamo
from mtp_jax.decode.decoders.dynamo_exact import DynamoExact
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.speculative import Speculative
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.decoders.tree import Tree
from mtp_jax.decode.decoders.typical import Typical

DECODERS: dict[str, type[Decoder]] = {
    "plain": Plain,
    "blockwise": Blockwise,
    "speculative": Speculative,
    "tree": Tree,
    "typical": Typical,
    "dynamo": Dynamo,
    "dynamo_exact": DynamoExact,
    "beam": Beam,
}
