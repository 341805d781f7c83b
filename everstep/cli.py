"""The command line (interface; the body follows)."""


def main() -> None:
    raise NotImplementedError
