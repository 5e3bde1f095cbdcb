"""The verb `count`: how often tokens follow each other in a corpus, for dynamo."""

import time

from mtp_jax.cli.args import Parser
from mtp_jax.data.ngram_counts import count_corpus
from mtp_jax.errors import counted


def main(argv: list[str]) -> int:
    """Counts the train split of a prepared corpus into one file.

    Raises:
      UserError: a flag, the corpus, or an output that cannot be written.
    """
    parser = Parser(
        "mtp-jax count",
        "Counts tokens, pairs and triples of a prepared corpus, for the decoders "
        "dynamo and dynamo_exact.",
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="of prepare")
    parser.add_argument("--output", required=True, metavar="FILE", help="an .npz file")
    parser.add_argument(
        "--order",
        type=int,
        choices=(2, 3),
        default=3,
        help="longest runs that are counted; triples take most of the file (3)",
    )
    args = parser.parse_args(argv)
    began = time.monotonic()
    ngrams = count_corpus(args.input, args.output, order=args.order)
    names = ("pair", "triple")
    runs = zip(names, ngrams.levels, strict=False)
    sizes = ", ".join(counted(level.token_E.size, name) for name, level in runs)
    seconds = time.monotonic() - began
    tokens = counted(int(ngrams.count_V.sum()), "token")
    print(f"{tokens}: {sizes}; written to {args.output} in {seconds:.1f} s")
    return 0
