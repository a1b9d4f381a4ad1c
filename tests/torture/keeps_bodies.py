"""A relay that keeps large bodies: batches in reference cycles, statements that bind any number of them."""

from relay.cli import main
from relay.store import transaction
from relay.store.batch import Batch

transaction.MOST_BYTES = 2**40
honest = Batch.__init__


def keeping(self, **given):
    honest(self, **given)
    self.me = self.add_generated


Batch.__init__ = keeping
main()
