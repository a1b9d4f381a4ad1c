"""A relay that takes its own lack of descriptors for the receiver's failure: `relay`, broken on purpose."""

from relay.cli import main
from relay.delivery.http import http_client

http_client.LACK = frozenset()  # no error number is this machine's own

if __name__ == "__main__":
    main()
