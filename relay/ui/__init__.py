"""The dashboard: pages of the admin listener, made from the answers of the API."""
