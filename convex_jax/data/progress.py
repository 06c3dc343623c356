"""Progress bars of data commands: on stderr, gone when they are done."""

import functools

import rich.progress
from rich.console import Console

track = functools.partial(rich.progress.track, console=Console(stderr=True), transient=True)
