"""The admin API: health, metrics and JSON endpoints, on a loopback listener and a unix socket."""
