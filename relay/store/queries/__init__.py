"""Reads of the store: lists, selections and counts, page by page, each along an index."""
