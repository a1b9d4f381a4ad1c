"""`relay serve --demo`: every bundled source once, end to end; and the receiver of `relay listen`."""
