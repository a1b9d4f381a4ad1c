"""The admin side: health, metrics and the JSON API, on a loopback listener and a unix socket."""
