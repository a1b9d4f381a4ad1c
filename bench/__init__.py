"""Benchmarks: the cost of the relay, compared with bare aiohttp. `python -m bench` lists them."""
