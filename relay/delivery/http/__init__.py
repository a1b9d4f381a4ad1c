"""The HTTP client that deliveries use."""
