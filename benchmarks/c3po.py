"""What C3PO++ gains over synchronous rollouts, and over "stop at N samples, abort, resubmit".

    python benchmarks/c3po.py sim [--plots benchmarks/plots]
    python benchmarks/c3po.py engine
    python benchmarks/c3po.py server

    sim     the controller itself over drawn lengths, the engine a formula (c3po_sim.py)
    engine  the driver of `everstep rollout` and a tiny model, measured (c3po_engine.py)
    server  the same driver over HTTP: how full the server's steps are (c3po_server.py)

Markdown on standard output.
"""

import argparse

import c3po_engine
import c3po_server
import c3po_sim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    c3po_sim.add_command(commands)
    c3po_engine.add_command(commands)
    c3po_server.add_command(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
