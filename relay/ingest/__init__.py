"""The public listener: receives requests and stores their events."""
