"""What the tests of the outgoing client share."""

SHORT = 0.2  # seconds, for what only a timeout ends
AMPLE = 10.0  # seconds, for what must end by itself
GRACE = 0.2  # seconds that an attempt may last beyond its timeout


async def send(client, url, body=b"{}", **headers):
    return await client.send(url, {"content-type": "application/json", **headers}, body)
