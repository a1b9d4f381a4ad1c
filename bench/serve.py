"""The other processes of a benchmark: `python -m bench.serve receiver | handler PATH | proxy PATH TARGET`."""

import sys

from bench import bare
from bench.loop import run
from bench.receiver import receive

match sys.argv[1:]:
    case ["receiver"]:
        run(receive())
    case ["handler", path]:
        run(bare.serve(bare.handler(path)))
    case ["proxy", path, target]:
        run(bare.serve(bare.proxy(path, target)))
