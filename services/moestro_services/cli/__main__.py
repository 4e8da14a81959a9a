"""`python -m moestro_services.cli` is `moestro`."""

from moestro_services.cli.app import main

main()
