"""What the configuration makes of a request, and why it does not take it: judged without a running relay."""
