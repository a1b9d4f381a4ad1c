"""Write the man pages of all commands, from the same texts as `--help`: packaging/man.py FOLDER [DATE].

The pages are `relay.1` and one per command, such as `relay-events-list.1`.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

import relay
from relay.cli.main import EXIT_CODES, main

_SPECIAL = re.compile(r"^([.'])", re.MULTILINE)


def pages(date: str) -> Iterator[tuple[str, str]]:
    """Yield name and text (man(7)) of each page."""
    commands = list(_walk(main, ("relay",)))
    for path, command in commands:
        below = [name for name, _ in commands if len(name) > len(path) and name[: len(path)] == path]
        yield "-".join(path), "".join(_page(path, command, below, date))


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _walk(inner, (*path, name))


def _page(
    path: Sequence[str], command: click.Command, below: Sequence[Sequence[str]], date: str
) -> Iterator[str]:
    name, help_ = "-".join(path), command.help or ""
    context = click.Context(command, info_name=" ".join(path))
    first, _, rest = help_.replace("\b\n", "").partition("\n\n")
    summary = " ".join(first.split()).removesuffix(".")
    usage = " ".join(command.collect_usage_pieces(context))
    yield f'.TH "{name.upper()}" "1" "{date}" "hookferry {relay.__version__}" "hookferry manual"\n'
    yield ".nh\n.ad l\n"
    yield f".SH NAME\n{_text(name)} \\- {_text(summary[:1].lower() + summary[1:])}\n"
    yield f".SH SYNOPSIS\n.B {_text(' '.join(path))}\n{_text(usage)}\n"
    yield f".SH DESCRIPTION\n{_text(first)}\n"
    for paragraph in filter(None, rest.split("\n\n")):
        is_example = paragraph.lstrip().startswith("Example")
        yield f".PP\n.nf\n{_text(paragraph)}\n.fi\n" if is_example else f".PP\n{_text(paragraph)}\n"
    if records := [
        record for each in command.get_params(context) if (record := each.get_help_record(context))
    ]:
        yield ".SH OPTIONS\n"
        for option, text in filter(None, records):
            choices = _text(option).replace("|", "\\:|")  # lines of many choices may break there
            yield f".TP\n.B {choices}\n{_text(text)}\n"
    if below:
        yield ".SH COMMANDS\n"
        for inner in below:
            yield f".TP\n.BR {_text('-'.join(inner))} (1)\n"
    if len(path) == 1 or not below:
        yield ".SH EXIT STATUS\n"
        for code, meaning in EXIT_CODES.items():
            yield f".TP\n.B {code}\n{_text(meaning)}\n"
    related = ["relay"] if len(path) > 1 else []
    yield ".SH SEE ALSO\n"
    yield "".join(f".BR {each} (1),\n" for each in related)
    yield "the pages in /usr/share/doc/hookferry\n"


def _text(text: str) -> str:
    """Return text without anything that man(7) would interpret."""
    text = "\n".join(line.strip() for line in text.strip().splitlines())
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return _SPECIAL.sub(r"\\&\1", text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(sys.argv[2] if sys.argv[2:] else ""):
        (folder / f"{name}.1").write_text(text)
