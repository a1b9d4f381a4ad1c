"""What the relay's promises cost, measured against bare aiohttp: `python -m bench` lists it all."""
