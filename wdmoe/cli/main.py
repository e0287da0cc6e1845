"""`wdmoe-node`: one command, a file beside this one for each group of subcommands.

Subcommands import what is heavy (torch, transformers, onnxruntime, zmq) inside their bodies, so that help is
instant, and neither a device nor a base station with graphs needs torch.
"""

from __future__ import annotations

import sys

import click

from wdmoe.cli.base_station import bs
from wdmoe.cli.broadcast import broadcast
from wdmoe.cli.demo import demo
from wdmoe.cli.device import device
from wdmoe.cli.failures import EXIT_INTERRUPTED, explain
from wdmoe.cli.logs import configure_logging
from wdmoe.cli.models import export, split, trace, verify
from wdmoe.cli.place import place
from wdmoe.cli.simulate import simulate
from wdmoe.cli.status import status
from wdmoe.cli.tokens import token


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="wdmoe", prog_name="wdmoe-node")
@click.option("-v", "--verbose", count=True, help="Log more: -v events, -vv every detail.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
def cli(verbose: int, quiet: bool) -> None:
    """One Mixture-of-Experts language model across a wireless network.

    The base station computes attention and gate, the devices compute the experts. First steps:

    \b
      wdmoe-node demo                        # everything on this machine
      wdmoe-node token > token.txt           # what a device needs to join: a secret
      wdmoe-node bs default                  # a base station with the default model
      wdmoe-node device --join @token.txt    # on every device
      wdmoe-node status                      # the devices, and how fast they are

    Quantities carry their unit: 20MHz, 150ms, 2GiB, 20Mbit/s, -174dBm/Hz.

    Exit codes: 0 success, 1 a failure, which one line names, 2 wrong usage.
    """
    configure_logging(verbose=verbose, quiet=quiet)


for command in (broadcast, bs, demo, device, export, place, simulate, split, status, token, trace, verify):
    cli.add_command(command)


def main() -> None:
    """Entry point of the `wdmoe-node` command. A failure that can be named becomes one line; a bug keeps its
    traceback."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:  # click's word for Ctrl-C
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        click.echo(f"Error: {line}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
