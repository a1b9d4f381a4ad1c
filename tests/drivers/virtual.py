"""The whole relay on a clock that stdin moves: `virtual.py CONFIG NOW`, then lines `to NOW` and `sweep`.

NOW is in microseconds. Every line is answered once it is done; the end of stdin ends the relay.
"""

import asyncio
import sys
from pathlib import Path

from relay.app import App
from relay.plugin_loading.loader import load


class Clock:
    """Both scales, which lines on stdin set."""

    def __init__(self, now):
        self.now = now

    def wall(self):
        return self.now

    steady = wall


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main(config, now):
    loop = asyncio.get_running_loop()
    clock = Clock(now)
    app = App(load(config), clock)
    life = loop.create_task(app.run(lambda addresses: say(addresses.public)))
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := (await lines.readline()).decode().split():
        match line:
            case ["to", moment]:
                clock.now = int(moment)
            case ["sweep"]:
                await app.watch.sweep()
        say("done")
    app.stopping.set()
    await life


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
