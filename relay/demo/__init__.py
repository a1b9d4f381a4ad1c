"""`relay serve --demo`: the way of an event, shown once from end to end."""
