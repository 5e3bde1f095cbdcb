"""Ways to turn what the heads say into text, by name.

Each is a module, or any object, with the four functions of `state.Decoder`.
"""

from mtp_jax.decoders import blockwise, plain
from mtp_jax.decoders.state import Decoder

DECODERS: dict[str, Decoder] = {"plain": plain, "blockwise": blockwise}
