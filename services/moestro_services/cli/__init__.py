"""The command line: `moestro`. `app` puts the commands together, every other module holds one of them."""

from moestro_services.cli.app import main

__all__ = ["main"]
