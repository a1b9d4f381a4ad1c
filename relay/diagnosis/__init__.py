"""`relay verify` and `relay explain`: why a source or a receiver refuses a request. Needs no daemon."""
