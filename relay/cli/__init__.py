"""The `relay` command: one module per noun, imported when its command is asked for."""

import click

import relay
from relay.cli.main import Group

COMMANDS = {
    "check-config": ("relay.cli.config:check", "Tell every problem of config.toml at once."),
    "config": ("relay.cli.config:config_", "What the configuration comes to, and a first one."),
    "serve": ("relay.cli.serve:serve", "Run the daemon until SIGTERM or Ctrl-C."),
    "reload": ("relay.cli.reload:reload", "Have the running relay go by its changed config.toml."),
    "events": (
        "relay.cli.events:events",
        "What came in: looking at it, sending it once more, moving and deleting it.",
    ),
    "deliveries": ("relay.cli.deliveries:deliveries", "What is owed to destinations, and what became of it."),
    "destinations": (
        "relay.cli.destinations:destinations",
        "Who receives, what is owed, and stopping and going on.",
    ),
    "sources": ("relay.cli.sources:sources", "Who sends, and telling them to keep it for a while."),
    "workers": ("relay.cli.workers:workers", "Who sends heartbeats, and telling them something."),
    "stats": (
        "relay.cli.stats:stats",
        "Count what came in per hour, source and type, also of events that are gone.",
    ),
    "jobs": ("relay.cli.jobs:jobs", "What runs periodically, and running it now."),
    "status": ("relay.cli.status:status", "Show on one screen how the relay is."),
    "top": ("relay.cli.top:top", "Show on one screen how it goes, anew every second."),
    "tail": ("relay.cli.tail:tail", "Follow events and attempts as they happen."),
    "explain": (
        "relay.cli.explain:explain",
        "Say of every destination whether an event goes there.",
    ),
    "verify": (
        "relay.cli.verify:verify",
        "Tell why a request's token or signature does not match: which of secret, encoding, bytes, clock.",
    ),
    "send": ("relay.cli.send:send", "Send a sample event through the front door."),
    "listen": (
        "relay.cli.listen:listen",
        "Receive webhooks on this machine, verify their signatures and print them.",
    ),
    "doctor": ("relay.cli.doctor:doctor", "Look for everything that could be wrong, and say what to do."),
    "db": ("relay.cli.db:db", "The database: what it takes, copies of it, giving room back."),
    "completion": ("relay.cli.completion:completion", "Print what makes a shell complete this command."),
    "plugins": ("relay.cli.plugins:plugins", "What plugins are there, where they come from, and a new one."),
}
"""Every command: where it is, and its line in `relay --help`, which imports none of them."""


@click.group(cls=Group, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(relay.__version__, message="hookferry %(version)s")
def main() -> None:
    """Take webhooks in, store them, and deliver them until the end is known."""
