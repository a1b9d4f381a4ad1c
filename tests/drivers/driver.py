"""Passes the cases on stdin to `verify` of docs/receiving.md; tests/helpers/snippets.py has the format."""

import base64
import json
import sys

from verify import verify

answers = {}
for name, (secrets, headers, body, now) in json.load(sys.stdin).items():
    try:
        answers[name] = [verify(secrets, headers, base64.b64decode(body), now), None]
    except Exception as error:  # noqa: BLE001 - a bad secret raises a different exception from a bad request
        answers[name] = [None, str(error)]
json.dump(answers, sys.stdout)
