"""`relay ui`."""

import os
import webbrowser
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import click

from relay.base.text import printable
from relay.cli.api_client import Daemon
from relay.cli.endpoint import daemon_options
from relay.cli.main import OneOf
from relay.cli.options import json_option
from relay.cli.output import count, print_json

PAGE = "relay-ui.html"


@click.command()
@click.option(
    "--scope", type=OneOf(("read", "operate", "admin")), help="Scope of the login.  [default: your own]"
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--end-logins", is_flag=True, help="Only end all logins of all browsers.")
@json_option
@daemon_options
def ui(daemon: Daemon, *, scope: str | None, no_browser: bool, end_logins: bool, as_json: bool) -> None:
    """Open the dashboard in a browser.

    Example: relay ui --scope read

    Prints an address that logs in one browser; it works once, within a minute. On another machine, forward
    the port first: ssh -L 8081:127.0.0.1:8081 HOST
    """
    if end_logins:
        answer = daemon.delete("logins")
        if as_json:
            print_json(answer)
        else:
            click.echo(f"ended {count(answer['ended'], 'login')}")
        return
    answer = daemon.post("logins", body={"scope": scope} if scope else {})
    if as_json:
        print_json(answer)
        return
    url = answer["url"]
    if daemon.url is not None:  # the address by which this machine reaches the daemon
        url = f"{daemon.url}/ui/#code={answer['code']}"
    click.echo(printable(url))
    opened = not no_browser and _has_screen() and _open(url)
    click.echo(
        "opened in the browser" if opened else "open this address in a browser within a minute", err=True
    )
    if "SSH_CONNECTION" in os.environ and not opened:
        port = urlsplit(url).port
        click.echo(f"from your own machine, first run: ssh -L {port}:127.0.0.1:{port} HOST", err=True)


def _has_screen() -> bool:
    """Return whether this user has a graphical session; root's browser would be another user's."""
    return bool(os.environ.get("WAYLAND_DISPLAY") or os.environ.get("DISPLAY")) and os.geteuid() != 0


def _open(url: str) -> bool:
    """Open a browser; return False if it cannot be done safely.

    Other users see the arguments of a process, so the browser gets a private file that leads to the address.
    """
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        return False
    file = Path(folder) / PAGE
    target = escape(url)
    try:
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(f'<!doctype html><meta http-equiv="refresh" content="0;url={target}">')
            out.write(f'<a href="{target}">dashboard</a>\n')
    except OSError:
        return False
    return webbrowser.open(file.as_uri())
