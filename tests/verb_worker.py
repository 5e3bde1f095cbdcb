"""`python -m mtp_jax` on a host with a folder of its own, and with faults.

python verb_worker.py FOLDER DEED VERB OPTIONS...
"""

import os
import sys

from mtp_jax.__main__ import program
from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.errors import UserError
from mtp_jax.interop.safetensors_file import SafetensorsFile


def main():
    folder, deed = sys.argv[1:3]
    del sys.argv[1:3]
    os.chdir(folder)
    read = SafetensorsFile.read
    sizes = []

    def counted(*of):
        found = read(*of)
        sizes.append(found.nbytes)
        return found

    def no_room(*of, **named):
        raise UserError("no room on this host.")

    def killed(*of, **named):
        os._exit(9)

    SafetensorsFile.read = counted
    if deed == "no room":
        Checkpoints.save = no_room
    if deed == "killed":
        Checkpoints.save = killed
    code = program()
    print("bytes read:", sum(sizes), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
