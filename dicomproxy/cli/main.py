"""The command line: what is asked for, then the module that does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dicomproxy import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dicomproxy", description="A DICOM proxy that makes remote priors look local."
    )
    parser.add_argument("--version", action="version", version=f"dicomproxy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the proxy")
    _add_config(serve)

    check = commands.add_parser("check", help="check a configuration file")
    check.add_argument("file", type=Path, metavar="FILE")

    demo = commands.add_parser("demo", help="run the main job on an embedded region")
    demo.add_argument("--keep", action="store_true", help="leave it running for a real workstation")

    doctor = commands.add_parser("doctor", help="test every route of a configuration")
    _add_config(doctor)

    _add_coerce(commands.add_parser("coerce", help="show what becomes of a source's object"))

    cache = commands.add_parser("cache", help="look at the cache, evict, verify")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, words in (
        ("stats", "how full it is"),
        ("list", "the studies it holds"),
        ("verify", "compare every instance with its checksum"),
    ):
        _add_config(actions.add_parser(action, help=words))
    evict = actions.add_parser("evict", help="drop one study")
    evict.add_argument("study", metavar="STUDY", help="its Study Instance UID")
    _add_config(evict)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")


def _add_coerce(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--source", required=True, metavar="NAME", help="where the object is from")
    parser.add_argument("--destination", default="", metavar="AE", help="where it goes")
    parser.add_argument("--patient-id", metavar="ID", help="the local one; default: left as it is")
    for option, words in (
        ("--patient-name", "the local patient's, as a PN"),
        ("--birth-date", "likewise, YYYYMMDD"),
        ("--sex", "likewise, M, F or O"),
    ):
        parser.add_argument(option, metavar="TEXT", help=f"{words}; default: the object's")
    parser.add_argument("infile", type=Path, metavar="IN", help="a DICOM file of the source")
    parser.add_argument("outfile", type=Path, metavar="OUT", help="where the result is written")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = _parser().parse_args(argv)
    # Imported when needed: most commands want little of the package.
    if arguments.command == "check":
        from dicomproxy.cli import check

        return check.run(arguments.file)
    if arguments.command == "demo":
        from dicomproxy.cli import demo

        return demo.run(keep=arguments.keep)
    from dicomproxy.config import ConfigError, load

    try:
        settings = load(arguments.config)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
        return 2
    if arguments.command == "serve":
        from dicomproxy import app

        return app.serve(settings, arguments.config)
    if arguments.command == "doctor":
        from dicomproxy.cli import doctor

        return doctor.run(settings)
    if arguments.command == "coerce":
        from dicomproxy.cli import coerce

        return coerce.run(settings, arguments)
    from dicomproxy.cli import cache
    from dicomproxy.wiring import cache_settings

    return cache.run(
        arguments.action, cache_settings(settings), study=getattr(arguments, "study", None)
    )


def console() -> None:
    """Entry point of the ``dicomproxy`` command."""
    sys.exit(main())
