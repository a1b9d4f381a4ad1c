"""The process and its machine: systemd, sockets, locks, logs, health."""
